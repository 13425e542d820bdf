"""A small convolutional backbone for small images, fast on a CPU."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sync_jax.models.backbone import FEATURES, WIDTH, Backbone
from sync_jax.models.convolution import Conv
from sync_jax.options import Option


class CNN(nn.Module):
    """Three convolutions and a dense layer, each with BatchNorm and ReLU.

    The first convolution halves the resolution: at full resolution, with one to three input
    channels, a CPU would spend most of the time there. 28 x 28 pixels become 14 x 14, 7 x 7, 3 x 3.
    """

    width: int = 32  # channels of the first convolution; then twice and four times as many
    features: int = 256  # size of the feature vector
    dtype: DTypeLike = jnp.float32  # of the arithmetic; parameters and statistics are float32

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Maps images `[batch, height, width, channels]` of 8 x 8 pixels or more to features."""

        def norm_relu(x: Array) -> Array:
            # 0.9 rather than 0.99: short runs end before a slower average has caught up.
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)
            return nn.relu(norm(x))

        conv = functools.partial(Conv, use_bias=False, dtype=self.dtype)
        x = norm_relu(conv(self.width, (5, 5), strides=(2, 2))(images))
        x = norm_relu(conv(2 * self.width, (3, 3))(x))
        x = max_pool_2x2(x)
        x = norm_relu(conv(4 * self.width, (3, 3))(x))
        x = max_pool_2x2(x)
        x = x.reshape(x.shape[0], -1)
        return norm_relu(nn.Dense(self.features, use_bias=False, dtype=self.dtype)(x))


def max_pool_2x2(x: Array) -> Array:
    """Takes the maximum over 2 x 2 windows; an odd last row or column is dropped.

    The gradient of flax's `max_pool` is some twenty times slower on a CPU. It differs only where
    the two largest of a window are equal: here they share it.
    """
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = x[:, :height, :width]
    rows = jnp.maximum(x[:, 0::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, 0::2], rows[:, :, 1::2])


BACKBONE = Backbone(
    build=lambda config: CNN(config.width, config.features, config.dtype),
    options={
        "width": Option(32, WIDTH, "channels of the first convolution"),
        "features": Option(256, FEATURES, "size of the feature vector"),
    },
)

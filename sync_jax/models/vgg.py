"""VGG16 with BatchNorm for small images, as selective classification uses it."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sync_jax.models.backbone import FEATURES, WIDTH, Backbone
from sync_jax.models.cnn import max_pool_2x2
from sync_jax.models.convolution import Conv
from sync_jax.options import Option

# Channels in units of the first convolution's, dropout after it; "pool" halves the resolution.
LAYERS = (
    *((1, 0.3), (1, 0.0), "pool"),
    *((2, 0.4), (2, 0.0), "pool"),
    *((4, 0.4), (4, 0.4), (4, 0.0), "pool"),
    *((8, 0.4), (8, 0.4), (8, 0.0), "pool"),
    *((8, 0.4), (8, 0.4), (8, 0.0), "pool"),
)


class VGG16(nn.Module):
    """Thirteen 3 x 3 convolutions, five poolings, a dense layer; then dropout before the heads.

    The form of Liu & Deng (2015), which Deep Gamblers, SelectiveNet and self-adaptive training are
    published with: ReLU, BatchNorm and dropout, in this order, follow each convolution and the
    dense layer. At 32 x 32 pixels one place is left; larger images are averaged over places.
    """

    width: int = 64  # channels of the first convolution
    features: int = 512  # size of the feature vector
    channel_dropout: bool = True  # whole channels drop, as in the PyTorch codes; Keras: elements
    norm_first: bool = False  # BatchNorm before ReLU, as in torchvision; for its weights
    conv_dropout: bool = True  # whether there is any between convolutions
    last_dropout: float = 0.5  # rate after the dense layer
    dtype: DTypeLike = jnp.float32  # of the arithmetic; parameters and statistics are float32

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Maps images `[batch, height, width, channels]` to features `[batch, features]`."""

        def norm_relu(x: Array, name: str) -> Array:
            norm = nn.BatchNorm(
                use_running_average=not train, momentum=0.9, dtype=self.dtype, name=name
            )
            return nn.relu(norm(x)) if self.norm_first else norm(nn.relu(x))

        x, convolutions = images, 0
        for layer in LAYERS:
            if isinstance(layer, str):
                x = max_pool_2x2(x) if min(x.shape[1:3]) > 1 else x
                continue
            channels, rate = layer
            x = Conv(
                channels * self.width,
                (3, 3),
                kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
                dtype=self.dtype,
                name=f"features_conv{convolutions}",
            )(x)
            x = norm_relu(x, f"features_norm{convolutions}")
            if rate and self.conv_dropout:
                shared = (1, 2) if self.channel_dropout else ()
                x = nn.Dropout(rate, broadcast_dims=shared, deterministic=not train)(x)
            convolutions += 1
        x = jnp.mean(x, axis=(1, 2))
        init = nn.initializers.normal(0.01)
        x = nn.Dense(self.features, kernel_init=init, dtype=self.dtype, name="dense")(x)
        x = norm_relu(x, "dense_norm")
        return nn.Dropout(self.last_dropout, deterministic=not train)(x)


BACKBONE = Backbone(
    build=lambda config: VGG16(
        *(config.width, config.features, config.channel_dropout, config.norm_first),
        dtype=config.dtype,
    ),
    options={
        "width": Option(64, WIDTH, "channels of the first convolution"),
        "features": Option(512, FEATURES, "size of the feature vector"),
        "channel_dropout": Option(True, "", "dropout of whole channels rather than elements"),
        "norm_first": Option(False, "", "BatchNorm before ReLU, as torchvision's weights want it"),
    },
    has_weights=True,
)

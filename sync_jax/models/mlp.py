"""A multilayer perceptron for feature vectors, such as another network's embeddings."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sync_jax.models.backbone import WIDTH, Backbone
from sync_jax.options import Option


class MLP(nn.Module):
    """Dense layers, each with BatchNorm and ReLU."""

    width: int = 256
    layers: int = 2
    dtype: DTypeLike = jnp.float32  # of the arithmetic; parameters and statistics are float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps `[batch, d]`, or images, which are flattened, to `[batch, width]`."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(self.layers):
            x = nn.Dense(self.width, use_bias=False, dtype=self.dtype)(x)
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)
            x = nn.relu(norm(x))
        return x


BACKBONE = Backbone(
    build=lambda config: MLP(config.width, config.layers, config.dtype),
    options={
        "width": Option(256, WIDTH, "units of each layer"),
        "layers": Option(2, "[1, 100]", "number of layers"),
    },
    images_only=False,
)

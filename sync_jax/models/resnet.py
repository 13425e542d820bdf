"""ResNet-18, -34 and -50 (He et al., 2016), as torchvision builds them."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sync_jax.models.backbone import WIDTH, Backbone
from sync_jax.models.convolution import Conv
from sync_jax.options import Option

# Name: blocks of each stage, and whether they are bottlenecks.
RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, and the mean over places.

    The stem 'imagenet', a 7 x 7 convolution and a pooling, leaves a quarter of the resolution;
    'cifar', a 3 x 3 convolution, leaves all of it.
    """

    stages: tuple[int, ...]  # blocks of each
    bottleneck: bool = False  # blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions, not of two 3 x 3 ones
    width: int = 64  # channels of the first stage
    stem: str = "cifar"
    dtype: DTypeLike = jnp.float32  # of the arithmetic; parameters and statistics are float32

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Maps images `[batch, height, width, channels]` to 8 x width features, or 32 x width."""

        def conv(channels: int, size: int, stride: int, name: str) -> nn.Module:
            return Conv(
                channels,
                (size, size),
                strides=(stride, stride),
                padding=size // 2,  # explicit: 'SAME' pads unevenly where there is a stride
                use_bias=False,
                kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
                dtype=self.dtype,
                name=name,
            )

        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = nn.relu(norm(name="bn1")(conv(self.width, size, stride, "conv1")(images)))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                x = Block(
                    channels=self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=self.bottleneck,
                    conv=conv,
                    norm=norm,
                    name=f"layer{stage + 1}_{block}",
                )(x)
        if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
            # jaxlib 0.12 fuses the mean with the sum of two convolutions below it, and then reads
            # uninitialised memory.
            x = jax.lax.optimization_barrier(x)
        return jnp.mean(x, axis=(1, 2))


class Block(nn.Module):
    """A residual block; the shortcut has a 1 x 1 convolution where the shape changes.

    `conv` makes a convolution of so many channels, size, stride and name, `norm` a BatchNorm.
    """

    channels: int
    stride: int
    bottleneck: bool
    conv: Callable[[int, int, int, str], nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, height, width, channels]` to the block's own number of channels."""
        layers = [(1, 3, self.stride), (1, 3, 1)]
        if self.bottleneck:
            layers = [(1, 1, 1), (1, 3, self.stride), (4, 1, 1)]
        y = x
        for i, (factor, size, stride) in enumerate(layers, 1):
            y = self.conv(factor * self.channels, size, stride, f"conv{i}")(y)
            y = self.norm(name=f"bn{i}")(y)
            if i < len(layers):
                y = nn.relu(y)
        if x.shape != y.shape:
            x = self.conv(y.shape[-1], 1, self.stride, "downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x)
        return nn.relu(x + y)


def _backbone(stages: tuple[int, ...], bottleneck: bool) -> Backbone:
    return Backbone(
        build=lambda config: ResNet(stages, bottleneck, config.width, config.stem, config.dtype),
        options={
            "width": Option(64, WIDTH, "channels of the first stage"),
            "stem": Option(
                "cifar", ("cifar", "imagenet"), "3 x 3 at full resolution, or 7 x 7 at a quarter"
            ),
        },
        has_weights=True,
    )


BACKBONES = {name: _backbone(*blocks) for name, blocks in RESNETS.items()}

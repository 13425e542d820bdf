"""Where training images are: in the devices' memory, on the disk, or decoded for each batch."""

import dataclasses

import psutil
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sync_jax.data.images import Layout
from sync_jax.data.info import DatasetInfo
from sync_jax.data.parts import calibration_size
from sync_jax.data.prepare import pictures
from sync_jax.errors import InputError

_SHARE = 0.5  # of the free memory that images may take: the rest is the network's
_COPY_SHARE = 0.05  # of it that each device may spend on a copy of its own, which saves an exchange


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where training images are.

    Attributes:
        where: "device": in the devices' memory; "disk": as squares there, read for each batch;
            "host": decoded there for each batch.
        sharded: a part of them on each device, rather than all.
        reason: what was chosen and why, in a line.
    """

    where: str = "device"
    sharded: bool = False
    reason: str = ""

    @property
    def on_device(self) -> bool:
        """Whether they are in the devices' memory."""
        return self.where == "device"

    @property
    def decoded(self) -> bool:
        """Whether the host decodes pictures for each batch; else they are squares by then."""
        return self.where == "host"


def choose(section: ConfigDict, info: DatasetInfo, mesh: Mesh) -> Placement:
    """What `data.placement` says; 'auto' takes the devices where they have room.

    Args:
        section: `data`.
        info: of the dataset.
        mesh: the devices.

    Raises:
        InputError: the devices are asked for and are too small.
    """
    count = info.num_train - calibration_size(section, info.num_train)
    height, width, channels = info.image_shape
    if section.name in pictures.NAMES:
        height = width = Layout.of(section).stored
    needed = count * height * width * channels
    free = free_memory(mesh)
    each = free / mesh.size
    devices = f"{mesh.size} device{'s' if mesh.size > 1 else ''}"
    sizes = (
        f"{_giga(needed)} of training images, {_giga(free)} free on {devices} "
        f"(data.placement={section.placement!r}"
    )
    sharded = mesh.size > 1 and needed > _COPY_SHARE * each
    how = "in device memory, sharded" if sharded else "in device memory"
    if section.placement == "host":
        return Placement("host", False, f"images on the host, decoded for each batch: {sizes})")
    if section.placement == "disk":
        return Placement("disk", False, f"images on the disk, read for each batch: {sizes})")
    if section.placement == "device":
        if needed > free:
            raise InputError(
                f"config.data.placement='device': {sizes}); use 'disk' or 'host', or a smaller "
                "config.data.stored_size"
            )
        return Placement("device", sharded, f"images {how}: {sizes})")
    if needed <= _SHARE * free:
        return Placement("device", sharded, f"images {how}: {sizes}, at most half)")
    return Placement(
        "host", False, f"images on the host, decoded for each batch: {sizes}, at most half)"
    )


def free_memory(mesh: Mesh) -> float:
    """Bytes free on all devices together; the host's of a CPU's, and of those that do not tell."""
    total = 0.0
    for device in mesh.local_devices:
        statistics = device.memory_stats() if device.platform != "cpu" else None
        if not statistics or "bytes_limit" not in statistics:
            return float(psutil.virtual_memory().available)
        total += statistics["bytes_limit"] - statistics["bytes_in_use"]
    # Those of other processes do not tell, and are taken to be as these.
    return total * mesh.size / len(mesh.local_devices)


def _giga(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"

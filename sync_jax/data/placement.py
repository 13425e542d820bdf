"""Places training images: in the devices' memory, on the disk, or on the host."""

import dataclasses
import os
import shutil

import psutil
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sync_jax.data.info import DatasetInfo
from sync_jax.data.splits import part_sizes
from sync_jax.errors import InputError

_SHARE = 0.5  # of the free memory that images may take: the rest is the network's
_COPY_SHARE = 0.05  # of it that each device may spend on a copy of its own, which saves an exchange


@dataclasses.dataclass(frozen=True)
class Placement:
    """The place of the training images."""

    where: str = "device"  # or "disk": squares, or "host": decoded there, or arrays in memory
    sharded: bool = False  # each device holds a part of them rather than all
    reason: str = ""  # the choice and its reason, in a line

    @property
    def on_device(self) -> bool:
        """True where they are in the devices' memory."""
        return self.where == "device"

    @property
    def decoded(self) -> bool:
        """True where the host decodes and crops pictures for each batch."""
        return self.where == "host"


def choose(section: ConfigDict, info: DatasetInfo, mesh: Mesh) -> Placement:
    """Places the training images as `data.placement` says.

    'auto' takes the devices where the images fit into half of their free memory, else the disk
    where the squares are there or fit, else the host.
    """
    needed = max(part_sizes(section, info)[0], 0) * info.bytes_per_example
    free = free_memory(mesh)
    devices = f"{mesh.size} device{'s' if mesh.size > 1 else ''}"
    sizes = (
        f"{_giga(needed)} of training images, {_giga(free)} free on {devices} "
        f"(data.placement={section.placement!r}"
    )
    where: str = section.placement
    if where == "device" and needed > free:
        smaller = "; use 'disk' or 'host', or a smaller config.data.stored_size"
        raise InputError(f"config.data.placement='device': {sizes}){smaller}")
    if where == "auto":
        sizes += ", at most half"
        where = "device" if needed <= _SHARE * free else "host"
        if where == "host" and info.squares_bytes is not None:
            room = _free_disk(section.data_dir)
            where = "disk" if info.squares_bytes <= room else "host"
            sizes += (
                f"; squares on the disk take {_giga(info.squares_bytes)} more, {_giga(room)} free"
            )
    sharded = where == "device" and mesh.size > 1 and needed > _COPY_SHARE * free / mesh.size
    how = {
        "device": f"in device memory{', sharded' if sharded else ''}",
        "disk": "on the disk, read for each batch",
        "host": "on the host, decoded for each batch",
    }[where]
    if where != "device" and info.squares_bytes is None:
        how = "in the host's memory, copied for each batch"
    return Placement(where, sharded, f"images {how}: {sizes})")


def free_memory(mesh: Mesh) -> float:
    """Free bytes of all devices together; the host's for CPUs and devices that do not tell."""
    total = 0.0
    for device in mesh.local_devices:
        statistics = device.memory_stats() if device.platform != "cpu" else None
        if not statistics or "bytes_limit" not in statistics:
            return float(psutil.virtual_memory().available)
        total += statistics["bytes_limit"] - statistics["bytes_in_use"]
    # Those of other processes do not tell, and are taken to be as these.
    return total * mesh.size / len(mesh.local_devices)


def _free_disk(folder: str) -> int:
    """Bytes free on the disk of a folder that need not be there yet; 0 where none may write."""
    path = os.path.abspath(os.path.expanduser(folder))
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free if os.access(path, os.W_OK) else 0


def _giga(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"

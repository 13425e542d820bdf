"""Encoded pictures in folders, tar and zip archives, and other files that authors publish.

Nothing is unpacked: each picture is read from its place in the archive, by any thread, and what an
archive says of paths, links and permissions is never followed.
"""

import dataclasses
import hashlib
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.io

from sync_jax.data.images import SUFFIXES
from sync_jax.errors import InputError

_ZIP_METHODS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
# A member begins with 30 bytes, the last four the lengths of what stands before its contents.
_ZIP_HEADER, _ZIP_LENGTHS = 30, 26
_LARGEST = 200_000_000  # bytes of a file that is read into memory; the largest has 155 million


class Picture(NamedTuple):
    """An encoded picture: `size` bytes of a file, or all of it (-1); label -1: not known yet."""

    name: str  # what a user knows it by
    label: int
    path: Path
    offset: int = 0
    size: int = -1
    inflated: int = -1  # bytes once decompressed, in a zip archive; -1: not compressed
    extra: tuple[str, ...] = ()  # of `Listing.columns`

    def read(self) -> bytes:
        """Its bytes; raises an OSError where the file ends before, or is damaged."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if self.size >= 0 and len(data) < self.size:
            raise OSError(f"{self.path} ends in the middle of it")
        if self.inflated < 0:
            return data
        try:
            # A picture that claims to be larger is cut off, and is then no picture.
            most = min(max(self.inflated, 1), _LARGEST)
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, most)
        except zlib.error as error:
            raise OSError(f"{self.path} is damaged: {error}") from error


@dataclasses.dataclass(frozen=True)
class Listing:
    """The pictures of each split, in the order in which they are to be kept."""

    class_names: tuple[str, ...]
    splits: Mapping[str, Sequence[Any]]  # "train", "test" and, where one is given, "calibration"
    note: str = ""  # see `DatasetInfo.note`
    columns: tuple[str, ...] = ()  # of a table beside the pictures: the names of `Picture.extra`

    def digest(self) -> str:
        """Digest of all names, labels, columns, places, sizes and times of change."""
        digest = hashlib.sha256(repr(self.columns).encode())
        times: dict[Path, tuple[int, int]] = {}
        for split, pictures in sorted(self.splits.items()):
            for name, label, path, offset, size, _, extra in pictures:
                if path not in times or size < 0:
                    status = os.stat(path)
                    times[path] = status.st_size, status.st_mtime_ns
                line = (split, name, label, offset, size, *times[path], *extra)
                digest.update("\0".join(map(str, line)).encode(errors="surrogateescape") + b"\n")
        return digest.hexdigest()

    def num_bytes(self) -> int:
        """Size of all pictures, encoded."""
        pictures = [picture for split in self.splits.values() for picture in split]
        return sum(p.size if p.size >= 0 else os.stat(p.path).st_size for p in pictures)


def is_picture(name: str) -> bool:
    """True for the suffixes of pictures; no hidden file is one."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in SUFFIXES


def tar_members(path: Path, *, offset: int = 0, size: int = -1) -> Iterator[Picture]:
    """Yields the files of a tar archive that is not compressed, without their contents.

    An archive in an archive begins at `offset` and has `size` bytes. Raises an InputError where a
    member is unsafe: a link, a device, or of a name that leads out of its folder.
    """
    end = offset + size if size >= 0 else os.stat(path).st_size
    try:
        with path.open("rb") as file:
            file.seek(offset)
            # tarfile counts from where the file object stands.
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    name = member.name
                    if name.startswith("/") or ".." in name.split("/"):
                        raise InputError(f"{path} is unsafe: it has a member named {name!r}")
                    if not (member.isfile() or member.isdir()):
                        raise InputError(f"{path} is unsafe: its member {name!r} is no plain file")
                    if member.isdir():
                        continue
                    if member.offset_data + member.size > end:
                        raise InputError(f"{path} is truncated: it ends in the middle of {name!r}")
                    yield Picture(name, -1, path, member.offset_data, member.size)
                    if offset and member.offset_data + member.size + 512 > end:
                        return  # the next header would be of the archive around this one
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a tar archive: {error}") from error


def zip_members(path: Path) -> Iterator[Picture]:
    """Yields the files of a zip archive, without their contents.

    Raises an InputError where one is encrypted, compressed in another way than by "deflate", or of
    a name that leads out of its folder.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for member in archive.infolist():
                name = member.filename
                if name.startswith("/") or ".." in name.split("/"):
                    raise InputError(f"{path} is unsafe: it has a member named {name!r}")
                if member.is_dir():
                    continue
                if member.flag_bits & 1 or member.compress_type not in _ZIP_METHODS:
                    raise InputError(f"{path}: {name!r} is encrypted, or compressed in a rare way")
                file.seek(member.header_offset + _ZIP_LENGTHS)
                lengths = struct.unpack("<HH", file.read(4))
                offset = member.header_offset + _ZIP_HEADER + sum(lengths)
                deflated = member.compress_type == zipfile.ZIP_DEFLATED
                inflated = member.file_size if deflated else -1
                yield Picture(name, -1, path, offset, member.compress_size, inflated)
    # zipfile knows not all versions, and a local header may be cut off.
    except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
        raise InputError(f"{path} cannot be read as a zip archive: {error}") from error


def named_members(archive: tarfile.TarFile, names: Container[str]) -> Iterator[tuple[str, bytes]]:
    """Yields the contents of plain files by the last part of their names; nothing else is read."""
    for member in archive:
        name = member.name.rpartition("/")[2]
        stream = archive.extractfile(member) if member.isfile() else None
        if stream is not None and name in names:
            if member.size > _LARGEST:
                raise tarfile.TarError(f"{name} has {member.size:,} bytes, too many")
            yield name, stream.read()


def read_mat(path: Path, *names: str) -> list[np.ndarray]:
    """Reads arrays of a .mat file, without their axes of length 1."""
    try:
        contents = scipy.io.loadmat(path, variable_names=names, squeeze_me=True)
        return [np.asarray(contents[name]) for name in names]
    except Exception as error:  # what a damaged file raises is anybody's guess
        raise InputError(f"{path} cannot be read as {' and '.join(names)}: {error}") from error

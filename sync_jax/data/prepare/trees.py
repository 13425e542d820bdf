"""The pictures below a folder, or in a zip or tar archive, by their paths; none is opened."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sync_jax.data.prepare import tables
from sync_jax.data.prepare.archives import Picture, is_picture, tar_members, zip_members
from sync_jax.errors import InputError

# What programs and file systems leave; hidden files and folders are left out too.
_LITTER = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "lost+found")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
ARCHIVES = {".zip": zip_members, ".tar": tar_members}
METADATA = tuple(f"metadata{suffix}" for suffix in tables.SUFFIXES)  # Hugging Face's name


@dataclasses.dataclass(frozen=True)
class Tree:
    """Pictures by their paths, which are relative to the root and separated as by this system."""

    pictures: Mapping[str, Picture]  # label -1
    inside: Mapping[str, Sequence[str]]  # the names of the folders in each folder; "": the root
    tables: Mapping[str, Picture]  # metadata.csv and the like, by their paths
    others: int  # files that are neither

    def below(self, name: str) -> "Tree":
        """The tree in a folder of the root."""
        start = name + os.sep

        def shorter(found: Mapping[str, Any]) -> dict[str, Any]:
            return {x.removeprefix(start): y for x, y in found.items() if x.startswith(start)}

        inside = shorter(self.inside) | {"": self.inside[name]}
        pictures, named = shorter(self.pictures), shorter(self.tables)
        lost = len(self.pictures) - len(pictures) + len(self.tables) - len(named)
        return Tree(pictures, inside, named, self.others + lost)


def read_tree(source: Path, where: str) -> Tree:
    """Reads the paths in a folder or an archive.

    Args:
        source: a folder, a .zip, or a .tar.
        where: names it in messages.

    Raises:
        InputError: it is none of these, or cannot be read.
    """
    if os.path.isdir(source):
        try:
            return _of_folder(source)
        except OSError as error:
            reason = f"{error.strerror} ({error.filename})"
            raise InputError(f"{where} cannot be read: {reason}") from error
    if not os.path.exists(source):
        raise InputError(f"{where} does not exist")
    suffix = source.suffix.lower()
    if suffix in _COMPRESSED:
        raise InputError(
            f"{where} is compressed as a whole, so that no picture in it can be read by itself; "
            "unpack it, or make it a .zip or .tar"
        )
    if suffix not in ARCHIVES:
        raise InputError(
            f"{where} is no folder of pictures, no archive ({', '.join(ARCHIVES)}) and no table "
            f"({', '.join(tables.SUFFIXES)})"
        )
    try:
        return _of_archive(ARCHIVES[suffix](source))
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}") from error


def _of_archive(members: Iterable[Picture]) -> Tree:
    pictures: dict[str, Picture] = {}
    inside: dict[str, dict[str, None]] = {"": {}}
    found: dict[str, Picture] = {}
    others = 0
    for member in members:
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        path = os.sep.join(parts)
        if any(part.startswith(".") or part in _LITTER for part in parts):
            others += 1
            continue
        for depth in range(1, len(parts)):
            parent, folder = os.sep.join(parts[: depth - 1]), os.sep.join(parts[:depth])
            inside[parent][parts[depth - 1]] = None
            inside.setdefault(folder, {})
        if is_picture(parts[-1]):
            pictures[path] = member._replace(name=path)
        elif parts[-1].lower() in METADATA:
            found[path] = member._replace(name=path)
        else:
            others += 1
    return Tree(pictures, {x: sorted(names) for x, names in inside.items()}, found, others)


def _of_folder(root: Path) -> Tree:
    """Links to split and class folders are followed."""
    pictures: dict[str, Picture] = {}
    inside: dict[str, list[str]] = {}
    found: dict[str, Picture] = {}
    others = 0
    for parent, names, files in os.walk(root, onerror=_stop, followlinks=True):
        here = os.path.relpath(parent, root).removeprefix(os.curdir)
        names.sort()
        inside[here] = []
        for name in names:
            path = os.path.join(parent, name)
            if name.startswith(".") or name in _LITTER:
                others += sum(len(files) for _, _, files in os.walk(path))
            elif not os.path.islink(path) or (
                here.count(os.sep) == 0 and not os.path.samefile(path, parent)
            ):
                inside[here].append(name)
        names[:] = inside[here]
        for name in files:
            path, relative = os.path.join(parent, name), os.path.join(here, name)
            if not os.path.isfile(path):  # a pipe, or a link to nothing
                others += 1
            elif is_picture(name):
                pictures[relative] = Picture(relative, -1, root / relative)
            elif name.lower() in METADATA:
                found[relative] = Picture(relative, -1, root / relative)
            else:
                others += 1
    return Tree(pictures, inside, found, others)


def _stop(error: OSError) -> NoReturn:
    raise error

"""Food-101: 101 dishes (Bossard, Guillaumin & Van Gool, 2014).

75,750 training pictures, whose labels are noisy, and 25,250 test pictures.
"""

import gzip
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from sync_jax.data.prepare.archives import Listing, Picture, tar_members
from sync_jax.data.prepare.pictures import PublishedPictures
from sync_jax.data.prepare.staging import Log, check_disk, exclusive, progress_bar
from sync_jax.errors import InputError
from sync_jax.runtime.files import write_atomically

_ARCHIVE, _TAR = "food-101.tar.gz", "food-101.tar"
_CHUNK = 1 << 22
_EXPANSION = 1.1  # JPEGs compress by less
_MOST = 5  # times its size that an archive may expand to


class Food101(PublishedPictures):
    """Food-101."""

    NUM_CLASSES, NUM_TRAIN, NUM_TEST = 101, 75_750, 25_250
    NEEDED = "food-101.tar.gz or food-101.tar, or the folder food-101/ with images/ and meta/"
    HOW = "the authors' address is http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz (5 GB)"

    def find(self, folder: Path, log: Log) -> Listing:
        """See `PublishedPictures.find`; in the order of the authors' lists.

        A compressed archive is decompressed as one file, for its pictures to have places.
        """
        for root in (folder / "food-101", folder):
            if (root / "images").is_dir() and (root / "meta").is_dir():
                return _listing(root, lambda name: Picture(name, -1, root / name))  # noqa: B023
        tar = folder / _TAR
        if not tar.is_file():
            if not (folder / _ARCHIVE).is_file():
                raise InputError(f"{folder} does not hold {self.NEEDED}")
            tar = self.scratch / _TAR
            with exclusive(self.root, self.key, log):
                if not tar.is_file():  # by an earlier process
                    _decompress(folder / _ARCHIVE, tar)
        members = {
            member.name.removeprefix("./").removeprefix("food-101/"): member
            for member in tar_members(tar)
        }

        def member(name: str) -> Picture:
            if name not in members:
                raise InputError(f"{tar} has no {name}")
            return members[name]

        return _listing(tar, member)


def _listing(where: Path, file: Callable[[str], Picture]) -> Listing:
    """Reads the lists; `file` gives a file by its name below food-101/."""

    def lines(name: str) -> list[str]:
        try:
            return file(name).read().decode().split()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name} of {where} cannot be read: {error}") from error

    names = lines("meta/classes.txt")
    label = {name: number for number, name in enumerate(names)}
    if not names or len(label) < len(names) or any("/" in x or x.startswith(".") for x in names):
        raise InputError(f"meta/classes.txt of {where} is no list of classes")
    splits: dict[str, list[Picture]] = {}
    for split in ("train", "test"):
        splits[split] = []
        for entry in lines(f"meta/{split}.txt"):
            name, _, rest = entry.partition("/")
            if name not in label or not rest or not rest.isalnum():
                raise InputError(f"meta/{split}.txt of {where} has the line {entry!r}")
            picture = file(f"images/{entry}.jpg")
            splits[split].append(picture._replace(name=f"{entry}.jpg", label=label[name]))
        if not splits[split]:
            raise InputError(f"meta/{split}.txt of {where} is empty")
    return Listing(tuple(names), splits)


def _decompress(archive: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    total = os.stat(archive).st_size
    check_disk(target.parent, int(_EXPANSION * total), f"to decompress {archive.name}")

    def write(out: IO[bytes]) -> None:
        with archive.open("rb") as compressed, progress_bar() as bar:
            task = bar.add_task(f"decompressing {archive.name}", total=total)
            with gzip.GzipFile(fileobj=compressed) as contents:
                while chunk := contents.read(_CHUNK):
                    out.write(chunk)
                    if out.tell() > _MOST * total + _CHUNK:
                        raise gzip.BadGzipFile("it expands to more than photographs do")
                    bar.update(task, completed=compressed.tell())

    try:
        write_atomically(target, write)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        shutil.rmtree(target.parent)
        raise InputError(f"{archive} is damaged or truncated: {error}") from error

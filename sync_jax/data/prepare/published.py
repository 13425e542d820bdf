"""Datasets published as archives with MD5 sums, in one form or several."""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from sync_jax.data.prepare.download import DataError, incomplete_prefix, read_url

_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """A file as its authors publish it.

    Attributes:
        name: on disk.
        md5: in hexadecimal.
        url: where it is.
    """

    name: str
    md5: str
    url: str


@dataclasses.dataclass(frozen=True)
class Archives:
    """What a dataset is published as; has what `catalogue` asks of an `Upstream`.

    Attributes:
        forms: each a set of files that holds the whole dataset; the first is what is fetched.
        prepared_bytes: disk that the prepared dataset takes, generously.
    """

    forms: tuple[tuple[PublishedFile, ...], ...]
    prepared_bytes: int

    @property
    def required(self) -> str:
        """What a folder must hold, in words."""
        return " or ".join(" and ".join(file.name for file in form) for form in self.forms)

    @property
    def fetched(self) -> str:
        """What is fetched, in words."""
        return ", ".join(file.name for file in self.forms[0])

    def verify(self, folder: Path) -> None:
        """Checks that a folder holds one form, as published.

        Raises:
            DataError: it does not; says what was found.
        """
        self.find(folder)

    def find(self, folder: Path) -> tuple[Path, ...]:
        """The files of the first form that a folder holds whole, verified.

        Raises:
            DataError: it holds none, or a file is not the published one.
        """
        if not os.path.isdir(folder):
            problem = "is not a folder" if os.path.exists(folder) else "does not exist"
            raise DataError(f"{folder} {problem}")
        for form in self.forms:
            paths = tuple(folder / file.name for file in form)
            if all(path.is_file() for path in paths):
                for path, file in zip(paths, form, strict=True):
                    _verify(path, file)
                return paths
        raise DataError(f"{folder} does not hold {self.required}")

    def obtain(self, *, cache: Path, log: Callable[[str], None]) -> Path:
        """Fetches the first form, once; see `sources.obtain`.

        Raises:
            DataError: it cannot be had.
            OSError: the cache cannot be written.
        """
        if cache.exists():
            try:
                self.verify(cache)
            except DataError as error:
                log(f"fetching again, for what was fetched before is unusable: {error}")
            else:
                log(f"using what was fetched before, {cache}")
                return cache
        cache.parent.mkdir(parents=True, exist_ok=True)
        prefix = incomplete_prefix(cache.name)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=cache.parent) as temporary:
            for file in self.forms[0]:
                log(f"fetching {file.url}")
                path = Path(temporary) / file.name
                with path.open("wb") as out:
                    # Bounded by what the prepared dataset takes: compression does not double it.
                    for chunk in read_url(file.url, limit=2 * self.prepared_bytes):
                        out.write(chunk)
                _verify(path, file)
            cache.mkdir(exist_ok=True)
            for file in self.forms[0]:
                (Path(temporary) / file.name).replace(cache / file.name)
        log(f"fetched, kept in {cache}")
        return cache


def _verify(path: Path, file: PublishedFile) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if digest.hexdigest() != file.md5:
        raise DataError(
            f"{path.name} is not the published file, or is damaged: its MD5 sum is "
            f"{digest.hexdigest()}, expected {file.md5}"
        )

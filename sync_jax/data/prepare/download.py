"""Published files: found or fetched, and verified before use.

Wherever the files of an `Upstream` come from, they count only if they hold exactly the published
bytes, so the source never changes a result.
"""

import dataclasses
import gzip
import hashlib
import http.client
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from sync_jax.data.prepare.archives import named_members
from sync_jax.data.prepare.staging import Log, check_folder, incomplete_prefix
from sync_jax.errors import InputError

_NETWORK_TIMEOUT = 10  # seconds without an answer; nobody without a network should wait longer
_CHUNK = 1 << 20

# Root's apt-get would hand its downloads to a user who cannot enter the caller's private folders.
# The system's hooks expect root, and an update whose hooks fail counts as failed.
_APT_CONFIG = """\
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "1";
Acquire::http::Timeout "15";
Acquire::https::Timeout "15";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """A file as its authors publish it.

    One with a size is named .gz, and may also lie there decompressed, under either name.
    """

    name: str
    digest: str  # in hexadecimal; MD5 of the file, or SHA-256 of its decompressed content
    url: str
    size: int | None = None  # bytes of the decompressed content; None: it is taken as it is

    def find(self, folder: Path) -> Path | None:
        """Its path in a folder; None where it is not there."""
        names = (self.name,) if self.size is None else (self.name, self.name.removesuffix(".gz"))
        return next((folder / name for name in names if os.path.isfile(folder / name)), None)

    def content(self, path: Path) -> Iterator[bytes]:
        """Yields the content, and raises an InputError where it is not the published one."""
        kind = "MD5" if self.size is None else "SHA-256"
        digest, size = hashlib.new(kind.replace("-", ""), usedforsecurity=False), 0
        try:
            with self._open(path) as stream:
                # Bounded, whatever a hostile file expands to.
                while (self.size is None or size <= self.size) and (chunk := stream.read(_CHUNK)):
                    digest.update(chunk)
                    size += len(chunk)
                    yield chunk
        except EOFError:
            raise InputError(f"{path} is truncated: its compressed data ends too early") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path} is damaged and cannot be decompressed ({error})") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
        if self.size is not None and size != self.size:
            found = "more" if size > self.size else f"{size}"
            raise InputError(f"{path} has {found} bytes once decompressed, expected {self.size}")
        if digest.hexdigest() != self.digest:
            raise InputError(
                f"{path} is not the published file, or is damaged: its {kind} sum is "
                f"{digest.hexdigest()}, expected {self.digest}"
            )

    def _open(self, path: Path) -> IO[bytes]:
        # By content and not by name: browsers decompress what they download and keep the name.
        if self.size is not None:
            with path.open("rb") as stream:
                if stream.read(2) == b"\x1f\x8b":
                    return gzip.open(path)  # type: ignore[return-value]
        return path.open("rb")


@dataclasses.dataclass(frozen=True)
class Upstream:
    """The files of a dataset, and where they may be had."""

    forms: tuple[tuple[PublishedFile, ...], ...]  # each holds all; the first is what is fetched
    prepared_bytes: int  # disk that the prepared dataset takes, generously
    debian_folder: Path | None = None  # in which a Debian package puts the first form
    debian_package: str = ""

    def find(self, folder: Path) -> tuple[Path, ...]:
        """The files of the first form that a folder holds whole, verified."""
        check_folder(folder)
        missing = []
        for form in self.forms:
            paths = [(file, file.find(folder)) for file in form]
            found = [path for file, path in paths if path is not None]
            if len(found) == len(form):
                for file, path in zip(form, found, strict=True):
                    for _ in file.content(path):
                        pass
                return tuple(found)
            missing.append(" and ".join(file.name for file, path in paths if path is None))
        raise InputError(f"{folder} does not hold {' or '.join(missing)}")

    def obtain(self, *, cache: Path, log: Log) -> Path:
        """Finds or fetches the files where the user names no folder; returns a verified folder.

        In order: Debian's folder, what was fetched before, the publisher's address, Debian's
        package. What is fetched is kept in `cache`. The InputError names every source's failure.
        """
        sources: list[tuple[str, Path | None, Callable[[Path], None] | None]] = [
            ("the Debian package's folder", self.debian_folder, None),
            ("what was fetched before", cache, None),
            ("the upstream address", cache, self._download),
        ]
        if self.debian_package:
            name = f"the Debian package {self.debian_package}"
            sources.append((name, cache, self._fetch_package))
        failures = ["your own folder: data.source names none"]
        for name, folder, fetch in sources:
            if folder is None:
                continue
            try:
                if fetch is None:
                    self.find(folder)
                else:
                    log(f"fetching from {name}")
                    self._fetch_into(cache, fetch)
            except InputError as error:
                failures.append(f"{name}: {error}")
                if fetch is not None:
                    log(f"failed: {error}")
            else:
                log(f"using {name}, {folder}")
                return folder
        raise InputError("; ".join(f"({i}) {failure}" for i, failure in enumerate(failures, 1)))

    def _fetch_into(self, cache: Path, fetch: Callable[[Path], None]) -> None:
        """Fetches beside the cache and moves there only what has been verified."""
        cache.parent.mkdir(parents=True, exist_ok=True)
        prefix = incomplete_prefix(cache.name)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=cache.parent) as temporary:
            folder = Path(temporary)
            try:
                fetch(folder)
                self.find(folder)
            except InputError as error:
                # The folder is about to vanish: its name would only puzzle the reader.
                message = str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "it")
                raise InputError(message) from None
            cache.mkdir(exist_ok=True)
            for file in self.forms[0]:
                (folder / file.name).replace(cache / file.name)

    def _download(self, folder: Path) -> None:
        for file in self.forms[0]:
            with (folder / file.name).open("wb") as out:
                # Compression does not double anything; a server that sends more has another file.
                for chunk in _read_url(file.url, limit=2 * self.prepared_bytes):
                    out.write(chunk)

    def _fetch_package(self, folder: Path) -> None:
        """Downloads a Debian package and unpacks the wanted files, all as an ordinary user."""
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            package = _apt_download(self.debian_package, Path(temporary))
            # The tar is read here and not unpacked by dpkg: nothing that it says about paths, links
            # or permissions is followed.
            contents = _run(["dpkg-deb", "--fsys-tarfile", str(package)], cwd=folder)
            wanted = {file.name for file in self.forms[0]}
            try:
                with tarfile.open(fileobj=io.BytesIO(contents), mode="r:") as archive:
                    for name, content in named_members(archive, wanted):
                        (folder / name).write_bytes(content)
            except tarfile.TarError as error:
                raise InputError(f"{package.name} cannot be unpacked: {error}") from None


def _read_url(url: str, *, limit: int) -> Iterator[bytes]:
    """Yields the content of an address up to a limit."""
    try:
        with urllib.request.urlopen(url, timeout=_NETWORK_TIMEOUT) as response:
            received = 0
            while received < limit and (chunk := response.read(_CHUNK)):
                received += len(chunk)
                yield chunk
    except urllib.error.HTTPError as error:
        with error:
            raise InputError(f"{url} answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # what a URLError wraps
        reason = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise InputError(f"{url} cannot be read: {reason}") from None


def _apt_download(package: str, folder: Path) -> Path:
    """Downloads a package into a folder with apt's own verification; returns the file."""
    if shutil.which("apt-get") is None:
        raise InputError("there is no apt-get on this machine")
    # With a cache and lists of our own nothing of the system's changes, and no root is needed.
    config = folder / "apt.conf"
    config.write_text(_APT_CONFIG)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    apt_get = ["apt-get", "-q", "-c", str(config), "-o", f"Dir::Cache={folder / 'cache'}"]
    try:
        _run([*apt_get, "download", package], cwd=folder)
    except InputError:
        # The system's lists are empty, as in a container image, or out of date: get our own.
        (folder / "lists" / "partial").mkdir(parents=True)
        apt_get += ["-o", f"Dir::State::lists={folder / 'lists'}"]
        update_failure = ""
        try:
            _run([*apt_get, "update"], cwd=folder)
        except InputError as error:
            # One unreachable repository among many fails an update that may still do.
            update_failure = f" (after apt-get update failed: {error})"
        try:
            _run([*apt_get, "download", package], cwd=folder)
        except InputError as error:
            raise InputError(f"{error}{update_failure}") from None
    return next(folder.glob("*.deb"))


def _run(command: list[str], *, cwd: Path) -> bytes:
    """Runs a program and returns its output; InputError with its first error line if it fails."""
    program = command[0]
    result = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if result.returncode:
        lines = result.stderr.decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith(("E: ", "dpkg-deb: error: "))]
        reason = next(iter(errors or lines[-1:]), f"exit status {result.returncode}")
        raise InputError(f"{program}: {reason.removeprefix('E: ')}")
    return result.stdout

"""Obtaining the files that a dataset is published as, and verifying them before use.

A dataset says in an `Upstream` what its files must be and where they may be had. Wherever they
come from, they count only if they hold exactly the published bytes, so the source never changes
a result.
"""

import dataclasses
import gzip
import hashlib
import http.client
import io
import math
import os
import shutil
import struct
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sync_jax.errors import InputError

_NETWORK_TIMEOUT = 10  # seconds without an answer; whoever has no network should not wait longer
_APT_TIMEOUT = 600  # seconds for one apt-get command, which has network timeouts of its own
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


class DataError(InputError):
    """A dataset that cannot be obtained, prepared or read."""


@dataclasses.dataclass(frozen=True)
class IdxFile:
    """A published file: an array of unsigned bytes in IDX format.

    Attributes:
        name: without the `.gz` that it may or may not have on disk.
        shape: of the array.
        sha256: of the decompressed file, in hexadecimal.
    """

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def header(self) -> bytes:
        """The magic number (two zeros, 8 for unsigned bytes, the rank), then the dimensions."""
        rank = len(self.shape)
        return struct.pack(f">HBB{rank}I", 0, 8, rank, *self.shape)

    @property
    def num_bytes(self) -> int:
        """The size of the decompressed file."""
        return len(self.header) + math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Upstream:
    """The files of a dataset and where they may be had.

    Attributes:
        files: all of them.
        debian_folder: where Debian's package puts them.
        url: the publisher's folder, ending in a slash; the files there have `.gz` names.
        debian_package: the package's name.
    """

    files: tuple[IdxFile, ...]
    debian_folder: Path
    url: str
    debian_package: str

    @property
    def required(self) -> str:
        """What a folder must hold, in words."""
        return ", ".join(file.name for file in self.files) + ", with or without .gz"

    @property
    def fetched(self) -> str:
        """What is fetched, in words."""
        return ", ".join(f"{file.name}.gz" for file in self.files)

    @property
    def prepared_bytes(self) -> int:
        """Disk that the prepared dataset takes; records have an overhead."""
        return 5 * sum(file.num_bytes for file in self.files) // 4

    def verify(self, folder: Path) -> None:
        """See `verify`."""
        verify(folder, self.files)

    def obtain(self, *, cache: Path, log: Callable[[str], None]) -> Path:
        """See `obtain`."""
        return obtain(self, cache=cache, log=log)


def read_idx(folder: Path, file: IdxFile) -> np.ndarray:
    """Reads a file that a folder holds, compressed or not, and verifies it.

    Args:
        folder: where the file is, as `file.name` or with `.gz`.
        file: what it must be.

    Returns:
        The array, `file.shape` uint8.

    Raises:
        DataError: it is missing, unreadable, damaged or not the published file.
    """
    paths = [folder / f"{file.name}.gz", folder / file.name]
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        raise DataError(f"{folder} holds neither {paths[0].name} nor {paths[1].name}")
    try:
        with path.open("rb") as stream:
            # By content and not by name: browsers decompress what they download and keep the name.
            is_gzip = stream.read(2) == b"\x1f\x8b"
            stream.seek(0)
            contents = gzip.GzipFile(fileobj=stream) if is_gzip else stream
            data = contents.read(file.num_bytes + 1)  # bounded, whatever a hostile file expands to
    except EOFError:
        raise DataError(f"{path} is truncated: its compressed data ends too early") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged and cannot be decompressed ({error})") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    _check_idx(path, data, file)
    return np.frombuffer(data, np.uint8, offset=len(file.header)).reshape(file.shape)


def _check_idx(path: Path, data: bytes, file: IdxFile) -> None:
    header = file.header
    if data[:4] != header[:4]:
        raise DataError(
            f"{path} is not the IDX file that it should be: it starts with 0x{data[:4].hex()}, "
            f"expected 0x{header[:4].hex()}"
        )
    if len(data) >= len(header) and data[: len(header)] != header:
        shape = struct.unpack_from(f">{len(file.shape)}I", data, 4)
        raise DataError(
            f"{path} holds an array of {_dimensions(shape)}, expected {_dimensions(file.shape)}"
        )
    if len(data) != file.num_bytes:
        size = "more" if len(data) > file.num_bytes else f"{len(data)}"
        raise DataError(f"{path} has {size} bytes once decompressed, expected {file.num_bytes}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise DataError(
            f"{path} is not the published file: SHA-256 of the decompressed bytes is {digest}, "
            f"expected {file.sha256}"
        )


def _dimensions(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def verify(folder: Path, files: tuple[IdxFile, ...]) -> None:
    """Checks that a folder holds every file, each as published.

    Args:
        folder: where the files are.
        files: what they must be.

    Raises:
        DataError: it does not; names the file, what was found and what was expected.
    """
    if not os.path.isdir(folder):
        problem = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise DataError(f"{folder} {problem}")
    for file in files:
        read_idx(folder, file)


def obtain(upstream: Upstream, *, cache: Path, log: Callable[[str], None]) -> Path:
    """Finds or fetches the files of a dataset for which the user names no folder.

    In order: Debian's folder, the publisher's address, Debian's package. What is fetched is kept in
    `cache` and used from there the next time.

    Args:
        upstream: the files and where they may be had.
        cache: a folder for what is fetched; made when needed, with those around it.
        log: told what is tried and which source is used.

    Returns:
        A folder whose files have been verified.

    Raises:
        DataError: nothing worked; names every source and what failed.
        OSError: the cache cannot be written.
    """
    failures = ["your own folder: data.source names none"]
    try:
        verify(upstream.debian_folder, upstream.files)
    except DataError as error:
        failures.append(f"the Debian package's folder: {error}")
    else:
        log(f"using the Debian package's folder, {upstream.debian_folder}")
        return upstream.debian_folder
    if cache.exists():
        try:
            verify(cache, upstream.files)
        except DataError as error:
            log(f"fetching again, for what was fetched before is unusable: {error}")
        else:
            log(f"using what was fetched before, {cache}")
            return cache
    for fetch, source in (
        (_download, "the upstream address"),
        (_fetch_package, f"the Debian package {upstream.debian_package}"),
    ):
        log(f"fetching from {source}")
        try:
            _fetch_into(cache, fetch, upstream)
        except DataError as error:
            failures.append(f"{source}: {error}")
            log(f"failed: {error}")
        else:
            log(f"fetched from {source}, kept in {cache}")
            return cache
    raise DataError("; ".join(f"({i}) {failure}" for i, failure in enumerate(failures, 1)))


def incomplete_prefix(name: str) -> str:
    """How the names of a dataset's temporary folders begin; a killed process leaves its own."""
    return f"incomplete-{name}-"


def _fetch_into(cache: Path, fetch: Callable[[Upstream, Path], None], upstream: Upstream) -> None:
    """Fetches beside the cache and moves there only what has been verified."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    prefix = incomplete_prefix(cache.name)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=cache.parent) as temporary:
        folder = Path(temporary)
        try:
            fetch(upstream, folder)
            verify(folder, upstream.files)
        except DataError as error:
            # The folder is about to vanish: its name would only puzzle the reader.
            message = str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "it")
            raise DataError(message) from None
        cache.mkdir(exist_ok=True)
        for file in upstream.files:
            (cache / file.name).unlink(missing_ok=True)  # a bad one would hide behind the new one
            (folder / f"{file.name}.gz").replace(cache / f"{file.name}.gz")


def _download(upstream: Upstream, folder: Path) -> None:
    for file in upstream.files:
        name = f"{file.name}.gz"
        with (folder / name).open("wb") as out:
            # Compression may add a little; a server that sends much more has something else.
            for chunk in read_url(upstream.url + name, limit=2 * file.num_bytes + _CHUNK):
                out.write(chunk)


def read_url(url: str, *, limit: int) -> Iterator[bytes]:
    """Yields the content of an address up to a limit; failures of the network are DataErrors."""
    try:
        with urllib.request.urlopen(url, timeout=_NETWORK_TIMEOUT) as response:
            received = 0
            while received < limit and (chunk := response.read(_CHUNK)):
                received += len(chunk)
                yield chunk
    except urllib.error.HTTPError as error:
        with error:
            raise DataError(f"{url} answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # what a URLError wraps
        reason = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise DataError(f"{url} cannot be read: {reason}") from None


def _fetch_package(upstream: Upstream, folder: Path) -> None:
    """Downloads a Debian package and unpacks the wanted files, all as an ordinary user."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        package = _apt_download(upstream.debian_package, Path(temporary))
        # The tar is read here and not unpacked by dpkg: nothing that it says about paths, links or
        # permissions is followed.
        contents = _run(["dpkg-deb", "--fsys-tarfile", str(package)], cwd=folder)
        wanted = {f"{file.name}.gz" for file in upstream.files}
        try:
            with tarfile.open(fileobj=io.BytesIO(contents), mode="r:") as archive:
                for member in archive:
                    name = member.name.rpartition("/")[2]
                    stream = archive.extractfile(member) if member.isfile() else None
                    if stream is not None and name in wanted:
                        (folder / name).write_bytes(stream.read())
        except tarfile.TarError as error:
            raise DataError(f"{package.name} cannot be unpacked: {error}") from None


def _apt_download(package: str, folder: Path) -> Path:
    """Downloads a package into a folder with apt's own verification; returns the file."""
    if shutil.which("apt-get") is None:
        raise DataError("there is no apt-get on this machine")
    # With a cache and lists of our own nothing of the system's changes, and no root is needed.
    config = folder / "apt.conf"
    config.write_text(_APT_CONFIG)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    apt_get = ["apt-get", "-q", "-c", str(config), "-o", f"Dir::Cache={folder / 'cache'}"]
    try:
        _run([*apt_get, "download", package], cwd=folder)
    except DataError:
        # The system's lists are empty, as in a container image, or out of date: get our own.
        (folder / "lists" / "partial").mkdir(parents=True)
        apt_get += ["-o", f"Dir::State::lists={folder / 'lists'}"]
        try:
            _run([*apt_get, "update"], cwd=folder)
        except DataError as error:
            # One unreachable repository among many fails an update that may still do.
            update_failure = f" (after apt-get update failed: {error})"
        else:
            update_failure = ""
        try:
            _run([*apt_get, "download", package], cwd=folder)
        except DataError as error:
            raise DataError(f"{error}{update_failure}") from None
    found = list(folder.glob("*.deb"))
    if len(found) != 1:
        raise DataError(f"apt-get download left {len(found)} packages, expected 1")
    return found[0]


def _run(command: list[str], *, cwd: Path) -> bytes:
    """Runs a program and returns its output; DataError with its first error line if it fails."""
    program = command[0]
    try:
        result = subprocess.run(
            command,
            cwd=cwd,
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_APT_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise DataError(f"there is no {program} on this machine") from None
    except subprocess.TimeoutExpired:
        raise DataError(f"{program} was stopped after {_APT_TIMEOUT} s") from None
    if result.returncode:
        lines = result.stderr.decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith(("E: ", "dpkg-deb: error: "))]
        reason = next(iter(errors or lines[-1:]), f"exit status {result.returncode}")
        raise DataError(f"{program}: {reason.removeprefix('E: ')}")
    return result.stdout

"""Listing and removing prepared data sets: `--mode=clean`."""

import contextlib
import datetime
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sync_jax.data.prepare import digests
from sync_jax.data.prepare.staging import disk_errors, expand, incomplete_prefix
from sync_jax.errors import InputError, suggestion
from sync_jax.runtime.console import say
from sync_jax.runtime.files import LockedError, hold, locked

_OURS = '"moduleName": "sync_jax.'  # in what TFDS writes about a data set and its builder


class Entry(NamedTuple):
    """A prepared data set, downloads or an unfinished preparation, which may be removed."""

    path: Path
    key: str  # of the lock that its makers hold


def clean(data_dir: str, remove: Sequence[str], names: Iterable[str]) -> None:
    """Lists what a folder of prepared data sets holds, or removes what is named ('all': all of it).

    Nothing is removed that a preparation or a run uses, and no link is followed. `names` are those
    of our datasets: their downloads are ours.
    """
    root = expand(data_dir).resolve()
    with disk_errors(root):
        known = {
            str(entry.path.relative_to(root)): entry for entry in sorted(_entries(root, names))
        }
        if not remove:
            _show(root, known)
        for name in remove:
            if name not in known and name != "all":
                raise InputError(
                    f"--remove={name}: {root} holds no such data set{suggestion(name, known)}; "
                    "--mode=clean lists what it holds"
                )
        kept = []
        for name in known if "all" in remove else dict.fromkeys(remove):
            try:
                _remove(root, known[name])
                say(f"removed {name}")
            except LockedError as error:
                kept.append(f"{name} is used by {error}")
    if kept:
        raise InputError(f"{'; '.join(kept)}; remove it when that has ended")


def _entries(root: Path, names: Iterable[str]) -> Iterator[Entry]:
    prefix = incomplete_prefix("")[:-1]
    for about in (*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")):
        first, *_, key, _ = (".", *about.parent.relative_to(root).parts)[-3:]
        # TFDS's own data sets, which may lie beside ours, are not ours to remove.
        if (
            not first.startswith(prefix)
            and about.resolve() == about
            and about.is_file()
            and _OURS in about.read_text(errors="replace")
        ):
            yield Entry(about.parent, f"tfds-{key}" if first == "tfds" else key)
    # TFDS keeps files in downloads/ too, and users put some there for it.
    for path in (*root.glob(f"{prefix}*"), *(root / "downloads" / name for name in names)):
        if path.is_dir() and path.resolve() == path:
            unfinished = path.name.startswith(prefix)
            key = path.name.removeprefix(prefix).rpartition("-")[0] if unfinished else path.name
            yield Entry(path, key)


def _show(root: Path, known: dict[str, Entry]) -> None:
    say(f"{root} holds {len(known)} of: data sets, downloads, unfinished preparations")
    for name, (path, _) in known.items():
        source = ""
        with contextlib.suppress(Exception):  # a damaged file is no reason not to list it
            source = digests.read(path)["source"]
        size = sum(
            os.lstat(os.path.join(parent, file)).st_size
            for parent, _, files in os.walk(path)
            for file in files
        )
        date = datetime.date.fromtimestamp(path.stat().st_mtime)
        say(f"  {name}: {size / 1e6:,.1f} MB, {date}{source and f', from {source}'}")
    ours = {name.partition("/")[0] for name in known}
    listed = sorted(os.listdir(root)) if root.is_dir() else []
    others = [x for x in listed if x not in ours and not x.endswith(".lock")]
    if others:
        say(f"  and what is not removed here: {', '.join(others)}")
    if known:
        say("--mode=clean --remove=NAME removes one, --remove=all removes all of these")


def _remove(root: Path, entry: Entry) -> None:
    lock = root / f"{entry.key}.lock"
    with locked(lock):
        held, prefix = hold(entry.path, alone=True), incomplete_prefix(entry.key)
        # Out of its place in one step: what is half removed must not pass for prepared.
        with tempfile.TemporaryDirectory(prefix=prefix, dir=root) as temporary:
            entry.path.rename(Path(temporary, "removed"))
        os.close(held)
        for parent in entry.path.parents:
            if parent == root or any(parent.iterdir()):
                break
            parent.rmdir()
        lock.unlink()

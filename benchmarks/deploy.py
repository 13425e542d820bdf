"""Speed of serving beside bare prediction, and memory of predicting 100 and 10,000 pictures.

    python -m benchmarks.deploy --workdir=EXPORT --pictures=FOLDER [--seconds=60]

`hey` (of Debian) must be installed: it sends one picture again and again, from 16 clients. Bare
prediction of the same picture, in batches of 32, is measured before and after in this process.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.step import describe_machine
from sync_jax import SelectiveClassifier

PORT = 8765
CHILD = (
    "import resource, sys; from pathlib import Path; from sync_jax import SelectiveClassifier\n"
    "from sync_jax.deploy.stream import stream\n"
    "classifier = SelectiveClassifier.load(sys.argv[1])\n"
    "stream(classifier, Path(sys.argv[2]), Path(sys.argv[2] + '.csv'))\n"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)


def bare(classifier: SelectiveClassifier, picture: Path, seconds: float) -> float:
    """Pictures a second, decoded and computed."""
    batch, count, began = [picture] * 32, 0, time.monotonic()
    classifier.predict(batch)  # compiled
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        classifier.predict(batch)
        count += len(batch)
    return count / (time.monotonic() - began)


def served(workdir: str, picture: Path, seconds: float, clients: int = 16) -> str:
    """The report of `hey`."""
    command = [sys.executable, "-m", "sync_jax.main", "--mode=serve", f"--workdir={workdir}"]
    server = subprocess.Popen([*command, f"--port={PORT}"], stdout=subprocess.DEVNULL)
    try:
        for _ in range(120):
            time.sleep(0.5)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/readyz", timeout=5)
                break
            except OSError:
                continue
        url = f"http://127.0.0.1:{PORT}/predict"
        options = ["-z", f"{seconds:g}s", "-c", str(clients), "-m", "POST", "-T", "image/jpeg"]
        sent = ["hey", *options, "-D", str(picture), url]
        return subprocess.run(sent, check=True, capture_output=True, text=True).stdout
    finally:
        server.terminate()
        server.wait()


def memory(workdir: str, pictures: list[Path], count: int) -> float:
    """Peak memory in MB of predicting so many pictures, links to those given."""
    with tempfile.TemporaryDirectory() as folder:
        album = Path(folder) / "album"
        album.mkdir()
        for i, path in zip(range(count), itertools.cycle(pictures), strict=False):
            os.symlink(path, album / f"{i:06}{path.suffix}")
        command = [sys.executable, "-c", CHILD, workdir, str(album)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(done.stdout) / 1024


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="an exported classifier")
    parser.add_argument("--pictures", type=Path, required=True, help="a folder of pictures")
    parser.add_argument("--seconds", type=float, default=60.0, help="of serving")
    arguments = parser.parse_args()
    pictures = sorted(path for path in arguments.pictures.rglob("*") if path.suffix == ".jpg")
    classifier = SelectiveClassifier.load(arguments.workdir)
    print(describe_machine())
    before = bare(classifier, pictures[0], 10)
    found = served(arguments.workdir, pictures[0], arguments.seconds)
    after = bare(classifier, pictures[0], 10)
    speed = float(re.search(r"Requests/sec:\s+([\d.]+)", found)[1])
    print(f"bare: {before:,.0f} pictures/s before, {after:,.0f} after")
    print(f"served: {speed:,.0f} pictures/s, {2 * speed / (before + after):.2f} of bare")
    for line in found.splitlines():
        if re.search(r"\[\d+\]|5?0%+ in|9[059]%+ in", line):
            print(line.strip().replace("%%", "%"))
    for count in (100, 10_000):
        print(
            f"predicting {count:,} pictures: {memory(arguments.workdir, pictures, count):,.0f} MB"
        )


if __name__ == "__main__":
    main()

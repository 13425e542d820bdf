"""What README says of the tests is so."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_promise_names_a_test_that_exists():
    section = (ROOT / "README.md").read_text().split("## What it promises")[1].split("\n## ")[0]
    promises = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(promises) > 10
    for promise in promises:
        named = re.findall(r"`(tests/[a-z_/]+\.py)(?:::(\w+))?`", promise)
        assert named, promise
        for file, test in named:
            assert f"def {test or 'test_'}" in (ROOT / file).read_text(), (file, test)

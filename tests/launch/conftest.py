from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cloud import Cloud


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "cloud")
    yield made
    made.close()

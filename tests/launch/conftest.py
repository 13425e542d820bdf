from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cloud import Cloud
from tests.launch.host import Host


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    """A cloud whose slices have one host; nothing that a test started outlives it."""
    made = Cloud(tmp_path / "cloud")
    yield made
    made.close()


@pytest.fixture
def slice_of_three(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "cloud", workers=3)
    yield made
    made.close()


@pytest.fixture
def host(cloud: Cloud) -> Host:
    return Host(cloud)

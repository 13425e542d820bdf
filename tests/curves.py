"""What a run has logged, compared with another's."""

from pathlib import Path

import numpy as np

from sync_jax.runtime.training_log import read_metrics


def curve(workdir: Path) -> list[dict]:
    """All that is logged, but the time."""
    return [{k: v for k, v in e.items() if k != "seconds"} for e in read_metrics(workdir)]


def check_close(first: Path, second: Path) -> None:
    """All that is logged, up to the order of float32 sums and what a dozen steps make of it."""
    one, other = curve(first), curve(second)
    assert [(e["step"], e["part"]) for e in one] == [(e["step"], e["part"]) for e in other]
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"part"}:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=2e-4, err_msg=name)

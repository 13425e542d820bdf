"""A file imports only what stands below it, and there are no cycles."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sync_jax"
# From the bottom to the top; what shares a line does not import each other, but for folders, whose
# files may. A few words on why stand in docs/design.md.
ORDER = (
    ("errors",),
    ("options",),
    ("losses", "scores", "metrics"),
    ("guarantees",),
    ("methods",),
    ("config",),
    ("optimizer", "runtime"),
    ("models", "data"),
    ("steps",),
    ("evaluation",),
    ("trainer",),
    ("train",),
    ("deploy",),
    ("predictor", "sweep", "listing"),
    ("main",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(source: str) -> set[str]:
    """The modules of ours that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not looked into"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in inside]
        else:
            continue
        found |= {name for name in names if name in MODULES}
    return found - {"sync_jax"}


def upward(module: str, others: set[str]) -> list[str]:
    """Returns the imports of a module that are neither below it nor beside it in its folder."""
    own = module.split(".")[1]
    return sorted(
        other
        for other in others
        if other.split(".")[1] != own and LEVEL[other.split(".")[1]] >= LEVEL[own]
    )


IMPORTS = {name: imported(path.read_text()) for name, path in MODULES.items()}
IMPORTS.pop("sync_jax")  # names `fit`, which it imports when it is asked for


def test_every_file_has_its_place():
    assert {name.split(".")[1] for name in IMPORTS} == LEVEL.keys()
    assert len(list(PACKAGE.glob("*.py"))) <= 15  # fourteen, and __init__.py


@pytest.mark.parametrize("module", IMPORTS)
def test_nothing_above_is_imported(module):
    assert upward(module, IMPORTS[module]) == []


def test_there_are_no_cycles():
    graphlib.TopologicalSorter(IMPORTS).prepare()


def test_an_upward_import_and_a_cycle_would_be_noticed():
    source = "def f():\n    from sync_jax.data import registry\n    import sync_jax.errors\n"
    found = imported(source)
    assert found == {"sync_jax.data.registry", "sync_jax.errors"}
    assert upward("sync_jax.config", found) == ["sync_jax.data.registry"]
    cycle = IMPORTS | {"sync_jax.errors": {"sync_jax.config"}}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(cycle).prepare()

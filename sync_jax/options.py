"""Options: the fields of a config, with default, bounds and one line of help.

A method's hyperparameters and a backbone's options are declared with it, as `Option`s; `config.py`
and the backbone's builder take defaults and checks from there.
"""

import dataclasses
import importlib
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from sync_jax.errors import InputError, suggestion

_MOST_VALUES = 1000  # of a list: a report has a row for each
_LARGEST = 1e30  # the devices compute in float32
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of a config.

    The default's type is the field's; a float also takes integers, and a tuple lists. Bounds are an
    interval such as "[0, 1)" or "(0, inf)", of a tuple for each value, or all choices of a string.
    """

    default: Any
    bounds: str | tuple[str, ...] = ""  # "": any value
    help: str = ""  # one line
    each: str = ""  # the plural noun for a tuple's values, such as "percentages"

    def check(self, field: str, value: Any) -> None:
        """Raises InputError where a value has another type or is out of bounds."""
        kind = type(self.default)
        accepted = {float: (float, int), tuple: (tuple, list)}.get(kind, (kind,))
        if type(value) not in accepted:
            raise InputError(f"{field}={value!r} must be of type {kind.__name__}")
        if kind is tuple:
            self._check_each(field, value)
        elif isinstance(self.bounds, tuple):
            if value not in self.bounds:
                raise InputError(
                    f"{field}={value!r} is unknown{suggestion(str(value), self.bounds)}; "
                    f"choose from {', '.join(sorted(self.bounds))}"
                )
        elif kind is float and not (_is_finite(value) and _within(value, self.bounds)):
            shown = f"{value}" if isinstance(value, float) else _short(value)
            large = _is_finite(value) and abs(value) > _LARGEST
            said = f"of {_LARGEST:g} at most" if large else self.described()
            raise InputError(f"{field}={shown} must be a finite number {said}")
        elif kind is int and not _within(value, self.bounds):
            raise InputError(f"{field}={_short(value)} must be {self.described()}")

    def _check_each(self, field: str, values: Any) -> None:
        if not self.bounds:  # names
            if not all(type(x) is str for x in values):
                raise InputError(f"{field}={tuple(values)} must be a list of {self.each}")
        elif len(values) > _MOST_VALUES:
            raise InputError(f"{field} has {len(values)} values; at most {_MOST_VALUES} will do")
        elif not values or not all(
            type(x) in (int, float) and _is_finite(x) and _within(x, self.bounds) for x in values
        ):
            raise InputError(
                f"{field}={tuple(values)} must be a list of {self.each} {self.described()}"
            )
        if len(set(values)) < len(values):
            raise InputError(f"{field}={tuple(values)} names a value twice")

    def described(self) -> str:
        """The bounds in words, such as 'in [0, 1)', 'at least 1', 'between 1 and 9', 'above 0'."""
        if isinstance(self.bounds, tuple):
            return f"one of {', '.join(self.bounds)}"
        if not self.bounds:
            return f"of {_LARGEST:g} at most" if type(self.default) is float else ""
        low, high = self.bounds[1:-1].split(", ")
        if high == "inf":
            return f"at least {low}" if self.bounds[0] == "[" else f"above {low}"
        if type(self.default) is int:
            return f"between {low} and {high}"
        return f"in {self.bounds}"


# The fields that an evaluation reads, with or without a training.
EVALUATION = {
    "target_coverage": Option(0.8, "(0, 1]", "that training aims at; the operating point"),
    "evaluation.coverages": Option(
        (100, 99, 98, 97, 95, 90, 85, 80, 75, 70, 60, 50, 40, 30, 20, 10),
        *("(0, 100]", "percent"),
        each="percentages",
    ),
    # Each certificate holds with confidence 1 - delta over the draw of the calibration split. The
    # defaults are what some thousands of calibration examples can prove, at the confidence that
    # people are used to from intervals: one calibration split in twenty may mislead. The report
    # leads with the first target.
    "evaluation.target_risks": Option((0.05, 0.02, 0.01), "[1e-6, 1)", each="error rates"),
    "evaluation.delta": Option(0.05, "(0, 1)", "chance that a certificate is broken"),
}


def _is_finite(value: float) -> bool:
    # An integer in a float's place can be too large for one.
    return abs(value) <= sys.float_info.max and math.isfinite(value)


def _within(value: float, interval: str | tuple[str, ...]) -> bool:
    if not interval:
        return type(value) is int or abs(value) <= _LARGEST
    assert isinstance(interval, str)
    low, high = map(float, interval[1:-1].split(", "))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and (type(value) is int or abs(value) <= _LARGEST)


def _short(value: int) -> str:
    """In digits; of very many only how many bits they are."""
    return f"{value}" if value.bit_length() < 128 else f"(a number of {value.bit_length()} bits)"


def find(name: str, known: Mapping[str, T], kind: type[T], field: str) -> T:
    """Finds an entry by its name, or imports one of another package, 'package.module:NAME'.

    Importing executes the module: take the name from a user's own command line or config, never
    from a file of a run.

    Raises:
        InputError: there is no such entry of this kind; names the field and what there is.
    """
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise InputError(
            f"{field}={name!r} is unknown{suggestion(name, known)}; choose from "
            f"{', '.join(sorted(known))}, or name one of yours as package.module:NAME"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module can raise anything while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{field}={name!r} cannot be imported: {reason}") from error
    if not isinstance(found, kind):
        raise InputError(f"{field}={name!r} is a {type(found).__name__}, not a {kind.__name__}")
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their path, such as 'train.epochs'."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value

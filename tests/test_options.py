import math

import pytest

from sync_jax.errors import InputError
from sync_jax.options import Option, find, flatten
from sync_jax.scores import SCORES, Score


@pytest.mark.parametrize(("option", "good", "bad", "said"), [
    (Option(1, "[1, 9]"), (1, 9), (0, 10, True, 1.0, "1"), "between 1 and 9"),
    (Option(1, "[0, inf)"), (0, 10**40), (-1, -(10**40)), "at least 0"),
    (Option(0.5, "[0, 1)"), (0, 0.0, 0.99), (-0.1, 1, math.nan), "in [0, 1)"),
    (Option(0.5, "(0, inf)"), (1e-9, 7), (0, 0.0, math.inf, 1e31, 10**400), "above 0"),
    (Option(0.5), (-1e30, 3), (1e31, math.inf, None), "of 1e+30 at most"),
    (Option("a", ("a", "b")), ("b",), ("c", "", 1), "one of a, b"),
    (Option(True), (False,), (1, "yes"), ""),
    (Option((1,), "(0, 3]", each="shares"), ((3, 0.1), [2]), ((), (0,), (1, 1), ("1",), 1),
     "in (0, 3]"),
    (Option((), each="names"), ((), ("x", "y")), ((1,), ("x", "x")), ""),
])  # fmt: skip
def test_bounds(option, good, bad, said):
    assert option.described() == said
    option.check("f", option.default)
    for value in good:
        option.check("f", value)
    for value in bad:
        with pytest.raises(InputError, match=r"^f=|^f has"):
            option.check("f", value)


def test_a_choice_gets_a_suggestion_and_a_long_number_is_not_printed():
    with pytest.raises(InputError, match=r"did you mean 'linear'\?\); choose from cosine, linear"):
        Option("cosine", ("cosine", "linear")).check("f", "linaer")
    with pytest.raises(InputError, match=r"f=\(a number of 333 bits\) must be between 0 and 1"):
        Option(0, "[0, 1]").check("f", 10**100)


@pytest.mark.parametrize(("name", "said"), [
    ("softmax", "is unknown (did you mean 'softmax_response'?); choose from abstention, energy,"),
    ("no_such_module:X", "cannot be imported: ModuleNotFoundError"),
    ("sync_jax.scores:nothing", "cannot be imported: AttributeError"),
    ("sync_jax.scores:SCORES", "is a dict, not a Score"),
    (":X", "cannot be imported: ValueError"),
])  # fmt: skip
def test_entries_that_cannot_be_found(name, said):
    with pytest.raises(InputError) as error:
        find(name, SCORES, Score, "f")
    assert str(error.value).startswith(f"f={name!r} ")
    assert said in str(error.value)
    assert find("energy", SCORES, Score, "f") is SCORES["energy"]


def test_flatten():
    assert dict(flatten({"a": 1, "b": {"c": {"d": 2}, "e": ()}})) == {"a": 1, "b.c.d": 2, "b.e": ()}

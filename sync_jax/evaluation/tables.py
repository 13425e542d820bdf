"""Tables and lines of a report: on the console, and on a page."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import rich.box
import rich.console
import rich.table
import rich.text

from sync_jax.runtime import page

WIDTH = 80  # of a terminal that does not say, and of what is piped


class Table(NamedTuple):
    """A table for the console; the first `keys` columns say what a row is of."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str | rich.text.Text]]
    keys: int = 1


def show(parts: Iterable[Table | str]) -> None:
    """Prints tables and lines, as wide as the terminal."""
    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH
    for part in parts:
        for each in [part] if isinstance(part, str) else _split(part, console.width):
            console.print(each)


def _split(table: Table, width: int) -> Iterator[rich.table.Table]:
    """Makes tables of at most a width, each with the keys and some of the other columns.

    Keys are wrapped where they must be; a number never is.
    """
    headings, keys, gap = [*table.headings], table.keys, 3
    columns = [[str(row[k]) for row in table.rows] for k in range(len(headings))]
    longest = [max(map(len, column), default=0) for column in columns]
    for k, heading in enumerate(headings):
        word = min(max(map(len, heading.split())), 16)
        lines = textwrap.wrap(heading, max(longest[k], word, 8), break_on_hyphens=False)
        headings[k] = "\n".join(lines)
        longest[k] = max(longest[k], *map(len, lines))
    words = [" ".join([headings[k], *columns[k]]).split() for k in range(keys)]
    least = [min(max(map(len, each)), width // 3) for each in words]
    taken = sum(least) + gap * keys
    title, first = table.title, keys
    while first < len(headings):
        end, room = first, width + gap - taken
        while end < len(headings) and (end == first or longest[end] + gap <= room):
            room -= longest[end] + gap
            end += 1
        chosen = [*range(keys), *range(first, end)]
        made = rich.table.Table(
            *(
                rich.table.Column(headings[k], overflow="fold", min_width=least[k])
                for k in range(keys)
            ),
            *(rich.table.Column(headings[k], justify="right", no_wrap=True) for k in chosen[keys:]),
            title=title,
            box=rich.box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        for row in table.rows:
            made.add_row(*(row[k] for k in chosen))
        yield made
        title, first = "", end


def as_html(parts: Iterable[Table | str]) -> list[str]:
    """The same for `page.page`."""
    return [
        page.paragraph(part) if isinstance(part, str) else page.table(*part)
        for part in parts
        if part
    ]

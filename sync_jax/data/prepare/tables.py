"""Tables that name pictures, read as columns of text: CSV, JSON lines and Parquet."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from sync_jax.errors import InputError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_DELIMITERS = ",;\t"

Columns = dict[str, list[str]]


def read_columns(name: str, data: bytes) -> Columns:
    """Reads a table into its columns, all of one length; what is missing is ''.

    Args:
        name: the name of its file, whose suffix is one of `SUFFIXES`.
        data: its bytes. Text is UTF-8; a CSV's fields are separated by commas, semicolons or tabs,
            and its first line has the names.

    Raises:
        InputError: it cannot be read as such a table, or has no rows.
    """
    suffix = name[name.rfind(".") :].lower()
    try:
        if suffix == ".parquet":
            columns = _from_parquet(data)
        elif suffix == ".jsonl":
            columns = _from_json_lines(data.decode("utf-8-sig").splitlines())
        else:
            columns = _from_csv(data.decode("utf-8-sig"))
    except InputError:
        raise
    except Exception as error:  # of pyarrow anything
        raise InputError(f"{name} cannot be read as a table: {error}") from error
    if not columns or not next(iter(columns.values())):
        raise InputError(f"{name} has no rows")
    return columns


def _from_csv(text: str) -> Columns:
    header = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count)  # the first, where there is none
    names, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = [row for row in rows if row]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise ValueError(
                f"row {number} has {len(row)} fields, and there are {len(names)} names"
            )
    return _named(names, zip(*rows, strict=True) if rows else ())


def _from_json_lines(lines: Sequence[str]) -> Columns:
    rows = [json.loads(line) for line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _named(names, ([row.get(name) for row in rows] for name in names))


def _from_parquet(data: bytes) -> Columns:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"Parquet is read by pyarrow: pip install pyarrow ({error})") from error
    found = pyarrow.parquet.read_table(io.BytesIO(data))
    return _named(found.column_names, (column.to_pylist() for column in found.columns))


def _named(names: Sequence[str], columns: Iterable[Iterable[Any]]) -> Columns:
    if len({*names}) < len(names):
        raise ValueError("two columns have the same name")
    return {
        name: ["" if value is None else str(value).strip() for value in column]
        for name, column in zip(names, columns, strict=False)  # of an empty table there are none
    }

"""Exported classifiers, as `deploy.export` writes them, and how they are read.

    card.json            what it is: preprocessing, outputs, versions, digests of the other files
    decision.json        classes, score, threshold, certificate, see `evaluation.decision`
    network.stablehlo    the network, of `jax.export`: (weights, inputs) -> outputs
    weights.safetensors  its weights

Reading needs JAX, NumPy and flatbuffers alone. StableHLO describes operations on arrays, and
safetensors holds nothing but arrays: nothing of a folder is executed as a program of this machine.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sync_jax.data.preprocessing import Preprocessing
from sync_jax.errors import InputError
from sync_jax.evaluation.decision import Decision

SCHEMA = 1
CARD, DECISION = "card.json", "decision.json"
NETWORK, WEIGHTS = "network.stablehlo", "weights.safetensors"
_DTYPES = {"F32": "float32", "F16": "float16", "F64": "float64", "I32": "int32", "U32": "uint32"}
_LARGEST = 256  # inputs of a batch: more are divided, so that few sizes are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
    """An exported network: inputs of any number to outputs."""

    exported: Any  # jax.export.Exported
    weights: Mapping[str, np.ndarray]
    card: Mapping[str, Any]

    def __call__(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Computes the outputs, `[n, ...]` float32 each, of inputs as `Preprocessing.batch` makes.

        Batches are filled up to a power of two, so that few sizes are compiled.
        """
        import jax

        rows = []
        for start in range(0, max(len(inputs), 1), _LARGEST):
            part = inputs[start : start + _LARGEST]
            size = 1 << max(len(part) - 1, 0).bit_length()
            padding = np.zeros((size - len(part), *inputs.shape[1:]), inputs.dtype)
            outputs = self.exported.call(self.weights, np.concatenate([part, padding]))
            rows.append(
                {name: np.asarray(jax.device_get(x))[: len(part)] for name, x in outputs.items()}
            )
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def load(folder: Path) -> tuple[Artifact, Preprocessing, Decision]:
    """Reads an exported classifier.

    Raises:
        InputError: a file is missing, was altered, or is of a later version.
    """
    import jax
    import jax.export

    card = read_card(folder)
    try:
        contents = {name: (folder / name).read_bytes() for name in card["digests"]}
        for name, digest in card["digests"].items():
            if hashlib.sha256(contents[name]).hexdigest() != digest:
                raise ValueError(f"{name} was altered since it was exported")
        exported = jax.export.deserialize(bytearray(contents[NETWORK]))
        weights = jax.device_put(read_safetensors(contents[WEIGHTS]))
        decision = Decision.from_json(json.loads(contents[DECISION]))
        return (
            Artifact(exported, weights, card),
            Preprocessing.from_json(card["preprocessing"]),
            decision,
        )
    except InputError:
        raise
    except Exception as error:  # of flatbuffers and StableHLO anything
        raise InputError(f"{folder} is damaged: {error}") from error


def read_card(folder: Path) -> dict[str, Any]:
    """Reads card.json."""
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text())
        if card["schema"] != SCHEMA:
            raise ValueError(f"its schema is {card['schema']}, this version reads {SCHEMA}")
        if {*card["digests"]} != {DECISION, NETWORK, WEIGHTS}:
            raise ValueError("it names other files")
        text = json.dumps({k: x for k, x in card.items() if k != "card_digest"}, sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() != card["card_digest"]:
            raise ValueError("it was altered since it was exported")
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder / CARD} cannot be used: {error}") from error
    return card


def write_card(folder: Path, fields: Mapping[str, Any]) -> None:
    """Writes card.json, with the digests of the other files and of itself."""
    names = (DECISION, NETWORK, WEIGHTS)
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    card = {"schema": SCHEMA, **fields, "digests": digests}
    text = json.dumps(card, sort_keys=True)
    card["card_digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / CARD).write_text(json.dumps(card, indent=1, allow_nan=False) + "\n")


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Reads the arrays of a safetensors file; ValueError where it is none.

    A length of 8 bytes, a header in JSON, and the arrays one after the other; the library is not
    among what an exported classifier needs.
    """
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise ValueError("its header is cut off")
    header, arrays = json.loads(data[8 : 8 + length]), {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]).newbyteorder("<"), tuple(entry["shape"])
        begin, end = (8 + length + x for x in entry["data_offsets"])
        if (
            not 8 + length <= begin <= end <= len(data)
            or end - begin != math.prod(shape) * dtype.itemsize
        ):
            raise ValueError(f"{name} does not fit the file")
        arrays[name] = np.frombuffer(data, dtype, math.prod(shape), begin).reshape(shape)
    return arrays

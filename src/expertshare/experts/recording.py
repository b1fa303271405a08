"""A record of which experts every forward asked for, layer by layer: what a cache can be simulated on.

A file of JSON lines. The first is {"routing_record": 1, "num_layers": N, "num_experts": E}; every other is one forward,
{"layers": [[ids of MoE layer 0], [ids of MoE layer 1], ...]}, ids ascending, in the order in which forwards ran.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from torch import Tensor

from expertshare.errors import InputError
from expertshare.types import ExpertStore, Loan

VERSION = 1


@dataclass(frozen=True, slots=True)
class RoutingRecord:
    """forwards: for each, the ids that every MoE layer used."""

    num_layers: int
    num_experts: int
    forwards: tuple[tuple[tuple[int, ...], ...], ...]


class RoutingRecorder:
    """Writes a record while a model runs. Use as `with RoutingRecorder(path) as recorder`, then lend through `around`.

    Raises InputError where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._begun = False

    def around(self, store: ExpertStore, *, num_layers: int, num_experts: int) -> ExpertStore:
        """The same store, with everything that is borrowed from it on record."""
        if not self._begun:
            self._write({"routing_record": VERSION, "num_layers": num_layers, "num_experts": num_experts})
            self._begun = True
        return _RecordedStore(store, self, num_layers)

    def write_forward(self, layers: Sequence[Sequence[int]]) -> None:
        """Put one forward on record."""
        self._write({"layers": layers})

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self._path} cannot be written ({error.strerror}): choose another file") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, value: dict[str, Any]) -> None:
        assert self._file is not None  # entered
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")


class _RecordedStore:
    """An ExpertStore that tells a recorder. A forward is on record once its last layer has asked."""

    def __init__(self, store: ExpertStore, recorder: RoutingRecorder, num_layers: int) -> None:
        self._store, self._recorder, self._num_layers = store, recorder, num_layers
        self._layers: list[list[int]] = []

    @contextmanager
    def borrow(self, layer: int, active_E: Tensor) -> Iterator[Loan]:
        """What the store lends."""
        if layer == 0:
            self._layers = []  # an interrupted forward leaves nothing
        self._layers.append(active_E.nonzero().flatten().tolist())
        with self._store.borrow(layer, active_E) as loan:
            yield loan
        if layer == self._num_layers - 1:
            self._recorder.write_forward(self._layers)


def read_record(path: Path) -> RoutingRecord:
    """The record in a file; InputError names the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a file of `generate --record-routing`") from error
    values = [_object(line, path, number) for number, line in enumerate(lines, 1)]
    head = values[0] if values else {}
    num_layers, num_experts = head.get("num_layers"), head.get("num_experts")
    if head.get("routing_record") != VERSION or not isinstance(num_layers, int) or not isinstance(num_experts, int):
        raise InputError(
            f"{path} is not a routing record of version {VERSION}: make one with `generate --record-routing`"
        )
    forwards = tuple(
        _forward(value, num_layers, num_experts, path, number) for number, value in enumerate(values[1:], 2)
    )
    if not forwards:
        raise InputError(f"{path} holds no forward: record a generation to its end")
    return RoutingRecord(num_layers, num_experts, forwards)


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error.msg}); record the generation again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}, line {number}: expected an object, got {type(value).__name__}")
    return value


def _forward(
    value: dict[str, Any], num_layers: int, num_experts: int, path: Path, number: int
) -> tuple[tuple[int, ...], ...]:
    layers = value.get("layers")
    if (
        not isinstance(layers, list)
        or len(layers) != num_layers
        or not all(isinstance(ids, list) for ids in layers)
        or not all(isinstance(e, int) and 0 <= e < num_experts for ids in layers for e in ids)
    ):
        raise InputError(
            f"{path}, line {number}: expected the expert ids (0..{num_experts - 1}) of {num_layers} layers; record the "
            "generation again"
        )
    return tuple(tuple(ids) for ids in layers)

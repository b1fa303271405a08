"""A record of which experts every forward asked for, layer by layer: what caches and clusters can be simulated on.

A file of JSON lines. The first is {"routing_record": 1, "num_layers": N, "num_experts": E}; every other is one forward,
{"layers": [[ids of MoE layer 0], [ids of MoE layer 1], ...], "tokens": [[[ids of token 0], ...] of MoE layer 0, ...]},
in the order in which forwards ran. Ids of a layer ascend, those of a token are best first; a padded token has none, so
that blocks stay whole. Records of earlier versions lack `tokens`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from expertshare.errors import InputError
from expertshare.types import RoutingPlan

VERSION = 1

TokenExperts = tuple[tuple[int, ...], ...]
"""Of one layer: the experts of each token. Or of one forward: those of each layer."""


@dataclass(frozen=True, slots=True)
class RoutingRecord:
    """forwards: for each, the ids that every MoE layer used. tokens: for each, per layer, the ids of every token; empty
    where a record does not have them."""

    num_layers: int
    num_experts: int
    forwards: tuple[TokenExperts, ...]
    tokens: tuple[tuple[TokenExperts, ...], ...] = ()


class RoutingRecorder:
    """Writes a record while a model runs: `with RoutingRecorder(path, num_layers=N, num_experts=E) as recorder`, then
    `Runtime(on_plan=recorder.hear)`.

    A forward is on record once its last layer has been heard of. Raises InputError where the file cannot be written.
    """

    def __init__(self, path: Path, *, num_layers: int, num_experts: int) -> None:
        self._path, self._num_layers, self._num_experts = path, num_layers, num_experts
        self._file: TextIO  # while it is entered
        self._layers: list[list[int]] = []
        self._tokens: list[list[list[int]]] = []

    def hear(self, layer: int, plan: RoutingPlan) -> None:
        """The plan of MoE layer `layer`, in the order in which layers run. Waits for the device."""
        if layer == 0:
            self._layers, self._tokens = [], []  # an interrupted forward leaves nothing
        tokens = [[e for e in ids if e >= 0] for ids in plan.expert_ids_TK.tolist()]
        self._layers.append(sorted({e for ids in tokens for e in ids}))
        self._tokens.append(tokens)
        if layer == self._num_layers - 1:
            self._write({"layers": self._layers, "tokens": self._tokens})

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self._path} cannot be written ({error.strerror}): choose another file") from error
        self._write({"routing_record": VERSION, "num_layers": self._num_layers, "num_experts": self._num_experts})
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")


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
    record = RoutingRecord(num_layers, num_experts, ())
    forwards, tokens = [], []
    for number, value in enumerate(values[1:], 2):
        where = f"{path}, line {number}"
        forwards.append(_layers(value.get("layers"), record, where))
        if "tokens" in value:
            tokens.append(_tokens(value["tokens"], forwards[-1], record, where))
    if not forwards:
        raise InputError(f"{path} holds no forward: record a generation to its end")
    if tokens and len(tokens) != len(forwards):
        raise InputError(f"{path}: only {len(tokens)} of {len(forwards)} forwards have tokens; record it again")
    return RoutingRecord(num_layers, num_experts, tuple(forwards), tuple(tokens))


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error.msg}); record the generation again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}, line {number}: expected an object, got {type(value).__name__}")
    return value


def _are_ids(lists: object, num_experts: int) -> bool:
    """Whether something is a list of lists of expert ids."""
    return isinstance(lists, list) and all(
        isinstance(ids, list) and all(isinstance(e, int) and 0 <= e < num_experts for e in ids) for ids in lists
    )


def _layers(found: Any, record: RoutingRecord, where: str) -> TokenExperts:
    """The ids that each layer of a forward used."""
    if not _are_ids(found, record.num_experts) or len(found) != record.num_layers:
        raise InputError(
            f"{where}: expected the expert ids (0..{record.num_experts - 1}) of {record.num_layers} layers; record the "
            "generation again"
        )
    return tuple(map(tuple, found))


def _tokens(found: Any, layers: TokenExperts, record: RoutingRecord, where: str) -> tuple[TokenExperts, ...]:
    """The ids of each token, by layer, of a forward whose layers used `layers`."""
    if (
        not isinstance(found, list)
        or not all(_are_ids(tokens, record.num_experts) for tokens in found)
        or len({len(tokens) for tokens in found}) != 1
        or [{e for ids in tokens for e in ids} for tokens in found] != list(map(set, layers))
    ):
        raise InputError(
            f"{where}: expected `tokens` to hold, for each of {len(layers)} layers, the experts of every token, "
            "together those of `layers`; record the generation again"
        )
    return tuple(tuple(map(tuple, tokens)) for tokens in found)

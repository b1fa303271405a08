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
"""Of one layer: the experts of each token."""


@dataclass(frozen=True, slots=True)
class RoutingRecord:
    """forwards: for each, the ids that every MoE layer used. tokens: for each, per layer, the ids of every token; empty
    where a record does not have them."""

    num_layers: int
    num_experts: int
    forwards: tuple[tuple[tuple[int, ...], ...], ...]
    tokens: tuple[tuple[TokenExperts, ...], ...] = ()


class RoutingRecorder:
    """Writes a record while a model runs: `with RoutingRecorder(path, num_layers=N, num_experts=E) as recorder`, then
    `Runtime(on_plan=recorder.hear)`.

    A forward is on record once its last layer has been heard of. Raises InputError where the file cannot be written.
    """

    def __init__(self, path: Path, *, num_layers: int, num_experts: int) -> None:
        self._path, self._num_layers, self._num_experts = path, num_layers, num_experts
        self._file: TextIO | None = None
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
        if self._file is not None:
            self._file.close()

    def _write(self, value: dict[str, Any]) -> None:
        assert self._file is not None  # entered
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
    forwards = tuple(
        _forward(value, num_layers, num_experts, path, number) for number, value in enumerate(values[1:], 2)
    )
    if not forwards:
        raise InputError(f"{path} holds no forward: record a generation to its end")
    tokens = tuple(
        _tokens(value, layers, path, number)
        for number, (value, layers) in enumerate(zip(values[1:], forwards, strict=True), 2)
        if "tokens" in value
    )
    if tokens and len(tokens) != len(forwards):
        raise InputError(f"{path}: only {len(tokens)} of {len(forwards)} forwards have tokens; record it again")
    return RoutingRecord(num_layers, num_experts, forwards, tokens)


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


def _tokens(
    value: dict[str, Any], layers: tuple[tuple[int, ...], ...], path: Path, number: int
) -> tuple[TokenExperts, ...]:
    """Those of a forward whose layers have been read; together they are the layers' ids."""
    found = value["tokens"]
    if (
        not isinstance(found, list)
        or len(found) != len(layers)
        or not all(isinstance(tokens, list) and all(isinstance(ids, list) for ids in tokens) for tokens in found)
        or len({len(tokens) for tokens in found}) != 1
        or any({e for ids in tokens for e in ids} != set(used) for tokens, used in zip(found, layers, strict=True))
    ):
        raise InputError(
            f"{path}, line {number}: expected `tokens` to hold, for each of {len(layers)} layers, the experts of every "
            "token, together those of `layers`; record the generation again"
        )
    return tuple(tuple(tuple(ids) for ids in tokens) for tokens in found)

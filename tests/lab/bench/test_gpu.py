"""The parts of GPU measurement that need no GPU: turns, graphs that fail, messages."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from expertshare.cli import main
from expertshare.cli.bench_tables import machine_line
from expertshare.errors import ConfigError
from expertshare.lab.bench import machine as machines
from expertshare.lab.bench.contenders import contenders
from expertshare.lab.bench.machine import CPU, Machine, Yardstick
from expertshare.lab.bench.timing import take_turns_on_gpu

CUDA = torch.device("cuda")


def test_calls_take_turns_and_a_walk_is_divided_by_its_calls() -> None:
    calls: list[tuple[str, int]] = []
    timed: list[str] = []

    def call_of(name: str) -> Callable[[int], object]:
        return lambda turn: calls.append((name, turn))

    def seconds_of(walk: Callable[[], object]) -> float:
        calls.clear()
        walk()
        timed.append(calls[0][0])
        assert [turn for _, turn in calls] == [0, 1, 2, 3]
        return 8.0

    times = take_turns_on_gpu(
        {name: call_of(name) for name in "ab"},
        turns=4,
        repeats=2,
        warmup=1,
        capture=lambda walk: walk,
        seconds_of=seconds_of,
    )
    assert times.seconds == {"a": [2.0, 2.0], "b": [2.0, 2.0]}
    assert times.captured == {"a": True, "b": True}
    assert "".join(timed) == "abbaab"


def test_who_cannot_be_captured_is_launched_call_by_call() -> None:
    launched: list[str] = []

    def capture(walk: Callable[[], object]) -> Callable[[], object]:
        walk()
        if launched[-1] == "fails":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return lambda: launched.append("replayed")

    times = take_turns_on_gpu(
        {name: (lambda turn, name=name: launched.append(name)) for name in ("good", "fails", "waits")},
        turns=1,
        repeats=1,
        warmup=0,
        host_bound=["waits"],
        capture=capture,
        seconds_of=lambda walk: (walk(), 1.0)[1],
    )
    assert times.captured == {"good": True, "fails": False, "waits": False}
    assert launched[-3:] == ["replayed", "fails", "waits"]
    assert times.reasons["fails"] == "cannot be captured: operation not permitted when stream is capturing"
    assert "waits for the GPU" in times.reasons["waits"]


def test_everybody_takes_part_on_the_device_that_it_is_made_for() -> None:
    on_cpu, on_gpu = contenders(None, CPU), contenders(None, CUDA)
    assert {"cpu", "cpu-int8", "torch", "transformers-grouped-mm"} <= on_cpu.keys()
    assert {"triton", "triton-int8", "triton-int4", "torch", "transformers-eager"} <= on_gpu.keys()
    assert not {name for name in on_cpu if name.startswith("triton")}
    assert not {name for name in on_gpu if name.startswith("cpu")}
    assert contenders(["triton"], CPU)["triton"].absent(CPU) == "runs on cuda only"


@pytest.mark.parametrize("verb", ["experts", "forward", "generate"])
def test_asking_for_cuda_without_a_gpu_is_a_clear_error(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        main(["bench", verb, "--case", "tiny", "--device", "cuda"])
    assert left.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--device cuda: torch sees no GPU" in said
    assert "Leave --device out" in said


def test_without_triton_or_with_the_interpreter_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET is set"):
        machines.gpu_device()
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(machines, "unavailable_reason", lambda: "Triton is not installed (pip install ...)")
    with pytest.raises(ConfigError, match="Triton is not installed"):
        machines.gpu_device()


def test_an_unknown_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "experts", "--device", "gpu"])
    assert left.value.code == 2
    assert "unknown device 'gpu'" in capsys.readouterr().err


def test_the_card_is_named_in_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines.metadata, "version", lambda name: "3.9.0")
    monkeypatch.setattr(machines, "driver_version", lambda: "580.1")
    card = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, total_memory=10**9)
    machine = Machine(
        facts={"gpu": machines.gpu_facts(card)},
        cache_bytes=1,
        instruction_set="sm_90",
        bytes_per_s=4e12,
        macs_per_s={"bfloat16": 4e14},
    )
    assert machine_line(machine).startswith("NVIDIA H200, driver 580.1, CUDA")
    assert "4000 GB/s (copy)" in machine_line(machine)
    assert machine.to_json()["gpu"]["multiprocessors"] == 132


def test_a_yardstick_copies_back_and_forth() -> None:
    square, buffer = torch.ones(4, 4), torch.arange(16.0)
    yardstick = Yardstick(square, square, buffer, copies=True)
    yardstick.read(0)
    assert buffer.tolist() == [8.0, 9, 10, 11, 12, 13, 14, 15] * 2
    yardstick.multiply(0)
    yardstick.note(dict(zip(yardstick.calls(), ([2.0, 1.0, 3.0], [1.0]), strict=True)))
    assert yardstick.peaks().bytes_per_s == 64 / 2.0  # 32 bytes read, 32 written
    assert yardstick.peaks().macs_per_s == 64.0

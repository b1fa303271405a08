"""Two CPU processes under torch's FSDP2 against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_worker import run

import expertshare
from expertshare.errors import TrainingError
from expertshare.training.config import DistillConfig
from expertshare.training.distill import distill_folder
from expertshare.training.processes import Processes

WORKER = Path(__file__).with_name("distill_worker.py")


def _launch(folder: Path, *arguments: str) -> None:
    source = str(Path(expertshare.__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _checkpoint(folder: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(distill_folder(folder).checkpoint, weights_only=True)
    return saved


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in distill_folder(folder).log.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["all", "routers"])
def test_two_processes_train_as_one_does_and_resume(tmp_path: Path, trained: str) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    run(alone, router_only=trained == "routers", resume=False, processes=Processes())
    _launch(together, trained, "new")
    assert _losses(together) == pytest.approx(_losses(alone), rel=1e-4)
    one, two = _checkpoint(alone), _checkpoint(together)
    assert one["step"] == two["step"] == 3
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    assert one["optimisers"][0].keys() == two["optimisers"][0].keys()


@pytest.mark.slow
def test_a_checkpoint_of_one_process_continues_on_two(tmp_path: Path) -> None:
    """The third step again, from the checkpoint behind the second, which has no number of processes in it."""
    folder = tmp_path / "run"
    run(tmp_path / "whole", router_only=False, resume=False, processes=Processes())
    run(folder, router_only=False, resume=False, processes=Processes(), interrupt_at=2)
    assert _checkpoint(folder)["step"] == 2
    _launch(folder, "all", "resume")
    assert _checkpoint(folder)["step"] == 3
    for name, tensor in _checkpoint(tmp_path / "whole")["model"].items():
        torch.testing.assert_close(_checkpoint(folder)["model"][name], tensor, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    ("change", "message"), [({"samples_per_step": 5}, "multiple"), ({"optimiser": "muon"}, "muon")]
)
def test_what_cannot_be_shared_out_is_refused(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"policy": "vanilla", "samples_per_step": 6, **change}
    with pytest.raises(TrainingError, match=message):
        Processes(rank=0, count=2).check(DistillConfig(**settings))

"""What goes wrong on a disk: interruption, no room, another source, damage. Nothing finished is lost or wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from expertshare.convert import convert, restore, verify
from expertshare.errors import CheckpointError, InputError

from .models import CONFIGS, directory_bytes, read_all, same_bits, save_random

SAR = CONFIGS["sdar_moe"]  # three MoE layers


class Stop(Exception):
    """An interruption."""


def stop_at(name: str, after: int) -> object:
    def on_progress(file: str, done: int, total: int) -> None:
        seen.append(file)
        if seen.count(name) > after:
            raise Stop

    seen: list[str] = []
    return on_progress


@pytest.mark.parametrize("place", ["experts-00000.safetensors", "experts-00002.safetensors", "dense.safetensors"])
def test_an_interrupted_conversion_goes_on_and_gives_the_same_bytes(place: str, tmp_path: Path) -> None:
    source = save_random(SAR, tmp_path / "source")
    convert(source, tmp_path / "whole")
    with pytest.raises(Stop):
        convert(source, tmp_path / "out", on_progress=stop_at(place, 3))
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*.writing*"))
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert convert(source, tmp_path / "out").fresh
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "whole")
    assert {tmp_path / "out" / p.name: t for p, t in finished.items()} == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out" / p.name for p in finished)
    }
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_file_that_changed_meanwhile_is_written_again(tmp_path: Path) -> None:
    source = save_random(SAR, tmp_path / "source")
    convert(source, tmp_path / "whole")
    with pytest.raises(Stop):
        convert(source, tmp_path / "out", on_progress=stop_at("dense.safetensors", 0))
    victim = tmp_path / "out.partial" / "experts-00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[9000] ^= 1
    victim.write_bytes(data)
    convert(source, tmp_path / "out")
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "whole")


KILLED = """
import sys, time
from expertshare.convert import convert
def on_progress(name, done, total):
    if name == "experts-00001.safetensors":
        print("there", flush=True)
        time.sleep(60)
convert(sys.argv[1], sys.argv[2], on_progress=on_progress)
"""


def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    source = save_random(SAR, tmp_path / "source")
    convert(source, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        with pytest.raises(CheckpointError, match="another process is writing"):
            convert(source, tmp_path / "out")
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out")
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "whole")


def test_another_source_or_scheme_is_refused_on_resume(tmp_path: Path) -> None:
    source = save_random(SAR, tmp_path / "source")
    with pytest.raises(Stop):
        convert(source, tmp_path / "out", on_progress=stop_at("experts-00001.safetensors", 1))
    other = save_random(SAR, tmp_path / "other", seed=8)
    with pytest.raises(CheckpointError, match="begun with another source_sha256"):
        convert(other, tmp_path / "out")
    with pytest.raises(CheckpointError, match="begun with another slab"):
        convert(source, tmp_path / "out", quantise="int4")
    convert(source, tmp_path / "out")
    assert verify(tmp_path / "out") > 0


LIMITED = """
import resource, sys
from expertshare.convert import convert
from expertshare.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    convert(sys.argv[1], sys.argv[2])
except CheckpointError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the layer files fit, the dense tensors do not."""
    source = save_random(SAR, tmp_path / "source")
    convert(source, tmp_path / "whole")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole").iterdir()}
    limit = (sizes["experts-00000.safetensors"] + sizes["dense.safetensors"]) // 2
    assert sizes["experts-00000.safetensors"] < limit < sizes["dense.safetensors"]
    command = [sys.executable, "-c", LIMITED, str(source), str(tmp_path / "out"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the disk is full" in done.stdout
    assert "3 finished files are kept" in done.stdout
    assert not done.stderr
    convert(source, tmp_path / "out")
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "whole")


def test_no_space_in_the_middle_of_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_random(SAR, tmp_path / "source")
    real = os.fsync
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="the disk is full"):
            convert(source, tmp_path / "out")
    assert not list((tmp_path / "out.partial").glob("*.writing*"))
    convert(source, tmp_path / "out")
    restore(tmp_path / "out", tmp_path / "back")
    assert same_bits(read_all(source), read_all(tmp_path / "back"))


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_random(SAR, tmp_path / "source")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes more, but its disk has 1,000 bytes free"):
        convert(source, tmp_path / "out")
    assert not list((tmp_path / "out.partial").glob("*.safetensors"))


@pytest.mark.parametrize("what", ["flipped", "truncated", "removed"])
def test_damage_is_found_by_verify(what: str, tmp_path: Path) -> None:
    source = save_random(SAR, tmp_path / "source")
    convert(source, tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name != "checksums.json")
    assert verify(tmp_path / "out") == size
    victim = tmp_path / "out" / "experts-00002.safetensors"
    data = bytearray(victim.read_bytes())
    if what == "flipped":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif what == "truncated":
        victim.write_bytes(data[:-100])
    else:
        victim.unlink()
    with pytest.raises(CheckpointError, match=r"experts-00002\.safetensors(: expert \d+ has checksum| has| is)"):
        verify(tmp_path / "out")
    if what != "flipped":
        with pytest.raises(CheckpointError, match=r"experts-00002"):
            convert(source, tmp_path / "out")


def test_a_truncated_source_is_told(tmp_path: Path) -> None:
    source = save_random(SAR, tmp_path / "source")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_an_expert_is_told(tmp_path: Path) -> None:
    source = save_random(SAR, tmp_path / "source")
    weights = source / "model.safetensors"
    tensors = read_all(source)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.2\.up_proj.*NaN"):
        convert(source, tmp_path / "out")


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    source = save_random(SAR, tmp_path / "source")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be made"):
        convert(source, tmp_path / "file" / "out")
    with pytest.raises(InputError, match="not made by this command"):
        convert(source, tmp_path / "file")


def test_a_damaged_journal_is_told(tmp_path: Path) -> None:
    source = save_random(SAR, tmp_path / "source")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "journal.json").write_text('{"format": 9}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="not a list of checksums of format 1"):
        convert(source, tmp_path / "out")


MEASURED = """
import resource, sys, torch
from expertshare.convert import convert
from expertshare.convert.source import read_checkpoint
read_checkpoint  # everything is imported by now
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2], quantise=sys.argv[3])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("scheme", ["none", "int4"])
def test_memory_stays_below_one_layer(scheme: str, tmp_path: Path) -> None:
    """Peak resident memory, as the kernel counts it, grows by less than the experts of one layer."""
    from dataclasses import replace

    config = replace(SAR, hidden_size=512, expert_hidden=512, num_layers=2, router=replace(SAR.router, num_experts=64))
    layer = 64 * config.num_expert_parameters * 2
    source = save_random(config, tmp_path / "source")
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out"), scheme]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < layer / 2

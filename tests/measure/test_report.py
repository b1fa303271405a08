"""Reports: their form, their file, and what they say of the machine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from expertshare.errors import InputError
from expertshare.measure.memory import peak_memory_bytes
from expertshare.measure.report import Report, capture_environment, check_writable, checkout_commit, write_json


def example(results: object = None) -> Report:
    return Report(
        command="generate", environment=capture_environment(), seeds={"decoding": 3}, config={"a": 1}, results=results
    )


def test_report_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    example({"text": "é"}).write(path)
    value = json.loads(path.read_text(encoding="utf-8"))
    assert list(value) == ["schema_version", "command", "environment", "seeds", "config", "results"]
    assert (value["schema_version"], value["seeds"], value["results"]) == (1, {"decoding": 3}, {"text": "é"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_put_in_words_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON compliant"):
        example(float("nan")).write(path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("place", ["missing/report.json", "."])
def test_unwritable_paths(tmp_path: Path, place: str) -> None:
    with pytest.raises(InputError, match="expected a path that can be written"):
        check_writable(tmp_path / place)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(InputError, match="can be written"):
        write_json(tmp_path / "a.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_writable_path_is_left_alone(tmp_path: Path) -> None:
    check_writable(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_environment_names_versions_and_machine() -> None:
    found = capture_environment().to_json()
    assert found["versions"]["torch"] == torch.__version__ or found["versions"]["torch"] in torch.__version__
    assert found["versions"].keys() >= {"python", "expertshare", "transformers"}
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu"
    assert found["cpu"]


def test_peak_memory_is_at_least_what_is_resident() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert peak_memory_bytes() >= 0.9 * pages * os.sysconf("SC_PAGE_SIZE")


def git(directory: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", directory, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_of_a_checkout(tmp_path: Path) -> None:
    file, other = tmp_path / "tracked.py", tmp_path / "untracked.py"
    file.write_text("a = 1\n")
    other.write_text("b = 1\n")
    assert checkout_commit(file) is None
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", file.name)
    assert checkout_commit(file) is None
    git(tmp_path, "commit", "--quiet", "--no-verify", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert checkout_commit(file) == commit
    assert checkout_commit(other) is None
    file.write_text("a = 2\n")
    assert checkout_commit(file) == f"{commit}+"

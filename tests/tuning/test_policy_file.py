"""Policy files: what is written is read back, and every way of being wrong is an error."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from expertshare.errors import InputError, PolicyError
from expertshare.evaluation.prompts import PromptRecord
from expertshare.models import LoadedModel, load_model
from expertshare.routing import Layerwise, RoutingPolicy, make_policy
from expertshare.tuning.policy_file import (
    PolicyFile,
    check_model,
    model_facts,
    model_fingerprint,
    prompts_fingerprint,
    read_policy_file,
)

PLAIN = make_policy("des-vote", {"budget": 7})
LAYERED = Layerwise(layers=(make_policy("vanilla"), make_policy("block-top-p", {"top_p_experts": 0.75, "guard": 8})))


def file_of(policy: RoutingPolicy, loaded: LoadedModel) -> PolicyFile:
    evidence = {"claim": "not certified: made by hand", "tested": []}
    return PolicyFile(policy=policy, certified=False, model=model_facts(loaded), evidence=evidence)


def edited(path: Path, change: Callable[[dict[str, Any]], None], *, honest: bool = False) -> Path:
    """Change the file's contents; honest: with the checksum that belongs to them."""
    content = json.loads(path.read_text())
    change(content)
    if honest:
        content.pop("checksum")
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def written(tmp_path: Path, loaded: LoadedModel) -> Path:
    path = tmp_path / "policy.json"
    file_of(LAYERED, loaded).write(path)
    return path


@pytest.mark.parametrize("policy", [PLAIN, LAYERED], ids=["plain", "layerwise"])
def test_what_is_written_is_read_back(policy: RoutingPolicy, loaded: LoadedModel, tmp_path: Path) -> None:
    file = file_of(policy, loaded)
    file.write(tmp_path / "policy.json")
    found = read_policy_file(tmp_path / "policy.json")
    assert (found.policy, found.certified, found.model, found.evidence) == (policy, False, file.model, file.evidence)
    check_model(found, loaded)


def test_edited_evidence_is_found(written: Path) -> None:
    def boast(content: dict[str, Any]) -> None:
        content["evidence"]["claim"] = "certified: everything"

    with pytest.raises(InputError, match="edited after tuning"):
        read_policy_file(edited(written, boast))


def test_an_edited_knob_is_found(written: Path) -> None:
    def widen(content: dict[str, Any]) -> None:
        content["policy"]["layers"][1]["knobs"]["guard"] = 9

    with pytest.raises(InputError, match="edited after tuning"):
        read_policy_file(edited(written, widen))


def _rename_knob(content: dict[str, Any]) -> None:
    content["policy"]["layers"][1]["knobs"] = {"budgte": 3}


def _rename_policy(content: dict[str, Any]) -> None:
    content["policy"]["layers"][0]["name"] = "vanila"


def _malform(content: dict[str, Any]) -> None:
    content["policy"] = ["des-vote"]


def _list_name(content: dict[str, Any]) -> None:
    content["policy"]["layers"][0]["name"] = ["vanilla"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename_knob, "no knob 'budgte'"),
        (_rename_policy, "unknown policy 'vanila'"),
        (_malform, "a policy as"),
        (_list_name, "a policy as"),
    ],
)
def test_an_unusable_policy_is_named(written: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        read_policy_file(edited(written, change, honest=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format="something"), "expected a policy file"),
        (lambda content: content.update(format_version=99), "format_version 1, got 99"),
        (lambda content: content.update(modle={}), "'modle'.*Did you mean 'model'"),
        (lambda content: content.pop("evidence"), "got none of evidence"),
    ],
)
def test_another_kind_of_file_is_refused(written: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_policy_file(edited(written, change))


def test_a_missing_file_and_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="readable policy file"):
        read_policy_file(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("des-vote:budget=16")
    with pytest.raises(InputError, match="expected a policy file"):
        read_policy_file(tmp_path / "text.json")


@pytest.mark.parametrize("value", ["NaN", "1e999", '"\\ud800"', "[" * 100_000, "1" * 5000])
def test_values_that_no_policy_file_holds_are_refused(written: Path, value: str) -> None:
    written.write_text(written.read_text().replace('"not certified: made by hand"', value))
    with pytest.raises(InputError, match=r"expected a policy file \(JSON\)"):
        read_policy_file(written)


def test_a_model_with_other_weights_is_refused(written: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors")
    with pytest.raises(PolicyError, match="expected the model that it was made for"):
        check_model(read_policy_file(written), load_model(other))


def test_a_policy_with_another_number_of_layers_is_refused(loaded: LoadedModel) -> None:
    file = file_of(Layerwise(layers=(PLAIN,) * 3), loaded)
    with pytest.raises(PolicyError, match="each of 2 MoE layers, got 3"):
        check_model(file, loaded)


def test_a_knob_that_the_model_cannot_work_with_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(PolicyError, match="budget must lie in"):
        check_model(file_of(make_policy("des-vote", {"budget": 40}), loaded), loaded)


def test_a_model_in_memory_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="safetensors"):
        model_fingerprint(tmp_path)


def test_every_part_of_a_prompt_counts_for_its_fingerprint() -> None:
    records = [
        PromptRecord(prompt="a"),
        PromptRecord(prompt="a", reference="1"),
        PromptRecord(prompt="a", task="arith"),
        PromptRecord(prompt="a", tests=("assert True",)),
    ]
    assert len({prompts_fingerprint([record]) for record in records}) == 4

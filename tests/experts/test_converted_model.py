"""A converted model answers with the very tokens of the original, wherever its experts are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from backends import backend_named
from expertshare import api
from expertshare.api import loading
from expertshare.cli import main
from expertshare.convert.writing import json_bytes
from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.errors import CheckpointError, ConfigError, ExpertMemoryError
from expertshare.experts import BudgetedStore, ExpertMemory, StoreOptions, read_manifest
from expertshare.experts.layout import MANIFEST, layer_file_name
from expertshare.measure.memory import MemoryWatch, anonymous_bytes, peak_resident_bytes
from expertshare.models import LoadedModel, Runtime, load_model
from expertshare.models.runtime import ForwardInput
from expertshare.native import available
from expertshare.routing import make_policy

from .conversion import convert

REFERENCE = Path(__file__).parents[2] / "models" / "reference"
PROMPT = "Tom has 12 apples. He finds 7 more. How many apples does Tom have now?"
STEPS = {"gen_length": 32, "threshold": None, "steps_per_block": 12}
EXACT = "cpu" if available() else "torch"
"""Backends whose sums do not depend on the order of experts in the bank."""


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype) -> Path:
    return convert(REFERENCE, tmp_path_factory.mktemp("converted") / "model", dtype)


@pytest.fixture(scope="module")
def original(dtype: torch.dtype) -> LoadedModel:
    return load_model(REFERENCE, dtype)


def slots(converted: Path, count: int) -> ExpertMemory:
    return ExpertMemory(kind="budget", num_bytes=count * read_manifest(converted).format.slab_bytes)


def hidden_states(loaded: LoadedModel, runtime: Runtime) -> torch.Tensor:
    tokens = torch.randint(3, 500, (1, 32), generator=torch.Generator().manual_seed(0))
    inputs = ForwardInput(
        tokens_BS=tokens,
        positions_BS=torch.arange(32).expand(1, 32),
        live_BS=torch.ones(1, 32, dtype=torch.bool),
        mask_BSP=torch.ones(1, 32, 32, dtype=torch.bool),
        block_length=32,
    )
    with torch.no_grad():
        return loaded.model(inputs, runtime).hidden_BSD  # type: ignore[no-any-return]


@pytest.mark.parametrize("prefetch", [True, False])
def test_hidden_states_are_the_same_bit_for_bit(converted: Path, original: LoadedModel, prefetch: bool) -> None:
    policy = make_policy("des-vote", {"budget": 16}).bind(original.config.router)
    expected = hidden_states(original, Runtime(policy=policy, backend=backend_named(EXACT)))
    loaded = load_model(converted)
    assert loaded.layout is not None
    budget = slots(converted, 40).num_bytes
    with BudgetedStore(converted, loaded.layout, budget, prefetch=prefetch) as store:
        for _ in range(4):
            found = hidden_states(loaded, Runtime(policy=policy, backend=backend_named(EXACT), store=store))
            assert torch.equal(found, expected)
        for backend in ("torch", "cpu"):
            if backend != "cpu" or available():
                found = hidden_states(loaded, Runtime(policy=policy, backend=backend_named(backend), store=store))
                own = hidden_states(original, Runtime(policy=policy, backend=backend_named(backend)))
                assert torch.allclose(found.float(), own.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("memory", ["all", "mmap", "tight", "tight without prefetch"])
@pytest.mark.parametrize("policy", ["vanilla", "des-vote:budget=16", "des-vote:budget=16,voters=masked,reuse=4"])
def test_answers_are_the_same_token_for_token(
    converted: Path, original: LoadedModel, dtype: torch.dtype, memory: str, policy: str
) -> None:
    expected = api.generate(original, PROMPT, policy=policy, backend=EXACT, **STEPS)
    where = ExpertMemory.parse(memory) if memory in ("all", "mmap") else slots(converted, 70)
    store = StoreOptions(memory=where, prefetch="without" not in memory)
    found = api.generate(str(converted), PROMPT, policy=policy, backend=EXACT, store=store, **STEPS)
    assert found.answers[0].token_ids == expected.answers[0].token_ids
    assert found.cost.to_json() == expected.cost.to_json()
    statistics = found.run.expert_store
    assert statistics is not None
    asked = sum(sum(step.active_experts) for step in found.cost.steps)
    assert statistics.total.requests == asked
    if memory.startswith("tight"):
        assert 0 < statistics.total.reads * statistics.slot_bytes < asked * statistics.slot_bytes
    else:
        assert found.config["expert_store"] == {"memory": memory, "direct": False, "prefetch": True}


def test_facts_count_experts_that_are_elsewhere(converted: Path, original: LoadedModel) -> None:
    mine, theirs = api.info(str(converted)), api.info(original)
    assert (mine.num_parameters, mine.bytes_per_expert) == (theirs.num_parameters, theirs.bytes_per_expert)
    assert (mine.total_bytes, mine.experts_share) == (theirs.total_bytes, theirs.experts_share)


def test_a_model_without_experts_needs_a_store(converted: Path) -> None:
    loaded = load_model(converted)
    assert not any(".experts." in name for name in loaded.model.state_dict())
    runtime = Runtime(policy=make_policy("vanilla", {}))
    with pytest.raises(ConfigError, match=r"Runtime\(store="):
        next(BlockDecoder(loaded.model, runtime, DecodingOptions(gen_length=32)).blocks([[5, 6]]))


def test_a_budget_that_cannot_work_names_one_that_does(converted: Path) -> None:
    with pytest.raises(ExpertMemoryError, match=r"needs \d+ experts at once.*at least [\d.]+MiB, got [\d.]+KiB"):
        api.generate(str(converted), PROMPT, store=StoreOptions(memory=slots(converted, 7)), gen_length=32)


def test_a_truncated_file_is_named_and_the_model_still_loads_later(converted: Path) -> None:
    path = converted / layer_file_name(1)
    content = path.read_bytes()

    def cut(_: object) -> None:
        path.write_bytes(content[: len(content) // 2])

    try:
        with pytest.raises(CheckpointError, match=r"experts-00001\.safetensors ends within expert"):
            api.generate(
                str(converted),
                PROMPT,
                on_block=cut,
                store=StoreOptions(memory=slots(converted, 70)),
                gen_length=96,
                stop_at_eos=False,
            )
        with pytest.raises(CheckpointError, match="bytes, expected"):
            load_model(converted)
    finally:
        path.write_bytes(content)
    assert api.generate(str(converted), PROMPT, store="4MiB", gen_length=32).answers


def test_files_of_another_model_are_refused(converted: Path, dtype: torch.dtype) -> None:
    layout = read_manifest(converted)
    fewer = type(layout)(format=layout.format, num_experts=layout.num_experts, expert_files=layout.expert_files[:2])
    try:
        (converted / MANIFEST).write_bytes(json_bytes(fewer.to_json()))
        with pytest.raises(CheckpointError, match=r"\(2, 64, 128, 32\), expected \(3, 64, 128, 32\)"):
            load_model(converted)
    finally:
        (converted / MANIFEST).write_bytes(json_bytes(layout.to_json()))
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    with pytest.raises(ConfigError, match="experts are stored in"):
        load_model(converted, other)


def test_the_command_line_says_what_the_store_did(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = str(slots(converted, 70).num_bytes)
    flags = ["--expert-memory", size, "--gen-length", "32", "--threshold", "none", "--json"]
    with pytest.raises(SystemExit) as left:
        main(["generate", str(converted), "--prompt", PROMPT, *flags])
    assert not left.value.code
    captured = capsys.readouterr()
    line = json.loads(captured.out)
    store = line["expert_store"]
    assert store["kind"] == "budget"
    assert store["slots"] == 70
    assert len(store["hit_rate_by_layer"]) == 3
    assert 0 < store["hit_rate"] < 1
    assert store["bytes_read"] == store["reads"] * store["slot_bytes"] > 0
    assert store["stall_s"] > 0
    assert 0 < line["peak_anonymous_bytes"] <= line["peak_memory_bytes"]
    assert "70 slots of" in captured.err


def test_the_command_line_compares_at_one_budget(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    size = str(slots(converted, 70).num_bytes)
    arguments = ["compare", converted, "--prompts", prompts, "--policies", "vanilla,des-vote:budget=16"]
    with pytest.raises(SystemExit) as left:
        main([*map(str, arguments), "--expert-memory", size, "--gen-length", "32", "--threshold", "none", "--json"])
    assert not left.value.code
    report = json.loads(capsys.readouterr().out)
    vanilla, shared = (run["expert_store"] for run in report["runs"])
    assert shared["requests"] < vanilla["requests"]
    assert shared["hit_rate"] > vanilla["hit_rate"]
    assert report["peak_anonymous_bytes"] > 0


@pytest.mark.parametrize(
    "flags", [["--expert-memory", "1GiB"], ["--direct-io"], ["--expert-memory", "mmap"], ["--host-memory", "all"]]
)
def test_a_model_that_is_not_converted_is_refused_before_loading(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as left:
        main(["generate", str(REFERENCE), "--prompt", PROMPT, *flags])
    assert left.value.code == 2
    assert "expertshare convert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"), [("all", "the model is on the CPU"), ("mmap", "host memory: expected a size")]
)
def test_host_memory_is_refused_without_a_gpu(
    converted: Path, given: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["generate", str(converted), "--prompt", PROMPT, "--expert-memory", "1MiB", "--host-memory", given])
    assert left.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_watch_sees_memory_that_came_and_went() -> None:
    with MemoryWatch() as watch, watch:
        before = anonymous_bytes()
        block = torch.ones(32 << 20, dtype=torch.uint8)
        peak = watch.peak_anonymous_bytes
        del block
    assert before is not None
    assert peak is not None
    assert peak >= before + (30 << 20)
    assert watch.peak_anonymous_bytes == peak
    assert peak_resident_bytes() >= peak

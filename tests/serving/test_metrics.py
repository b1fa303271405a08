"""What Prometheus is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from expertshare import api
from expertshare.convert import convert
from expertshare.experts import ExpertMemory, StoreOptions
from expertshare.models import LoadedModel
from expertshare.serving import EngineLimits

from .server import PROMPTS, REFERENCE, Serve, Served, alone, running

ASK = {"model": "reference", "messages": [{"role": "user", "content": PROMPTS[0]}]}


def scrape(served: Served) -> dict[tuple[str, tuple[str, ...]], float]:
    text = served.http().get("/metrics").text
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_tokens_forwards_and_experts(serve: Serve, reference: LoadedModel) -> None:
    served = serve()
    expected = alone(reference, PROMPTS[0])
    tokens = len(expected.answers[0].token_ids)
    for _ in range(2):
        served.openai().chat.completions.create(**ASK)
    served.http().post("/v1/chat/completions", json={})
    served.http().get("/x" * 50)
    seen = scrape(served)
    cost = expected.cost
    assert seen["expertshare_requests_total", ("/v1/chat/completions", "200")] == 2
    assert seen["expertshare_requests_total", ("/v1/chat/completions", "400")] == 1
    assert seen["expertshare_requests_total", ("other", "404")] == 1
    assert seen["expertshare_request_seconds_count", ("/v1/chat/completions",)] == 3
    assert seen["expertshare_first_block_seconds_count", ()] == 2
    assert seen["expertshare_completion_tokens_total", ()] == 2 * tokens
    assert seen["expertshare_answers_total", ("eos",)] == 2
    for kind in ("denoise", "commit"):
        assert seen["expertshare_forwards_total", (kind,)] == 2 * cost.forwards[kind]
        assert seen["expertshare_expert_bytes_total", (kind,)] == 2 * cost.expert_bytes[kind]
    assert seen["expertshare_row_steps_total", ()] == 2 * cost.forwards["denoise"]
    for layer, mean in enumerate(cost.unique_experts_by_layer["denoise"]):
        total, count = (seen[f"expertshare_unique_experts_{end}", (str(layer),)] for end in ("sum", "count"))
        assert total / count == pytest.approx(mean)
    for name in ("queue_length", "running"):
        assert seen[f"expertshare_{name}", ()] == 0
    assert seen["expertshare_ready", ()] == 1
    assert seen["process_resident_memory_bytes", ()] > 1e6
    assert not any(name == "expertshare_store_hit_rate" for name, _ in seen)


def test_a_converted_model_and_its_store(tmp_path: Path) -> None:
    """Rows run one by one where the store does not hold a layer, and answers stay the same."""
    converted = tmp_path / "converted"
    convert(str(REFERENCE), converted)
    loaded = api.load(converted, store="all")
    slab = loaded.layout.format.slab_bytes
    expected = alone(loaded, PROMPTS[0], policy="des-vote:budget=24").answers[0].text
    for slots, rows in ((40, 1), (100, 4)):
        options = {"store": StoreOptions(memory=ExpertMemory.parse(str(slots * slab))), "policy": "des-vote:budget=24"}
        with running(loaded, limits=EngineLimits(max_batch=4), **options) as served:
            assert served.engine.max_rows == rows
            reply = served.openai().chat.completions.create(model="converted", messages=ASK["messages"], n=3)
            assert [choice.message.content for choice in reply.choices] == [expected] * 3
            assert 0 <= scrape(served)["expertshare_store_hit_rate", ()] < 1

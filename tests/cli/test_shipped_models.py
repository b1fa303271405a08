"""Every model in the repository loads, answers, and uses as many experts as its card says."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertshare import api

MODELS = Path(__file__).parents[2] / "models"
PROMPT = "Solve x + 5 = 12."


@pytest.mark.parametrize(
    ("name", "policy", "most"),
    [
        ("reference", "vanilla", 64.0),
        ("reference-llada-moe", "vanilla", 64.0),
        ("reference-llada-moe", "des-vote:budget=20", 20.0),
        ("reference-distilled", "block-top-p:top_p_experts=0.52,group_limit=ignore", 9.0),
    ],
)
def test_it_answers(name: str, policy: str, most: float) -> None:
    result = api.generate(str(MODELS / name), PROMPT, policy=policy, gen_length=64)
    assert result.answers[0].finish_reason == "eos"
    assert "7" in result.answers[0].text
    assert 8.0 <= result.cost.unique_experts["denoise"] <= most


def test_all_of_them_are_listed_and_small() -> None:
    sizes = {path.parent.name: path.stat().st_size for path in MODELS.glob("*/model.safetensors")}
    assert sorted(sizes) == ["reference", "reference-distilled", "reference-llada-moe"]
    assert max(sizes.values()) < 24e6
    assert sum(sizes.values()) < 60e6
    readme = (MODELS.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"models/{name}/README.md" in readme for name in sizes)

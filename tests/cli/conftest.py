"""A tiny random checkpoint on disk, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from expertshare.cli import main
from expertshare.config import ModelConfig, RouterSpec
from expertshare.models import MoETransformer, initialise, save_model
from expertshare.tasks import save_tokenizer

ROUTER = RouterSpec(
    num_experts=16,
    top_k=4,
    activation="sigmoid",
    renormalise=True,
    scaling=2.5,
    num_groups=4,
    kept_groups=2,
    has_bias=True,
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tokenizer(directory)
    vocab_size = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    config = ModelConfig(
        family="llada2_moe",
        vocab_size=vocab_size,
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        rotary_dim=8,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        num_dense_layers=1,
        dense_hidden=48,
        expert_hidden=16,
        shared_hidden=16,
        router=ROUTER,
        attention="block_causal",
        block_length=8,
        max_positions=128,
        mask_id=0,
        eos_ids=(1,),
        pad_id=2,
    )
    model = MoETransformer(config)
    initialise(model, seed=0, std=0.2)
    return save_model(model, directory)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: Any) -> Outcome:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = left.value.code
        return Outcome(code if isinstance(code, int) else 0, captured.out, captured.err)

    return call

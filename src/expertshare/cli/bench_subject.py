"""What `expertshare bench generate` decodes with a model from a directory."""

from __future__ import annotations

from pathlib import Path

import torch

from expertshare import api
from expertshare.decoding import DecodingOptions
from expertshare.evaluation import encode_prompts
from expertshare.evaluation.prompts import read_prompts
from expertshare.lab.bench import Subject


def loaded_subject(
    model: str,
    prompts: Path,
    limit: int,
    dtype: str | None,
    gen_length: int,
    threshold: float,
    seed: int,
    device: torch.device,
) -> Subject:
    """The model and the first `limit` prompts of the file, encoded."""
    records = read_prompts(prompts)[:limit]
    loaded = api.load(model, dtype=dtype, device=device)
    loaded.model.requires_grad_(False)
    return Subject(
        name=str(loaded.path),
        model=loaded.model,
        prompts=encode_prompts(loaded, [record.prompt for record in records], None),
        options=DecodingOptions(gen_length=gen_length, threshold=threshold, seed=seed),
    )

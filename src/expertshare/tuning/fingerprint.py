"""Which model, and which prompts, a policy file was made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from expertshare.errors import InputError
from expertshare.evaluation.prompts import PromptRecord

_CHUNK_BYTES = 4096
_NUM_CHUNKS = 256


def model_fingerprint(path: str | Path) -> str:
    """SHA-256 over the configuration, and over sizes, headers and evenly spaced samples of all weight files.

    Samples (1 MiB of each file) keep this at milliseconds for models of any size: any training step changes nearly
    all of them, an edit of one weight may change none. Raises InputError where there are no weight files.
    """
    directory = Path(path)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InputError(f"expected a model directory with .safetensors files, got {path}; name a saved model")
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header, size)))
            for index in range(_NUM_CHUNKS):
                stream.seek(max(0, size - _CHUNK_BYTES) * index // (_NUM_CHUNKS - 1))
                digest.update(stream.read(_CHUNK_BYTES))
    return digest.hexdigest()


def prompts_fingerprint(records: Sequence[PromptRecord]) -> str:
    """SHA-256 over the prompts and all that they are judged by, in order."""
    values = [[record.prompt, record.reference, record.task, list(record.tests)] for record in records]
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()

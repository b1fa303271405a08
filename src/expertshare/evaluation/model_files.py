"""Which model a directory holds."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

DOCUMENTS = frozenset({".md", ".jsonl", ".png"})
"""Files beside a model that change nothing about it."""


def model_sha256(path: Path) -> str:
    """Hash of every file of a model's directory, names included; documents and hidden files aside."""
    total = hashlib.sha256()
    for name in sorted(os.listdir(path)):
        file = path / name
        if file.is_file() and not name.startswith(".") and file.suffix not in DOCUMENTS:
            with file.open("rb") as opened:
                total.update(f"{name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()

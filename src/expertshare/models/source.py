"""Where a model comes from: a directory, or an id on the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from expertshare.errors import CheckpointError, InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
"""Weights, configurations and tokenizer files; never code."""


def resolve_source(source: str | os.PathLike[str]) -> Path:
    """The local directory of a model. Downloads weights, configs and tokenizer of a hub id, but no code.

    Raises InputError if it is neither a directory nor like a hub id, CheckpointError if the download fails.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise InputError(f"expected the directory of a model, got the file {directory}: name the folder that holds it")
    name = os.fspath(source)
    if not _HUB_ID.fullmatch(name):
        raise InputError(
            f"there is no directory {name!r}, and it is not a hub id (owner/name): check the spelling of the path"
        )
    return _download(name)


def _download(hub_id: str) -> Path:
    # Imported here: it is slow, and a local model needs none of it.
    from huggingface_hub import errors, snapshot_download

    # HfHubHTTPError is an HTTPError of httpx or of httpx2, by the release of the hub client: take the one it uses.
    http_error = next(c for c in errors.HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_PATTERNS)))
    except (http_error, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:  # type: ignore[misc]
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no directory {hub_id!r}, and downloading that id from the hub failed ({reason}). Check the "
            "spelling and the network, or download the model and give its directory"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError names the file and the line if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}: is it the directory of a model?") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON at line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: download it again") from error
    except (OSError, ValueError, RecursionError) as error:  # a folder; numbers too long, or too deep, for Python
        raise CheckpointError(f"{path} cannot be read ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`, but empty where there is no such file."""
    return read_json(path) if path.exists() else {}

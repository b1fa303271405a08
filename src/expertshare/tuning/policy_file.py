"""Policy files: a policy for one model, with the evidence that it was chosen by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertshare.errors import InputError, PolicyError, nearest
from expertshare.evaluation.prompts import PromptRecord
from expertshare.measure.report import write_json
from expertshare.models import LoadedModel
from expertshare.routing import Layerwise, RoutingPolicy, knobs, make_policy

FORMAT, FORMAT_VERSION = "expertshare policy", 1
_CHUNK_BYTES = 4096
_NUM_CHUNKS = 256
KEYS = ("format", "format_version", "certified", "policy", "model", "evidence", "checksum")


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyFile:
    """What a policy file says.

    model: fingerprint and number of MoE layers, experts and experts per token of the model that it is for. certified:
    whether the evidence supports the promise in it. evidence: any JSON. path: where it was read from, for messages.
    """

    policy: RoutingPolicy
    certified: bool
    model: Mapping[str, Any]
    evidence: Mapping[str, Any]
    path: str = "policy file"

    def to_json(self) -> dict[str, Any]:
        """Plain values, the checksum of all others last."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "certified": self.certified,
            "policy": policy_json(self.policy),
            "model": dict(self.model),
            "evidence": dict(self.evidence),
        }
        return {**content, "checksum": _checksum(content)}

    def write(self, path: str | Path) -> None:
        """Put the file at `path`, whole or not at all; InputError where it cannot be written."""
        write_json(path, self.to_json())


def model_facts(loaded: LoadedModel) -> dict[str, Any]:
    """What a policy file says of its model."""
    router = loaded.config.router
    return {
        "fingerprint": model_fingerprint(loaded.path),
        "num_moe_layers": loaded.config.num_moe_layers,
        "num_experts": router.num_experts,
        "top_k": router.top_k,
    }


def policy_json(policy: RoutingPolicy) -> dict[str, Any]:
    """Name and set knobs, or "layers" with one such object for each MoE layer."""
    if isinstance(policy, Layerwise):
        return {"layers": [policy_json(layer) for layer in policy.layers]}
    return {"name": policy.name, "knobs": {k: v for k, v in knobs(policy).items() if v is not None}}


def read_policy_file(path: str | Path) -> PolicyFile:
    """Raises InputError for a file that is none, or was changed after it was made; PolicyError for its policy."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        checksum = _checksum(content)
    except OSError as error:
        raise InputError(f"expected a readable policy file, got {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:  # no JSON, or values that JSON or Python cannot hold
        raise InputError(f"expected a policy file (JSON), got {path}: {error}; expertshare tune makes one") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f'expected a policy file ("format": "{FORMAT}"), got {path}; make one with expertshare tune')
    if content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version")
        raise InputError(f"{path}: expected format_version {FORMAT_VERSION}, got {found}; tune again with this version")
    _check_keys(content, path)
    if content["checksum"] != checksum:
        raise InputError(
            f"{path}: expected the contents that its checksum was made of, got others: policy or evidence was edited "
            "after tuning. Tune again; a policy of your own needs no file (--policy)."
        )
    try:
        policy = _policy(content["policy"])
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from error
    return PolicyFile(
        policy=policy, path=str(path), **{name: content[name] for name in ("certified", "model", "evidence")}
    )


def check_model(file: PolicyFile, loaded: LoadedModel) -> None:
    """Raise PolicyError unless `file` was made for this very model."""
    path, expected, got = file.path, dict(file.model), model_facts(loaded)
    for name, value in got.items():
        if expected.get(name) != value:
            raise PolicyError(
                f"{path}: expected the model that it was made for ({name} {expected.get(name)}), got {loaded.path} "
                f"({name} {value}). What it promises holds for that model only: tune for this one."
            )
    if isinstance(file.policy, Layerwise) and len(file.policy.layers) != loaded.config.num_moe_layers:
        raise PolicyError(
            f"{path}: expected a policy for each of {loaded.config.num_moe_layers} MoE layers, "
            f"got {len(file.policy.layers)}: tune for this model"
        )
    file.policy.bind(loaded.config.router)


def _check_keys(content: Mapping[str, Any], path: str | Path) -> None:
    for key in content:
        if key not in KEYS:
            raise InputError(f"{path}: expected only known keys, got {key!r}. {nearest(key, KEYS)}")
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise InputError(f"{path}: expected the keys {', '.join(KEYS)}, got none of {', '.join(missing)}; tune again")


def _policy(value: Any) -> RoutingPolicy:
    if isinstance(value, dict) and set(value) == {"layers"} and isinstance(value["layers"], list):
        return Layerwise(layers=tuple(_policy(layer) for layer in value["layers"]))
    is_plain = isinstance(value, dict) and set(value) == {"name", "knobs"}
    if is_plain and isinstance(value["name"], str) and isinstance(value["knobs"], dict):
        return make_policy(value["name"], value["knobs"])
    raise PolicyError(f'expected a policy as {{"name", "knobs"}} or {{"layers"}}, got {json.dumps(value)[:80]}')


def _checksum(content: Any) -> str:
    """SHA-256 of the canonical form, the checksum left out. It finds edits and damage; it is no signature."""
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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

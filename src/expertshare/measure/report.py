"""The JSON file that says what was run, where (versions, commit, processor), how, and what came of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import expertshare
from expertshare.errors import InputError

SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """commit: of the checkout that the package runs from, None outside one; a "+" marks local changes.

    cpu_count: logical processors; threads: those that torch uses for one operation.
    """

    versions: dict[str, str]
    commit: str | None
    platform: str
    cpu: str
    cpu_count: int
    threads: int
    device: str

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One command's record. config: the resolved configuration; results: what the command measured."""

    command: str
    environment: Environment
    seeds: Mapping[str, int]
    config: Mapping[str, Any]
    results: Any

    def to_json(self) -> dict[str, Any]:
        """Plain values by name, `schema_version` first."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "environment": self.environment.to_json(),
            "seeds": dict(self.seeds),
            "config": dict(self.config),
            "results": self.results,
        }

    def write(self, path: str | Path) -> None:
        """Put the report at `path`, whole or not at all. Raises InputError where the file cannot be written."""
        write_json(path, self.to_json())


def write_json(path: str | Path, value: Any) -> None:
    """Put `value` at `path` as JSON, whole or not at all. Raises InputError where the file cannot be written."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)  # there is one only where something failed
    except OSError as error:
        raise _unwritable(target, error.strerror or str(error)) from error


def check_writable(path: str | Path) -> None:
    """Raise InputError unless a file can be put at `path`; leaves nothing behind."""
    target = Path(path)
    if target.is_dir():
        raise _unwritable(target, "it is a directory")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _unwritable(target, error.strerror or str(error)) from error


def _unwritable(path: Path, reason: str) -> InputError:
    return InputError(
        f"expected a path that can be written, got {path}: {reason}; choose another or make its directory"
    )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def capture_environment(device: torch.device | None = None) -> Environment:
    """Look at the machine and the installation. `device`: where the model runs, by default the CPU."""
    device = device or torch.device("cpu")
    return Environment(
        versions=versions(),
        commit=checkout_commit(Path(__file__)),
        platform=platform.platform(),
        cpu=_cpu_model(),
        cpu_count=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def versions() -> dict[str, str]:
    """Of Python, of this package, and of the packages that decide about numbers."""
    found = {"python": platform.python_version(), "expertshare": expertshare.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def checkout_commit(file: Path) -> str | None:
    """The commit that `file` is part of, with a "+" where tracked files differ from it; None outside a checkout.

    The file must be tracked: a package installed below somebody's checkout is no part of that commit.
    """
    directory = file.parent
    if _git(directory, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(directory, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    return f"{commit}+" if _git(directory, "status", "--porcelain", "--untracked-files=no") else commit


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    """Linux says it in /proc/cpuinfo; elsewhere the platform's own word has to do."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

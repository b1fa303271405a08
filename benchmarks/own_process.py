"""One `expertshare generate` in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def generated(model: Path, prompt: str, policy: str, memory: str, flags: Sequence[str]) -> dict[str, Any]:
    """The JSON line of one generation with `memory` for experts. Leaves the program where it fails, with its reason."""
    command = [sys.executable, "-m", "expertshare", "generate", str(model), "--prompt", prompt, "--json"]
    command += ["--policy", policy, "--expert-memory", memory, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else "it said nothing"
        ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        hint = ": out of memory? Give it a smaller --expert-memory" if done.returncode == -9 else ""
        raise SystemExit(f"{policy} with {memory} for experts: {ended}, {reason}{hint}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result

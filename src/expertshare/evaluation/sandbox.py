"""Run generated programs out of harm's way, many per second.

Guaranteed on Linux, for programs that go wrong by accident: each runs in a process of its own with limits on
processor time, wall-clock time, address space, open files and file size; an audit hook refuses new processes,
connections, signals and every change to a file; the environment and the working directory are empty; nothing is
left running. Where the kernel permits, a network namespace without interfaces backs the hook. A program
counts as passed only if it ran to its end: leaving early, in whatever way, is a failure.

Not guaranteed: this is no security boundary. A hostile expert can reach around an audit hook from inside the
interpreter, and files of this user can be read. Run untrusted models in a container or virtual machine. On
systems other than Linux the limits hold as far as `setrlimit` does.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertshare.errors import SandboxError

DEFAULT_MEMORY_BYTES = 256 * 1024 * 1024
LIBRARIES = ("numpy",)
"""What a program may import beside the standard library."""
RUNNER = Path(__file__).with_name("sandbox_runner.py")
# Beside the programs' own time: starting the supervisor, forking, a busy machine.
STARTUP_ALLOWANCE_S = 60.0
ALLOWANCE_PER_PROGRAM_S = 0.5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """`passed`: the program ran to its end. `reason`: why not, else empty."""

    passed: bool
    reason: str


@functools.cache
def _say_once(refusal: str) -> None:
    _log.warning("no network namespace for programs (%s); the audit hook alone refuses sockets", refusal)


def _converse(lines: Sequence[str], limit_s: float) -> list[str]:
    """Give the runner its input, return its output lines; it ends with this call, whatever happens."""
    command = [sys.executable, "-I", "-S", "-B", str(RUNNER)]
    with tempfile.TemporaryDirectory(prefix="expertshare-") as empty:
        try:
            done = subprocess.run(
                command,
                input="\n".join(lines),
                capture_output=True,
                text=True,
                encoding="utf-8",
                env={},
                cwd=empty,
                start_new_session=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise SandboxError(
                f"expected verdicts within {limit_s:.0f} s, got a hanging supervisor; run fewer programs"
            ) from error
    if done.returncode != 0:
        found = f"{done.returncode}: {done.stderr.strip()[-500:]}"
        raise SandboxError(
            f"expected the sandbox supervisor to end with 0, got {found}; "
            "check that this Python starts with `-I -S` and an empty environment"
        )
    return done.stdout.splitlines()


@functools.cache
def _libraries() -> dict[str, str]:
    """Where each of LIBRARIES lies, of those that are installed."""
    specs = {name: importlib.util.find_spec(name) for name in LIBRARIES}
    return {name: str(Path(spec.origin).parents[1]) for name, spec in specs.items() if spec is not None and spec.origin}


def run_programs(
    programs: Sequence[str], *, timeout_s: float = 2.0, memory_bytes: int = DEFAULT_MEMORY_BYTES
) -> list[Verdict]:
    """One verdict per program, in order. `timeout_s` is wall-clock time per program.

    Raises SandboxError if the limits make no sense or the supervisor fails; a program's failure is a verdict.
    """
    if timeout_s <= 0 or memory_bytes <= 0:
        raise SandboxError(f"expected positive limits, got timeout_s={timeout_s}, memory_bytes={memory_bytes}")
    if not programs:
        return []
    limits = json.dumps({"timeout_s": timeout_s, "memory_bytes": memory_bytes, "libraries": _libraries()})
    limit_s = STARTUP_ALLOWANCE_S + len(programs) * (timeout_s + ALLOWANCE_PER_PROGRAM_S)
    isolation, *answers = _converse([limits, *map(json.dumps, programs)], limit_s) or [""]
    if len(answers) != len(programs):
        raise SandboxError(f"expected {len(programs)} verdicts, got {len(answers)}; run fewer programs at once")
    refusal = json.loads(isolation)["network_refusal"]
    if refusal:
        _say_once(refusal)
    return [Verdict(**json.loads(answer)) for answer in answers]

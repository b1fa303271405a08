"""Programs that misbehave fail and leave nothing behind; the others pass."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from expertshare.errors import SandboxError
from expertshare.evaluation import sandbox as sandbox_module
from expertshare.evaluation.sandbox import run_programs

PASSING = {
    "assert": "def f(x):\n    return x + 1\nassert f(1) == 2",
    "prints": "print('x' * 10**6)\nimport sys\nsys.stderr.write('y')",
    "imports": "import math, re, collections, itertools, typing, heapq",
    "empty environment": "import os\nassert not os.environ and not os.listdir('.')",
    "imports numpy": "import numpy as np\nassert np.linalg.inv(2 * np.eye(2)).sum() == 1",
    "asyncio": "import asyncio\nasync def f(): await asyncio.sleep(0); return 1\nassert asyncio.run(f()) == 1",
    "not a script": "if __name__ == '__main__':\n    import sys\n    input()\n    sys.exit(0)",
    "dataclass with postponed annotations": "from __future__ import annotations\n"
    "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1).x == 1",
    "no paths but the library": "import sys\nassert not any('site-packages' in p for p in sys.path)",
}
FAILING = {
    "false assert": ("assert 1 == 2", "AssertionError"),
    "syntax": ("def f(:", "SyntaxError"),
    "null byte": ("x = '\0'", "SyntaxError"),
    "surrogate": ("x = '\ud800'", "UnicodeEncodeError"),
    "exit": ("import sys\nsys.exit(0)", "SystemExit"),
    "hard exit": ("import os\nos._exit(0)", "ended before"),
    "guessed report": (
        "import os\nfor i in range(3, 64):\n  try: os.write(i, b'passed ')\n  except OSError: 0",
        "",
    ),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "message that raises": ("class E(Exception):\n  def __str__(self): raise E\nraise E", "ended before"),
    "recursion": ("def f(): return f()\nf()", "RecursionError"),
    "fork": ("import os\nwhile True: os.fork()", "PermissionError"),
    "process": ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
    "shell": ("import os\nos.system('true')", "PermissionError"),
    "kill": ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
    "other libraries": ("import torch", "ModuleNotFoundError"),
    "ctypes": ("import ctypes", "ImportError"),
    "network socket": ("import socket\nsocket.socket()", "PermissionError"),
    "bound socket": ("import socket\nsocket.socket(socket.AF_UNIX).bind('x')", "PermissionError"),
    "socket": ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "PermissionError"),
    "memory at once": ("x = [0] * 10**9", "MemoryError"),
    "memory by and by": ("x = []\nwhile True: x.append('x' * 10**6)", "MemoryError"),
    "segfault": ("import faulthandler\nfaulthandler._sigsegv()", "signal 11"),
}
ENDLESS = {
    "loop": "while True: pass",
    "loop that catches": "while True:\n  try: raise ValueError\n  except BaseException: pass",
    "sleep": "import time\ntime.sleep(60)",
    "ignores signals": "import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60)",
}


@pytest.mark.parametrize("name", PASSING)
def test_passes(name: str) -> None:
    assert [v.reason for v in run_programs([PASSING[name]])] == [""]


def test_failures_say_why_and_do_not_disturb_the_next_program() -> None:
    good = PASSING["assert"]
    programs = [p for program, _ in FAILING.values() for p in (program, good)]
    verdicts = run_programs(programs)
    for (name, (_, reason)), verdict in zip(FAILING.items(), verdicts[::2], strict=True):
        assert not verdict.passed, name
        assert reason in verdict.reason, name
    assert all(verdict.passed for verdict in verdicts[1::2])


def test_endless_programs_are_stopped() -> None:
    verdicts = run_programs([*ENDLESS.values(), PASSING["assert"]], timeout_s=0.3)
    assert [v.reason for v in verdicts[:-1]] == ["timeout after 0.3 s"] * len(ENDLESS)
    assert verdicts[-1].passed


def test_programs_do_not_see_each_other() -> None:
    first = "import builtins, sys\nbuiltins.leak = 1\nsys.leak = 1"
    second = "import sys\nassert not hasattr(sys, 'leak')\nassert 'leak' not in dir(__builtins__)"
    assert [v.passed for v in run_programs([first, second])] == [True, True]


def test_files_cannot_be_changed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("content")
    programs = [
        f"open({str(kept)!r}, 'w')",
        f"import os\nos.open({str(kept)!r}, os.O_RDWR | os.O_TRUNC)",
        f"import os\nos.remove({str(kept)!r})",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"open({str(tmp_path / 'new')!r}, 'x')",
    ]
    assert not any(v.passed for v in run_programs(programs))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "content"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_an_escaped_descendant_is_swept_up() -> None:
    """A process that got past the audit hook, here by emptying its list, must not outlive the call."""
    program = """
import os, sys, time
frame = sys._getframe()
while frame:
    if 'BANNED_EVENTS' in frame.f_globals:
        frame.f_globals['BANNED_EVENTS'] = frozenset()
    frame = frame.f_back
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
"""
    before = _processes_of_runner()
    [verdict] = run_programs([program], timeout_s=0.5)
    assert "PermissionError" not in verdict.reason
    assert _processes_of_runner() <= before


def _processes_of_runner() -> set[str]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if b"sandbox_runner" in (entry / "cmdline").read_bytes():
                    found.add(entry.name)
            except OSError:
                continue  # it ended while we looked
    return found


def test_many_short_programs_share_one_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = sandbox_module._converse

    def counting(lines: list[str], limit_s: float) -> list[str]:
        calls.append(len(lines))
        return real(lines, limit_s)

    monkeypatch.setattr(sandbox_module, "_converse", counting)
    verdicts = run_programs([f"assert {n} % 2 == 0" for n in range(200)])
    assert [v.passed for v in verdicts] == [n % 2 == 0 for n in range(200)]
    assert calls == [201]


def test_a_missing_namespace_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    answers = ['{"network_refusal": "not permitted"}', '{"passed": true, "reason": ""}']
    monkeypatch.setattr(sandbox_module, "_converse", lambda _lines, _limit_s: answers)
    sandbox_module._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        run_programs(["1"])
        run_programs(["1"])
    assert [record.getMessage().count("not permitted") for record in caplog.records] == [1]


def test_a_broken_supervisor_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "runner.py"
    broken.write_text("raise SystemExit('no interpreter')")
    monkeypatch.setattr(sandbox_module, "RUNNER", broken)
    with pytest.raises(SandboxError, match="no interpreter"):
        run_programs(["1"])
    broken.write_text('print(\'{"network_refusal": ""}\')')
    with pytest.raises(SandboxError, match="expected 1 verdicts, got 0"):
        run_programs(["1"])


def test_limits_and_empty_input() -> None:
    assert run_programs([]) == []
    with pytest.raises(SandboxError, match="positive"):
        run_programs(["1"], timeout_s=0)
    with pytest.raises(SandboxError, match="positive"):
        run_programs(["1"], memory_bytes=-1)

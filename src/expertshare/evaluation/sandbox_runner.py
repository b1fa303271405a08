"""The supervisor that `sandbox` starts: forks one limited child per program and reports a verdict each.

Runs alone under `python -I -S` with an empty environment, so it imports the standard library only. stdin: one
JSON object with the limits, then one JSON string per program. stdout: one JSON object about the isolation
reached, then one JSON object per program.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import select
import signal
import sys
import time
import types
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any, NoReturn

CLONE_NEWUSER, CLONE_NEWNET = 0x1000_0000, 0x4000_0000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MAX_REPORT_BYTES = 4096
MAX_OPEN_FILES = 16
BANNED_IMPORTS = frozenset({"ctypes", "_ctypes", "_posixsubprocess"})
AF_UNIX = 1
_PROCESS_CALLS = "exec fork forkpty kill killpg posix_spawn spawn startfile system"
_FILE_CALLS = (
    "chflags chmod chown link mkdir mkfifo mknod remove removexattr rename rmdir setxattr symlink truncate utime"
)
BANNED_EVENTS = frozenset(
    {"pty.spawn", "signal.pthread_kill", "subprocess.Popen"}
    | {f"os.{call}" for call in f"{_PROCESS_CALLS} {_FILE_CALLS}".split()}
)
BANNED_PREFIXES = ("socket.", "ctypes.", "shutil.")
# Asyncio wakes its loop by a pair of sockets that are nobody else's; connecting and binding stay refused.
SOCKET_MADE = "socket.__new__"


def isolate() -> str:
    """Enter an empty network namespace, tie this process to its parent and orphans to this process.

    Returns "" or why the namespace was refused.
    """
    if not sys.platform.startswith("linux"):
        return f"no network namespaces on {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    refused = libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0
    reason = os.strerror(ctypes.get_errno()) if refused else ""
    # After unshare, which clears the death signal together with the old credentials.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    return reason


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: no processes, no sockets, no signals, no change to any file."""
    banned = event in BANNED_EVENTS or event.startswith(BANNED_PREFIXES)
    if event == "open":
        banned = isinstance(arguments[2], int) and bool(arguments[2] & WRITE_FLAGS)
    elif event == SOCKET_MADE:
        banned = arguments[1] != AF_UNIX
    elif event == "import" and arguments[0] in BANNED_IMPORTS:
        raise ImportError(f"the sandbox refuses {event} of {arguments[0]}")  # which libraries know how to do without
    if banned:
        raise PermissionError(f"the sandbox refuses {event}")


class Libraries:
    """Finds the few libraries that programs may import, and nothing else that is installed beside them."""

    def __init__(self, folders: dict[str, str]) -> None:
        self._folders = folders

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """As an entry of sys.meta_path."""
        del path, target
        folder = self._folders.get(name)
        return PathFinder.find_spec(name, [folder]) if folder is not None else None


def limit_resources(timeout_s: float, memory_bytes: int) -> None:
    """Set hard limits on this process; a limit that the system lacks is left out."""
    wanted = {
        "RLIMIT_CPU": int(timeout_s) + 1,
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": MAX_OPEN_FILES,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 1,
    }
    for name, value in wanted.items():
        if hasattr(resource, name):
            which = getattr(resource, name)
            hard = resource.getrlimit(which)[1]
            limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (limit, limit))


def close_files(report_fd: int) -> None:
    """Leave /dev/null as the three standard streams, and the report pipe."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, report_fd)
    os.closerange(report_fd + 1, 1024)


def execute(program: str) -> str:
    """Run the program; returns "" when it reached its end, else the reason that it did not."""
    # Not __main__: what a program does only when it is run as a script is not what its tests ask for.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
    except BaseException as error:  # whatever a foreign program raises, SystemExit included, is its failure
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def become_child(program: str, report_fd: int, nonce: str, timeout_s: float, memory_bytes: int) -> NoReturn:
    """The forked side. Only a program that returned here earns the nonce, so an early exit proves nothing."""
    try:
        os.setpgid(0, 0)
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        close_files(report_fd)
        os.environ.clear()  # the C library's locale coercion may have put a variable there
        os.putenv("OPENBLAS_NUM_THREADS", "1")  # numpy's, which may start no threads; os.environ stays empty
        for name in BANNED_IMPORTS:
            sys.modules.pop(name, None)
        processes = types.ModuleType("_posixsubprocess")  # asyncio imports subprocess, which imports this
        processes.fork_exec = None  # type: ignore[attr-defined]
        sys.modules[processes.__name__] = processes
        limit_resources(timeout_s, memory_bytes)
        sys.addaudithook(refuse)
        reason = execute(program)
        report = f"failed {reason}" if reason else f"passed {nonce}"
        os.write(report_fd, report.encode("utf-8", "replace")[:MAX_REPORT_BYTES])
    finally:
        os._exit(0)


def read_report(fd: int, timeout_s: float) -> tuple[bytes, bool]:
    """What the child wrote, and whether it was done in time."""
    deadline = time.monotonic() + timeout_s
    received = b""
    while len(received) <= MAX_REPORT_BYTES:
        remaining = deadline - time.monotonic()
        ready = select.select([fd], [], [], max(remaining, 0))[0]
        if not ready:
            return received, False
        chunk = os.read(fd, MAX_REPORT_BYTES)
        if not chunk:
            break
        received += chunk
    return received, True


def end_process(pid: int) -> int:
    """Kill the child's group, wait for the child, sweep up what it may have left; returns its wait status."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue  # already gone, or the group was never made
    status = os.waitpid(pid, 0)[1]
    sweep_orphans()
    return status


def sweep_orphans() -> None:
    """Kill descendants that left the group; as their subreaper this process has become their parent."""
    listing = f"/proc/self/task/{os.getpid()}/children"
    while os.path.exists(listing):
        with open(listing, encoding="ascii") as children:
            orphans = [int(pid) for pid in children.read().split()]
        if not orphans:
            return
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)  # our own unreaped child: the id cannot have been reused
            os.waitpid(pid, 0)


def judge(program: str, timeout_s: float, memory_bytes: int) -> dict[str, object]:
    """Run one program in a child of its own; returns the verdict as a JSON object."""
    nonce = os.urandom(16).hex()
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_fd)
        become_child(program, write_fd, nonce, timeout_s, memory_bytes)
    os.close(write_fd)
    received, in_time = read_report(read_fd, timeout_s)
    status = end_process(pid)
    os.close(read_fd)
    if received == f"passed {nonce}".encode():
        return {"passed": True, "reason": ""}
    if not in_time:
        return {"passed": False, "reason": f"timeout after {timeout_s} s"}
    if received.startswith(b"failed "):
        return {"passed": False, "reason": received[7:].decode("utf-8", "replace")}
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        return {"passed": False, "reason": f"killed by signal {os.WTERMSIG(status)}"}
    return {"passed": False, "reason": "ended before its tests were through"}


def main() -> None:
    """Judge every program on stdin."""
    first, *lines = sys.stdin.buffer.read().splitlines()
    limits = json.loads(first)
    sys.meta_path.append(Libraries(limits["libraries"]))
    refusal = isolate()
    sys.stdout.write(json.dumps({"network_refusal": refusal}) + "\n")
    sys.stdout.flush()
    gc.freeze()
    for line in lines:
        verdict = judge(json.loads(line), limits["timeout_s"], limits["memory_bytes"])
        sys.stdout.write(json.dumps(verdict) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""A server under load: many streaming clients at once, a share of whom leave early; every answer is checked.

    python benchmarks/serving_load.py models/reference --clients 64 --requests 512 --out build/serving-load.json

Starts `expertshare serve` on a free port, in float32 unless told otherwise: every answer has to equal the one that
its request gets alone. First one client asks one request after the other, then all clients ask at once, twice, so that
memory can settle. Needs the extra `serve`, and httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from expertshare import api
from expertshare.lab.tasks.generation import generate_items
from expertshare.measure.report import capture_environment
from expertshare.models import LoadedModel, decode_answer

KINDS = ("arith", "math", "code", "choice")


@dataclass(frozen=True, slots=True)
class Request:
    """leaves: after the first piece of its answer."""

    prompt: str
    policy: str
    max_tokens: int
    leaves: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one. right: the text is the one that the request gets alone; its beginning, if the client left."""

    right: bool
    left: bool
    seconds: float
    first_s: float
    error: str | None = None


def main() -> int:
    options = _options()
    requests = _requests(options)
    loaded = api.load(options.model, dtype=options.dtype)
    expected = _alone(loaded, requests)
    with _server(options) as (url, log):
        asyncio.run(_ask_all(url, requests[: options.clients], expected, clients=4))  # warms up
        patient = [r for r in requests if not r.leaves][: options.one_by_one]
        runs = {"one by one": _measured(url, patient, expected, clients=1)}
        for name in ("all at once", "all at once, again"):
            runs[name] = _measured(url, requests, expected, clients=options.clients)
        gained = runs["all at once, again"]["tokens_per_s"] / runs["one by one"]["tokens_per_s"]
    result = {
        "clients": options.clients,
        "max_batch": options.max_batch,
        "requests": len(requests),
        "policies": options.policies,
        "dtype": options.dtype,
        "runs": runs,
        "throughput_ratio": gained,
        "server_log_errors": [line for line in log if '"level": "error"' in line][:5],
        "environment": asdict(capture_environment(loaded.model.device)),
    }
    _print(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(run["wrong"] == run["failed"] == 0 for run in runs.values()) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", default=64, type=int)
    parser.add_argument("--requests", default=512, type=int)
    parser.add_argument("--one-by-one", default=64, type=int, help="requests of the run with one client")
    parser.add_argument("--leave", default=0.2, type=float, help="share of clients that leave after a first piece")
    parser.add_argument("--policies", default="vanilla", help="policies of requests, parted by |; each picks one")
    parser.add_argument("--max-batch", default=32, type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--out", type=Path, help="file for the JSON")
    return parser.parse_args()


def _requests(options: argparse.Namespace) -> list[Request]:
    chance = random.Random(options.seed)
    each = -(-options.requests // len(KINDS))
    items = [item for kind in KINDS for item in generate_items(kind, split="test", count=each, seed=options.seed)]
    chance.shuffle(items)
    return [
        Request(
            prompt=item.prompt,
            policy=chance.choice(options.policies.split("|")),
            max_tokens=chance.choice((8, 16, 32, 64, 96)),
            leaves=chance.random() < options.leave,
        )
        for item in items[: options.requests]
    ]


def _alone(loaded: LoadedModel, requests: Sequence[Request]) -> dict[Request, str]:
    """By `generate`, one prompt at a time; a limit below the block's length only cuts."""
    found = {}
    for request in requests:
        length = max(request.max_tokens, loaded.config.block_length)
        made = api.generate(loaded, request.prompt, policy=request.policy, gen_length=length)
        found[request] = decode_answer(loaded.tokenizer, made.answers[0].token_ids[: request.max_tokens])
    return found


@contextmanager
def _server(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    flags = ["--port", "0", "--dtype", options.dtype, "--max-batch", str(options.max_batch)]
    flags += ["--max-queue", str(2 * options.clients), "--no-page"]
    command = [sys.executable, "-m", "expertshare", "serve", str(options.model), *flags]
    log_file = Path(os.environ.get("TMPDIR", "/tmp")) / f"serving-load-{os.getpid()}.log"
    log: list[str] = []
    with log_file.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(command, stderr=sink)
    try:
        until = time.monotonic() + 300
        while not (port := re.search(r'"event": "listening".*?"port": (\d+)', log_file.read_text(encoding="utf-8"))):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start; see {log_file}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port[1]}", log
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        log += log_file.read_text(encoding="utf-8").splitlines()
        log_file.unlink()
    finally:
        process.kill()
        process.wait()


def _measured(url: str, requests: Sequence[Request], expected: dict[Request, str], *, clients: int) -> dict[str, Any]:
    before, start = _counts(url), time.monotonic()
    outcomes = asyncio.run(_ask_all(url, requests, expected, clients=clients))
    seconds, after = time.monotonic() - start, _settled(url)
    tokens = after["expertshare_completion_tokens_total"] - before["expertshare_completion_tokens_total"]
    done = sorted(outcome.seconds for outcome in outcomes if not outcome.left and outcome.error is None)
    first = sorted(outcome.first_s for outcome in outcomes if outcome.error is None)
    return {
        "requests": len(outcomes),
        "left": sum(outcome.left for outcome in outcomes),
        "wrong": sum(not outcome.right and outcome.error is None for outcome in outcomes),
        "failed": sum(outcome.error is not None for outcome in outcomes),
        "errors": sorted({outcome.error for outcome in outcomes if outcome.error is not None})[:5],
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "requests_per_s": len(outcomes) / seconds,
        "latency_s": {"p50": _quantile(done, 0.5), "p95": _quantile(done, 0.95)},
        "first_block_s": {"p50": _quantile(first, 0.5), "p95": _quantile(first, 0.95)},
        "server_memory_bytes": {
            "before": before["process_resident_memory_bytes"],
            "after": after["process_resident_memory_bytes"],
        },
    }


async def _ask_all(
    url: str, requests: Sequence[Request], expected: dict[Request, str], *, clients: int
) -> list[Outcome]:
    waiting = iter(requests)
    outcomes: list[Outcome] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def client(http: httpx.AsyncClient) -> None:
        for request in waiting:  # shared: each takes the next one
            outcomes.append(await _ask(http, request, expected[request]))

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        http.headers["x-model"] = model
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return outcomes


async def _ask(http: httpx.AsyncClient, request: Request, expected: str) -> Outcome:
    body = {
        "model": http.headers["x-model"],
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": True,
        "expert_policy": request.policy,
    }
    start, first, text, error, ended = time.monotonic(), None, "", None, False
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    error = chunk["error"]["message"]
                    break
                text += chunk["choices"][0]["delta"].get("content", "")
                first = first or (time.monotonic() - start if text else None)
                if request.leaves and text:
                    break
            elif line and reply.status_code != 200:
                error = f"{reply.status_code} {line[:200]}"
    seconds = time.monotonic() - start
    left = request.leaves and not ended
    if error is None and not left and not ended:
        error = "the stream broke off"
    right = expected.startswith(text) if left else text == expected
    return Outcome(right, left, seconds, first or seconds, error)


def _counts(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#") and "{" not in line}


def _settled(url: str) -> dict[str, float]:
    """The counts once nothing runs: those who left are gone."""
    while (counts := _counts(url))["expertshare_running"] or counts["expertshare_queue_length"]:
        time.sleep(0.02)
    return counts


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def _print(result: dict[str, Any]) -> None:
    for name, run in result["runs"].items():
        latency, first, memory = run["latency_s"], run["first_block_s"], run["server_memory_bytes"]
        print(
            f"{name}: {run['requests']} requests, {run['left']} left, {run['wrong']} wrong, {run['failed']} failed; "
            f"{run['tokens_per_s']:.0f} tokens/s; latency p50 {latency['p50']:.3f} s, p95 {latency['p95']:.3f} s; "
            f"first block p50 {first['p50']:.3f} s, p95 {first['p95']:.3f} s; server memory "
            f"{memory['before'] / 1e6:.0f} -> {memory['after'] / 1e6:.0f} MB"
        )
    print(f"all at once gives {result['throughput_ratio']:.2f} times the tokens per second of one by one")


if __name__ == "__main__":
    sys.exit(main())

"""`expertshare eval`: repeatable, resumed after kill -9, containing what models write, refusing wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Run
from expertshare import api
from expertshare.evaluation.items import GeneratedSource
from expertshare.evaluation.run_directory import ITEMS, REPORT, RUN
from expertshare.lab.tasks.generation import generate_items
from expertshare.models import load_model
from expertshare.routing import Layerwise, make_policy
from expertshare.tuning.policy_file import PolicyFile, model_facts

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "models" / "reference"
POLICIES = "vanilla,des-vote:budget=8"


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / ITEMS).read_text().splitlines()]


def test_a_run_leaves_its_configuration_items_and_report(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("--tasks", "arith,code", "--policies", POLICIES, "--limit", "2", "--gen-length", "16", "--seed", "3")
    done = run("eval", checkpoint, *arguments, "--out", out, "--json")
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    assert printed["policies"] == ["vanilla", "des-vote:budget=8"]
    assert [(r["task"], r["policy"]) for r in printed["rows"]] == [
        (task, policy) for task in ("arith", "code") for policy in printed["policies"]
    ]
    stored = json.loads((out / RUN).read_text())
    assert stored["identity"]["items"] == {"arith": 2, "code": 2}
    assert stored["identity"]["decoding"]["seed"] == 3
    assert len(stored["identity"]["model_sha256"]) == 64
    assert json.loads((out / REPORT).read_text())["results"]["rows"] == printed["rows"]
    items = lines(out)
    assert [(x["task"], x["id"], x["policy"]) for x in items] == [
        (task, number, policy) for task in ("arith", "code") for number in "01" for policy in printed["policies"]
    ]
    code = [x for x in items if x["task"] == "code"]
    assert all(x["correct"] is None and "--allow-code" in x["reason"] for x in code)
    assert all(set(x["unique_experts"]) == {"prefill", "denoise", "commit"} for x in items)
    for word in ("vanilla", "arith", "Not judged", "capped"):
        assert word in done.err


def test_a_policy_file_is_a_policy_for_the_model_that_it_was_made_for(
    checkpoint: Path, run: Run, tmp_path: Path
) -> None:
    path, out = tmp_path / "policy.json", tmp_path / "run"
    layers = (make_policy("vanilla"),) * (load_model(str(checkpoint)).config.num_moe_layers - 1)
    policy = Layerwise(layers=(*layers, make_policy("des-vote", {"budget": 8})))

    def write(model: Path) -> None:
        facts = model_facts(load_model(str(model)))
        PolicyFile(policy=policy, certified=False, model=facts, evidence={"claim": "made by hand"}).write(path)

    write(checkpoint)
    arguments = ("--tasks", "arith", "--limit", "2", "--gen-length", "16", "--policies", "vanilla")
    arguments = (*arguments, "--policy-file", path)
    done = run("eval", checkpoint, *arguments, "--out", out, "--json")
    assert done.code == 0, done.err
    assert len(lines(out)) == 4
    assert json.loads(done.out)["policies"][1].startswith("layerwise(")
    write(REFERENCE)
    done = run("eval", checkpoint, *arguments, "--out", tmp_path / "other", "--json")
    assert done.code == 2
    assert "another model" in done.err or "fingerprint" in done.err


@pytest.mark.parametrize(
    "flags", [(), ("--expert-memory", "mmap"), ("--expert-memory", "163840", "--no-prefetch", "--processes", "2")]
)
def test_a_converted_model_scores_as_the_one_that_it_was_made_from(
    checkpoint: Path, run: Run, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    assert run("convert", checkpoint, tmp_path / "experts").code == 0
    arguments = ("--tasks", "arith", "--policies", POLICIES, "--limit", "2", "--gen-length", "16")
    done = run("eval", tmp_path / "experts", *arguments, *flags, "--out", tmp_path / "converted", "--json")
    assert done.code == 0, done.err
    plain = run("eval", checkpoint, *arguments, "--out", tmp_path / "plain", "--json")
    assert (tmp_path / "converted" / ITEMS).read_bytes() == (tmp_path / "plain" / ITEMS).read_bytes()
    assert json.loads(done.out)["rows"] == json.loads(plain.out)["rows"]
    store = json.loads((tmp_path / "converted" / RUN).read_text())["config"]["expert_store"]
    assert store["memory"] == (flags[1] if flags else "all")
    refused = run("eval", checkpoint, *arguments, "--expert-memory", "mmap", "--out", tmp_path / "other")
    assert refused.code == 2
    assert "expert layout" in refused.err


@pytest.mark.slow
def test_processes_do_not_change_the_items_and_a_second_call_asks_nothing(
    checkpoint: Path, run: Run, tmp_path: Path
) -> None:
    arguments = ("--tasks", "math,choice", "--policies", POLICIES, "--limit", "2", "--gen-length", "8")
    assert run("eval", checkpoint, *arguments, "--out", tmp_path / "one").code == 0
    assert run("eval", checkpoint, *arguments, "--processes", "2", "--out", tmp_path / "two").code == 0
    whole = (tmp_path / "one" / ITEMS).read_bytes()
    assert (tmp_path / "two" / ITEMS).read_bytes() == whole
    again = run("eval", checkpoint, *arguments, "--out", tmp_path / "two", "--json")
    assert "8 of 8 answers" in again.err
    assert (tmp_path / "two" / ITEMS).read_bytes() == whole
    report = json.loads((tmp_path / "one" / REPORT).read_text())["results"]
    assert {key: value for key, value in json.loads(again.out).items() if key != "run_dir"} == report


@pytest.mark.slow
def test_kill_9_and_resume_give_the_file_of_an_uninterrupted_run(run: Run, tmp_path: Path) -> None:
    arguments = ["eval", str(REFERENCE), "--tasks", "arith,code", "--allow-code", "--limit", "12"]
    arguments += ["--policies", "vanilla,des-vote:budget=28", "--out"]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with subprocess.Popen(
        [sys.executable, "-m", "expertshare", *arguments, str(cut), "--processes", "2"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    ) as killed:
        while not (cut / ITEMS).exists() or (cut / ITEMS).read_bytes().count(b"\n") < 10:
            assert killed.poll() is None
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
    assert 10 <= len(lines(cut)) < 48
    with (cut / ITEMS).open("ab") as file:
        file.write(b'{"task": "arith", "id"')  # as a kill in the middle of a write leaves it
    resumed = run(*arguments, cut)
    assert resumed.code == 0, resumed.err
    assert "(22 bytes): dropped" in resumed.err
    assert "to go" in resumed.err
    assert run(*arguments, whole).code == 0
    assert (cut / ITEMS).read_bytes() == (whole / ITEMS).read_bytes()
    assert len({(x["task"], x["id"], x["policy"]) for x in lines(cut)}) == len(lines(cut)) == 48


HARMFUL = {
    "endless loop": "while True: pass",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(10**7))",
    "fork bomb": "import os\nwhile True: os.fork()",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "deletion": "import shutil\nshutil.rmtree({victim!r})",
    "removal": "import os\nos.remove({victim!r} + '/kept')",
    "network": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
    "raw socket": "import _socket\n_socket.socket()",
    "leaves early": "import os\nos._exit(0)",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "fills the disk": "open({victim!r} + '/big', 'wb').write(b'x' * 10**9)",
    "output flood": "import sys\nwhile True: sys.stdout.write('x' * 10**6)",
}


def test_harmful_answers_are_contained_failures_and_the_evaluation_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end: the model's text is replaced, everything behind it is real."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").write_text("content")
    programs = [text.format(victim=str(victim)) for text in HARMFUL.values()]
    drawn = generate_items("code", split="test", count=len(programs) + 1, seed=0)
    texts = {item.prompt: text for item, text in zip(drawn, programs, strict=False)}
    right = {drawn[-1].prompt: drawn[-1].reference}
    real = GeneratedSource.judge

    def judge(self: Any, item: Any, _: str) -> Any:
        return real(self, item, {**texts, **right}[item.prompt])

    monkeypatch.setattr(GeneratedSource, "judge", judge)
    evaluation = api.evaluate(
        checkpoint, ["code"], ["vanilla"], out=tmp_path / "run", limit=len(drawn), allow_code=True, gen_length=8
    )
    outcomes = {name: x["correct"] for name, x in zip([*HARMFUL, "right"], evaluation.lines, strict=True)}
    assert outcomes == {**dict.fromkeys(HARMFUL, False), "right": True}
    assert [path.name for path in victim.iterdir()] == ["kept"]
    assert evaluation.lines[0]["reason"].startswith("timeout")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "arit"), "Did you mean 'arith'"),
        (("--tasks", ","), "at least one task"),
        (("--limit", "0"), "limit must be at least 1"),
        (("--preset", "dmo"), "Did you mean 'dmoe'"),
        (("--policies", "des-vot"), "Did you mean 'des-vote'"),
        (("--processes", "0"), "processes must be"),
        (("--data", "nowhere"), "folder of benchmark files"),
        (("--shots", "-1"), "shots must be"),
        (("--gen-length", "4000"), "task arith, item 0"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    checkpoint: Path, run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run("eval", checkpoint, *arguments, "--out", tmp_path / "run")
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert not (tmp_path / "run").exists()


def test_a_missing_model_and_another_evaluation_are_refused(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    assert run("eval", tmp_path / "none", "--out", tmp_path / "run").code == 2
    arguments = ("--tasks", "arith", "--limit", "1", "--gen-length", "8", "--out", tmp_path / "run")
    assert run("eval", checkpoint, *arguments).code == 0
    other = run("eval", REFERENCE, *arguments)
    assert other.code == 2
    assert "model_sha256" in other.err
    seeded = run("eval", checkpoint, *arguments, "--seed", "1")
    assert seeded.code == 2
    assert "holds another evaluation" in seeded.err


def test_a_preset_is_resolved_and_flags_go_before_it(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    arguments = ("--tasks", "arith", "--limit", "1", "--preset", "dmoe", "--gen-length", "8", "--block-length", "8")
    done = run("eval", checkpoint, *arguments, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    stored = json.loads((tmp_path / "run" / RUN).read_text())
    decoding = stored["identity"]["decoding"]
    assert (decoding["gen_length"], decoding["block_length"], decoding["steps_per_block"]) == (8, 8, 32)
    assert stored["config"]["preset"]["name"] == "dmoe"
    assert stored["config"]["preset"]["unknown"]

"""`expertshare generate`, in this process."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from cli.conftest import Run
from expertshare import api
from expertshare.measure.cost import FORWARD_KINDS
from expertshare.models import decode_answer, encode_prompt, load_model

KEYS = {
    *("token_ids", "text", "finish_reason", "policy", "knobs", "unique_experts", "expert_bytes", "steps", "forwards"),
    *("tokens_per_s", "peak_memory_bytes", "seconds_by_part", "seed", "model", "versions"),
}
LENGTH = ("--gen-length", "16")


def test_json_is_the_one_line_on_stdout(checkpoint: Path, run: Run) -> None:
    done = run(
        "generate", checkpoint, "--prompt", "hello", "--policy", "des-vote", "--budget", "0.5", "--json", *LENGTH
    )
    assert done.code == 0
    (line,) = done.out.splitlines()
    value = json.loads(line)
    assert value.keys() >= KEYS
    assert (value["policy"], value["knobs"]["budget"]) == ("des-vote", 8)
    assert value["unique_experts"].keys() == value["expert_bytes"].keys() == set(FORWARD_KINDS)
    assert 0 < value["unique_experts"]["denoise"] <= 8
    assert value["forwards"] > value["steps"] > 0
    assert value["peak_memory_bytes"] > 1_000_000
    assert value["captured"] is False
    assert "graphs are a GPU's" in value["uncaptured_because"]
    loaded = load_model(checkpoint)
    assert loaded.tokenizer is not None
    assert value["text"] == decode_answer(loaded.tokenizer, value["token_ids"])
    assert value["text"] in done.err


def test_the_answer_is_streamed_before_the_table(checkpoint: Path, run: Run) -> None:
    text = json.loads(run("generate", checkpoint, "--prompt", "hello", "--json", *LENGTH).out)["text"]
    done = run("generate", checkpoint, "--prompt", "hello", *LENGTH)
    assert done.out.startswith(text + "\n")
    for word in ("vanilla", "unique experts per block and layer", "expert weights read, MB", "tokens in", "router"):
        assert word in done.out[len(text) :]


def test_several_prompts(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hello"}\n\n{"prompt": "What is 7 plus 8?", "reference": "15"}\n')
    done = run("generate", checkpoint, "--prompts", file, "--batch-size", "2", "--json", *LENGTH)
    value = json.loads(done.out.splitlines()[-1])
    assert value.keys() >= {*KEYS, "results"}
    assert [result["prompt"] for result in value["results"]] == ["hello", "What is 7 plus 8?"]
    assert value["token_ids"] == [result["token_ids"] for result in value["results"]]
    alone = json.loads(run("generate", checkpoint, "--prompt", "hello", "--json", *LENGTH).out)
    assert alone["token_ids"] == value["token_ids"][0]
    shown = run("generate", checkpoint, "--prompts", file, *LENGTH).out
    assert shown.index("[1/2] hello") < shown.index("[2/2] What is 7 plus 8?")


@pytest.mark.parametrize("marker", [("-",), ()])
def test_stdin_is_one_prompt(
    checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch, marker: tuple[str, ...]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    piped = json.loads(run("generate", checkpoint, *marker, "--json", *LENGTH).out)
    named = json.loads(run("generate", checkpoint, "--prompt", "hello", "--json", *LENGTH).out)
    assert piped["token_ids"] == named["token_ids"]


def test_jsonl_from_stdin(checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "hello"}\n{"prompt": "bye"}\n'))
    value = json.loads(run("generate", checkpoint, "--prompts", "-", "--json", *LENGTH).out)
    assert [result["prompt"] for result in value["results"]] == ["hello", "bye"]


def test_knobs_as_flags_or_in_the_policy_are_the_same(checkpoint: Path, run: Run) -> None:
    flags = ("--policy", "block-top-p", "--top-p-experts", "0.4", "--guard", "8", "--group-limit", "ignore")
    text = ("--policy", "block-top-p:top_p_experts=0.4,guard=8,group-limit=ignore")
    values = [
        json.loads(run("generate", checkpoint, "--prompt", "hi", "--json", *LENGTH, *k).out) for k in (flags, text)
    ]
    assert values[0]["knobs"] == values[1]["knobs"]
    assert values[0]["knobs"]["guard"] == 8
    assert values[0]["token_ids"] == values[1]["token_ids"]


def test_decoding_flags_reach_the_decoder(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    flags = {
        **{"block-length": "4", "steps": "2", "threshold": "none", "temperature": "0.7", "top-k": "9", "top-p": "0.8"},
        **{"seed": "5", "editing-threshold": "0.9"},
    }
    spread = [part for name, value in flags.items() for part in (f"--{name}", value)]
    report = tmp_path / "report.json"
    done = run("generate", checkpoint, "--prompt", "hi", *LENGTH, *spread, "--report", report)
    assert done.code == 0
    value = json.loads(report.read_text())
    decoding = value["config"]["decoding"]
    wanted = {
        **{"block_length": 4, "steps_per_block": 2, "threshold": None, "temperature": 0.7, "top_k": 9, "top_p": 0.8},
        **{"seed": 5, "editing_threshold": 0.9, "gen_length": 16},
    }
    assert {key: decoding[key] for key in wanted} == wanted
    assert value["seeds"] == {"decoding": 5}


def test_report_has_the_cost_of_every_forward(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run("generate", checkpoint, "--prompt", "hello", "--raw", "--report", report, "--dtype", "bfloat16", *LENGTH)
    value = json.loads(report.read_text())
    assert value["schema_version"] == 1
    assert value["config"]["chat"] is False
    assert value["config"]["model_facts"]["dtype"] == "bfloat16"
    steps = value["results"]["cost"]["steps"]
    assert len(steps) == value["results"]["forwards"]
    assert all(len(step["unique_experts"]) == 2 for step in steps)


def test_chat_template_or_raw_text(checkpoint: Path) -> None:
    loaded = load_model(checkpoint)
    assert loaded.tokenizer is not None
    assert encode_prompt(loaded.tokenizer, "hello", chat=False) != encode_prompt(loaded.tokenizer, "hello")
    configs = [api.generate(loaded, "hello", chat=chat, gen_length=8).config["chat"] for chat in (None, True, False)]
    assert configs == [True, True, False]


def test_python_and_command_line_say_the_same(checkpoint: Path, run: Run) -> None:
    line = json.loads(run("generate", checkpoint, "--prompt", "hello", "--policy", "skip", "--json", *LENGTH).out)
    value = api.generate(str(checkpoint), "hello", policy="skip", gen_length=16).to_json()
    same = ("token_ids", "text", "knobs", "unique_experts", "expert_bytes", "steps", "forwards", "model")
    assert {key: value[key] for key in same} == {key: line[key] for key in same}


def test_interruption_is_130(checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "generate", interrupt)
    done = run("generate", checkpoint, "--prompt", "hello")
    assert done.code == 130
    assert "Traceback" not in done.err

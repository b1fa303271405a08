"""Wrong input: exit code 2, one clear message on stderr, nothing on stdout, no traceback."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch

from cli.conftest import Run
from expertshare import api
from expertshare.errors import InputError

GENERATE = [
    (("--policy", "des-vot"), "Did you mean 'des-vote'?"),
    (("--policy", "block-top-p", "--top-p-experts", "1.5"), "top_p_experts must lie in (0, 1], got 1.5"),
    (("--policy", "block-top-p", "--top-p-experts", "0"), "top_p_experts must lie in (0, 1]"),
    (("--policy", "des-vote", "--budget", "5"), "must lie in 6..16 experts"),
    (("--policy", "des-vote", "--budget", "17"), "must lie in 6..16 experts"),
    (("--policy", "des-vote", "--budget", "-3"), "must lie in 6..16 experts"),
    (("--policy", "des-vote", "--budget", "1.5"), "a fraction in (0, 1], got 1.5"),
    (("--policy", "des-vote", "--budget", "many"), "budget must be a number, got 'many'"),
    (("--policy", "des-vote", "--skip-share", "0.2"), "it belongs to skip"),
    (("--policy", "des-vote:budget=8", "--budget", "9"), "got both: choose one way"),
    (("--budget", "8"), "expected --policy beside --budget"),
    (("--gen-length", "0"), "gen_length must be a whole number of at least 1, got 0"),
    (("--gen-length", "-4"), "gen_length must be a whole number of at least 1, got -4"),
    (("--gen-length", "500"), "the model has 128 positions"),
    (("--block-length", "0"), "block_length must be"),
    (("--steps", "0"), "steps_per_block must be"),
    (("--batch-size", "0"), "batch_size must be"),
    (("--threshold", "1.5"), "threshold must lie in [0, 1)"),
    (("--temperature", "-1"), "temperature must be"),
    (("--seed", "-1"), "seed must be"),
    (("--dtype", "float23"), "Did you mean 'float32'?"),
    (("--backend", "tritn"), "Did you mean 'triton'?"),
    (("--device", "gpu"), "unknown device 'gpu'"),
    (("--prompts", "x.jsonl"), "got --prompt and --prompts: choose one"),
    (("--report", "missing-directory/report.json"), "expected a path that can be written"),
    (("--threads", str(10**12)), "threads must be at most"),
]
OTHERS = [
    (("plan", "MODEL", "--tokens-per-step", "nan"), "tokens per step must be at least 1, got nan"),
    (("convert", "MODEL", "OUT", "--shard-size", "1GB"), "--shard-size belongs to --to huggingface"),
    (("train", "MODEL/config.json"), "expected a folder"),
    (("distill", "MODEL", "--out", "OUT", "--policy", "skip", "--threads", "0"), "threads must be at least 1"),
    (("train", "OUT", "--hidden", "5"), "hidden must be a multiple of 64, got 5"),
    (("serve", "MODEL", "--drain-timeout", "-1"), "drain-timeout must be"),
    (("serve", "MODEL", "--drain-timeout", "nan"), "drain-timeout must be"),
    (("serve", "MODEL", "--host", "a" * 70 + ".x"), "cannot listen on aaa"),
]


@pytest.mark.parametrize(("arguments", "message"), GENERATE)
def test_generate_refuses(checkpoint: Path, run: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run("generate", checkpoint, "--prompt", "hello", *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert message in done.err


@pytest.mark.parametrize(("arguments", "message"), OTHERS)
def test_other_verbs_refuse(
    checkpoint: Path, run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run(*(text.replace("MODEL", str(checkpoint)).replace("OUT", str(tmp_path / "out")) for text in arguments))
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert message in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("-",), ("--prompts", "-")])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_stdin_that_is_no_utf_8(
    checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], errors: str
) -> None:
    given = io.BytesIO(b'{"prompt": "caf\xe9"}')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given, encoding="utf-8", errors=errors))
    done = run("generate", checkpoint, *arguments)
    assert done.code == 2
    assert "UTF-8" in done.err


@pytest.mark.parametrize(
    "line", ['{"prompt": "\\ud800"}', '{"prompt": ' + "9" * 5000 + "}", '{"prompt": ' + "[" * 10**5]
)
def test_prompt_files_that_python_cannot_read(checkpoint: Path, run: Run, tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    done = run("generate", checkpoint, "--prompts", tmp_path / "p.jsonl")
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert len(done.err) < 500


@pytest.mark.parametrize("verb", [("generate", "--prompt", "hello"), ("serve", "--port", "0")])
def test_a_gpu_that_is_not_there(
    checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run(verb[0], checkpoint, *verb[1:], "--device", "cuda")
    assert (done.code, done.out) == (2, "")
    assert "expected a GPU, because device 'cuda' was asked for, but torch sees none" in " ".join(done.err.split())


def test_triton_on_the_cpu(checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("expertshare.kernels.triton.check_available", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    done = run("generate", checkpoint, "--prompt", "hello", "--backend", "triton")
    assert done.code == 2
    said = "the backend 'triton' expects a model on the device 'cuda', got one on 'cpu': use --device cuda"
    assert said in " ".join(done.err.split())


def test_several_replicas_do_not_share_a_gpu(checkpoint: Path, run: Run) -> None:
    done = run("serve", checkpoint, "--device", "cuda", "--replicas", "2")
    assert done.code == 2
    assert "expected --device cpu with replicas on Ray, got cuda" in " ".join(done.err.split())


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(checkpoint: Path, run: Run, prompt: str) -> None:
    done = run("generate", checkpoint, "--prompt", prompt)
    assert done.code == 2
    assert "got an empty one" in done.err


def test_prompt_longer_than_the_model(checkpoint: Path, run: Run) -> None:
    done = run("generate", checkpoint, "--prompt", "number " * 200)
    assert done.code == 2
    assert "the model has 128 positions" in done.err


def test_missing_model(run: Run, tmp_path: Path) -> None:
    done = run("generate", tmp_path / "nothing", "--prompt", "hello")
    assert done.code == 2
    assert "there is no directory" in done.err


def test_model_without_a_tokenizer(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    done = run("generate", bare, "--prompt", "hello")
    assert done.code == 2
    assert "has no tokenizer" in done.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: expected one JSON object"),
        ("\n", "got none"),
        ('{"prompt": "a"}\n\n{"question": "b"}\n', "line 3"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "compare"])
def test_unusable_prompt_files(
    checkpoint: Path, run: Run, tmp_path: Path, verb: str, content: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    done = run(verb, checkpoint, "--prompts", file)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policies", "vanilla,des-vot"), "Did you mean 'des-vote'?"),
        (("--policies", "vanilla,vanilla"), "got vanilla again"),
        (("--policies", "budget=8"), "expected a policy before the knob"),
        (("--policies", ""), "expected at least one policy"),
        (("--policies", "skip:budget=8"), "skip has no knob 'budget'"),
        (("--policies", "des-vote:budget=3"), "must lie in 6..16 experts"),
        (("--limit", "0"), "limit must be at least 1"),
        (("--plot", "quality.bmp"), "expected a picture name ending in .png, .svg, .pdf"),
        (("--plot", "missing-directory/quality.png"), "expected a path that can be written"),
        (("--report", "."), "it is a directory"),
    ],
)
def test_compare_refuses(checkpoint: Path, run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hello"}\n')
    done = run("compare", checkpoint, "--prompts", file, "--gen-length", "8", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_unknown_task_in_a_prompt_file(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hello", "reference": "x", "task": "arit"}\n')
    done = run("compare", checkpoint, "--prompts", file)
    assert done.code == 2
    assert "Did you mean 'arith'?" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "arit"), "Did you mean 'arith'?"),
        (("--split", "tset"), "expected split 'train' or 'test'"),
        (("--count", "0"), "count must be at least 1"),
    ],
)
def test_tasks_refuses(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run("tasks", tmp_path / "out.jsonl", *arguments)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generat",), "No such command 'generat'"),
        (("info", "model", "--jsn"), "No such option: --jsn"),
        (("generate",), "Missing argument"),
        (("generate", "m", "--gen-length", "ten"), "Invalid value for '--gen-length'"),
        (("generate", "m", "--threshold", "high"), "expected a number or none"),
    ],
)
def test_unusable_command_lines(run: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_python_api_names_the_nearest_option(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'gen_length'"):
        api.generate(checkpoint, "hello", gen_lenght=8)
    with pytest.raises(InputError, match="expected at least one prompt"):
        api.generate(checkpoint, [])

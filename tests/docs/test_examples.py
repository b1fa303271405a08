"""Every example of README.md and docs/ runs, or at least means something to the command line's own parser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

from expertshare.cli import main
from expertshare.cli.app import app, load_verb
from expertshare.routing import parse_policies, parse_policy

from .examples import ROOT, Example, command_lines, inline_commands, python_blocks

NOT_RUN = {
    # part of a block -> why it is not run here
    'AutoModelForCausalLM.from_pretrained("my-model")': "tests/integrations runs it on a small model",
    "class FirmVote(CoresetPolicy)": "tests/routing/test_add_a_policy_doc.py runs it",
    "class HeadCount(CoresetPolicy)": "tests/routing/test_add_a_policy_doc.py runs it",
    '"count": "Say how many bytes': "tests/cli/test_add_a_verb_doc.py runs it",
    "class CountOptions(OptionGroup)": "tests/cli/test_add_a_verb_doc.py runs it",
    'EMBED = Call("es_embed"': "needs a library with that function",
    "def embed(self, tokens: Tensor": "a method, shown without its class",
    "def test_three_tokens_elect_two_experts": "tests/routing/test_add_a_policy_doc.py runs it",
    'load_model("path/to/model", device="cuda")': "needs a GPU",
    "client = OpenAI(": "asks a running server; tests/serving/test_clients.py does so with the same client",
    'FAMILIES = (..., "my_moe")': "a name to be added to a tuple, around an ellipsis",
}
SHORTER = {"limit=200": "limit=1", '["runs/first", "compare.json"]': '["benchmarks/results/policies.json"]'}
"""What is exchanged before a block is run: minutes become seconds, and results of commands those in the repository."""
PLACEHOLDERS = {
    # commands that leave something out, and what they leave out
    "torchrun --nproc-per-node 2 -m expertshare distill ...": "the options of the command above it",
    "torchrun --nproc-per-node 8 -m expertshare distill ... --device cuda": "the options of the command above it",
}
RUN = ("generate models/reference --prompt", "simulate models/reference", "simulate --like", "bench --list")
"""Commands that are run as they stand, where what they need is in the repository; others are only parsed."""
NEEDS = "--policy-file"
POLICY_PARAMETERS = ("policy", "start_policy")

COMMANDS = [line for line in command_lines() if line.words and line.words[0] == "expertshare"]
OTHERS = [line for line in command_lines() if line not in COMMANDS]
RUNNABLE = [line for line in COMMANDS if line.text[12:].startswith(RUN) and NEEDS not in line.words]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory from which the repository's inputs are seen, so that nothing is written into them."""
    for name in ("models", "examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def program() -> Any:
    """The program with all its verbs imported."""
    group: Any = typer.main.get_command(app)
    group.commands = {name: load_verb(name) for name in group.commands}
    return group


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters that the command line's own parser reads from a command, without running it."""
    name = words.pop(0)
    command: Any = program()
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f"no command {name!r} among {', '.join(command.commands)}"
        command = command.commands[name]
    try:
        return dict(command.make_context(name, words).params)
    except typer.Exit as left:  # an option that answers by itself, such as --list
        if left.exit_code != 0:
            raise
        return {}


def test_enough_is_found() -> None:
    assert len(python_blocks()) >= 8
    assert len(COMMANDS) >= 25
    assert len(inline_commands()) >= 15
    assert len(RUNNABLE) >= 5


@pytest.mark.parametrize("example", COMMANDS, ids=str)
def test_a_command_is_understood(example: Example) -> None:
    values = parsed(example.words)
    for name in POLICY_PARAMETERS:
        if isinstance(values.get(name), str):
            parse_policy(values[name])
    if values.get("policies"):
        listed = values["policies"]
        parse_policies([listed] if isinstance(listed, str) else listed)
    for word in example.words:
        if re.match(r"(?:models|examples|benchmarks)/", word):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("example", inline_commands(), ids=str)
def test_a_command_in_a_sentence_exists(example: Example) -> None:
    words = example.words
    command: Any = program()
    for word in words[1:]:
        if word.startswith("-") or not hasattr(command, "commands"):
            break
        assert word in command.commands, word
        command = command.commands[word]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    named = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert named <= options


@pytest.mark.parametrize("example", OTHERS, ids=str)
def test_another_command_names_what_exists(example: Example) -> None:
    if re.sub(r"\s+#.*", "", example.text) in PLACEHOLDERS:
        return
    words = example.words
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif words[0] == "source":
        assert words[1:] == [".venv/bin/activate"]
    elif words[0] == "export":
        variable = words[1].partition("=")[0]
        sources = (ROOT / "src").rglob("*.py")
        assert any(variable in path.read_text(encoding="utf-8") for path in sources), variable
    elif words[0] == "curl":
        path = words[1].removeprefix("http://").partition("/")[2].removeprefix("v1")
        assert path
        served = (ROOT / "src" / "expertshare" / "serving").rglob("*.py")
        assert any(f'{path}"' in file.read_text(encoding="utf-8") for file in served), path
        json.loads(words[words.index("-d") + 1])
    elif words[:3] == ["python", "-m", "expertshare.evaluation.harness"]:
        assert (ROOT / "src/expertshare/evaluation/harness/__main__.py").is_file()
    else:
        assert words[0] in ("python", "pytest"), f"{example}: say here how {words[0]!r} is checked"
        paths = [word for word in words[1:] if word.startswith(("tests/", "benchmarks/"))]
        assert paths
        assert all((ROOT / path).exists() for path in paths)


@pytest.mark.parametrize("example", RUNNABLE, ids=str)
@pytest.mark.usefixtures("workplace")
def test_a_command_runs(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(example.words[1:])
    assert left.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("example", python_blocks(), ids=str)
def test_a_block_runs(example: Example, workplace: Path) -> None:
    if any(part in example.text for part in NOT_RUN):
        return
    source = example.text
    for long, short in SHORTER.items():
        source = source.replace(long, short)
    exec(compile(source, str(example), "exec"), {"__name__": "example"})
    assert Path.cwd() == workplace


def test_the_tables_name_what_is_there() -> None:
    """An exception for an example that is gone would hide the next one."""
    blocks = "\n".join(block.text for block in python_blocks())
    assert all(part in blocks for part in (*NOT_RUN, *SHORTER))
    assert set(PLACEHOLDERS) <= {re.sub(r"\s+#.*", "", line.text) for line in OTHERS}

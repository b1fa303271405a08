"""What a fresh clone relies on: versions, pins, commands, shipped prompts, links, and nothing of one machine."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import expertshare
from expertshare.evaluation.prompts import read_prompts
from expertshare.evaluation.scoring import score_many
from expertshare.lab.tasks.generation import TASKS, split_of

ROOT = Path(__file__).parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MACHINE_PATH = re.compile(r"/(?:work|root|farm|home|opt|tmp|mnt)/[A-Za-z]|file:/{2}")
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|--(?:extra-)?index-url")


def repository_files() -> list[Path]:
    """Files that are tracked, or would be by `git add`; the test is skipped outside a checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """The file's text, empty where it is not text (weights)."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def make_recipe(target: str) -> list[str]:
    """The commands that `make` would run, without running them."""
    done = subprocess.run(["make", "-n", "-B", target], cwd=ROOT, capture_output=True, check=True, text=True)
    return [line for line in done.stdout.splitlines() if not line.startswith(("make", "echo", "touch", "mkdir"))]


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, extras included; extras that name other extras of this package aside."""
    project = PYPROJECT["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    asked = [Requirement(line) for line in (*project["dependencies"], *extras)]
    return [requirement for requirement in asked if requirement.name != project["name"]]


def pins() -> dict[str, str]:
    """constraints.txt as package -> version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_version_is_the_same_everywhere() -> None:
    version = expertshare.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^version: (\S+)$", citation) == [version]
    assert re.findall(r"(?m)^## \[(\S+)\]", changelog)[0] == version


def test_the_command_that_gets_installed_exists() -> None:
    module, _, function = PYPROJECT["project"]["scripts"]["expertshare"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_every_requirement_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_pins_are_exact_and_not_local() -> None:
    assert all(re.fullmatch(r"\d+(\.\d+)*(\.post\d+)?", version) for version in pins().values())


def test_make_test_runs_every_check_and_ends_with_pytest() -> None:
    tools = [Path(line.split()[0]).name for line in make_recipe("test")][-4:]
    assert tools[:3] == ["ruff", "mypy", "lint-imports"]
    assert make_recipe("test")[-1].endswith("-m pytest -q -n auto --maxprocesses 4 --dist loadfile")


def test_ci_runs_make_test_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    lines = script.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith(("#", "set ", "cd "))] == ["make test"]
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_readme_names_the_command(command: str) -> None:
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_demo_uses_what_is_in_the_repository() -> None:
    commands = [line for line in make_recipe("demo") if "/expertshare " in line]
    assert [command.split()[1] for command in commands] == ["generate", "generate", "generate", "compare"]
    assert all((ROOT / command.split()[2]).is_dir() for command in commands)
    assert (ROOT / re.findall(r"--prompts (\S+)", commands[-1])[0]).is_file()


def test_the_demo_asks_what_was_never_trained_on() -> None:
    prompts = {prompt for line in make_recipe("demo") for prompt in re.findall(r"--prompt '([^']+)'", line)}
    assert len(prompts) == 1
    assert [split_of(prompt) for prompt in prompts] == ["test"]


def test_shipped_prompts_are_unseen_ones_of_every_kind() -> None:
    records = read_prompts(ROOT / "examples" / "prompts.jsonl")
    assert Counter(record.task for record in records) == dict.fromkeys(TASKS, 12)
    assert {split_of(record.prompt) for record in records} == {"test"}


def test_shipped_references_are_right() -> None:
    records = read_prompts(ROOT / "examples" / "prompts.jsonl")
    assert all(score_many(records, [record.reference or "" for record in records]))


def test_no_file_names_one_machine_or_a_package_registry() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in repository_files()
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if MACHINE_PATH.search(line) or REGISTRY.search(line)
    ]
    # this file holds the patterns
    assert [line for line in found if not line.startswith("tests/test_packaging.py:")] == []


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in repository_files()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text_of(path))
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert broken == []

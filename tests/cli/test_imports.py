"""What is imported, and when: help costs no torch, and a verb nothing of the laboratory that it does not need."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import expertshare
from expertshare import api
from expertshare.cli import load_verb
from expertshare.cli.app import VERBS

HEAVY = {"matplotlib", "numpy", "scipy", "torch", "transformers"}
LABORATORY = {"bench", "make-checkpoint", "report", "simulate", "tasks", "train"}
COUNT = "import json, sys; print(json.dumps(sorted({name for name in sys.modules})))"


def imported(program: str) -> set[str]:
    """The modules that a fresh Python has after `program`."""
    done = subprocess.run([sys.executable, "-c", f"{program}\n{COUNT}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], []])
def test_the_program_imports_nothing_heavy_for_its_help(arguments: list[str]) -> None:
    program = f"from expertshare.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass"
    assert not HEAVY & imported(program)


def test_the_package_and_its_api_import_nothing_heavy() -> None:
    assert not HEAVY & imported("import expertshare, expertshare.api\ndir(expertshare), dir(expertshare.api)")


@pytest.mark.parametrize("verb", sorted(set(VERBS) - LABORATORY))
def test_a_verb_imports_nothing_of_the_laboratory(verb: str) -> None:
    found = imported(f"from expertshare.cli import load_verb\nload_verb({verb!r})")
    assert not [name for name in found if name.startswith("expertshare.lab")]
    assert "matplotlib" not in found


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_a_verb_with_the_first_sentence_of_its_own_help(verb: str) -> None:
    assert inspect.cleandoc(load_verb(verb).help).splitlines()[0] == VERBS[verb]


def test_lazy_names_are_there() -> None:
    assert set(api.__all__) <= set(dir(api))
    assert all(getattr(api, name) is not None for name in api.__all__)
    assert "apply" in dir(expertshare)
    assert callable(expertshare.apply)
    assert inspect.isfunction(api.report)
    with pytest.raises(AttributeError, match="has no attribute 'generat'"):
        _ = api.generat

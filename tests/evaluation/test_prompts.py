"""Prompt files survive a round trip; each way of being wrong names the file and the line."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertshare.errors import InputError
from expertshare.evaluation.prompts import PromptRecord, read_prompts, write_prompts
from expertshare.lab.tasks.generation import generate_items

TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
RECORDS = st.builds(
    PromptRecord,
    prompt=TEXT,
    reference=st.none() | st.text(st.characters(codec="utf-8")),
    task=st.none() | TEXT,
    tests=st.lists(TEXT).map(tuple),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(RECORDS, min_size=1, max_size=5))
def test_round_trip(records: list[PromptRecord], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, records)
    assert read_prompts(path) == records
    assert read_prompts(io.StringIO(path.read_text(encoding="utf-8"))) == records


def test_items_become_records(tmp_path: Path) -> None:
    items = generate_items("code", split="test", count=5, seed=0)
    write_prompts(tmp_path / "p.jsonl", items)
    for record, item in zip(read_prompts(str(tmp_path / "p.jsonl")), items, strict=True):
        assert (record.prompt, record.reference) == (item.prompt, item.reference)
        assert (record.task, record.tests) == ("code", item.tests)


def test_blank_lines_count_but_hold_nothing() -> None:
    assert read_prompts(io.StringIO('\n{"prompt": "a"}\r\n\n')) == [PromptRecord(prompt="a")]
    with pytest.raises(InputError, match="line 3"):
        read_prompts(io.StringIO('\n{"prompt": "a"}\n{\n'))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "invalid JSON"),
        ("plain text", "invalid JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', "invalid JSON"),
        ('["a"]', "got a list"),
        ('"a"', "got a string"),
        ("3", "got a number"),
        ("null", "got null"),
        ("{}", 'the key "prompt"'),
        ('{"prompt": ""}', "got an empty one"),
        ('{"prompt": " \\n"}', "got an empty one"),
        ('{"prompt": 3}', "got a number"),
        ('{"prompt": null}', "got null"),
        ('{"prompt": "a", "reference": true}', '"reference" to be a string, got a boolean'),
        ('{"prompt": "a", "task": null}', '"task" to be a string, got null'),
        ('{"prompt": "a", "tests": "assert"}', '"tests" to be a list of strings'),
        ('{"prompt": "a", "tests": [1]}', '"tests" to be a list of strings'),
        ('{"promt": "a"}', "Did you mean 'prompt'"),
        ('{"prompt": "a", "level": 1}', "'level'"),
    ],
)
def test_wrong_lines(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}, line 2: expected")


def test_unreadable_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check the path"):
        read_prompts(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="check the path"):
        read_prompts(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(InputError, match="line 2: expected UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="at least one"):
        read_prompts(tmp_path / "empty.jsonl")


def test_prompts_and_scoring_are_read_without_torch() -> None:
    modules = "expertshare.evaluation.prompts, expertshare.evaluation.scoring"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

"""The example of docs/transformers.md runs as it stands, on a small model in the place of a large one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from .tiny_models import VOCAB, build

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["[UNK]", "Name", "five", "rivers", "."]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"word{i}" for i in range(VOCAB - len(words)))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "my-model")
    model = build("qwen3_moe")
    model.generation_config.max_new_tokens = 6
    model.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    source = example.group(1)
    assert sum(not line.startswith(("import ", "from ")) and bool(line.strip()) for line in source.splitlines()) == 5
    exec(compile(source, str(PAGE), "exec"), {})
    answer, counts = capsys.readouterr().out.strip().splitlines()
    assert answer.startswith("Name five rivers .")
    assert re.fullmatch(r"4\.\d+ experts per block and layer, \d+ bytes of weights", counts)

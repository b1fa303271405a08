"""The tokenizer takes a second to build, so all tests share one."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from expertshare.lab.tasks.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return build_tokenizer(0)

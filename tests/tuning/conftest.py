"""Tiny random models: block-causal on disk, and both kinds of attention in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertshare.models import LoadedModel, load_model
from tiny_models import save_tiny, tiny_loaded


@pytest.fixture(scope="session", params=["block_causal", "full"])
def any_model(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny_loaded(attention=request.param)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint)

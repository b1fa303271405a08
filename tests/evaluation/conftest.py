"""A tiny random model in the LLaDA2 layout, in memory."""

from __future__ import annotations

import pytest

from expertshare.models import LoadedModel
from tiny_models import tiny_loaded


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    return tiny_loaded()

"""The real model that the tests of the engine share: from the environment, else from the user's model cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtimes.store import ModelStore


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1. ``ARCHIPELAG_TEST_MODEL`` names a file; without it the store brings it once (98 MB)."""
    named = os.environ.get("ARCHIPELAG_TEST_MODEL")
    if named:
        return Path(named)
    return Path(ModelStore().fetch("smollm2-135m").path)

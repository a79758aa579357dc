"""What several test modules of A/B tests need."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.coordinator.desks import url_of


@pytest.fixture
def books_url(tmp_path: Path) -> str:
    """Of an SQLite database, for what no database has to do with."""
    return url_of(tmp_path)

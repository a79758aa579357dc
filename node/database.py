"""Where a Coordinator's database is."""

from __future__ import annotations

from pathlib import Path

DATABASE_FILE = "coordinator.db"


def database_url(data_dir: str, given: str | None) -> str:
    """The URL that was given, else a SQLite file in the data folder."""
    return given or f"sqlite:///{Path(data_dir).expanduser().absolute() / DATABASE_FILE}"

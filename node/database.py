"""The Coordinator's database, as the commands find it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from coordinator.books.database import Database, sqlite_url
from coordinator.books.errors import BooksRefused, Why
from node.datadir import DataDir
from protocol.errors import ConfigError

_ADVICE = {
    Why.NO_ACCOUNT: "see archipelag-node accounts list, or make it with archipelag-node accounts create",
    Why.NOT_OWNER: "it can be taken from its account with archipelag-node accounts unpair",
    Why.DIFFERS: "every id is used once: choose another",
}


def database_url(data_dir: str, given: str | None) -> str:
    """The URL that was given, else a SQLite file in the data folder."""
    return given or sqlite_url(Path(data_dir).expanduser().absolute())


@contextlib.contextmanager
def open_books(data_dir: str, given: str | None, make: bool = False) -> Iterator[Database]:
    """The books, beside a running Coordinator or without one; ``make``: also where there are none yet.

    Raises ConfigError, also for what the books refuse inside, and BooksUnavailable.
    """
    url = database_url(data_dir, given)
    if given is None:
        if not make and not Path(url.removeprefix("sqlite:///")).exists():
            raise ConfigError(
                f"no Coordinator keeps its books in {data_dir}; name its folder with --data-dir or its database with --database-url"
            )
        DataDir.open(data_dir)
    with closing(Database(url)) as database:
        try:
            yield database
        except BooksRefused as refused:
            advice = _ADVICE.get(refused.why)
            raise ConfigError(f"{refused.message}; {advice}" if advice else refused.message) from refused

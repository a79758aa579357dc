"""What a node has heard about Cargos, on disk: a file of its own for each notice, named by its key.

    KEY.revoked    flushed to the disk, and the folder's entry too, before the revocation takes effect
    KEY.promoted   likewise; the one before it of the same name goes after that
    KEY.cargo      written beside and renamed; what a power cut takes of them comes again from the network

Files are checked as if a stranger had brought them when they are read. What is damaged is put aside under ``.damaged``, and neighbours
send it again. Whatever a killed process left half-written is taken away at the next start.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from node.datadir import write_atomically
from protocol import limits
from protocol.cargo_news import NOTICE, About, Notice, Told
from protocol.errors import RemoteProtocolError

log = logging.getLogger(__name__)

NEWS_FOLDER = "cargo-news"
_SUFFIXES = {About.REVOCATION: ".revoked", About.PROMOTION: ".promoted", About.CARGO: ".cargo"}


class NoticeStore:
    """Calls block; any thread may make them, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __repr__(self) -> str:
        return f"<NoticeStore {self._folder}>"

    def load(self, read: Callable[[Notice], Told], tidies: bool = True) -> list[Told]:
        """All that is good, revocations first. ``tidies``: what is damaged or half-written is put away; not beside a running node."""
        if tidies:
            for rest in self._folder.glob(".*"):
                with contextlib.suppress(OSError):
                    rest.unlink()
        return [told for about in About for told in self._load_kind(about, read, tidies)]

    def _load_kind(self, about: About, read: Callable[[Notice], Told], tidies: bool) -> Iterator[Told]:
        for file in sorted(self._folder.glob(f"*{_SUFFIXES[about]}")):
            try:
                yield _checked(file, about, read)
            except (RemoteProtocolError, OSError) as error:
                log.warning("%s is damaged (%s) and is put aside; neighbours have it", file.name, error)
                if tidies:
                    with contextlib.suppress(OSError):
                        file.rename(file.with_suffix(".damaged"))

    def keep_words(self, words: Sequence[Told]) -> None:
        """Revocations and promotions: on the disk when this returns. Raises OSError."""
        for told in words:
            write_atomically(self._path(told.notice.about, told.key), NOTICE.encode(told.notice))
        if words:
            self._flush_folder()

    def drop_promotions(self, keys: Iterable[bytes]) -> None:
        """Raises OSError."""
        for key in keys:
            self._path(About.PROMOTION, key).unlink(missing_ok=True)

    def keep_cargos(self, cargos: Sequence[Told]) -> None:
        """Raises OSError."""
        for told in cargos:
            write_atomically(self._path(About.CARGO, told.key), NOTICE.encode(told.notice), flush=False)

    def drop_cargos(self, keys: Iterable[bytes]) -> None:
        """Raises OSError."""
        for key in keys:
            self._path(About.CARGO, key).unlink(missing_ok=True)

    def _path(self, about: About, key: bytes) -> Path:
        return self._folder / f"{key.hex()}{_SUFFIXES[about]}"

    def _flush_folder(self) -> None:
        """A name that was just given is on the disk only then (fsync(2))."""
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _checked(file: Path, about: About, read: Callable[[Notice], Told]) -> Told:
    with open(file, "rb") as opened:
        told = read(NOTICE.decode(opened.read(limits.ENVELOPE_BYTES_MAX + 1)))
    if (told.notice.about, told.key.hex()) != (about, file.stem):
        raise RemoteProtocolError("it is about something else than its name says")
    return told

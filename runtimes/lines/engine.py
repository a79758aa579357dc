"""What a runtime of lines brings: an engine that a worker loads once and that does one job at a time.

A worker module is ``serve(load)`` of runtimes/lines/worker.py; everything around it, the frames, time limits, cancelling, the window, the
walls, is the same for all runtimes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from protocol.cargo_io import DoneLine, ImageLine, ProgressLine, StatusLine, TokenLine


class JobStopped(Exception):
    """The job has to end: nobody waits for it any more, or its time is over. Let it pass."""


class BadJob(Exception):
    """The input cannot be used. The text is for whoever sent it and says what would do; it quotes no more of the input than a name."""


class BrokenJob(Exception):
    """The Cargo is at fault: its model does not do what it says. The text is for its publisher."""


class LineJob(Protocol):
    """One job, as an engine sees it."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """The input: one JSON object."""
        ...

    @property
    def seed(self) -> bytes:
        """16 bytes for whatever is drawn."""
        ...

    def say(self, line: StatusLine | TokenLine | ProgressLine | ImageLine) -> None:
        """Waits while the reader is behind. Raises JobStopped."""
        ...

    def check(self) -> None:
        """Raises JobStopped where the job has to end; called between steps of what takes long."""
        ...


class LineEngine(Protocol):
    """``label``: build and model; answers are equal between equal labels. At most NAME_CHARS_MAX printable characters without spaces."""

    @property
    def label(self) -> str: ...

    def run(self, job: LineJob) -> DoneLine:
        """Raises BadJob, BrokenJob, JobStopped. Anything else is a bug and ends the worker."""
        ...


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What a worker loads: a Cargo by its manifest. ``files``: path in the manifest -> absolute place where the worker finds it;
    ``entry``: the manifest's, one of the paths; ``options``: the manifest's; ``threads``: to compute with; ``code``: the entry, where
    it is given as bytes."""

    name: str
    content_hash: str
    entry: str
    files: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    code: bytes = field(default=b"", repr=False)

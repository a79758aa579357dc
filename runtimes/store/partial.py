"""The file that a download grows in.

``KEY.partial`` holds the bytes, ``KEY.state`` says which source they are from: where each part begins, and for the one under way the
server's validator (ETag or date), so that a later try can ask for the rest of the same file. The state is written before the bytes it
describes. Whatever else is in doubt, the hash over all bytes decides in the end.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from runtimes.store.errors import DiskFull, WrongContent
from runtimes.store.files import CHUNK_BYTES, disk_full_is_clear, read_json, write_json


class Partial:
    """One download under way; the caller holds its lock. Use as a context manager."""

    def __init__(self, path: Path, state_path: Path) -> None:
        self.path = path
        self._state_path = state_path
        self._state = _sound_state(read_json(state_path))
        with disk_full_is_clear(path.parent):
            # Unbuffered: what was written is in the kernel when this process is killed, and close() has nothing left to fail at.
            self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        self.size = os.fstat(self._file.fileno()).st_size
        starts = self._state["starts"]
        if not starts or starts[-1] > self.size:
            self._state = _sound_state({})
            self._cut(0)
        self.resumed = self.size > 0
        self._whole, self._part = self._hash_again()

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        if self.size == 0:  # nothing to resume
            self.discard()

    def __repr__(self) -> str:
        return f"<Partial {self.path.name}: {self.size} bytes, part {len(self._state['starts'])}>"

    @property
    def part_bytes(self) -> int:
        """Bytes of the part under way."""
        return self.size - int(self._state["starts"][-1])

    @property
    def validator(self) -> str | None:
        found = self._state["validator"]
        return str(found) if found else None

    def has_part(self, index: int) -> bool:
        """Whether the part is complete from an earlier try."""
        return index < len(self._state["starts"]) - 1

    def begin_part(self, index: int) -> None:
        """The part ``index`` follows; what an earlier try brought of it stays."""
        if index == len(self._state["starts"]):
            self._state["starts"].append(self.size)
            self.note(None)
            self._part = hashlib.sha256()

    def note(self, validator: str | None) -> None:
        """Remember the validator of the part under way, before its bytes."""
        self._state["validator"] = validator
        write_json(self._state_path, self._state)

    def write(self, data: bytes) -> None:
        """Raises DiskFull, and then leaves nothing behind."""
        try:
            with disk_full_is_clear(self.path.parent):
                rest = memoryview(data)
                while rest:
                    rest = rest[self._file.write(rest) :]
        except (DiskFull, OSError):
            self.discard()
            raise
        self.size += len(data)
        self._whole.update(data)
        self._part.update(data)

    def restart_part(self) -> None:
        """Forget what there is of the part under way."""
        if self.part_bytes:
            self._cut(int(self._state["starts"][-1]))
            self._whole, self._part = self._hash_again()
        self.note(None)

    def end_part(self, expected: str | None, what: str) -> None:
        """Raises WrongContent where the part's own hash is known and differs."""
        found = self._part.hexdigest()
        if expected is not None and found != expected:
            raise WrongContent(
                f"{what} has the SHA-256 {found}, but {expected} was expected. What was downloaded is deleted. Start again; if it "
                "stays wrong, correct the source or the hash."
            )

    def finish(self) -> str:
        """All bytes are on the disk; returns their SHA-256."""
        with disk_full_is_clear(self.path.parent):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._whole.hexdigest()

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._state_path.unlink(missing_ok=True)

    def _cut(self, size: int) -> None:
        self._file.truncate(size)
        self._file.seek(size)
        self.size = size

    def _hash_again(self) -> tuple[hashlib._Hash, hashlib._Hash]:
        """Hashes over what is there: of the whole, and of the part under way."""
        whole, part = hashlib.sha256(), hashlib.sha256()
        start = int(self._state["starts"][-1]) if self._state["starts"] else 0
        self._file.seek(0)
        position = 0
        while chunk := self._file.read(CHUNK_BYTES):
            whole.update(chunk)
            part.update(chunk[max(0, start - position) :])
            position += len(chunk)
        return whole, part


def _sound_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state if it is well formed, else that of an empty file."""
    starts = state.get("starts")
    rising = (
        isinstance(starts, list)
        and all(isinstance(start, int) for start in starts)
        and starts == sorted(starts)
        and starts[:1] == [0]
    )
    if not rising:
        return {"starts": [], "validator": None}
    return {"starts": starts, "validator": state.get("validator")}

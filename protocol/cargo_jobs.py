"""Jobs of Cargos that give lines: what they are asked, and how an answer that another Island goes on with stays one answer.

A Cargo gives the same lines for the same input and seed. So where an Island dies in the middle, another one begins anew, and what the
Consumer has is taken off its front: ``Splice`` passes over so many bytes, and sees by their hash that they are the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from protocol import checks, limits
from protocol.cargo_io import decode_input
from protocol.errors import Code, Refused, RemoteProtocolError

SEED_BYTES = 16
TEXT_RUNTIMES = frozenset({"gguf", "echo"})  # whose Cargos write texts; all others give lines
_MARK = b"lines/1\0"


@dataclass(frozen=True, slots=True)
class CargoInput:
    """``data``: JSON of one object. ``seed``: of whatever the Cargo draws. Raises ValueError for what is none."""

    data: bytes
    seed: bytes

    def __post_init__(self) -> None:
        checks.exactly("seed", self.seed, SEED_BYTES)
        try:
            decode_input(self.data)
        except RemoteProtocolError as error:
            raise ValueError(str(error)) from None

    @property
    def input_chars(self) -> int:
        return len(self.data)

    @property
    def max_tokens(self) -> int:
        """Lines with text that are counted and paid for; there may be more."""
        return limits.COMPLETION_TOKENS_MAX


def pack_input(given: CargoInput) -> bytes:
    """For keeping."""
    return _MARK + given.seed + given.data


def is_packed_input(data: bytes) -> bool:
    """Whether ``pack_input`` made it."""
    return data.startswith(_MARK)


def unpack_input(data: bytes) -> CargoInput:
    """Raises ValueError for what ``pack_input`` did not make."""
    if not is_packed_input(data):
        raise ValueError("no kept input of a Cargo")
    start = len(_MARK) + SEED_BYTES
    return CargoInput(data[start:], data[len(_MARK) : start])


def counted_tokens(lines_with_text: int) -> int:
    """What a job's receipt counts as output tokens."""
    return min(lines_with_text, limits.COMPLETION_TOKENS_MAX)


class Splice:
    """The output of one job over several attempts. ``begin`` an attempt, then ``feed`` it what comes."""

    def __init__(self) -> None:
        self.delivered_bytes = 0
        self._delivered = hashlib.sha256()
        self._again = hashlib.sha256()
        self._seen_bytes = 0  # of this attempt

    def __repr__(self) -> str:
        return f"<Splice {self._seen_bytes} of {self.delivered_bytes} bytes>"

    def begin(self) -> None:
        self._again, self._seen_bytes = hashlib.sha256(), 0

    def feed(self, data: bytes) -> bytes:
        """The part of it that is new. Raises Refused(CARGO_FAILED) where what was delivered before comes different this time."""
        left = self.delivered_bytes - self._seen_bytes
        old, new = data[: max(0, left)], data[max(0, left) :]
        self._seen_bytes += len(data)
        if old:
            self._again.update(old)
            if len(old) == left and self._again.digest() != self._delivered.digest():
                text = "its Island was lost in the middle, and another one gives other lines for the same input: send the job again"
                raise Refused(Code.CARGO_FAILED, text)
        self._delivered.update(new)
        self.delivered_bytes += len(new)
        return new

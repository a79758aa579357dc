"""The worker's loop without its process: what it says and when, and frames that would be too large."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from protocol import limits
from protocol.errors import Code, LocalProtocolError, Refused
from protocol.framing import FrameDecoder, encode_frame
from protocol.generation import pack_tokens, unpack_tokens
from runtimes.gguf import worker as worker_module
from runtimes.gguf.load import Loaded
from runtimes.gguf.messages import GGUF_WORKER, Cancel, Embedded, Output, Rejected, Room, Step
from runtimes.gguf.worker import Link, Worker


@dataclass
class Talk:
    """The other end of a link."""

    said: list[object] = field(default_factory=list)

    def send(self, *messages: object) -> None:
        self.said.extend(messages)


@dataclass
class Events:
    given: list[object]

    def messages(self) -> list[object]:
        return self.given


@dataclass
class Engine:
    """Busy for ever; a step gives what it is told to."""

    now: Room = field(default_factory=lambda: Room(100, 2, 0, 1.0))
    gives: list[object] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    is_idle = False
    spare_s = 0.03
    is_waiting_for_stages = False

    def tidy(self) -> None: ...

    def admit(self) -> Events:
        return Events([])

    def step(self) -> Events:
        given, self.gives = self.gives, []
        return Events(given)

    def room(self) -> Room:
        return self.now

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def submit(self, job: Any) -> None:
        raise Refused(Code.NO_CAPACITY, "64 jobs are waiting already")


@dataclass
class Embeddings:
    """Has something to do for as many steps as it has answers."""

    gives: list[list[Embedded]]
    spare: list[float] = field(default_factory=list)

    @property
    def is_idle(self) -> bool:
        return not self.gives

    def step(self, spare_s: float) -> list[Embedded]:
        self.spare.append(spare_s)
        return self.gives.pop(0) if self.gives else []


@dataclass
class Order:
    """A prepared job, as far as the loop looks at it."""

    number: int


@dataclass
class Clock:
    now_s: float = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(worker_module, "time", clock)
    return clock


def made(engine: Engine, embedder: Embeddings | None = None) -> tuple[Worker, Talk]:
    talk, loaded = Talk(), cast(Loaded, type("L", (), {"engine": engine, "ring": None, "embedder": embedder}))
    return Worker(cast(Link, talk), loaded), talk


def test_the_room_is_told_when_it_changes(clock: Clock) -> None:
    engine = Engine()
    worker, talk = made(engine)
    worker.turn()
    worker.turn()
    assert talk.said == [engine.now]
    engine.now = Room(50, 1, 0, 1.0)
    worker.turn()
    worker.turn()
    assert talk.said[1:] == [engine.now]


def test_long_silent_computing_is_not_taken_for_standing_still(clock: Clock) -> None:
    """A prompt of minutes gives nothing to say, yet the node ends a worker that is silent for WORKER_STALL_S."""
    engine = Engine()
    worker, talk = made(engine)
    gaps, last_s = [], clock.now_s
    for _ in range(1000):
        clock.now_s += 0.35
        before = len(talk.said)
        worker.turn()
        if len(talk.said) > before:
            gaps.append(clock.now_s - last_s)
            last_s = clock.now_s
    gaps.append(clock.now_s - last_s)
    assert 0 < max(gaps) < limits.WORKER_STALL_S / 4
    assert len(talk.said) < 50, "it says so now and then, not at each step"


def test_whoever_answers_needs_no_heartbeat(clock: Clock) -> None:
    engine = Engine()
    worker, talk = made(engine)
    worker.turn()
    for _ in range(100):
        clock.now_s += 1.0
        engine.gives = [Rejected(1, Code.INTERNAL, "x")]
        worker.turn()
    assert [type(message) for message in talk.said] == [Room] + [Rejected] * 100


def test_cancels_and_refusals_of_the_engine(clock: Clock) -> None:
    engine = Engine()
    worker, talk = made(engine)
    worker._inbox.put(Cancel(7))
    worker._inbox.put(Order(8))
    worker._inbox.put(Cancel(9))
    worker.turn()
    assert engine.cancelled == [7, 9]
    assert talk.said == [Rejected(8, Code.NO_CAPACITY, "64 jobs are waiting already"), engine.now]


def test_embeddings_get_what_the_engine_spares() -> None:
    """Also where it is idle: nobody waits for the next message while there is something to compute."""
    engine, embeddings = Engine(), Embeddings([[], [Embedded(5, 3, b"{}")]])
    worker, talk = made(engine, embeddings)
    worker.turn()
    engine.is_idle = True
    worker.turn()
    assert Embedded(5, 3, b"{}") in talk.said and embeddings.spare == [engine.spare_s] * 2


LOGPROBS = json.dumps([{"token": "word", "logprob": -1.25, "bytes": [119, 111, 114, 100]}] * 40).encode()


@pytest.mark.parametrize(("text", "logprobs"), [("a", b""), ("a", LOGPROBS), ("€" * 2000, b""), ("x" * 40_000, LOGPROBS)])
@pytest.mark.parametrize("count", [1, 2])
def test_steps_of_many_answers_fit_into_frames(text: str, logprobs: bytes, count: int) -> None:
    outputs = tuple(Output(2**40 + number, count, text, logprobs) for number in range(limits.ENGINE_SLOTS_MAX))
    tokens = list(range(limits.ENGINE_SLOTS_MAX * count))
    whole = Step(outputs, pack_tokens(tokens))
    if len(text) + len(logprobs) > 2100:
        with pytest.raises(LocalProtocolError, match="too large for a frame"):
            encode_frame(GGUF_WORKER, whole)
    frames = b"".join(encode_frame(GGUF_WORKER, part) for part in worker_module._parts(whole))
    parts = list(FrameDecoder(GGUF_WORKER).feed(frames))
    assert tuple(output for part in parts for output in part.outputs) == outputs
    assert [token for part in parts for token in unpack_tokens(part.tokens)] == tokens
    for part in parts:
        assert len(part.tokens) == 4 * sum(output.count for output in part.outputs)
    assert (len(parts) == 1) == (len(text) + len(logprobs) < 2)


def test_other_messages_stay_as_they_are() -> None:
    ended = Rejected(1, Code.INTERNAL, "x")
    assert list(worker_module._parts(ended)) == [ended]


def test_an_error_shows_lines_of_code_and_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "a " + "prompt"
    for action, name in ((int, "ValueError"), (json.loads, "RuntimeError")):
        try:
            action(secret)
        except ValueError:
            sys.__excepthook__(*worker_module._without_values())
        shown = capsys.readouterr().err
        assert f"{name}: hidden" in shown and "action(secret)" in shown and secret not in shown

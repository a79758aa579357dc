"""The job stream: two real sessions, and a driver that moves frames between them one at a time."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import deque
from typing import Any

import pytest

from protocol import limits
from protocol.errors import Code, LocalProtocolError, RemoteProtocolError
from protocol.framing import FrameDecoder, encode_frame
from protocol.generation import FinishReason, pack_tokens
from protocol.jobs import SENT_BY, TRANSITIONS, JobState, JobStreams, Side
from protocol.messages import (
    JOB,
    Hello,
    JobAccepted,
    JobAlive,
    JobCancel,
    JobChunk,
    JobCount,
    JobDone,
    JobFailed,
    JobLines,
    JobMore,
    JobOpen,
    NodeRole,
    RouteBroken,
    RouteMended,
)

KINDS = list(SENT_BY)
LINE = b'{"type":"token","content":"x"}\n'


def message(kind: type[Any], job: int = 1, step: int = 0, tokens: int = 1) -> Any:
    made: dict[type[Any], Any] = {
        JobOpen: lambda: JobOpen(job, b"ticket", input=b"input"),
        JobAccepted: lambda: JobAccepted(job, "echo/1", 3, 0),
        JobChunk: lambda: JobChunk(job, step, "x", b"", pack_tokens(list(range(step, step + tokens)))),
        JobDone: lambda: JobDone(job, FinishReason.STOP, "", 3, 0, step, 1, 1, b""),
        JobFailed: lambda: JobFailed(job, Code.INTERNAL, "broke"),
        JobCancel: lambda: JobCancel(job),
        RouteBroken: lambda: RouteBroken(job, 0, 1, Code.LINK_LOST, "stage 0 is gone"),
        RouteMended: lambda: RouteMended(job, b"ticket"),
        JobCount: lambda: JobCount(job, b"count"),
        JobAlive: lambda: JobAlive(job),
        JobLines: lambda: JobLines(job, step, 1, LINE),
        JobMore: lambda: JobMore(job, 1),
    }
    return made[kind]()


class Pair:
    """A holder and an Island with a wire between them; nothing arrives before ``move`` carries it."""

    def __init__(self) -> None:
        self.holder, self.island = JobStreams(Side.HOLDER), JobStreams(Side.ISLAND)
        self.wires: dict[Side, deque[bytes]] = {Side.HOLDER: deque(), Side.ISLAND: deque()}
        self._decoders = {Side.HOLDER: FrameDecoder(JOB), Side.ISLAND: FrameDecoder(JOB)}

    def end(self, side: Side) -> JobStreams:
        return self.holder if side is Side.HOLDER else self.island

    def say(self, *said: Any) -> None:
        for one in said:
            side = SENT_BY[type(one)]
            self.end(side).send(one)
            self.wires[side].append(encode_frame(JOB, one))

    def move(self, speaker: Side) -> Any:
        """Carries one frame of that speaker to the other end."""
        (heard,) = self._decoders[speaker].feed(self.wires[speaker].popleft())
        self.end(Side.ISLAND if speaker is Side.HOLDER else Side.HOLDER).receive(heard)
        return heard

    def say_and_move(self, *said: Any) -> None:
        for one in said:
            self.say(one)
            self.move(SENT_BY[type(one)])

    def states(self, job: int = 1) -> tuple[JobState, JobState]:
        return self.holder.state(job), self.island.state(job)


def test_a_job_from_start_to_end() -> None:
    pair = Pair()
    pair.say(message(JobOpen))
    assert pair.states() == (JobState.OPENING, JobState.IDLE)
    pair.move(Side.HOLDER)
    assert pair.states() == (JobState.OPENING, JobState.OPENING)
    pair.say_and_move(message(JobAccepted), message(JobChunk, tokens=2), message(JobChunk, step=2))
    assert pair.states() == (JobState.RUNNING, JobState.RUNNING)
    digest = hashlib.sha256(pack_tokens([0, 1, 2])).digest()
    assert pair.holder.counted(1) == pair.island.counted(1) == (3, digest)
    pair.say(message(JobDone, step=3))
    assert pair.states() == (JobState.RUNNING, JobState.ENDED)
    pair.move(Side.ISLAND)
    assert pair.states() == (JobState.ENDED, JobState.ENDED)
    assert len(pair.holder) == len(pair.island) == 0
    assert repr(pair.holder) == "<JobStreams HOLDER: 0 open, highest 1>"


def test_a_refusal_ends_a_job_that_never_ran() -> None:
    pair = Pair()
    pair.say_and_move(message(JobOpen), message(JobFailed))
    assert pair.states() == (JobState.ENDED, JobState.ENDED)
    with pytest.raises(LocalProtocolError):
        pair.say(message(JobAccepted))


@pytest.mark.parametrize(("last", "running"), [(JobDone, True), (JobFailed, True), (JobFailed, False)])
def test_a_cancel_may_cross_the_last_message(last: type[Any], running: bool) -> None:
    pair = Pair()
    pair.say_and_move(message(JobOpen))
    if running:
        pair.say_and_move(message(JobAccepted))
    pair.say(message(JobCancel), message(last))
    assert pair.states() == (JobState.CANCELLING if running else JobState.WITHDRAWN, JobState.ENDED)
    pair.move(Side.HOLDER)
    pair.move(Side.ISLAND)
    assert pair.states() == (JobState.ENDED, JobState.ENDED)


def test_a_cancel_may_cross_everything_that_the_island_says() -> None:
    pair = Pair()
    pair.say(message(JobOpen), message(JobCancel))
    pair.move(Side.HOLDER)
    pair.say(message(JobAccepted), message(JobChunk), message(JobChunk, step=1), message(JobFailed))
    pair.move(Side.HOLDER)
    for _ in range(4):
        pair.move(Side.ISLAND)
    assert pair.states() == (JobState.ENDED, JobState.ENDED)


OF_LINES = (JobLines, JobMore)


def into(state: JobState, job: int = 1, lines: bool = False) -> Pair:
    """A pair that agrees on this state, of a job whose first line has come where it gives ``lines``."""
    pair = Pair()
    if lines and state is not JobState.IDLE:
        pair.say_and_move(JobOpen(job, b"ticket", bytes(16), b"{}"))
        if state in (JobState.RUNNING, JobState.CANCELLING, JobState.ENDED):
            pair.say_and_move(message(JobAccepted, job), JobLines(job, 0, 1, LINE))
        ends = {JobState.WITHDRAWN: JobCancel, JobState.CANCELLING: JobCancel, JobState.ENDED: JobFailed}
        if state in ends:
            pair.say_and_move(message(ends[state], job))
        return pair
    way: dict[JobState, list[type[Any]]] = {
        JobState.IDLE: [],
        JobState.OPENING: [JobOpen],
        JobState.RUNNING: [JobOpen, JobAccepted],
        JobState.WITHDRAWN: [JobOpen, JobCancel],
        JobState.CANCELLING: [JobOpen, JobAccepted, JobCancel],
        JobState.ENDED: [JobOpen, JobAccepted, JobDone],
    }
    pair.say_and_move(*(message(kind, job) for kind in way[state]))
    assert pair.states(job) == (state, state)
    return pair


ALL = [(state, kind, side) for state in JobState for kind in KINDS for side in Side]


@pytest.mark.parametrize(
    ("state", "kind", "side"), ALL, ids=lambda value: getattr(value, "name", None) or value.__name__
)
def test_every_move_is_in_the_table_or_is_refused_by_both_ends(state: JobState, kind: type[Any], side: Side) -> None:
    lines = kind in OF_LINES
    said = message(kind, step=len(LINE) if lines else 0)
    legal = (state, kind) in TRANSITIONS and SENT_BY[kind] is side
    sender = into(state, lines=lines).end(side)
    receiver = into(state, lines=lines).end(Side.ISLAND if side is Side.HOLDER else Side.HOLDER)
    if legal:
        sender.send(said)
        receiver.receive(said)
        assert sender.state(1) is receiver.state(1) is TRANSITIONS[state, kind]
    else:
        with pytest.raises(LocalProtocolError):
            sender.send(said)
        with pytest.raises(RemoteProtocolError):
            receiver.receive(said)
        assert sender.state(1) is receiver.state(1) is state, "a refused message changes nothing"


def test_the_table_is_sound() -> None:
    """Every state is reached, every open state can end, and what has ended stays so."""
    reached = {JobState.IDLE, *TRANSITIONS.values()}
    assert reached == set(JobState)
    for (state, kind), following in TRANSITIONS.items():
        assert following is not JobState.IDLE
        if state is JobState.ENDED:
            assert kind in (JobCancel, RouteMended, JobCount, JobMore) and following is JobState.ENDED
    for state in (JobState.OPENING, JobState.RUNNING, JobState.WITHDRAWN, JobState.CANCELLING):
        assert TRANSITIONS[state, JobFailed] is JobState.ENDED
    assert {kind for _, kind in TRANSITIONS} == set(SENT_BY)


def test_messages_of_another_kind_are_refused() -> None:
    hello = Hello(1, NodeRole.ISLAND, "", "a")
    for side in Side:
        with pytest.raises(RemoteProtocolError):
            JobStreams(side).receive(hello)
        with pytest.raises(LocalProtocolError):
            JobStreams(side).send(hello)


@pytest.mark.parametrize("step", [0, 1, 3, 5, 4096])
def test_chunks_that_are_repeated_lost_or_reordered(step: int) -> None:
    pair = into(JobState.RUNNING)
    pair.say_and_move(message(JobChunk, tokens=2))
    before = pair.holder.counted(1)
    with pytest.raises(RemoteProtocolError, match="step 2 was due"):
        pair.holder.receive(message(JobChunk, step=step))
    assert pair.holder.counted(1) == before


def test_a_cancelled_job_is_held_to_the_table_too() -> None:
    """Found missing: with one state for both kinds of cancel an Island could accept twice, or answer what it had not accepted."""
    withdrawn = into(JobState.WITHDRAWN)
    for kind in (JobChunk, JobDone, JobCancel):
        with pytest.raises((RemoteProtocolError, LocalProtocolError)):
            withdrawn.say_and_move(message(kind))
    withdrawn.say_and_move(message(JobAccepted))
    with pytest.raises(LocalProtocolError):
        withdrawn.say(message(JobAccepted))
    with pytest.raises(RemoteProtocolError):
        withdrawn.holder.receive(message(JobAccepted))


def test_a_frame_that_is_replayed() -> None:
    """Whatever frame of a conversation is delivered twice in a row, the receiver notices, or it was a cancel of an ended job."""
    story = [JobOpen, JobAccepted, JobChunk, JobDone]
    for repeated in range(len(story)):
        pair = Pair()
        pair.say_and_move(*(message(kind, step=0) for kind in story[: repeated + 1]))
        with pytest.raises(RemoteProtocolError):
            kind = story[repeated]
            receiver = pair.end(Side.ISLAND if SENT_BY[kind] is Side.HOLDER else Side.HOLDER)
            receiver.receive(message(kind, step=0))


def test_frames_in_any_other_order() -> None:
    """Of all orders of the Island's frames only the true one passes."""
    said = [message(JobAccepted), message(JobChunk), message(JobChunk, step=1), message(JobDone, step=2)]
    for order in itertools.permutations(said):
        holder = into(JobState.OPENING).holder
        if list(order) == said:
            for one in order:
                holder.receive(one)
        else:
            with pytest.raises(RemoteProtocolError):
                for one in order:
                    holder.receive(one)


def test_numbers_grow_and_are_never_used_again() -> None:
    pair = Pair()
    pair.say_and_move(message(JobOpen, 5))
    assert pair.holder.next_number() == 6
    for job in (5, 4, 1):
        with pytest.raises(RemoteProtocolError):
            pair.island.receive(message(JobOpen, job))
    pair.say_and_move(message(JobFailed, 5))
    with pytest.raises(LocalProtocolError):
        pair.holder.send(message(JobOpen, 5))
    pair.say_and_move(message(JobOpen, 6))


def test_a_message_for_a_job_that_was_skipped_over() -> None:
    pair = Pair()
    pair.say_and_move(message(JobOpen, 5))
    with pytest.raises(RemoteProtocolError):
        pair.holder.receive(message(JobAccepted, 3))
    with pytest.raises(RemoteProtocolError):
        pair.holder.receive(message(JobAccepted, 7))


def test_the_number_of_open_jobs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JOBS_PER_LINK_MAX", 4)
    pair = Pair()
    pair.say_and_move(*(message(JobOpen, job) for job in range(1, 5)))
    with pytest.raises(RemoteProtocolError, match="more than 4"):
        pair.island.receive(message(JobOpen, 5))
    with pytest.raises(LocalProtocolError, match="more than 4"):
        pair.holder.send(message(JobOpen, 5))
    pair.say_and_move(message(JobFailed, 2), message(JobOpen, 5))


def test_memory_does_not_grow_with_jobs_that_have_ended() -> None:
    pair = Pair()
    for job in range(1, 3001):
        pair.say_and_move(message(JobOpen, job), message(JobAccepted, job), message(JobDone, job))
    assert len(pair.holder) == len(pair.island) == 0


def test_an_endless_answer_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COMPLETION_TOKENS_MAX", 10)
    pair = into(JobState.RUNNING)
    pair.say_and_move(message(JobChunk, tokens=10))
    with pytest.raises(RemoteProtocolError, match="more than 10"):
        pair.holder.receive(message(JobChunk, step=10))
    assert pair.holder.counted(1)[0] == 10


@pytest.mark.parametrize("seed", range(20))
def test_random_conversations_never_disagree(seed: int) -> None:
    """Many jobs, frames of both directions interleaved at random: both ends count the same tokens and close every job."""
    chance, pair = random.Random(seed), Pair()
    alive: dict[int, int] = {}
    for _ in range(400):
        if pair.wires[Side.HOLDER] and chance.random() < 0.4:
            pair.move(Side.HOLDER)
        elif pair.wires[Side.ISLAND] and chance.random() < 0.4:
            heard = pair.move(Side.ISLAND)
            if isinstance(heard, (JobDone, JobFailed)):
                assert pair.holder.state(heard.job) is JobState.ENDED
        else:
            _say_something(pair, alive, chance)
    for job in list(alive):
        while pair.wires[Side.HOLDER]:
            pair.move(Side.HOLDER)
        if pair.island.state(job) is not JobState.ENDED:
            pair.say(message(JobFailed, job))
    while pair.wires[Side.ISLAND]:
        pair.move(Side.ISLAND)
    assert len(pair.holder) == len(pair.island) == 0
    assert pair.holder.next_number() == pair.island.next_number() > 5


def _say_something(pair: Pair, alive: dict[int, int], chance: random.Random) -> None:
    job = chance.choice([*alive, 0])
    if job == 0:
        opened = pair.holder.next_number() + chance.choice([0, 0, 3])
        alive[opened] = 0
        pair.say(message(JobOpen, opened))
        return
    if chance.random() < 0.1 and pair.holder.state(job) in (JobState.OPENING, JobState.RUNNING):
        pair.say(message(JobCancel, job))
        return
    kinds = [k for k in KINDS if SENT_BY[k] is Side.ISLAND and k is not JobLines and (pair.island.state(job), k) in TRANSITIONS]
    if not kinds:
        return
    kind = chance.choice(kinds)
    tokens = chance.randint(1, 3)
    pair.say(message(kind, job, alive[job], tokens))
    alive[job] += tokens if kind is JobChunk else 0


@pytest.mark.parametrize("text", ["two\nlines", "a\0b", "\x1b[31mred", "\ud800", "x" * (limits.TEXT_CHARS_MAX + 1)])
def test_what_an_island_says_of_a_failure_may_stand_on_a_terminal(text: str) -> None:
    with pytest.raises(ValueError, match="message"):
        JobFailed(1, Code.INTERNAL, text)

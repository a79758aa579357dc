"""One stage of a pipeline as a state machine: which rows to compute, which to pass on, which to ask for again. No IO, no clock.

Theory of operation. A stage gets rows of sequences, computes them and pushes the results to the next stage. It keeps the results of each
sequence for as long as the sequence lives. From that alone follows recovery, with one rule for each position p of a sequence of which
``n`` rows have been given to the engine:

- p == n: compute it, keep the result, pass it on.
- p < n: it was computed before; pass on what was kept, compute nothing.
- p > n: rows are missing; ask the stage before for them (RowsWanted). It sends what it kept, as *fill*: computed here, not passed on.

A replacement begins with n = 0, so the first row that reaches it makes it ask for all of the past, which only it computes. After any loss
the driver sends again the steps that have not come back; whoever has computed them answers from what it kept. Nothing depends on which
frames were lost, and no stage has to know that another was replaced. An engine that restarts loses its cells, not what was kept: that is
passed on without it, and computed again only where somebody needs it for a new row.

The opening of a fork may overtake the rows of its source, which wait for engines on their way. So a fork that is opened too early copies
later: when its first own row comes, or when its source ends.

The engine is named by what it does: compute batches in the order in which they are given, copy and cut sequences in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from protocol import limits
from protocol.errors import Code, Refused, RemoteProtocolError
from protocol.kept_rows import KeptRows, fill_frames
from protocol.stage_messages import RowsWanted, SequenceOpen, Span, StageRows, StageTime


@dataclass(frozen=True, slots=True)
class Forward:
    """For the next stage."""

    message: StageRows | SequenceOpen


@dataclass(frozen=True, slots=True)
class Back:
    """For the stage before."""

    message: RowsWanted


@dataclass(frozen=True, slots=True)
class Compute:
    """For the engine: rows of ``spans``, whose sequences are the engine's own numbers."""

    batch: int
    spans: tuple[Span, ...]
    rows: bytes


@dataclass(frozen=True, slots=True)
class Copy:
    """For the engine: ``target`` shares the first ``length`` cells of ``source``."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Cut:
    """For the engine: forget the sequence from position ``length`` on."""

    sequence: int
    length: int


Action = Forward | Back | Compute | Copy | Cut


@dataclass(slots=True, eq=False)
class _Sequence:
    """``given``: rows that the engine has or will have computed; ``asked``: rows asked for up to here; ``owed``: rows that the next
    stage has asked for and not been sent; ``source``: that it shares its first ``shared`` rows with."""

    job: str
    local: int
    declared: int
    kept: KeptRows
    source: _Sequence | None = None
    shared: int = 0
    given: int = 0
    asked: int = 0
    engines_ended: int = 0  # while they computed rows of it, since the last that was computed
    owed: list[tuple[int, int]] = field(default_factory=list)
    may_copy: bool = True  # what the source has is what this one means
    has_lost: bool = False  # rows that the engine had, since the stage before was another: fill from before may be on its way
    is_told: bool = True  # the next stage has been told of it on this link
    is_over: bool = False


@dataclass(slots=True, eq=False)
class _Frame:
    """A frame on its way through this stage; ``batch`` 0: not with the engine."""

    message: StageRows
    arrived_us: int
    batch: int = 0
    compute_us: int = 0
    submitted: bool = False


class _Part(NamedTuple):
    """One span of a batch. ``kept``: where its results go, whatever happens to the sequence meanwhile."""

    entry: _Sequence
    kept: KeptRows
    position: int
    length: int


@dataclass(slots=True)
class StageCounts:
    """What happened, for tests and status. Rows are positions."""

    rows_computed: int = 0
    rows_filled: int = 0  # of those, to make up for a lost engine or stage
    rows_repeated: int = 0  # passed on from what was kept, not computed
    rows_asked: int = 0
    rows_sent_again: int = 0  # to a next stage that had lost them
    frames_forwarded: int = 0
    batches: int = 0
    adopted: int = 0


class StageMachine:
    """The stage's part of one session. ``row_bytes_in`` and ``row_bytes_out``: size of a row as it travels; ``slots``: sequences that the
    engine can hold; ``cells``: positions that it can hold."""

    def __init__(self, row_bytes_in: int, row_bytes_out: int, slots: int, cells: int) -> None:
        self._row_in, self._row_out, self._cells = row_bytes_in, row_bytes_out, cells
        self._window = max(1, limits.STAGE_FILL_BYTES // row_bytes_in)
        self._free = list(range(slots - 1, -1, -1))
        self._sequences: dict[int, _Sequence] = {}
        self._orphans: list[_Sequence] = []  # of a driver that was lost, oldest first
        self._refused: set[int] = set()
        self._early: dict[int, RowsWanted] = {}  # for sequences that are not open here yet
        self._frames: deque[_Frame] = deque()
        self._batches: dict[int, tuple[tuple[_Part, ...], _Frame | None]] = {}
        self._batch = 0
        self._now_us = 0
        self._is_down = False  # the engine is being restarted
        self.counts = StageCounts()

    def __repr__(self) -> str:
        return f"<StageMachine {len(self._sequences)} sequences, {len(self._frames)} frames, {len(self._batches)} batches computing>"

    @property
    def waiting(self) -> int:
        """Frames that have not been passed on."""
        return len(self._frames)

    @property
    def computing(self) -> int:
        """Batches that the engine has."""
        return len(self._batches)

    @property
    def kept_bytes(self) -> int:
        """Of rows, those of sequences that are over and still share theirs included."""
        found = {id(kept): len(kept._own) for entry in (*self._sequences.values(), *self._orphans) for kept in entry.kept.line()}
        return sum(found.values())

    def positions(self) -> dict[str, int]:
        """Rows that each job's sequence has here."""
        return {entry.job: entry.given for entry in self._sequences.values()}

    # -- sequences

    def open(self, message: SequenceOpen, job: str) -> list[Action]:
        """A sequence of a job whose ticket has been checked. Raises Refused(NO_CAPACITY)."""
        number = message.sequence
        self._refused.discard(number)
        if number in self._sequences:  # said again after a loss
            self._sequences[number].is_told = True
            return [Forward(message), *self._advance()]
        orphan = next((entry for entry in self._orphans if entry.job == job), None)
        actions = self._enter(message, job) if orphan is None else self._adopt(orphan, message)
        actions.append(Forward(message))
        early = self._early.pop(number, None)
        if early is not None and early.low < message.declared:
            actions += self.wanted(early)
        return actions

    def _enter(self, message: SequenceOpen, job: str) -> list[Action]:
        actions = self._make_room(message.declared) if message.declared <= self._cells else []
        if not self._free or message.declared > self._cells:
            self._refused.add(message.sequence)
            raise Refused(Code.NO_CAPACITY, f"a stage has no room for {message.declared} positions")
        source = self._sequences.get(message.source)
        shared = message.shared if source is not None else 0
        kept = KeptRows(self._row_out, source.kept if source is not None and shared else None, shared)
        entry = _Sequence(job, self._free.pop(), message.declared, kept, source, shared)
        self._sequences[message.sequence] = entry
        if source is not None and source.given >= shared:
            actions += self._copy(entry)
        return actions

    def _copy(self, entry: _Sequence) -> list[Action]:
        """What the engine has of a fork's source and lacks of the fork."""
        source = entry.source
        if source is None or source.is_over or not entry.may_copy or self._is_down:
            return []
        actions = self._copy(source) if source.given < entry.shared else []  # it may be a fork that waits, too
        length = min(entry.shared, source.given)
        if length <= entry.given:
            return actions
        actions += [Cut(entry.local, 0)] if entry.given else []
        entry.given, entry.asked = length, max(entry.asked, length)
        return [*actions, Copy(source.local, entry.local, length)]

    def _adopt(self, orphan: _Sequence, message: SequenceOpen) -> list[Action]:
        self.counts.adopted += 1
        self._orphans.remove(orphan)
        self._sequences[message.sequence] = orphan
        orphan.declared, orphan.is_told, orphan.has_lost = message.declared, True, False
        orphan.kept = KeptRows(self._row_out, orphan.kept, message.keep)  # those behind are of tokens that nobody has seen
        if orphan.given <= message.keep:
            return []
        orphan.given = orphan.asked = message.keep
        return [Cut(orphan.local, message.keep)]

    def _make_room(self, positions: int) -> list[Action]:
        """Orphans go where the cells are needed, oldest first."""
        actions: list[Action] = []
        held = sum(entry.declared for entry in self._sequences.values())
        while self._orphans and not (self._free and held + positions + sum(entry.given for entry in self._orphans) <= self._cells):
            actions.append(self._free_slot(self._orphans.pop(0)))
        return actions

    def _free_slot(self, entry: _Sequence) -> Cut:
        entry.is_over = True
        self._free.append(entry.local)
        return Cut(entry.local, 0)

    def refuse(self, number: int) -> None:
        """Its ticket is no good: rows of it that are on their way are dropped."""
        self._refused.add(number)

    def end(self, numbers: Sequence[int]) -> list[Action]:
        """Forgets sequences, known or not."""
        actions = self._remove(numbers)
        return [*actions, *self._ask_again()] if actions else []

    def _remove(self, numbers: Sequence[int]) -> list[Action]:
        actions: list[Action] = []
        gone = set(numbers) & self._sequences.keys()
        for number in numbers:
            self._refused.discard(number)
            self._early.pop(number, None)
            entry = self._sequences.pop(number, None)
            if entry is not None:
                is_computing = any(part.entry is entry for parts, _ in self._batches.values() for part in parts)
                for fork in (fork for fork in self._sequences.values() if fork.source is entry):
                    actions += self._copy(fork)
                    if not is_computing:  # else drop() has to know that they belong together
                        fork.source, fork.shared = entry.source, min(fork.shared, entry.shared)
                actions.append(self._free_slot(entry))
        for frame in list(self._frames) if gone else ():
            message = self._without(frame.message, gone)
            if message is None:
                self._frames.remove(frame)
            else:
                frame.message = message
        return actions

    def orphan(self) -> None:
        """The driver is lost: its sequences wait for another one that goes on with their jobs."""
        self._frames.clear()
        self._early.clear()
        for entry in self._sequences.values():
            entry.owed.clear()
            entry.asked, entry.may_copy = entry.given, False  # the source may go on with other rows
            self._orphans.append(entry)
        self._sequences.clear()
        self._refused.clear()

    def forget_orphans(self) -> list[Action]:
        """Nobody came for them."""
        orphans, self._orphans = self._orphans, []
        return [self._free_slot(entry) for entry in orphans]

    # -- rows

    def rows(self, message: StageRows, now_us: int) -> list[Action]:
        """Rows from the stage before. Raises RemoteProtocolError for what it may not send."""
        self._check(message)
        self._now_us = now_us
        if message.fill:
            return self._fill(message)
        left = self._without(message, self._refused)
        if left is None:
            return []
        self._frames.append(_Frame(left, now_us))
        return self._advance()

    def _without(self, message: StageRows, numbers: set[int]) -> StageRows | None:
        """A frame without its rows of some sequences; None where nothing is left."""
        spans = tuple(span for span in message.spans if span.sequence not in numbers)
        if len(spans) == len(message.spans):
            return message
        return StageRows(message.step, spans, False, message.times, self._part(message, spans)) if spans else None

    def _advance(self) -> list[Action]:
        """Does for the frames that wait what has become possible."""
        given = [action for frame in self._frames if not frame.submitted for action in self._submit(frame)]
        return [*given, *self._pass_on()]

    def _check(self, message: StageRows) -> None:
        if len(message.rows) != message.count * self._row_in:
            raise RemoteProtocolError(f"{message.count} rows of {self._row_in} bytes do not make {len(message.rows)} bytes")
        if len(message.times) >= limits.ROUTE_STAGES_MAX:
            raise RemoteProtocolError(f"a frame that has passed {len(message.times)} stages")
        for span in message.spans:
            entry = self._sequences.get(span.sequence)
            if entry is None and span.sequence not in self._refused:
                raise RemoteProtocolError(f"rows of sequence {span.sequence}, which is not open")
            if entry is not None and span.end > entry.declared:
                raise RemoteProtocolError(f"row {span.end - 1} of a sequence that declared {entry.declared}")

    def _part(self, message: StageRows, spans: Sequence[Span]) -> bytes:
        """The bytes of some of a frame's spans, from their positions on."""
        wanted = {span.sequence: span for span in spans}
        parts, at = [], 0
        for span in message.spans:
            part = wanted.get(span.sequence)
            if part is not None:
                start = at + (part.position - span.position) * self._row_in
                parts.append(message.rows[start : start + part.count * self._row_in])
            at += span.count * self._row_in
        return b"".join(parts)

    def _submit(self, frame: _Frame) -> list[Action]:
        """Gives the engine what it has not had of a frame, or asks for what is missing before that."""
        actions: list[Action] = []
        new: list[Span] = []
        message, missing = frame.message, False
        for span in message.spans:
            entry = self._sequences[span.sequence]
            if span.end <= len(entry.kept):
                continue
            if span.position > entry.given:
                actions += self._copy(entry)
            if span.position > entry.given:
                missing = True
                actions += self._ask(span.sequence, entry, span.position)
            elif span.end > entry.given:
                new.append(Span(span.sequence, entry.given, span.end - entry.given))
        if missing or (new and self._is_down):
            return actions
        frame.submitted = True
        self.counts.rows_repeated += message.count - sum(span.count for span in new)
        if not new:
            return actions
        frame.batch = self._batch + 1
        return [*actions, self._compute(tuple(new), self._part(message, new), frame)]

    def _compute(self, spans: tuple[Span, ...], rows: bytes, frame: _Frame | None) -> Compute:
        self._batch += 1
        entries = [self._sequences[span.sequence] for span in spans]
        parts = tuple(_Part(entry, entry.kept, span.position, span.count) for entry, span in zip(entries, spans, strict=True))
        self._batches[self._batch] = (parts, frame)
        local = []
        for entry, span in zip(entries, spans, strict=True):
            local.append(Span(entry.local + 1, span.position, span.count))  # numbers on the wire begin at 1
            entry.given = span.end
            entry.asked = max(entry.asked, span.end)
        return Compute(self._batch, tuple(local), rows)

    def _ask(self, number: int, entry: _Sequence, position: int) -> list[Action]:
        """At most a window of rows at a time, of all sequences together: the rest is asked for as those come."""
        low = max(entry.given, entry.asked)
        room = self._window - sum(other.asked - other.given for other in self._sequences.values())
        if low >= position or self._is_down or room <= 0:
            return []
        entry.asked = min(position, low + room)
        self.counts.rows_asked += entry.asked - low
        return [Back(RowsWanted(number, low, entry.asked))]

    def _fill(self, message: StageRows) -> list[Action]:
        actions: list[Action] = []
        for span in message.spans if not self._is_down else ():  # else they are asked for again when it is back
            entry = self._sequences.get(span.sequence)
            if entry is None or span.end <= entry.given:
                continue
            if span.position > entry.given:
                if entry.has_lost:
                    continue  # the rest of an older answer; a newer one follows
                raise RemoteProtocolError(f"fill from {span.position} on leaves a hole behind row {entry.given}")
            new = Span(span.sequence, entry.given, span.end - entry.given)
            self.counts.rows_filled += new.count
            actions.append(self._compute((new,), self._part(message, (new,)), None))
        return [*actions, *self._ask_again()]

    # -- the engine's answers

    def computed(self, batch: int, rows: bytes, compute_us: int, now_us: int) -> list[Action]:
        """The engine has computed a batch: rows as they travel on. Unknown batches are those of an engine that was lost."""
        parts, frame = self._batches.pop(batch, ((), None))
        if not parts:
            return []
        count = sum(part.length for part in parts)
        if len(rows) != count * self._row_out:
            raise ValueError(f"the engine gave {len(rows)} bytes for {count} rows of {self._row_out}")
        self._now_us = now_us
        self.counts.batches += 1
        self.counts.rows_computed += count
        at = 0
        for part in parts:
            end = at + part.length * self._row_out
            part.kept.put(part.position, rows[at:end])
            if frame is not None:
                part.entry.engines_ended = 0
            at = end
        if frame is not None:
            frame.batch, frame.compute_us = 0, compute_us
        return [*self._advance(), *self._pay()]

    def _pass_on(self) -> list[Action]:
        """Frames that are complete, in the order in which they came; one that lacks rows does not hold up others."""
        actions: list[Action] = []
        for frame in list(self._frames):
            message = frame.message
            entries = [self._sequences[span.sequence] for span in message.spans]
            has_all = all(entry.is_told and len(entry.kept) >= span.end for entry, span in zip(entries, message.spans, strict=True))
            if not frame.submitted or frame.batch or not has_all:
                continue
            self._frames.remove(frame)
            rows = b"".join(entry.kept.take(span.position, span.end) for entry, span in zip(entries, message.spans, strict=True))
            time = StageTime(max(0, self._now_us - frame.arrived_us), frame.compute_us)
            actions.append(Forward(StageRows(message.step, message.spans, False, (*message.times, time), rows)))
            self.counts.frames_forwarded += 1
        return actions

    # -- losses

    def wanted(self, message: RowsWanted) -> list[Action]:
        """The next stage lacks rows that it had or should have had. Raises RemoteProtocolError for rows that nobody will have."""
        number = message.sequence
        entry = self._sequences.get(number)
        if entry is None:
            if number not in self._refused and len(self._early) < limits.STAGE_ROWS_MAX:
                first = self._early.get(number, message)  # a new stage may hear from its next one before it hears from the driver
                self._early[number] = RowsWanted(number, min(first.low, message.low), max(first.high, message.high))
            return []
        if message.low >= entry.declared:
            raise RemoteProtocolError(f"row {message.low} was asked for, of a sequence that declared {entry.declared}")
        entry.owed.append((message.low, min(message.high, entry.declared)))
        return [*self._pay(), *self._ask_owed(number, entry)]

    def _ask_owed(self, number: int, entry: _Sequence) -> list[Action]:
        return self._ask(number, entry, max((high for _, high in entry.owed), default=0))

    def drop(self, batch: int) -> list[Action]:
        """The engine could not compute a batch: its rows, and all behind them, are to come again from whoever can send better ones."""
        family = {part.entry for parts, _ in self._batches.values() for part in parts}.union(self._orphans, self._sequences.values())
        first: dict[_Sequence, int] = {}  # first position that is not computed
        before: dict[_Sequence, int] | None = None
        dropped = {batch}
        while first != before:
            before = dict(first)
            for number in dropped:
                parts, frame = self._batches.pop(number, ((), None))
                for part in parts:
                    first[part.entry] = min(part.position, first.get(part.entry, part.position))
                if frame is not None and frame in self._frames:
                    self._frames.remove(frame)
            for entry in family:
                if entry.source in first and first[entry.source] < min(entry.shared, first.get(entry, entry.shared)):
                    first[entry] = first[entry.source]  # it was copied from what is not there
            dropped = {number for number, (parts, _) in self._batches.items() if any(part.entry in first for part in parts)}
        damaged = [entry for entry in first if not entry.is_over]
        for entry in damaged:
            entry.given = entry.asked = min(entry.given, first[entry])
            entry.has_lost = True
        return [Cut(entry.local, entry.given) for entry in damaged]

    def _pay(self) -> list[Action]:
        """Sends rows that are owed and here."""
        actions: list[Action] = []
        for number, entry in self._sequences.items():
            while entry.owed and entry.owed[0][0] < len(entry.kept):
                low, high = entry.owed.pop(0)
                end = min(high, len(entry.kept))
                if end < high:
                    entry.owed.insert(0, (end, high))
                self.counts.rows_sent_again += end - low
                actions += [Forward(frame) for frame in fill_frames(number, low, end, entry.kept)]
        return actions

    def upstream_changed(self) -> list[Action]:
        """Another stage, or another link, stands before this one: what was asked for and has not come is asked for again."""
        for entry in self._sequences.values():
            entry.asked, entry.has_lost = entry.given, False
        return self._ask_again()

    def _ask_again(self) -> list[Action]:
        return [*self._advance(), *(action for number, entry in self._sequences.items() for action in self._ask_owed(number, entry))]

    def downstream_changed(self) -> None:
        """Another stage, or another link, stands behind this one; it asks for what it lacks."""
        self._early.clear()
        for entry in self._sequences.values():
            entry.is_told = False  # the driver says all openings again; a new stage knows none of them before
            entry.owed.clear()

    def engine_lost(self) -> list[int]:
        """The engine ends; what it held is gone, what was kept stays. Returns the sequences that have ended a second engine without a
        step in between: they are refused from now on, since they might be the cause."""
        self._is_down = True
        suspects = {part.entry for parts, _ in self._batches.values() for part in parts}
        self._batches.clear()
        for entry in (*self._sequences.values(), *self._orphans):
            entry.given = entry.asked = 0
            entry.has_lost = True
        for frame in self._frames:
            frame.batch, frame.submitted = 0, False
        for entry in suspects:
            entry.engines_ended += 1
        guilty = [n for n, e in self._sequences.items() if e in suspects and e.engines_ended >= limits.WORKERS_ENDED_PER_JOB_MAX]
        self._remove(guilty)  # there is no engine to cut them in
        self._refused.update(guilty)
        return guilty

    def engine_back(self) -> list[Action]:
        """Another engine with empty cells. Rows are computed again only where somebody needs them."""
        self._is_down = False
        return self._ask_again()

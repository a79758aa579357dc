"""A seeded simulator of a ring of stages: real StageMachines, fake engines, links that break, and a driver that tells right from wrong.

Theory of operation. One ``random.Random`` chooses which of all possible events happens next: a link delivers a message, an engine takes
up or answers a batch, the driver opens, launches, ends or repeats something, a fault, its repair. So a seed is a run.

An engine computes a row as a running hash over all input rows of its sequence up to that one, and of the number of its stage: a row that
is missing, repeated, out of order or out of date changes all later ones. It refuses what llama.cpp refuses, such as a row at another
position than the next. The driver knows what a ring without faults computes and compares every row that comes round.

A stage that dies is replaced by one with nothing. A link that breaks loses what is in it; both ends attach to another one, of that link
alone or of the whole ring. An engine that dies comes back empty; one that cannot compute a batch (no cells, bad rows) says so,
and the ring is opened anew. A driver that dies is replaced by one that numbers its sequences
anew, goes on with the jobs and makes other tokens than those that nobody has seen.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from protocol.activations import TOKEN_BYTES
from protocol.errors import Code, Refused
from protocol.kept_rows import KeptRows, fill_frames
from protocol.stage_messages import RowsWanted, SequenceEnd, SequenceOpen, Span, StageFault, StageRows
from protocol.stages import Action, Back, Compute, Copy, Cut, Forward, StageMachine

ROW_BYTES = 8
_PRIME = 2**61 - 1
FAULTS = ("stage", "engine", "link", "driver", "batch")


def mix(stage: int, before: int, value: int) -> int:
    """The row of a stage from its row before and its input."""
    mixed = (before * 0x9E3779B97F4A7C15 + value * 0xC2B2AE3D27D4EB4F + stage + 1) % _PRIME
    return mixed ^ mixed >> 29


def ring_rows(stages: int, tokens: Sequence[int]) -> list[list[int]]:
    """What each stage of a ring without faults computes of a sequence."""
    found: list[list[int]] = []
    values = list(tokens)
    for stage in range(stages):
        rows, before = [], 0
        for value in values:
            before = mix(stage, before, value)
            rows.append(before)
        found.append(rows)
        values = rows
    return found


def pack(values: Sequence[int], size: int = ROW_BYTES) -> bytes:
    return b"".join(value.to_bytes(size, "little") for value in values)


def unpack(rows: bytes, size: int = ROW_BYTES) -> list[int]:
    return [int.from_bytes(rows[at : at + size], "little") for at in range(0, len(rows), size)]


class FakeEngine:
    """Cells by slot. ``computed``: how often it has computed each row; ``todo`` and ``done`` are what it was given and has to say."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.cells: dict[int, list[int]] = {}
        self.todo: list[Compute | Copy | Cut] = []
        self.done: deque[tuple[int, bytes | None]] = deque()
        self.computed: Counter[int] = Counter()
        self.answered: set[int] = set()  # of those, the ones that the machine has got
        self.fails_next = False
        self.spoiled: set[int] = set()  # slots that lack rows of a batch that failed, until they are cut

    def work(self, chance: Random) -> None:
        """Does one thing: the first, or a batch that may go before others as in runtimes.gguf.stage_worker."""
        index = 0
        if isinstance(self.todo[0], Compute) and chance.random() < 0.3:
            passed: set[int] = set()
            for at, item in enumerate(self.todo):
                if not isinstance(item, Compute):
                    break
                sequences = {span.sequence for span in item.spans}
                if passed.isdisjoint(sequences):
                    index = at
                passed |= sequences
        item = self.todo.pop(index)
        if isinstance(item, Copy):
            self._copy(item)
        elif isinstance(item, Cut):
            cells = self.cells.setdefault(item.sequence, [])
            del cells[item.length :]
            if len(cells) == item.length:
                self.spoiled.discard(item.sequence)
        else:
            slots = {span.sequence - 1 for span in item.spans}
            if self.fails_next or slots & self.spoiled:
                self.fails_next = False
                self.spoiled |= slots
                self.done.append((item.batch, None))
            else:
                self.done.append((item.batch, self._compute(item)))

    def _copy(self, copy: Copy) -> None:
        source = self.cells.get(copy.source, [])
        if copy.source in self.spoiled:
            self.spoiled.add(copy.target)
        else:
            assert len(source) >= copy.length, f"{copy} from a sequence of {len(source)} cells"
        assert not self.cells.get(copy.target), f"{copy} into cells that are taken"
        self.cells[copy.target] = source[: copy.length]

    def _compute(self, batch: Compute) -> bytes:
        values = unpack(batch.rows, ROW_BYTES if self.stage else TOKEN_BYTES)
        assert len(values) == sum(span.count for span in batch.spans)
        answers: list[int] = []
        for span in batch.spans:
            cells = self.cells.setdefault(span.sequence - 1, [])
            assert len(cells) == span.position, f"row {span.position} behind {len(cells)} cells at stage {self.stage}"
            for _ in range(span.count):
                row = mix(self.stage, cells[-1] if cells else 0, values[len(answers)])
                cells.append(row)
                answers.append(row)
                self.computed[row] += 1
        return pack(answers)


@dataclass(slots=True, eq=False)
class Link:
    """To node ``index`` from the one before it; the driver is the last node, and the one before the first."""

    forward: deque[SequenceOpen | SequenceEnd | StageRows] = field(default_factory=deque)
    back: deque[RowsWanted | StageFault] = field(default_factory=deque)
    is_broken: bool = False

    def break_off(self) -> None:
        self.is_broken = True
        self.forward.clear()
        self.back.clear()


@dataclass(slots=True, eq=False)
class Stage:
    """One life of a stage. ``engines``: all that it has had."""

    machine: StageMachine
    engine: FakeEngine
    is_down: bool = False
    engines: list[FakeEngine] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Job:
    """``prompt``: tokens that are known when it begins; ``expected``: the rows of each stage; ``got``: positions that have come round."""

    name: str
    tokens: list[int]
    prompt: int
    source: Job | None
    shared: int
    expected: list[list[int]]
    number: int = 0
    launched: int = 0
    landed: int = 0
    got: set[int] = field(default_factory=set)
    kept: KeptRows = field(default_factory=lambda: KeptRows(TOKEN_BYTES))
    is_failed: bool = False

    @property
    def is_done(self) -> bool:
        return self.landed == len(self.tokens)


@dataclass(slots=True, eq=False)
class Flight:
    step: int
    spans: tuple[Span, ...]
    rows: dict[int, bytes]


@dataclass(frozen=True, slots=True)
class Plan:
    """``faults``: how many, of which kinds; ``slots``: sequences at a time; ``room``: slots of a stage, where not the same."""

    seed: int
    stages: int = 3
    jobs: int = 8
    slots: int = 4
    faults: int = 0
    kinds: tuple[str, ...] = FAULTS
    doubles: float = 0.0
    forks: float = 0.3
    cancels: float = 0.01
    room: int = 0
    window: int = 0  # rows that a stage asks for at a time, where not as many as the limits say
    whole: bool | None = None  # every link is new after a fault; None: by chance


class Ring:
    """A run. ``run`` ends with everything over, or raises AssertionError."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.chance = plan, Random(plan.seed)
        self.stages = [self._stage(index) for index in range(plan.stages)]
        self.lives = list(self.stages)
        self.links = [Link() for _ in range(plan.stages + 1)]
        self.waiting: list[Job] = []
        self.jobs_left, self.faults_left = plan.jobs, plan.faults
        self.open: dict[int, Job] = {}
        self.known: dict[int, Job] = {}  # of this driver, those that are over, too
        self.lost: set[int] = set()  # links that are to be mended
        self.flights: dict[int, Flight] = {}
        self.finished: list[Job] = []
        self.failed: list[Job] = []
        self.clock = self.last_step = self.last_number = self.last_token = 0
        self.has_driver = True
        self.drivers = 1
        self.rows_checked = 0
        self.events = 0

    def _stage(self, index: int) -> Stage:
        engine = FakeEngine(index)
        room = self.plan.room or self.plan.slots
        machine = StageMachine(TOKEN_BYTES if index == 0 else ROW_BYTES, ROW_BYTES, room, 64 * room)
        if self.plan.window:
            machine._window = self.plan.window
        return Stage(machine, engine, engines=[engine])

    # -- links and stages

    def _say(self, index: int, message: SequenceOpen | SequenceEnd | StageRows) -> None:
        if not self.links[index].is_broken:
            self.links[index].forward.append(message)

    def _say_back(self, index: int, message: RowsWanted | StageFault) -> None:
        if not self.links[index].is_broken:
            self.links[index].back.append(message)

    def _do(self, index: int, actions: Sequence[Action]) -> None:
        stage = self.stages[index]
        for action in actions:
            if isinstance(action, Forward):
                self._say(index + 1, action.message)
            elif isinstance(action, Back):
                self._say_back(index, action.message)
            elif not stage.is_down:
                stage.engine.todo.append(action)

    def _deliver(self, index: int) -> None:
        """One message of a link, forward."""
        link = self.links[index]
        message = link.forward[0]
        if not (isinstance(message, StageRows) and self.chance.random() < self.plan.doubles):
            link.forward.popleft()
        if index == len(self.stages):
            if isinstance(message, StageRows):
                self._arrive(message)
            return
        machine = self.stages[index].machine
        self.clock += 1
        if isinstance(message, StageRows):
            self._do(index, machine.rows(message, self.clock))
        elif isinstance(message, SequenceEnd):
            self._do(index, machine.end(message.sequences))
            self._say(index + 1, message)
        else:
            try:
                self._do(index, machine.open(message, message.ticket.decode()))
            except Refused as refusal:
                machine.refuse(message.sequence)
                self._say_back(index, StageFault(index, message.sequence, refusal.code, refusal.message))

    def _deliver_back(self, index: int) -> None:
        message = self.links[index].back.popleft()
        if index == 0:
            if isinstance(message, StageFault):
                self._fail(message.sequence)
            else:
                self._send_again(message)
        elif isinstance(message, StageFault):
            self._say_back(index - 1, message)
        else:
            self._do(index - 1, self.stages[index - 1].machine.wanted(message))

    def _answer(self, index: int) -> None:
        stage = self.stages[index]
        batch, rows = stage.engine.done.popleft()
        self.clock += 1
        if rows is not None:
            stage.engine.answered.update(unpack(rows))
            self._do(index, stage.machine.computed(batch, rows, 1, self.clock))
            return
        self._do(index, stage.machine.drop(batch))
        for at in range(len(self.links)):
            self._break(at)

    # -- the driver

    def _new_job(self) -> Job:
        chance = self.chance
        self.jobs_left -= 1
        sources = [job for job in self.open.values() if job.launched and not job.is_failed]
        source, shared = None, 0
        if sources and chance.random() < self.plan.forks:
            source = chance.choice(sources)
            shared = chance.randint(1, source.launched)
        tokens = source.tokens[:shared] if source is not None else []
        prompt = shared + chance.randint(1, 9)
        tokens = tokens + self._tokens(prompt + chance.randint(0, 6) - shared)
        return Job(f"job {self.plan.jobs - self.jobs_left}", tokens, prompt, source, shared, ring_rows(self.plan.stages, tokens))

    def _tokens(self, count: int) -> list[int]:
        first, self.last_token = self.last_token, self.last_token + count
        return list(range(first + 1, first + count + 1))

    def _open_one(self) -> None:
        job = self.waiting.pop(0) if self.waiting else self._new_job()
        source = job.source
        if source is not None and not self._is_shared(source, job):
            source = None  # all rows are sent
        self.last_number += 1
        job.source, job.number = source, self.last_number
        job.launched = job.landed = job.shared if source is not None else 0
        job.got = set()
        job.kept = KeptRows(TOKEN_BYTES, source.kept if source is not None else None, job.launched)
        self.open[job.number] = self.known[job.number] = job
        self._say_open(job)

    def _is_shared(self, source: Job, job: Job) -> bool:
        """Another driver may not have got so far, or have gone on with other tokens than those that the fork was made of."""
        is_open = self.open.get(source.number) is source and source.launched >= job.shared
        return is_open and source.tokens[: job.shared] == job.tokens[: job.shared]

    def _say_open(self, job: Job) -> None:
        source, shared = (job.source.number, job.shared) if job.source is not None else (0, 0)
        self._say(0, SequenceOpen(job.number, len(job.tokens), job.prompt, source, shared, job.name.encode()))

    def _ready(self) -> list[Job]:
        """Jobs with a row to send: prompts do not wait for what is under way, answers do."""
        return [
            job
            for job in self.open.values()
            if not job.is_failed and job.launched < len(job.tokens) and (job.launched < job.prompt or job.launched == job.landed)
        ]

    def _launch(self) -> None:
        ready = self._ready()
        chosen = self.chance.sample(ready, self.chance.randint(1, min(4, len(ready))))
        self.last_step += 1
        spans, rows = [], {}
        for job in chosen:
            count = min(self.chance.randint(1, 6), job.prompt - job.launched) if job.launched < job.prompt else 1
            span = Span(job.number, job.launched, count)
            rows[job.number] = pack(job.tokens[span.position : span.end], TOKEN_BYTES)
            job.kept.put(span.position, rows[job.number])
            job.launched = span.end
            spans.append(span)
        self.flights[self.last_step] = Flight(self.last_step, tuple(spans), rows)
        self._send(self.flights[self.last_step])

    def _send(self, flight: Flight) -> None:
        rows = b"".join(flight.rows[span.sequence] for span in flight.spans)
        self._say(0, StageRows(flight.step, flight.spans, rows=rows))

    def _send_again(self, wanted: RowsWanted) -> None:
        job = self.open.get(wanted.sequence)
        if job is not None:
            for frame in fill_frames(wanted.sequence, wanted.low, min(wanted.high, len(job.kept)), job.kept):
                self._say(0, frame)

    def _arrive(self, message: StageRows) -> None:
        assert not message.fill, "nobody has asked for that"
        rows = unpack(message.rows)
        assert len(message.times) == self.plan.stages
        for span in message.spans:
            job = self.known[span.sequence]
            part, rows = rows[: span.count], rows[span.count :]
            assert part == job.expected[-1][span.position : span.end], f"wrong rows of {span}"
            self.rows_checked += span.count
            job.got.update(range(span.position, span.end))
            while job.landed in job.got:
                job.landed += 1
        assert not rows
        flight = self.flights.get(message.step)
        if flight is not None:
            missing = set(flight.spans) - set(message.spans)
            assert not missing or self.plan.room or self.plan.faults, f"{missing} did not come round"
            self._narrow(flight, {span.sequence for span in message.spans})

    def _narrow(self, flight: Flight, numbers: set[int]) -> None:
        flight.spans = tuple(span for span in flight.spans if span.sequence not in numbers)
        if not flight.spans:
            del self.flights[flight.step]

    def _fail(self, number: int) -> None:
        job = self.open.get(number)
        if job is not None:
            job.is_failed = True
            self.failed.append(job)
            self._end(job)

    def _end(self, job: Job) -> None:
        del self.open[job.number]
        for flight in list(self.flights.values()):
            self._narrow(flight, {job.number})
        self._say(0, SequenceEnd((job.number,)))

    def _finish(self) -> None:
        job = self.chance.choice([job for job in self.open.values() if job.is_done])
        self.finished.append(job)
        self._end(job)

    def _cancel(self) -> None:
        job = self.chance.choice(list(self.open.values()))
        self.failed.append(job)
        self._end(job)

    def _repeat(self) -> None:
        self._send(self.chance.choice(list(self.flights.values())))

    # -- faults and repairs

    def _fault(self) -> None:
        self.faults_left -= 1
        kind = self.chance.choice(self.plan.kinds)
        index = self.chance.randrange(len(self.stages))
        if kind == "stage":
            self._kill_stage(index)
        elif kind == "link":
            self._break(self.chance.randrange(len(self.links)))
        elif kind == "driver":
            for at in range(len(self.links)):
                self._break(at)
            self.has_driver = False
        elif kind == "batch":
            self.stages[index].engine.fails_next = True
        elif not self.stages[index].is_down:
            self._kill_engine(index)

    def _kill_stage(self, index: int) -> None:
        self.stages[index] = self._stage(index)
        self.lives.append(self.stages[index])
        self._break(index)
        self._break(index + 1)

    def _kill_engine(self, index: int) -> None:
        stage = self.stages[index]
        stage.is_down = True
        stage.engine = FakeEngine(index)
        stage.engines.append(stage.engine)
        for number in stage.machine.engine_lost():
            self._say_back(index, StageFault(index, number, Code.WORKER_DIED, "ended two engines"))

    def _restart(self, index: int) -> None:
        self.stages[index].is_down = False
        self._do(index, self.stages[index].machine.engine_back())

    def _break(self, index: int) -> None:
        self.links[index].break_off()
        self.lost.add(index)

    def _mend(self) -> None:
        """What was lost is found again: the driver says all that a stage may not know."""
        whole = self.plan.whole if self.plan.whole is not None else self.chance.random() < 0.5
        new = set(range(len(self.links))) if whole or not self.has_driver else set(self.lost)
        self.lost.clear()
        if not self.has_driver:
            self._replace_driver()
        for index in new:
            self.links[index] = Link()
        order = list(range(len(self.stages)))
        self.chance.shuffle(order)
        for index in order:
            machine = self.stages[index].machine
            if index in new:
                self._do(index, machine.upstream_changed())
            if index + 1 in new:
                machine.downstream_changed()
        ended = tuple(number for number in self.known if number not in self.open)
        if ended:
            self._say(0, SequenceEnd(ended))
        for job in self.open.values():
            self._say_open(job)
        for flight in self.flights.values():
            self._send(flight)

    def _replace_driver(self) -> None:
        """The jobs go on with other numbers; tokens that nobody has seen are other ones now."""
        self.has_driver = True
        self.drivers += 1
        for stage in self.stages:
            stage.machine.orphan()
        going_on = [job for job in self.open.values() if not job.is_done]
        self.finished += [job for job in self.open.values() if job.is_done]
        for job in going_on:
            seen = max(job.prompt, min(job.landed + 1, len(job.tokens)))
            job.prompt = self.chance.randint(job.prompt, seen)
            job.tokens = job.tokens[: job.prompt] + self._tokens(len(job.tokens) - job.prompt)
            job.expected = ring_rows(self.plan.stages, job.tokens)
            job.launched = 0
        self.waiting = going_on + self.waiting
        self.open, self.known, self.flights = {}, {}, {}
        self.last_number = 0

    # -- the run

    def _driver_events(self) -> list[Callable[[], None]]:
        events: list[Callable[[], None]] = []
        if not self.has_driver:
            return events
        if (self.waiting or self.jobs_left) and len(self.open) < self.plan.slots:
            events.append(self._open_one)
        if len(self.flights) < self.plan.stages + 2 and self._ready():
            events.append(self._launch)
        if any(job.is_done for job in self.open.values()) and (self.chance.random() < 0.2 or len(self.open) == self.plan.slots):
            events.append(self._finish)
        if self.open and self.chance.random() < self.plan.cancels:
            events.append(self._cancel)
        if self.flights and self.plan.doubles and self.chance.random() < 0.05:
            events.append(self._repeat)
        return events

    def _ring_events(self) -> list[Callable[[], None]]:
        events: list[Callable[[], None]] = []
        for index, link in enumerate(self.links):
            if link.forward:
                events.append(partial(self._deliver, index))
            if link.back:
                events.append(partial(self._deliver_back, index))
        for index, stage in enumerate(self.stages):
            if stage.is_down:
                if self.chance.random() < 0.2:
                    events.append(partial(self._restart, index))
                continue
            if stage.engine.todo:
                events.append(partial(stage.engine.work, self.chance))
            if stage.engine.done:
                events.append(partial(self._answer, index))
        return events

    def run(self) -> None:
        """Until all is over. Raises AssertionError for a wrong row, for what an engine refuses, and for a standstill."""
        idle = 0
        while True:
            self.events += 1
            assert self.events < 60_000, f"no end: {self}"
            events = self._ring_events() + self._driver_events()
            if self.lost and (self.chance.random() < 0.1 or not events):
                events = [self._mend]
            elif self.faults_left and self.chance.random() < 0.01:
                events = [self._fault]
            if events:
                idle = 0
                self.chance.choice(events)()
                continue
            if not (self.open or self.waiting or self.jobs_left or self.lost or any(stage.is_down for stage in self.stages)):
                return
            idle += 1
            assert idle < 500, f"a standstill: {self}"

    def __repr__(self) -> str:
        flights = [flight.spans for flight in self.flights.values()]
        machines = [stage.machine for stage in self.stages]
        return f"<Ring {self.plan}: {len(self.open)} open, {len(self.waiting)} wait, under way {flights}, {machines}>"


# ---- for tests of one stage by hand


def opening(number: int, declared: int = 32, keep: int = 0, source: int = 0, shared: int = 0) -> SequenceOpen:
    return SequenceOpen(number, declared, min(keep, declared), source, shared, b"ticket")


def rows(step: int, *spans: tuple[int, int, int], fill: bool = False) -> StageRows:
    made = tuple(Span(*span) for span in spans)
    return StageRows(0 if fill else step, made, fill, rows=b"".join(row(s.sequence, p) for s in made for p in range(s.position, s.end)))


def row(sequence: int, position: int) -> bytes:
    return pack([1000 * sequence + position])


def forwarded(actions: list[Action]) -> list[StageRows]:
    return [action.message for action in actions if isinstance(action, Forward) and isinstance(action.message, StageRows)]


def asked(actions: list[Action]) -> list[tuple[int, int, int]]:
    wants = [action.message for action in actions if isinstance(action, Back)]
    return [(message.sequence, message.low, message.high) for message in wants]

"""The messages between neighbouring stages of a pipeline, ``/archipelag/stage/1``.

One long-lived stream goes from each stage to the next, and from the driver (the last stage, which has the tokenizer, the scheduler and
the sampler) to the first; so the stages form a ring. Forward go openings of sequences and rows: token ids from the driver, hidden states
behind it. Backward on the same streams go only small words: that a stage is open, that rows are missing, how a stage does, what broke.

The first frame names the whole route by the Coordinator's ticket. A row is named by its sequence and position, a frame by its step;
whoever gets either a second time computes nothing a second time (see protocol/stages.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol import checks, limits
from protocol.errors import Code
from protocol.messages import PROTOCOL_VERSION, Hello
from protocol.registry import Registry, body

STAGE_PROTOCOL = f"/archipelag/stage/{PROTOCOL_VERSION}"
STAGE = Registry("stage")
SESSION_BYTES = 16


def _sequence(number: int) -> None:
    checks.in_range("sequence", number, 1, 2**53)


STAGE.message(1)(Hello)


@STAGE.message(2)
@dataclass(frozen=True, slots=True)
class StageOpen:
    """To stage ``index`` of the ticket's route, or to the driver from the one before it. ``epoch`` grows each time that the driver mends
    the route of a session; a stage leaves its older links then and keeps what it has computed."""

    session: bytes
    epoch: int
    index: int
    ticket: bytes

    def __post_init__(self) -> None:
        checks.exactly("session", self.session, SESSION_BYTES)
        checks.in_range("epoch", self.epoch, 1, 2**31)
        checks.in_range("index", self.index, 0, limits.ROUTE_STAGES_MAX - 1)
        checks.at_most("ticket", self.ticket, limits.ENVELOPE_BYTES_MAX)


@STAGE.message(3)
@dataclass(frozen=True, slots=True)
class StageOpened:
    """Backward, once the stage and all behind it are open. ``engines``: of this stage and those behind it, but the driver."""

    engines: tuple[str, ...]

    def __post_init__(self) -> None:
        checks.at_most("engines", self.engines, limits.ROUTE_STAGES_MAX)
        for engine in self.engines:
            checks.label("engine", engine, limits.NAME_CHARS_MAX)


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` rows of a sequence from ``position`` on."""

    sequence: int
    position: int
    count: int

    def __post_init__(self) -> None:
        _sequence(self.sequence)
        checks.in_range("position", self.position, 0, 2**31)
        checks.in_range("count", self.count, 1, limits.STAGE_ROWS_MAX)

    @property
    def end(self) -> int:
        return self.position + self.count


@dataclass(frozen=True, slots=True)
class StageTime:
    """What a frame met at one stage, in microseconds: from its arrival to its departure, and computing."""

    held_us: int
    compute_us: int

    def __post_init__(self) -> None:
        checks.in_range("held_us", self.held_us, 0, 2**53)
        checks.in_range("compute_us", self.compute_us, 0, 2**53)


@STAGE.message(4)
@dataclass(frozen=True, slots=True)
class StageRows:
    """Rows of one step: int32 token ids to the first stage, hidden states in the route's encoding to the others. ``fill`` answers
    RowsWanted: it is computed and not passed on; its step is 0. ``times``: one entry for each stage that it has passed."""

    step: int
    spans: tuple[Span, ...]
    fill: bool = False
    times: tuple[StageTime, ...] = ()
    rows: bytes = body()

    def __post_init__(self) -> None:
        checks.in_range("step", self.step, 0 if self.fill else 1, 2**53)
        if not self.spans:
            raise ValueError("a frame of rows has at least one span")
        checks.at_most("spans", self.spans, limits.STAGE_ROWS_MAX)
        checks.in_range("rows", self.count, 1, limits.STAGE_ROWS_MAX)
        checks.unique("sequences of a frame", [span.sequence for span in self.spans])
        checks.at_most("times", self.times, limits.ROUTE_STAGES_MAX)

    @property
    def count(self) -> int:
        return sum(span.count for span in self.spans)


@STAGE.message(5)
@dataclass(frozen=True, slots=True)
class SequenceOpen:
    """A job's sequence of at most ``declared`` positions; its ticket names this route. The first ``shared`` positions are those of
    ``source`` (0: none). A stage that still holds the same job's sequence from a driver that was lost goes on with the first ``keep``
    positions of that one: they are the prompt and the tokens that were delivered, so both drivers mean the same."""

    sequence: int
    declared: int
    keep: int
    source: int
    shared: int
    ticket: bytes

    def __post_init__(self) -> None:
        _sequence(self.sequence)
        checks.in_range("declared", self.declared, 1, 2**31)
        checks.in_range("keep", self.keep, 0, self.declared)
        checks.in_range("source", self.source, 0, 2**53)
        checks.in_range("shared", self.shared, 0, self.declared if self.source else 0)
        checks.at_most("ticket", self.ticket, limits.ENVELOPE_BYTES_MAX)


@STAGE.message(6)
@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """Forget these sequences; their cells are free."""

    sequences: tuple[int, ...]

    def __post_init__(self) -> None:
        checks.at_most("sequences", self.sequences, limits.ARRAY_ENTRIES_MAX)
        for number in self.sequences:
            _sequence(number)


@STAGE.message(7)
@dataclass(frozen=True, slots=True)
class RowsWanted:
    """Backward: send me rows ``low`` up to, not including, ``high`` of a sequence; you have them."""

    sequence: int
    low: int
    high: int

    def __post_init__(self) -> None:
        _sequence(self.sequence)
        checks.in_range("low", self.low, 0, 2**31 - 1)
        checks.in_range("high", self.high, self.low + 1, 2**31)


@STAGE.message(8)
@dataclass(frozen=True, slots=True)
class StageProbe:
    """Forward, from stage to stage without a pass through an engine: how do you do?"""

    probe: int

    def __post_init__(self) -> None:
        checks.in_range("probe", self.probe, 1, 2**53)


@STAGE.message(9)
@dataclass(frozen=True, slots=True)
class StageReport:
    """Backward, from each stage to the driver. ``batches``: computed so far; ``waiting``: not yet computed; ``busy_us``: since the one
    that is being computed began. A stage that reports and computes on is busy, not dead."""

    probe: int
    index: int
    batches: int
    waiting: int
    busy_us: int

    def __post_init__(self) -> None:
        checks.in_range("probe", self.probe, 1, 2**53)
        checks.in_range("index", self.index, 0, limits.ROUTE_STAGES_MAX - 1)
        for name in ("batches", "waiting", "busy_us"):
            checks.in_range(name, getattr(self, name), 0, 2**53)


@STAGE.message(10)
@dataclass(frozen=True, slots=True)
class StageFault:
    """In either direction to the driver: the stage with this index has to be replaced, or (``sequence`` not 0) one job cannot go on."""

    index: int
    sequence: int
    code: Code
    message: str

    def __post_init__(self) -> None:
        checks.in_range("index", self.index, 0, limits.ROUTE_STAGES_MAX - 1)
        checks.in_range("sequence", self.sequence, 0, 2**53)
        checks.printable("message", self.message, limits.TEXT_CHARS_MAX)


STAGE.seal()


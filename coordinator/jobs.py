"""Jobs as values: what is to be done, what happens meanwhile, and what came of it. They cross from trio to the HTTP side."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from coordinator.logprobs import TokenLogprob
from coordinator.matching import Choice
from coordinator.regions import Residency
from protocol.cargo_io import DoneLine, ImageLine, ProgressLine, StatusLine, TokenLine
from protocol.cargo_jobs import CargoInput
from protocol.generation import FinishReason, GenerationRequest
from protocol.prices import Ask

W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One request of a Consumer. Each choice runs as a job of its own on some Island; all share the job id.

    ``cache_salt``: 32 bytes of the account. ``job_id`` stands in tickets, headers and logs. ``price_max_micros``: what a choice may cost,
    None for any price. ``island``: where a quote has promised to run it. ``avoid``: Islands that are not to run it.
    ``group``: jobs of one group spread over Islands, where that costs little. ``content_hash``: only this version of the Cargo; empty for
    what its name stands for.
    """

    job_id: str
    cargo: str
    cache_salt: bytes
    choices: tuple[GenerationRequest | CargoInput, ...]
    account: str = ""
    price_max_micros: int | None = None
    policy: Residency | None = None
    priority: int = 0
    island: str = ""
    avoid: frozenset[str] = frozenset()
    group: str = ""
    patience_s: float | None = None  # how long it waits for an Island; None: as the Coordinator is set
    content_hash: str = ""

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("a job has at least one choice")


@dataclass(frozen=True, slots=True)
class Accepted:
    """An Island has taken a choice. Comes again where another Island had to take over; the first one counts for headers."""

    choice: int
    island: str
    engine: str
    placed_s: float  # from the start of the job
    route: tuple[str, ...] = ()  # of a pipeline, first stage first


@dataclass(frozen=True, slots=True)
class Text:
    """The next piece of a choice, with the logprobs of its tokens where they were asked for."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Said:
    """The next line of a Cargo that gives lines, but for the last: that one is ``ChoiceResult.done``."""

    choice: int
    line: StatusLine | TokenLine | ProgressLine | ImageLine


@dataclass(frozen=True, slots=True)
class StageShare:
    """What one stage of a pipeline did for a choice: its layers, its ask, and its time, in microseconds. ``layers`` is empty for one that
    was replaced on the way."""

    island: str
    layers: str
    ask: Ask
    compute_us: int
    held_us: int


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """How a choice ended. ``completion_tokens`` counts all attempts, ``prompt_tokens`` the last one's."""

    choice: int
    finish_reason: FinishReason
    islands: tuple[str, ...]  # that produced tokens, in order; the last one finished
    engines: tuple[str, ...]  # distinct, in order: more than one where the answer was continued by another engine
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    price_micros: int
    prefill_us: int
    decode_us: int
    stages: tuple[StageShare, ...] = ()
    wire_us: int = 0
    mended: int = 0  # times that a stage was replaced on the way
    receipt: bytes = b""
    done: DoneLine | None = None  # of a Cargo that gives lines


@dataclass(frozen=True, slots=True)
class Settled:
    """The job is paid for: comes before its last result. ``price_micros`` is what was charged, ``placement`` why it ran where it did (JSON,
    or empty)."""

    price_micros: int
    placement: str = ""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What follows is the kept answer of an earlier job. ``test``, ``variant``: of the A/B test that this job counted for; empty where it
    counted for none."""

    job_id: str
    test: str = ""
    variant: str = ""


@dataclass(frozen=True, slots=True)
class CacheHit:
    """What follows is a kept answer to the same question (``strategy`` exact) or to one that means the same (semantic). ``key``: under
    which it is kept, hex; ``job_id``: the job that the answer belongs to, for its account; ``age_s``: since it was kept."""

    strategy: str
    key: str
    job_id: str = ""
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CachePassed:
    """The cache was not asked: the Cargo's answers are not kept."""


@dataclass(frozen=True, slots=True)
class Assigned:
    """The request counts for an A/B test, in the arm of this name."""

    test: str
    variant: str


@dataclass(frozen=True, slots=True)
class CacheWaits:
    """An equal question of the same account is under way; its answer is waited for."""


Event = Accepted | Text | Said | ChoiceResult | Settled | Replayed | CacheHit | CachePassed | CacheWaits | Assigned
Emit = Callable[[Event], Awaitable[None]]


async def collected(run: Callable[[W, Emit], Awaitable[object]], work: W) -> list[Event]:
    """All events of ``run(work, emit)`` at once, for answers that are not streamed. Raises what it raises."""
    events: list[Event] = []

    async def keep(event: Event) -> None:
        events.append(event)

    await run(work, keep)
    return events


@dataclass(slots=True)
class Metered:
    """What one choice has used so far at the Island that works on it now, as the receiver counts it."""

    island: str = ""
    region: str = ""
    ask: Ask = field(default_factory=Ask)
    placed: Choice | None = None
    tokens: int = 0  # that came from this Island
    lines: int = 0  # of a Cargo that gives them, told to the Consumer
    started_s: float = 0.0
    ended_s: float = 0.0  # 0.0 while it works
    failed: list[str] = field(default_factory=list)  # Islands that broke


@dataclass(slots=True)
class Meter:
    """Kept by whoever runs a job, read by whoever settles it, however it ended."""

    choices: dict[int, Metered] = field(default_factory=dict)

    def choice(self, index: int) -> Metered:
        return self.choices.setdefault(index, Metered())

"""The trace of a simulated day: which Islands are there when, and which jobs come. It knows nothing of who is given what, so that every
way of placing jobs is measured by the same day.

Figures are made up where no source is named, in the ranges that mission.md and the README give for home GPUs. Work is counted in *output
tokens*: a prompt token is an eighth of one (``pricing.PREFILL_SPEEDUP``). How long Islands are online follows from how busy they shall be:
``Config.load`` is the work of all jobs over what all Islands together could do, all their slots in use, while they are there.

A smaller day (``scaled``) is shorter and has fewer Islands, both by the same factor, so that as many jobs come to each.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.exchange.hardware import Tier
from coordinator.pricing import PREFILL_SPEEDUP
from protocol.prices import Ask

JOBS, ISLANDS, DAY_S = 1_000_000, 1_000, 86_400.0
SLOT_SHARING = 0.35  # each further stream slows all streams of an Island by so much of what one alone would take
SPEED_MEDIAN, SPEED_SIGMA, SPEED_MIN, SPEED_MAX = 55.0, 0.5, 20.0, 150.0  # tokens/s of one stream
SESSION_S = 9_000.0  # mean time online at a stretch
WORKER_LIFE_S = 30_000.0  # mean time until a worker dies
FLAKY_SHARE, FLAKY_FACTOR = 0.1, 8.0  # of the Islands, and how much more often their workers die
LATE_SHARE = 0.3  # of the Islands that are paired are so only after they have served for a while
CRASH_SHARE = 0.25  # of the sessions end without a word
REPRICE_S = 7_200.0  # mean time between two changes of an ask
PROMPT_MAX, OUTPUT_CHOICES = 4_000, ((512, 0.1), (1024, 0.4), (2048, 0.35), (4096, 0.15))
CONTEXT_TOKENS = 8_192
PEAK_AT, SWING = 0.35, 0.75  # when on the day most jobs come, and by how much more than on average
RUSHES, RUSH_SHARE, RUSH_FACTOR = 4, 0.005, 1.6  # short times at which everybody comes
CURVE_STEPS = 2_880

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CargoKind:
    """``ask_per_1k`` in micro-credits is what an Island of middling speed asks, ``share`` that of the jobs; bytes as in ads."""

    name: str
    share: float
    ask_per_1k: int
    weights_bytes: int
    kv_bytes_per_token: int
    publisher_ppm: int


CARGOS = (
    CargoKind("chat-small", 0.5, 250_000, 5 * 10**9, 60_000, 50_000),
    CargoKind("chat-medium", 0.3, 500_000, 9 * 10**9, 100_000, 80_000),
    CargoKind("chat-large", 0.2, 1_000_000, 20 * 10**9, 200_000, 0),
)


@dataclass(frozen=True, slots=True)
class Config:
    jobs: int = JOBS
    islands: int = ISLANDS
    day_s: float = DAY_S
    accounts: int = 2_000
    seed: int = 1
    load: float = 0.6

    @classmethod
    def scaled(cls, jobs: int, seed: int = 1, load: float = 0.6) -> Config:
        factor = sqrt(jobs / JOBS)
        return cls(jobs, max(12, round(ISLANDS * factor)), DAY_S * factor, max(50, round(2_000 * factor)), seed, load)


@dataclass(frozen=True, slots=True)
class Death:
    """A worker dies at ``at_s`` with its jobs; another is there after ``restart_s``."""

    at_s: float
    restart_s: float


@dataclass(frozen=True, slots=True)
class Session:
    """An Island is there. At the end it drains, or, where it ``crashes``, is silent: noticed ``notice_s`` later. ``reprices``: times at
    which it thinks its ask over, and a factor that it then puts on it."""

    start_s: float
    end_s: float
    crashes: bool
    notice_s: float
    deaths: tuple[Death, ...]
    reprices: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class IslandPlan:
    """``tokens_per_s``: of one stream, in truth; ``claimed``: what the ad says, 0.0 nothing. ``owner``: number of an account, -1 unpaired;
    paired at ``paired_s``. ``follows``: asks by what the exchange suggests. ``karma_milli``: from the days before."""

    peer: str
    cargo: int
    tokens_per_s: float
    claimed: float
    slots: int
    region: str
    round_trip_s: float
    ask: Ask
    tier: Tier
    follows: bool
    owner: int
    paired_s: float
    karma_milli: int
    sessions: tuple[Session, ...]

    @property
    def capacity(self) -> float:
        """Tokens/s with all slots in use."""
        return self.slots * self.tokens_per_s / (1.0 + SLOT_SHARING * (self.slots - 1))

    @property
    def online_s(self) -> float:
        return sum(session.end_s - session.start_s for session in self.sessions)


@dataclass(frozen=True, slots=True)
class JobPlan:
    """``bid_factor``: explicit bid as a multiple of what is usual, 0.0 for none. ``cancel_share``: of the answer after which the Consumer
    leaves, 1.0 if he stays. ``waits``: a job that was submitted, that waits long and may be run again; else a chat."""

    number: int
    at_s: float
    account: int
    cargo: int
    conversation: int
    prompt_tokens: int
    max_tokens: int
    output_tokens: int
    bid_factor: float
    priority: int
    cancel_share: float
    waits: bool
    in_eu: bool


class Jobs:
    """Columns of all jobs, by arrival; one job is made when it comes."""

    def __init__(self, columns: dict[str, npt.NDArray[Any]]) -> None:
        self._columns = {name: _array(column) for name, column in columns.items()}
        self.at_s = self._columns["at_s"]
        self._rows = list(self._columns.values())

    def __len__(self) -> int:
        return len(self.at_s)

    def __getitem__(self, number: int) -> JobPlan:
        at_s, account, cargo, conversation, prompt, most, output, bid, priority, cancel, waits, eu = (
            row[number] for row in self._rows
        )
        return JobPlan(
            number, at_s, account, cargo, conversation, prompt, most, output, bid, priority, cancel, bool(waits), bool(eu)
        )


def _array(column: npt.NDArray[Any]) -> array[Any]:
    whole = column.dtype.kind in "iub"
    return array("q" if whole else "d", column.astype(np.int64 if whole else np.float64).tobytes())


@dataclass(frozen=True, slots=True)
class Trace:
    """``saved_factor``: of accounts that saved a bid, by number, as a multiple of what is usual."""

    config: Config
    islands: tuple[IslandPlan, ...]
    jobs: Jobs
    saved_factor: dict[int, float]
    work: float

    @property
    def load(self) -> float:
        """Of the whole day; a little off ``Config.load``, as sessions are cut at its ends."""
        return self.work / _could(self.islands)


def make_trace(config: Config) -> Trace:
    rng = np.random.default_rng([config.seed, config.jobs])
    columns, work = _jobs(config, rng)
    by_cargo = np.zeros(len(CARGOS))
    np.add.at(by_cargo, columns["cargo"], work)
    islands = _islands(config, rng, by_cargo)
    savers = np.flatnonzero(rng.random(config.accounts) < 0.12)
    factors = _lognormal(rng, 1.6, 0.4, len(savers))
    saved = {int(account): float(factor) for account, factor in zip(savers, factors, strict=True)}
    return Trace(config, islands, Jobs(columns), saved, float(work.sum()))


def _lognormal(rng: np.random.Generator, median: float, sigma: float, count: int) -> Floats:
    return median * np.exp(sigma * rng.standard_normal(count))


# -- jobs


def demand_curve(rng: np.random.Generator) -> Floats:
    """How many jobs come in each of CURVE_STEPS pieces of the day, 1.0 on average."""
    at = (np.arange(CURVE_STEPS) + 0.5) / CURVE_STEPS
    curve = 1.0 + SWING * np.cos(2 * np.pi * (at - PEAK_AT))
    for start in rng.random(RUSHES):
        curve[(at >= start) & (at < start + RUSH_SHARE)] *= RUSH_FACTOR
    mean_one: Floats = curve / curve.mean()
    return mean_one


def _starts(config: Config, rng: np.random.Generator, count: int) -> Floats:
    edges = np.concatenate([[0.0], np.cumsum(demand_curve(rng))])
    drawn = rng.random(count) * edges[-1]
    starts: Floats = np.interp(drawn, edges, np.linspace(0.0, config.day_s, CURVE_STEPS + 1))
    return starts


def _jobs(config: Config, rng: np.random.Generator) -> tuple[dict[str, npt.NDArray[Any]], Floats]:
    """Columns in the order of ``JobPlan`` behind its number, and the work of each job in output tokens."""
    count = config.jobs
    turns = np.where(rng.random(count) < 0.5, 1, 1 + rng.geometric(0.25, count))
    talk = np.repeat(np.arange(count), turns)[:count]  # conversation of each job
    talks = int(talk[-1]) + 1
    first = np.flatnonzero(np.concatenate([[True], talk[1:] != talk[:-1]]))

    def so_far(values: Floats) -> Floats:
        """Sums within a conversation, up to and with each turn."""
        sums = np.cumsum(values)
        return np.asarray(sums - np.repeat(sums[first] - values[first], np.diff([*first, count])), np.float64)

    gaps = 15.0 + rng.exponential(75.0, count)
    gaps[first] = 0.0
    at_s = _starts(config, rng, talks)[talk] + so_far(gaps)
    at_s *= config.day_s / at_s.max()
    sizes, odds = zip(*OUTPUT_CHOICES, strict=True)
    most = rng.choice(np.array(sizes), count, p=odds)
    output = np.clip(_lognormal(rng, 800.0, 0.8, count).astype(np.int64), 1, most)
    message = np.clip(_lognormal(rng, 180.0, 0.9, count), 8.0, 2_000.0)
    before = so_far(message + output) - output  # all messages, and the answers before this one
    prompt = np.minimum(300.0 + before, PROMPT_MAX).astype(np.int64)
    activity = np.cumsum(_lognormal(rng, 1.0, 1.3, config.accounts))
    account = np.searchsorted(activity, rng.random(talks) * activity[-1])[talk]
    cargo = rng.choice(len(CARGOS), talks, p=[kind.share for kind in CARGOS])[talk]
    waits = rng.random(count) < 0.15
    cancels = (rng.random(count) < 0.03) & ~waits
    columns: dict[str, npt.NDArray[Any]] = {
        "at_s": at_s,
        "account": account,
        "cargo": cargo,
        "conversation": talk,
        "prompt_tokens": prompt,
        "max_tokens": most,
        "output_tokens": output,
        "bid_factor": np.where(rng.random(count) < 0.2, _lognormal(rng, 1.4, 0.4, count), 0.0),
        "priority": np.where(rng.random(count) < 0.12, rng.integers(1, 101, count), 0),
        "cancel_share": np.where(cancels, rng.random(count), 1.0),
        "waits": waits,
        "in_eu": rng.random(count) < 0.06,
    }
    order = np.argsort(at_s, kind="stable")
    columns = {name: column[order] for name, column in columns.items()}
    work = columns["output_tokens"] * columns["cancel_share"] + columns["prompt_tokens"] / PREFILL_SPEEDUP
    return columns, work


# -- Islands

_CAPACITY_TYPICAL = 98.0  # tokens/s of an Island, mean of what ``_island`` draws
_TRIES = 6
_REGIONS = (("de", 0.25), ("fr", 0.1), ("nl", 0.1), ("ch", 0.1), ("us-east", 0.2), ("us-west", 0.15), ("jp", 0.1))
_TIERS = ((110.0, Tier.ENTERPRISE), (80.0, Tier.HIGH_END), (50.0, Tier.MID_RANGE), (30.0, Tier.ENTRY), (0.0, Tier.CPU))


def _islands(config: Config, rng: np.random.Generator, work: Floats) -> tuple[IslandPlan, ...]:
    """Each has the Cargo that lacks most, as owners load what is wanted; all are online for the same share of the day on average."""
    bare: list[IslandPlan] = []
    lacking = work / work.sum()
    for number in range(config.islands):
        island = _island(config, rng, number, int(lacking.argmax()))
        lacking[island.cargo] -= island.capacity / (config.islands * _CAPACITY_TYPICAL)
        bare.append(island)
    wanted = float(work.sum()) / config.load
    online = wanted / (sum(island.capacity for island in bare) * config.day_s)
    tries: list[tuple[IslandPlan, ...]] = []
    for _ in range(_TRIES):  # sessions are cut at the ends of the day, so what comes of a share is seen when it is there
        sessions_rng = np.random.default_rng([config.seed, config.jobs, 1])
        tries.append(tuple(_with_sessions(config, sessions_rng, island, min(0.95, online)) for island in bare))
        online *= wanted / _could(tries[-1])
    return min(tries, key=lambda islands: abs(_could(islands) - wanted))


def _could(islands: tuple[IslandPlan, ...]) -> float:
    """Work that they could do on the day, in output tokens."""
    return sum(island.capacity * island.online_s for island in islands)


def _island(config: Config, rng: np.random.Generator, number: int, cargo: int) -> IslandPlan:
    speed = float(np.clip(_lognormal(rng, SPEED_MEDIAN, SPEED_SIGMA, 1)[0], SPEED_MIN, SPEED_MAX))
    slots = (1, 2, 4, 8)[int(np.clip(rng.normal(0.3 + speed / 55.0, 0.9), 0, 3))]
    is_paired = rng.random() < 0.85
    return IslandPlan(
        peer=f"island-{number:04}",
        cargo=cargo,
        tokens_per_s=speed,
        claimed=0.0 if rng.random() < 0.1 else speed * float(_lognormal(rng, 1.05, 0.15, 1)[0]),
        slots=slots,
        region=str(rng.choice([name for name, _ in _REGIONS], p=[odds for _, odds in _REGIONS])),
        round_trip_s=float(rng.uniform(0.005, 0.2)),
        ask=_ask(rng, CARGOS[cargo], speed),
        tier=next(tier for least, tier in _TIERS if speed >= least),
        follows=bool(rng.random() < 0.6),
        owner=int(rng.integers(config.accounts)) if is_paired else -1,
        paired_s=0.0,
        karma_milli=0 if rng.random() < 0.3 else int(rng.integers(0, 20_000)),
        sessions=(),
    )


def _ask(rng: np.random.Generator, kind: CargoKind, speed: float) -> Ask:
    """Faster Islands ask more; some want a part of it by time, some a little for each job."""
    per_1k = int(kind.ask_per_1k * (speed / SPEED_MEDIAN) ** 0.6 * _lognormal(rng, 1.0, 0.3, 1)[0])
    if rng.random() < 0.2:
        return Ask(0, per_1k // 2, int(per_1k / 2 * speed / 1000))
    return Ask(10_000 if rng.random() < 0.1 else 0, per_1k, 0)


def _with_sessions(config: Config, rng: np.random.Generator, bare: IslandPlan, online: float) -> IslandPlan:
    """Comes and goes; everybody comes at least once."""
    scale = config.day_s / DAY_S
    on_s, off_s = SESSION_S * scale, SESSION_S * scale * (1.0 / online - 1.0)
    sessions: list[Session] = []
    at_s = 0.0 if rng.random() < online else float(rng.exponential(off_s))
    while at_s < config.day_s:
        end_s = at_s + float(rng.gamma(2.0, on_s / 2.0))
        sessions.append(_session(config, rng, at_s, min(end_s, config.day_s)))
        at_s = end_s + float(rng.exponential(off_s))
    if not sessions:
        start_s = float(rng.uniform(0.0, config.day_s - on_s))
        sessions = [_session(config, rng, start_s, start_s + on_s)]
    first = sessions[0]
    paired_s = float(rng.uniform(first.start_s, first.end_s)) if rng.random() < LATE_SHARE else 0.0
    return replace(bare, sessions=tuple(sessions), paired_s=paired_s)


def _session(config: Config, rng: np.random.Generator, start_s: float, end_s: float) -> Session:
    scale = config.day_s / DAY_S
    life_s = WORKER_LIFE_S * scale / (FLAKY_FACTOR if rng.random() < FLAKY_SHARE else 1.0)
    deaths = tuple(Death(at_s, float(rng.uniform(2.0, 20.0))) for at_s in _times(rng, start_s, end_s, life_s))
    reprices = tuple(
        (at_s, float(_lognormal(rng, 1.0, 0.2, 1)[0])) for at_s in _times(rng, start_s, end_s, REPRICE_S * scale)
    )
    lasts = end_s >= config.day_s
    crashes = not lasts and bool(rng.random() < CRASH_SHARE)
    return Session(start_s, end_s, crashes, float(rng.uniform(0.1, 10.0)), deaths, reprices)


def _times(rng: np.random.Generator, start_s: float, end_s: float, mean_s: float) -> list[float]:
    found, at_s = [], start_s + float(rng.exponential(mean_s))
    while at_s < end_s:
        found.append(at_s)
        at_s += float(rng.exponential(mean_s))
    return found

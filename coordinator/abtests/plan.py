"""What an A/B test is made of: its arms, its metric and its rules, fixed before it starts. Pure values.

Theory of operation. A test stands on the name of a Cargo, its *base*. Units (an account, or an account's user) that are enrolled are
sorted into *arms* by a hash (assignment.py); each arm is one version of the Cargo, by its content address. What the jobs of a unit came to
is summed up in one row for each unit and arm (books/ab_tests.py); of these rows the statistics are made (statistics.py), and of those the
decision (decision.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

SHARE_WHOLE = 100_000  # shares are in thousandths of a percent


class Metric(StrEnum):
    """What is measured of each job, and averaged over the jobs of an arm.

    ``latency`` and ``time_to_first_token`` in microseconds, ``success`` 0 or 1 of the jobs that succeeded or failed, ``abandoned`` 0 or 1
    of those and of the jobs that their Consumers gave up on, ``tokens_per_second`` in thousandths, ``cost`` in micro-credits, ``thumbs`` 0
    or 1 of the jobs that were rated.
    """

    LATENCY = "latency"
    TIME_TO_FIRST_TOKEN = "time_to_first_token"
    SUCCESS = "success"
    ABANDONED = "abandoned"
    TOKENS_PER_SECOND = "tokens_per_second"
    COST = "cost"
    THUMBS = "thumbs"

    @property
    def lower_is_better(self) -> bool:
        return self in (Metric.LATENCY, Metric.TIME_TO_FIRST_TOKEN, Metric.ABANDONED, Metric.COST)


class UnitKind(StrEnum):
    """Who always gets the same arm: a user of an account (the request's ``user``; the account where it names none), the whole account, or
    nobody: each job for itself."""

    USER = "user"
    ACCOUNT = "account"
    JOB = "job"


class AbState(StrEnum):
    """A draft has not begun; a paused test counts no traffic and keeps what it has; the last two have ended."""

    DRAFT = "draft"
    ACTIVE = "active"
    PAUSED = "paused"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"

    @property
    def ended(self) -> bool:
        return self in (AbState.PROMOTED, AbState.ROLLED_BACK)


@dataclass(frozen=True, slots=True)
class Arm:
    """One version on trial. ``cargo``: the name of the Cargo that runs; ``address``: its content address; ``share``: of the enrolled units,
    in thousandths of a percent."""

    name: str
    cargo: str
    release: str
    address: str
    share: int


@dataclass(frozen=True, slots=True)
class Guardrail:
    """A metric that must not get worse by more than ``max_regression_percent`` of the control's mean."""

    metric: Metric
    max_regression_percent: float


@dataclass(frozen=True, slots=True)
class RampStep:
    """For ``hours`` of the test's running time only ``percent`` of all units are enrolled; behind the last step all are."""

    percent: float
    hours: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Fixed before the start. ``control``: the arm that the others are compared with; ``minimum_samples``: units of each arm of which the
    primary metric is known; ``alpha``: the chance that any difference is called one by mistake, over all looks and arms together."""

    name: str
    base_cargo: str
    arms: tuple[Arm, ...]
    control: str
    primary_metric: Metric = Metric.LATENCY
    minimum_samples: int = 1000
    minimum_hours: float = 24.0
    guardrails: tuple[Guardrail, ...] = ()
    alpha: float = 0.05
    unit: UnitKind = UnitKind.USER
    ramp: tuple[RampStep, ...] = ()
    auto_promote: bool = True

    def arm(self, name: str) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)


@dataclass(frozen=True, slots=True)
class Tally:
    """One metric of one arm, summed over units u: S_u is the sum of the values of a unit's jobs, N_u how many there are. ``units``: those
    with N_u > 0; ``count``: ΣN_u; ``total``: ΣS_u; then ΣS_u², ΣN_u², ΣS_uN_u."""

    units: int = 0
    count: int = 0
    total: float = 0.0
    total_squares: float = 0.0
    count_squares: float = 0.0
    cross: float = 0.0


@dataclass(frozen=True, slots=True)
class ArmCounts:
    """What is known of an arm. ``units``: that were given it, also those whose answers all came from the cache; ``jobs``: that ended and
    count; ``cached``: answers that came from the cache, which are no jobs; ``tokens``: completion tokens."""

    units: int = 0
    jobs: int = 0
    succeeded: int = 0
    cached: int = 0
    tokens: int = 0
    tallies: Mapping[Metric, Tally] | None = None

    def tally(self, metric: Metric) -> Tally:
        return (self.tallies or {}).get(metric, Tally())

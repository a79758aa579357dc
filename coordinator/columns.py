"""The facts of one Cargo as columns: one row an Island that offers it, one array a fact.

Ten thousand Islands are scored within a millisecond or two only if nothing is done for each of them, so what depends on the Island alone
is worked out when its row is written, and what depends on all of them when the first job after a change asks. Writing a row costs some
microseconds; ads change far less often than jobs come. Rows keep the order in which Islands came, except that the last one moves into
the place of one that leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.planning import Plan
from coordinator.pricing import PREFILL_SPEEDUP, TIME_BASE_MS, TIME_MARGIN, TOKENS_PER_S_ASSUMED
from coordinator.regions import Closeness, Residency, closeness
from protocol import limits
from protocol.ads import Ad, CargoOffer
from protocol.prices import Ask

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

WEIGHTS_OTHER = (0.25, 0.40, 0.35)  # of Speed, Fit and Headroom, as of wasm
WEIGHTS = {
    "gguf": (0.50, 0.35, 0.15),
    "container": (0.30, 0.40, 0.30),
    "wasm": WEIGHTS_OTHER,
    "onnx": (0.45, 0.40, 0.15),
}  # mission.md, "Placement"
KV_SHARE_MIN = 0.05  # an Island whose room is only guessed to be full stays a candidate
CLAIM_OVER_MEASURED_MAX = 2.0  # a claim counts for at most so many times the fastest that was measured here

# Fit in points by the share of the offered memory that is in use with this job: a peak at 60 %, which beats 95 % and 20 % (mission.md)
FIT_BEST_SHARE = 0.6
FIT_EMPTY_POINTS = 40.0
FIT_FULL_POINTS = 0.0
FIT_UNKNOWN_POINTS = 50.0

ROUND_TRIP_POINTS_PER_S = 100.0  # an answer waits for one or two round trips, not for one a token
ROUND_TRIP_POINTS_MAX = 20.0
KARMA_POINTS_MAX = 5.0
KARMA_HALF_MILLI = 10_000  # karma of +10 unlocks earning (mission.md) and gives half of the points

_SPEED_MIN = 1e-200  # tokens/s; so that no division overflows, whatever an ad claims
_PRICED_MAX = 10**15  # tokens or milliseconds; 999 times as many still fit into 64 bits
_FIT_RISE = (100.0 - FIT_EMPTY_POINTS) / FIT_BEST_SHARE
_FIT_FALL = (100.0 - FIT_FULL_POINTS) / (1.0 - FIT_BEST_SHARE)
_SPARE_CODES = 64  # of content hashes that no row has any more
_SHARE_UNKNOWN = (FIT_UNKNOWN_POINTS - FIT_EMPTY_POINTS) / _FIT_RISE

assert FIT_EMPTY_POINTS <= FIT_UNKNOWN_POINTS <= 100.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One Island that offers the Cargo. ``busy_slots`` and ``busy_kv`` (tokens) are best knowledge: its ad and our own open jobs.

    ``plan``: of a pipeline, whose last stage the Island is; the offer is that of all stages together.
    """

    island: str
    boot: int
    sequence: int
    draining: bool
    offer: CargoOffer
    busy_slots: int
    busy_kv: int
    plan: Plan | None = None

    @property
    def slots_left(self) -> int:
        return self.offer.slots_total - self.busy_slots

    @property
    def kv_left(self) -> int:
        return max(0, self.offer.kv_tokens_total - self.busy_kv)


@dataclass(frozen=True, slots=True)
class Known:
    """What stands beside an Island's offer; the defaults say that nothing is known.

    ``memory_other_bytes``: in use beside the KV cells of this Cargo. ``measured_tokens_per_s``: of one stream, by this Coordinator, 0.0
    unknown. Until ``cool_until_s`` the Island is a last resort.
    """

    region: str = ""
    memory_offered_bytes: int = 0
    memory_other_bytes: int = 0
    measured_tokens_per_s: float = 0.0
    cool_until_s: float = 0.0
    karma_milli: int = 0
    is_approved: bool = True


NOTHING_KNOWN = Known()
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("is_staying", "is_approved"), np.bool_),
    **dict.fromkeys(("content", "sequence", "boot", "context", "room", "slots_left", "slots_total"), np.int64),
    **dict.fromkeys(("per_job", "per_1k", "per_1k_rest", "per_second", "per_second_rest"), np.int64),
    **dict.fromkeys(("measured", "claimed", "headroom", "weight_speed", "weight_fit", "weight_headroom"), np.float64),
    **dict.fromkeys(
        ("memory_share", "memory_share_per_token", "cool_until_s", "karma_points", "round_trip_s"), np.float64
    ),
}


class Columns:
    """``is_staying``: does not drain. ``content``: a number for the content hash. ``room``: tokens that seem to fit. ``headroom``: share
    that is idle, 0 to 1. ``per_1k`` and
    ``per_second``: of asks, in milli-credits rounded down, and what is left over in micro-credits. After ``derive``: ``speed`` in tokens
    per second, a typical one where it is unknown, and the points for karma and round trips."""

    is_staying: Bools
    is_approved: Bools
    content: Ints
    sequence: Ints
    boot: Ints
    context: Ints
    room: Ints
    slots_left: Ints
    slots_total: Ints
    per_job: Ints
    per_1k: Ints
    per_1k_rest: Ints
    per_second: Ints
    per_second_rest: Ints
    measured: Floats
    claimed: Floats
    headroom: Floats
    weight_speed: Floats
    weight_fit: Floats
    weight_headroom: Floats
    memory_share: Floats
    memory_share_per_token: Floats
    cool_until_s: Floats
    karma_points: Floats
    round_trip_s: Floats

    def __init__(self, cargo: str) -> None:
        self.cargo = cargo
        self._islands: list[str] = []
        self._rows: dict[str, int] = {}
        self._candidates: list[Candidate] = []
        self._known: list[Known] = []
        self._asks: list[Ask] = []
        self._codes: dict[str, int] = {}  # content hash -> its number
        self._full: dict[str, npt.NDArray[Any]] = {}
        self._capacity = 0
        self._is_stale = True
        self._region_names: list[str] | None = None
        self._region_codes: Ints = np.zeros(0, np.int64)
        self.speed: Floats = np.zeros(0)
        self.round_trip_points: Floats = np.zeros(0)
        self.standing_points: Floats = np.zeros(0)
        self._priced_speed: Floats = np.zeros(0)
        self._is_timed = False
        self._view()

    @classmethod
    def of(cls, cargo: str, candidates: Iterable[Candidate], known: Mapping[str, Known] | None = None) -> Columns:
        columns = cls(cargo)
        for candidate in candidates:
            columns.put(candidate, (known or {}).get(candidate.island, NOTHING_KNOWN))
        return columns

    def __len__(self) -> int:
        return len(self._islands)

    def __repr__(self) -> str:
        return f"<Columns of {self.cargo}: {len(self)} Islands>"

    @property
    def islands(self) -> list[str]:
        """By row; not to be changed."""
        return self._islands

    def row(self, island: str) -> int | None:
        return self._rows.get(island)

    def row_of(self, island: str) -> int:
        """Raises KeyError."""
        return self._rows[island]

    def content_hashes(self) -> set[str]:
        """Of all that is offered under the name by Islands that neither drain nor lack approval."""
        rows = np.bincount(self.content[self.is_staying & self.is_approved], minlength=len(self._codes)).tolist()
        return {content_hash for content_hash, code in self._codes.items() if rows[code]}

    def offers(self, island: str, content_hash: str) -> bool:
        """Whether this Island is among those of ``content_hashes`` with this one."""
        row = self._rows.get(island)
        return row is not None and bool(self.is_staying[row] and self.is_approved[row] and self.has_content(content_hash)[row])

    @property
    def runtime(self) -> str:
        """What runs the Cargo, by the word of who offered it first; empty where nobody does."""
        return self._candidates[0].offer.runtime if self._candidates else ""

    def candidate(self, row: int) -> Candidate:
        return self._candidates[row]

    def known(self, row: int) -> Known:
        return self._known[row]

    # -- writing

    def put(self, candidate: Candidate, known: Known = NOTHING_KNOWN) -> None:
        """Writes the row of an Island, which may be new."""
        row = self._rows.get(candidate.island)
        if row is None:
            row = self._append(candidate, known)
        offer, ask = candidate.offer, candidate.offer.ask
        self.is_staying[row] = not candidate.draining
        self.sequence[row] = candidate.sequence
        self.boot[row] = candidate.boot
        self.context[row] = offer.context_tokens
        self.slots_total[row] = offer.slots_total
        self._asks[row] = ask
        self.claimed[row] = offer.tokens_per_s
        self.per_job[row] = ask.per_job
        self.per_1k[row], self.per_1k_rest[row] = divmod(ask.per_1k_output, 1000)
        self.per_second[row], self.per_second_rest[row] = divmod(ask.per_second, 1000)
        weights = WEIGHTS.get(offer.runtime, WEIGHTS_OTHER)
        self.weight_speed[row], self.weight_fit[row], self.weight_headroom[row] = weights
        self._candidates[row] = candidate
        self._write_content(row, offer.content_hash)
        self._write_known(row, known)
        self._write_busy(row, candidate)

    def know(self, island: str, known: Known) -> None:
        """Something has changed beside an Island's offer."""
        row = self._rows[island]
        self._write_known(row, known)
        self._write_busy(row, self._candidates[row])

    def set_busy(self, island: str, busy_slots: int, busy_kv: int) -> None:
        """Jobs have come or gone there."""
        row = self._rows[island]
        it = self._candidates[row]
        it = Candidate(it.island, it.boot, it.sequence, it.draining, it.offer, busy_slots, busy_kv, it.plan)
        self._candidates[row] = it
        self._write_busy(row, it)

    def set_round_trips(self, round_trips_s: Mapping[str, float]) -> None:
        """Measured, by Island; the others count as typical."""
        trips = (round_trips_s.get(island, math.nan) for island in self._islands)
        self.round_trip_s[:] = np.fromiter(trips, np.float64, len(self))
        self._is_stale = True

    def drop(self, island: str) -> None:
        """An Island does not offer this any more."""
        row, last = self._rows.pop(island), len(self._islands) - 1
        if row != last:
            self._rows[self._islands[last]] = row
            for array in self._full.values():
                array[row] = array[last]
        self._islands[row] = self._islands[last]
        self._candidates[row] = self._candidates[last]
        self._known[row] = self._known[last]
        self._asks[row] = self._asks[last]
        del self._islands[last], self._candidates[last], self._known[last], self._asks[last]
        self._view()
        self._is_stale, self._region_names = True, None

    def _append(self, candidate: Candidate, known: Known) -> int:
        row = self._rows[candidate.island] = len(self._islands)
        self._islands.append(candidate.island)
        self._candidates.append(candidate)
        self._known.append(known)
        self._asks.append(candidate.offer.ask)
        self._region_names = None
        self._view()
        self.round_trip_s[row] = math.nan
        return row

    def _view(self) -> None:
        count = len(self._islands)
        if count > self._capacity or not self._full:
            self._capacity = max(4, 2 * count)
            for name, kind in _KINDS.items():
                grown = np.zeros(self._capacity, kind)
                before = self._full.get(name)
                if before is not None:
                    grown[: len(before)] = before
                self._full[name] = grown
        for name, array in self._full.items():
            setattr(self, name, array[:count])

    def _write_content(self, row: int, content_hash: str) -> None:
        self.content[row] = self._codes.setdefault(content_hash, len(self._codes))
        if len(self._codes) > 2 * len(self) + _SPARE_CODES:  # an Island may say another one in each of its ads
            self._codes = {}
            for each, candidate in enumerate(self._candidates):
                self.content[each] = self._codes.setdefault(candidate.offer.content_hash, len(self._codes))

    def _write_known(self, row: int, known: Known) -> None:
        if known.region != self._known[row].region:
            self._region_names = None
        self._known[row] = known
        self.is_approved[row] = known.is_approved
        self.measured[row] = known.measured_tokens_per_s
        self.cool_until_s[row] = known.cool_until_s
        karma = known.karma_milli
        self.karma_points[row] = KARMA_POINTS_MAX * karma / (abs(karma) + KARMA_HALF_MILLI)
        self._is_stale = True

    def _write_busy(self, row: int, candidate: Candidate) -> None:
        offer, known = candidate.offer, self._known[row]
        slots_left, kv_left = candidate.slots_left, candidate.kv_left
        share = slots_left / offer.slots_total if offer.slots_total else 0.0
        if offer.kv_tokens_total:
            share = min(share, max(KV_SHARE_MIN, kv_left / offer.kv_tokens_total))
        self.slots_left[row] = slots_left
        self.headroom[row] = max(share, 0.0)
        self.room[row] = min(offer.context_tokens, kv_left) if offer.kv_tokens_total else offer.context_tokens
        if known.memory_offered_bytes:
            used = known.memory_other_bytes + candidate.busy_kv * offer.kv_bytes_per_token
            self.memory_share[row] = used / known.memory_offered_bytes
            self.memory_share_per_token[row] = offer.kv_bytes_per_token / known.memory_offered_bytes
        else:
            self.memory_share[row], self.memory_share_per_token[row] = _SHARE_UNKNOWN, 0.0

    # -- reading

    def derive(self) -> None:
        """Brings what depends on all rows up to date, where one of them has changed."""
        if not self._is_stale:
            return
        self._is_stale = False
        known = np.where(self.measured > 0.0, self.measured, self.claimed)
        self._priced_speed = np.maximum(np.where(self.claimed > 0.0, self.claimed, TOKENS_PER_S_ASSUMED), _SPEED_MIN)
        self._is_timed = bool(self.per_second.any() or self.per_second_rest.any())
        self.speed = self._believed(known)
        self.round_trip_points = self._round_trip_points()
        self.standing_points = self.karma_points + self.round_trip_points

    def _believed(self, known: Floats) -> Floats:
        """What is measured counts, a claim counts up to a bound, and who says nothing is as fast as the one in the middle."""
        fastest = self.measured.max(initial=0.0)
        if fastest:
            known = np.where(self.measured > 0.0, known, np.minimum(known, CLAIM_OVER_MEASURED_MAX * fastest))
        some = known[known > 0.0]
        if len(some) == len(known):
            return known
        typical = np.partition(some, len(some) // 2)[len(some) // 2] if len(some) else 1.0
        return np.where(known > 0.0, known, typical)

    def _round_trip_points(self) -> Floats:
        is_unknown = np.isnan(self.round_trip_s)
        if is_unknown.all():
            return np.zeros(len(self))
        typical = self.round_trip_s[~is_unknown].mean()
        trips = np.where(is_unknown, typical, self.round_trip_s)
        points: Floats = -np.minimum(trips * ROUND_TRIP_POINTS_PER_S, ROUND_TRIP_POINTS_MAX)
        return points

    def slots(self, content_hash: str, policy: Residency | None) -> int:
        """All slots, free or busy, of Islands that neither drain nor lack approval. ``content_hash``: of what has to run, empty for any;
        ``policy``: where, None for anywhere."""
        chosen = self.is_staying & self.is_approved
        if content_hash:
            chosen = chosen & self.has_content(content_hash)
        if policy is not None:
            chosen = chosen & self.is_allowed(policy)
        return int(self.slots_total[chosen].sum())

    def order_book(self) -> list[tuple[str, Ask, float, int, int]]:
        """Island, ask, tokens/s that it claims, free slots and all slots of those that neither drain nor lack approval."""
        slots = np.maximum(self.slots_left, 0).tolist()
        rows = zip(self._islands, self._asks, self.claimed.tolist(), slots, self.slots_total.tolist(), strict=True)
        return list(compress(rows, (self.is_staying & self.is_approved).tolist()))

    def prices(self, prompt_tokens: int, output_tokens: int, job_s_max: float) -> Ints:
        """``pricing.price_max`` of each row by what its ad says, micro-credits. Exact, without overflow; counts above 10^15 count as
        10^15. By the ad and not by what was measured here, so that whoever has the ad comes to the same price."""
        self.derive()
        total = self.per_job + _thousandths(self.per_1k, self.per_1k_rest, min(output_tokens, _PRICED_MAX))
        if self._is_timed:
            ms = self._compute_ms(prompt_tokens, output_tokens, job_s_max)
            total += _thousandths(self.per_second, self.per_second_rest, ms)
        priced: Ints = np.minimum(total, limits.PRICE_MICROS_MAX)
        return priced

    def _compute_ms(self, prompt_tokens: int, output_tokens: int, job_s_max: float) -> Ints:
        """``pricing.compute_ms_max`` of each row: the same steps in the same order, so the same floats."""
        expected = 1000 * (output_tokens + prompt_tokens / PREFILL_SPEEDUP) / self._priced_speed
        bound = TIME_BASE_MS + TIME_MARGIN * expected
        return np.minimum(bound, min(int(job_s_max * 1000), _PRICED_MAX)).astype(np.int64)

    def fit(self, tokens: int) -> Floats:
        """Points for how well a job of so many tokens of room would fill the memory, 0 to 100."""
        share = self.memory_share + tokens * self.memory_share_per_token
        rising = FIT_EMPTY_POINTS + _FIT_RISE * share
        falling = FIT_FULL_POINTS + _FIT_FALL * (1.0 - share)
        points: Floats = np.maximum(np.minimum(rising, falling), 0.0)
        return points

    def is_allowed(self, policy: Residency) -> Bools:
        """Rows of Islands within the policy."""
        names, codes = self._regions()
        return np.fromiter(map(policy.allows, names), np.bool_, len(names))[codes]

    def nearness(self, region: str) -> Floats:
        """0 to 1: how near the rows' Islands are to a region."""
        names, codes = self._regions()
        near = (closeness(name, region) / Closeness.SAME for name in names)
        return np.fromiter(near, np.float64, len(names))[codes]

    def _regions(self) -> tuple[list[str], Ints]:
        """The different regions, and which of them each row has."""
        if self._region_names is None:
            code_of: dict[str, int] = {}
            codes = (code_of.setdefault(known.region, len(code_of)) for known in self._known)
            self._region_codes = np.fromiter(codes, np.int64, len(self))
            self._region_names = list(code_of)
        return self._region_names, self._region_codes

    def has_content(self, content_hash: str) -> Bools:
        """Rows whose model file is this one."""
        same: Bools = self.content == self._codes.get(content_hash, -1)
        return same

    def largest_context(self, content_hash: str) -> int:
        offers = (candidate.offer for candidate in self._candidates)
        return max((offer.context_tokens for offer in offers if offer.content_hash == content_hash), default=0)

    def has_engine(self, engine: str) -> Bools:
        same = (candidate.offer.engine == engine for candidate in self._candidates)
        return np.fromiter(same, np.bool_, len(self))


def _thousandths(thousands: Ints, rest: Ints, count: int | Ints) -> Ints:
    """``(1000 × thousands + rest) × count / 1000`` rounded up; more than PRICE_MICROS_MAX where the exact value is."""
    least = max(count, 1) if isinstance(count, int) else np.maximum(count, 1)
    priced: Ints = np.minimum(thousands, limits.PRICE_MICROS_MAX // least + 1) * count + (rest * count + 999) // 1000
    return priced


def memory_used(ad: Ad) -> int:
    """Bytes of all that an Island holds, of KV caches what is in use."""
    cargos = sum(offer.weights_bytes + offer.compute_bytes + kv_used(offer) for offer in ad.offers)
    shards = sum(
        shard.weights_bytes + shard.compute_bytes + shard.process_bytes + shard.kv_tokens_total * shard.kv_bytes_per_token
        for shard in ad.shards
    )
    return cargos + shards


def kv_used(offer: CargoOffer) -> int:
    return (offer.kv_tokens_total - offer.kv_tokens_free) * offer.kv_bytes_per_token

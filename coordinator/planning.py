"""Which Islands hold which layers of a model that is too large for each of them: one pure function from facts to a plan.

Theory of operation. Stages form a ring. The last one drives: it has tokenizer, scheduler, output matrix and sampler; it sends token ids to
the first stage, and hidden states are pushed from the first to the second and so on to the last. One token is one lap, so it takes the sum
of what all stages compute and of the one-way delays all round the ring, back to the first stage. A plan of one stage has no hops.

Rules, in this order:

1. Fewest stages. A hop costs every token of every job, loading costs once: so a route that is loaded already does not beat one of fewer
   stages that has to be loaded first, unless that one does not fit anywhere.
2. Fewest stages to load: a route of shards that are held starts at once.
3. Shortest predicted time of a token, then the lower ask for a typical job, then the names of the Islands.

A route gets as many cells as fit in all its stages, up to what is wanted; memory is counted as ``manifest.stage_bytes`` says.
Shards that are loaded anew may be cut anywhere; layers are shared out in proportion to the speed of the Islands, as far as memory beside
these cells allows, so that all stages take equally long: one token gains nothing by that, but many jobs in the ring do.
The search itself is in ``planning_search``; it is complete unless there are very many routes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coordinator.planning_search import CELLS_STEP, Found, Ints, Option, Place, Problem, Searcher
from protocol import limits
from protocol.errors import Code
from protocol.prices import Ask, sum_of_asks
from protocol.shards import LayerRange, ShardManifest

CELLS_WANTED = 4096
DELAY_UNKNOWN_S = 0.025  # one way: two homes in neighbouring countries
HELD_PER_ISLAND_MAX = 8  # shards of one model on one Island that are looked at
TYPICAL_TOKENS, TYPICAL_MS = 1000, 60_000  # the job for which asks are compared
_NUMBERS = ("no", "single", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True, slots=True)
class Held:
    """A shard of this model that an Island has loaded and advertises. ``token_s``: measured time of a token in it, 0.0 unknown."""

    layers: LayerRange
    cells_free: int
    compute_bytes: int
    token_s: float


@dataclass(frozen=True, slots=True)
class Site:
    """An Island that may take part.

    ``memory_free_bytes``: offered and not used by what is loaded, 0 when it takes no shards. ``layer_s``: measured time of a token in one
    layer of this model, 0.0 unknown. ``process_bytes``: measured size of an empty worker process there, 0 unknown.
    """

    island: str
    boot: int
    memory_free_bytes: int
    ask: Ask
    held: tuple[Held, ...] = ()
    layer_s: float = 0.0
    process_bytes: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """``held``: loaded already. ``bytes_needed`` and ``compute_s`` (of one token) are predicted; 0.0 where no Island knows its speed."""

    island: str
    boot: int
    layers: LayerRange
    ask: Ask
    held: bool
    bytes_needed: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """``cells``: what stages that are loaded get. ``token_s``: predicted for one token, ``wire_s`` of it between the Islands."""

    stages: tuple[PlannedStage, ...]
    cells: int
    token_s: float
    wire_s: float
    reasons: tuple[str, ...]

    @property
    def ask(self) -> Ask:
        """What all stages want together."""
        return sum_of_asks(stage.ask for stage in self.stages)


@dataclass(frozen=True, slots=True)
class NoPlan:
    """NO_ISLAND: nobody takes part. NO_CAPACITY: those who do have not enough room. CONTEXT_LENGTH: no plan could ever do it."""

    code: Code
    message: str


def plan(
    manifest: ShardManifest,
    sites: Sequence[Site],
    tokens: int,
    round_trips_s: Mapping[tuple[str, str], float],
    cells_wanted: int = CELLS_WANTED,
) -> Plan | NoPlan:
    """The best route for a job of ``tokens``, or why there is none. The order of ``sites`` does not matter."""
    if tokens > manifest.context_tokens:
        text = f"{tokens} tokens are more than the context of {manifest.name}, {manifest.context_tokens} tokens"
        return NoPlan(Code.CONTEXT_LENGTH, text)
    able = _able(manifest, sites, tokens)
    if not able:
        return _nobody(manifest, sites)
    some = _at_most(manifest, able, tokens)
    fewest = cells_of(tokens)
    most = max(fewest, min(cells_wanted // CELLS_STEP * CELLS_STEP, cells_of(manifest.context_tokens)))
    problem = _problem(manifest, some, tokens, fewest, most, round_trips_s)
    searcher = Searcher(problem)
    for stages in range(searcher.fewest(), manifest.max_shards + 1):
        if found := searcher.find(stages):
            return _plan(manifest, some, problem, found)
    return _too_small(manifest, able, tokens)


def replace(
    manifest: ShardManifest,
    old: Plan,
    lost: int,
    sites: Sequence[Site],
    round_trips_s: Mapping[tuple[str, str], float],
) -> Plan | NoPlan:
    """The same route with another Island in place of stage ``lost``: same layers, at least as many cells, all other stages as they are."""
    gone = old.stages[lost]
    in_route = {stage.island for stage in old.stages}
    able = [site for site in _sorted(sites) if not site.draining and site.island not in in_route]
    layer_s = speeds(manifest, able)
    best: tuple[tuple[bool, int, int, str], Plan] | None = None
    for site in able:
        held = [held for held in site.held if held.layers == gone.layers and held.cells_free >= old.cells]
        needed = manifest.stage_bytes(gone.layers, old.cells, *overheads(manifest, site, gone.layers))
        if not held and needed > site.memory_free_bytes:
            continue
        times = [held.token_s or len(gone.layers) * layer_s[site.island] for held in held]
        compute_s = min(times, default=len(gone.layers) * layer_s[site.island])
        stage = PlannedStage(site.island, site.boot, gone.layers, site.ask, bool(held), needed, compute_s)
        new = _replaced(old, lost, stage, round_trips_s)
        key = (not held, round(new.token_s * 1e9), price_of_ask(site.ask), site.island)
        if best is None or key < best[0]:
            best = key, new
    return best[1] if best else _no_replacement(manifest, old, lost, able)


def cells_of(tokens: int) -> int:
    """KV cells for so many positions."""
    return -(-max(1, tokens) // CELLS_STEP) * CELLS_STEP


def price_of_ask(ask: Ask) -> int:
    """Of a typical job, in micro-credits."""
    return ask.price(TYPICAL_TOKENS, TYPICAL_MS)


def _sorted(sites: Sequence[Site]) -> list[Site]:
    """By name; of an Island that is there twice its latest run."""
    latest = {site.island: site for site in sorted(sites, key=lambda site: site.boot)}
    return [latest[island] for island in sorted(latest)]


def _of_use(manifest: ShardManifest, site: Site, tokens: int) -> list[Held]:
    """Shards that the job could use as they are, the longest first."""
    held = [held for held in site.held if held.layers.high <= manifest.total_layers and held.cells_free >= tokens]
    held.sort(key=lambda held: (-len(held.layers), held.layers, held.token_s, -held.cells_free))
    return held[:HELD_PER_ISLAND_MAX]


def _able(manifest: ShardManifest, sites: Sequence[Site], tokens: int) -> list[Site]:
    return [
        site
        for site in _sorted(sites)
        if not site.draining and (site.memory_free_bytes > 0 or _of_use(manifest, site, tokens))
    ]


def _at_most(manifest: ShardManifest, able: Sequence[Site], tokens: int) -> list[Site]:
    """So many as can be searched: who holds something of use first, then who has the most memory."""
    ranked = sorted(able, key=lambda site: (not _of_use(manifest, site, tokens), -site.memory_free_bytes, site.island))
    return sorted(ranked[: limits.CANDIDATES_MAX], key=lambda site: site.island)


def _kind(manifest: ShardManifest, layers: LayerRange) -> Literal[0, 1, 2]:
    """First, middle or last; the whole model counts as last, since it has the output matrix."""
    return 2 if manifest.is_last(layers) else 0 if manifest.is_first(layers) else 1


def overheads(manifest: ShardManifest, site: Site, layers: LayerRange) -> tuple[int, int]:
    """Bytes of compute buffers and of the process; the Island's own measure where it has one."""
    kind = _kind(manifest, layers)
    own = (held.compute_bytes for held in site.held if _kind(manifest, held.layers) == kind)
    compute_bytes = max(own, default=0) or manifest.measured_compute_bytes(layers)
    return compute_bytes, site.process_bytes or manifest.process_bytes(layers)


def speeds(manifest: ShardManifest, sites: Sequence[Site]) -> dict[str, float]:
    """Seconds a layer for each Island: measured, else from a shard that it holds, else as long as the median; 0.0 if none is known."""
    known = {}
    for site in sites:
        timed = [held for held in site.held if held.token_s > 0]
        if site.layer_s > 0:
            known[site.island] = site.layer_s
        elif timed:
            known[site.island] = sum(held.token_s for held in timed) / sum(len(held.layers) for held in timed)
    median = statistics.median_low(sorted(known.values())) if known else 0.0
    return {site.island: known.get(site.island, median) for site in sites}


def _delay_s(one: str, other: str, round_trips_s: Mapping[tuple[str, str], float]) -> float:
    """One way; of two measures the larger one, since the plan has to hold for both."""
    given = [round_trips_s.get(pair, math.nan) for pair in ((one, other), (other, one))]
    return max((value / 2 for value in given if math.isfinite(value) and value >= 0), default=DELAY_UNKNOWN_S)


def ring_delay_s(islands: Sequence[str], round_trips_s: Mapping[tuple[str, str], float]) -> float:
    """One-way delays of a lap, in seconds."""
    return sum(_delay_s(*hop, round_trips_s) for hop in _ring(islands))


def _ring(islands: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The hops of one lap."""
    if len(islands) > 1:
        yield from zip(islands, [*islands[1:], islands[0]], strict=True)


def _problem(
    manifest: ShardManifest,
    sites: Sequence[Site],
    tokens: int,
    fewest: int,
    most: int,
    round_trips_s: Mapping[tuple[str, str], float],
) -> Problem:
    """The facts in numbers; ``sites`` are sorted."""
    layer_s = speeds(manifest, sites)
    timed = any(layer_s.values())
    total = manifest.total_layers
    shapes = [LayerRange(0, 1), LayerRange(1, max(2, total - 1)), LayerRange(total - 1, total), LayerRange(0, total)]
    # Of two layers none is in the middle; then there are no middle stages either, and what they would take does not matter.
    ends = (manifest.embedding_bytes, 0, manifest.head_bytes, manifest.embedding_bytes + manifest.head_bytes)
    places, options = [], []
    for index, site in enumerate(sites):
        first, middle, last, whole = (
            manifest.shared_bytes + end + sum(overheads(manifest, site, shape))
            for shape, end in zip(shapes, ends, strict=True)
        )
        layer_ns = max(1, round(layer_s[site.island] * 1e9)) if timed else 0
        places.append(Place(site.memory_free_bytes, first, middle, last, whole, layer_ns, price_of_ask(site.ask)))
        if site.memory_free_bytes > 0:
            options.append(Option(index))
        for held in _of_use(manifest, site, tokens):
            token_ns = round(held.token_s * 1e9) or len(held.layers) * layer_ns
            # Less than a full step may be free; that is enough for the tokens that were declared.
            cells = max(fewest, held.cells_free // CELLS_STEP * CELLS_STEP)
            options.append(Option(index, held.layers.low, held.layers.high, cells, token_ns))
    return Problem(
        layer_bytes=manifest.layer_bytes,
        kv_bytes=manifest.kv_bytes,
        kept_bytes=4 * manifest.width,
        places=tuple(places),
        options=tuple(options),
        delays_ns=_delays_ns([site.island for site in sites], round_trips_s),
        timed=timed,
        cells_least=fewest,
        cells_most=most,
    )


def _delays_ns(islands: Sequence[str], round_trips_s: Mapping[tuple[str, str], float]) -> Ints:
    delays = np.zeros((len(islands), len(islands)), np.int64)
    for row, one in enumerate(islands):
        for column in range(row):
            delays[row, column] = delays[column, row] = round(_delay_s(one, islands[column], round_trips_s) * 1e9)
    return delays


def _plan(manifest: ShardManifest, sites: Sequence[Site], problem: Problem, found: Found) -> Plan:
    stages = []
    for option, low, high in zip(found.options, found.cuts, found.cuts[1:], strict=False):
        site, layers = sites[option.site], LayerRange(low, high)
        token_ns = option.token_ns if option.held else len(layers) * problem.places[option.site].layer_ns
        needed = manifest.stage_bytes(layers, found.cells, *overheads(manifest, site, layers))
        stages.append(PlannedStage(site.island, site.boot, layers, site.ask, option.held, needed, token_ns / 1e9))
    indices = [option.site for option in found.options]
    wire_ns = int(problem.delays_ns[indices, [*indices[1:], indices[0]]].sum())
    token_s = sum(stage.compute_s for stage in stages) + wire_ns / 1e9
    whole = manifest.stage_bytes(LayerRange(0, manifest.total_layers), problem.cells_least, 0, 0)
    count = len(stages)
    if count == 1:
        reasons = [f"1 stage: island {stages[0].island} has room for the whole model"]
    else:
        plural = "Islands were" if count > 2 else "Island was"
        reasons = [f"{count} stages: no {_NUMBERS[count - 1]} {plural} found to hold {_size(whole)}"]
    reasons += [f"island {stage.island} already holds layers {stage.layers}" for stage in stages if stage.held]
    if found.cells < problem.cells_most:
        reasons.append(f"{found.cells} cells: there is no room for {problem.cells_most}")
    reasons.append(_time(token_s, wire_ns / 1e9))
    return Plan(tuple(stages), found.cells, token_s, wire_ns / 1e9, tuple(reasons))


def _replaced(old: Plan, lost: int, stage: PlannedStage, round_trips_s: Mapping[tuple[str, str], float]) -> Plan:
    stages = (*old.stages[:lost], stage, *old.stages[lost + 1 :])
    wire_s = ring_delay_s([stage.island for stage in stages], round_trips_s)
    token_s = sum(stage.compute_s for stage in stages) + wire_s
    how = "already holds" if stage.held else "loads"
    reasons = (
        f"island {stage.island} takes the place of {old.stages[lost].island}: it {how} layers {stage.layers}",
        _time(token_s, wire_s),
    )
    return Plan(stages, old.cells, token_s, wire_s, reasons)


def _time(token_s: float, wire_s: float) -> str:
    if token_s == wire_s == 0:
        return "no Island has measured its speed"
    if token_s == wire_s:
        return f"predicted {wire_s * 1000:.3g} ms a token on the wire; no Island has measured its speed"
    return f"predicted {token_s * 1000:.3g} ms a token, {wire_s * 1000:.3g} ms of it on the wire"


def _size(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes"


def _nobody(manifest: ShardManifest, sites: Sequence[Site]) -> NoPlan:
    if any(site.held and not site.draining for site in sites):
        text = f"no capacity: the shards of {manifest.name} that are held are busy, and nobody offers memory for more"
        return NoPlan(Code.NO_CAPACITY, text)
    return NoPlan(Code.NO_ISLAND, f"nobody offers memory for shards of {manifest.name}")


def _too_small(manifest: ShardManifest, able: Sequence[Site], tokens: int) -> NoPlan:
    """Too little in sum, or enough in sum that cannot be cut; the message tells which."""
    name, cells = manifest.name, cells_of(tokens)
    offering = [site for site in able if site.memory_free_bytes > 0]
    if not offering:
        text = (
            f"no capacity: the shards of {name} that are held do not make up the whole model, and nobody offers memory"
        )
        return NoPlan(Code.NO_CAPACITY, text)
    together = sum(site.memory_free_bytes for site in offering)
    whole = LayerRange(0, manifest.total_layers)
    needed = min(manifest.stage_bytes(whole, cells, *overheads(manifest, site, whole)) for site in offering)
    have = "the only Island that offers memory has"
    if len(offering) > 1:
        have = f"the {len(offering)} Islands that offer memory have together"
    text = f"no capacity: {name} needs {needed} bytes for {tokens} tokens, {have} {together}"
    if together < needed:
        return NoPlan(Code.NO_CAPACITY, text)
    covered = {number for site in able for held in _of_use(manifest, site, tokens) for number in _numbers(held.layers)}
    for number in sorted(set(_numbers(whole)) - covered):
        layer = LayerRange(number, number + 1)
        needs = [(manifest.stage_bytes(layer, cells, *overheads(manifest, s, layer)), s) for s in offering]
        if all(need > site.memory_free_bytes for need, site in needs):
            largest = max(site.memory_free_bytes for site in offering)
            least = min(need for need, _ in needs)
            alone = f"layer {number} alone needs {least} with its worker, and no Island has more than {largest}"
            return NoPlan(Code.NO_CAPACITY, f"{text}, but {alone}")
    return NoPlan(Code.NO_CAPACITY, f"{text}, but no cut into at most {manifest.max_shards} stages fits")


def _numbers(layers: LayerRange) -> range:
    return range(layers.low, layers.high)


def _no_replacement(manifest: ShardManifest, old: Plan, lost: int, able: Sequence[Site]) -> NoPlan:
    layers = old.stages[lost].layers
    if any(held.layers == layers for site in able for held in site.held):
        text = f"no capacity: no Island that holds layers {layers} of {manifest.name} has {old.cells} cells free"
        return NoPlan(Code.NO_CAPACITY, text)
    default = manifest.stage_bytes(layers, old.cells)
    needed = min(
        (manifest.stage_bytes(layers, old.cells, *overheads(manifest, site, layers)) for site in able),
        default=default,
    )
    text = f"nobody holds layers {layers} of {manifest.name}, and nobody offers the {needed} bytes to load them"
    return NoPlan(Code.NO_ISLAND, text)

"""Plans out of shards that lie ready as files: one Island for each of them, in the order of their layers.

For models whose whole file no Island can fetch, and where it costs no further hop: ready files need no cutting, and their hashes stand
in the manifest. Which Islands have which files is not known beforehand; ``cannot`` holds those that have said that they do not. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice, permutations

from coordinator.planning import (
    CELLS_WANTED,
    NoPlan,
    Plan,
    PlannedStage,
    Site,
    cells_of,
    overheads,
    price_of_ask,
    ring_delay_s,
    speeds,
)
from coordinator.planning_search import CELLS_STEP
from protocol import limits
from protocol.errors import Code
from protocol.shards import LayerRange, ShardManifest

_SITES_MAX = 12
_ROUTES_MAX = 20_000


def ready_chain(manifest: ShardManifest) -> tuple[LayerRange, ...]:
    """Shards that follow one another and are the whole model, the fewest there are; empty where there is no such chain of two or more."""
    longest: dict[int, LayerRange] = {}
    for layers in sorted(manifest.shard_layers):
        longest[layers.low] = layers  # sorted: the last with this beginning is the longest
    chain: list[LayerRange] = []
    while (chain[-1].high if chain else 0) in longest:
        chain.append(longest[chain[-1].high if chain else 0])
    whole = bool(chain) and chain[-1].high == manifest.total_layers
    return tuple(chain) if whole and 2 <= len(chain) <= limits.ROUTE_STAGES_MAX else ()


def plan_ready_made(
    manifest: ShardManifest,
    sites: Sequence[Site],
    tokens: int,
    round_trips_s: Mapping[tuple[str, str], float],
    cannot: Collection[tuple[str, LayerRange]] = (),
    cells_wanted: int = CELLS_WANTED,
) -> Plan | NoPlan:
    """The route over ready shards with the fewest to load, then the shortest time of a token, then the lowest ask."""
    chain, fewest = ready_chain(manifest), cells_of(tokens)
    most = max(fewest, min(cells_wanted, cells_of(manifest.context_tokens)))
    able = sorted((site for site in sites if not site.draining), key=lambda site: (-site.memory_free_bytes, site.island))
    rooms = {
        (site.island, layers): 0 if (site.island, layers) in cannot else _room(manifest, site, layers, fewest, most)
        for site in able
        for layers in chain
    }
    for layers in chain:
        if not any(rooms[site.island, layers] for site in able):
            held_back = " that has its file" if any(entry[1] == layers for entry in cannot) else ""
            return NoPlan(Code.NO_ISLAND, f"nobody holds layers {layers} of {manifest.name}, and no Island{held_back} has room for them")
    useful = [site for site in able if any(rooms[site.island, layers] for layers in chain)][:_SITES_MAX]
    layer_s = speeds(manifest, useful)
    best: tuple[tuple[int, int, int, tuple[str, ...]], Plan] | None = None
    for route in islice(permutations(useful, len(chain)), _ROUTES_MAX):
        cells = min(rooms[site.island, layers] for site, layers in zip(route, chain, strict=True))
        if cells:
            found = _plan(manifest, route, chain, cells, layer_s, round_trips_s)
            loads = sum(not stage.held for stage in found.stages)
            key = (loads, round(found.token_s * 1e9), price_of_ask(found.ask), tuple(stage.island for stage in found.stages))
            if best is None or key < best[0]:
                best = key, found
    if best is None:
        return NoPlan(Code.NO_CAPACITY, f"no capacity: the {len(chain)} shards of {manifest.name} need an Island each with room for it")
    return best[1]


def _room(manifest: ShardManifest, site: Site, layers: LayerRange, fewest: int, most: int) -> int:
    """KV cells that a stage would have there; 0 where it has no room for what is wanted."""
    free = max((held.cells_free for held in site.held if held.layers == layers), default=0)
    if free >= fewest:
        return min(most, max(fewest, free // CELLS_STEP * CELLS_STEP))
    bare = manifest.stage_bytes(layers, 0, *overheads(manifest, site, layers))
    a_cell = manifest.stage_bytes(layers, 1, 0, 0) - manifest.stage_bytes(layers, 0, 0, 0)
    cells = (site.memory_free_bytes - bare) // max(1, a_cell) // CELLS_STEP * CELLS_STEP
    return min(most, cells) if cells >= fewest else 0


def _plan(
    manifest: ShardManifest,
    route: Sequence[Site],
    chain: Sequence[LayerRange],
    cells: int,
    layer_s: Mapping[str, float],
    round_trips_s: Mapping[tuple[str, str], float],
) -> Plan:
    stages = []
    for site, layers in zip(route, chain, strict=True):
        held = [held for held in site.held if held.layers == layers and held.cells_free >= cells]
        needed = manifest.stage_bytes(layers, cells, *overheads(manifest, site, layers))
        compute_s = min((held.token_s for held in held if held.token_s), default=len(layers) * layer_s[site.island])
        stages.append(PlannedStage(site.island, site.boot, layers, site.ask, bool(held), needed, compute_s))
    wire_s = ring_delay_s([site.island for site in route], round_trips_s)
    token_s = sum(stage.compute_s for stage in stages) + wire_s
    reasons = (f"{len(chain)} stages: a ready shard each", f"{cells} cells")
    return Plan(tuple(stages), cells, token_s, wire_s, reasons)

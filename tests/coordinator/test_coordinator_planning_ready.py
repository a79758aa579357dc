"""Plans out of ready shards: one Island each, where the file is, within its memory."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.planning import Held, NoPlan, Plan, Site, overheads
from coordinator.planning_ready import plan_ready_made, ready_chain
from protocol.errors import Code
from protocol.prices import Ask
from protocol.shards import LayerRange, ShardManifest
from tests.coordinator.manifests import model

FIRST, SECOND = LayerRange(0, 5), LayerRange(5, 12)


def manifest(*ranges: LayerRange) -> ShardManifest:
    count = len(ranges)
    return model(shard_layers=ranges, shard_hashes=("cd" * 32,) * count, shard_bytes=(1,) * count, shard_urls=("",) * count)


BIG = manifest(FIRST, SECOND)


def site(name: str, memory: int = 10**9, **changes: Any) -> Site:
    return Site(**{"island": name, "boot": 1, "memory_free_bytes": memory, "ask": Ask(per_job=1), **changes})


def held(layers: LayerRange, free: int = 2048) -> Held:
    return Held(layers, free, 0, 0.01)


@pytest.mark.parametrize(
    ("ranges", "chain"),
    [
        ((FIRST, SECOND), (FIRST, SECOND)),
        ((SECOND, FIRST), (FIRST, SECOND)),
        ((FIRST,), ()),  # not all of the model
        ((LayerRange(0, 12),), ()),  # the whole is no chain
        ((LayerRange(0, 3), FIRST, SECOND), (FIRST, SECOND)),  # the longer ones
        ((FIRST, LayerRange(6, 12)), ()),  # a hole
        ((), ()),
    ],
)
def test_which_shards_are_the_whole_model(ranges: tuple[LayerRange, ...], chain: tuple[LayerRange, ...]) -> None:
    assert ready_chain(manifest(*ranges)) == chain


def ready(*sites: Site, **more: Any) -> Plan | NoPlan:
    return plan_ready_made(BIG, sites, 200, {}, **more)


def route(found: Plan | NoPlan) -> list[tuple[str, LayerRange]]:
    assert isinstance(found, Plan)
    return [(stage.island, stage.layers) for stage in found.stages]


def test_each_shard_has_an_island_and_stays_as_it_was_cut() -> None:
    assert route(ready(site("a"), site("b"))) == [("a", FIRST), ("b", SECOND)]


def test_who_does_not_have_a_file_gets_the_other_one() -> None:
    assert route(ready(site("a"), site("b"), cannot=[("a", FIRST), ("b", SECOND)])) == [("b", FIRST), ("a", SECOND)]


def test_what_is_held_is_preferred() -> None:
    found = ready(site("a"), site("b", 0, held=(held(FIRST),)), site("c"))
    assert route(found) == [("b", FIRST), ("a", SECOND)]
    assert isinstance(found, Plan) and [stage.held for stage in found.stages] == [True, False]


def test_memory_counts_to_the_byte() -> None:
    needed = BIG.stage_bytes(SECOND, 256, *overheads(BIG, site("b"), SECOND))
    small = site("a", BIG.stage_bytes(FIRST, 256, *overheads(BIG, site("a"), FIRST)))
    found = ready(small, site("b", needed))
    assert isinstance(found, Plan) and found.cells == 256
    refusal = ready(small, site("b", needed - 1))
    assert isinstance(refusal, NoPlan)


def test_refusals_name_the_layers() -> None:
    refusal = ready(site("a"), site("b"), cannot=[("a", SECOND), ("b", SECOND)])
    assert isinstance(refusal, NoPlan) and refusal.code is Code.NO_ISLAND and "nobody holds layers 5-11 of big" in refusal.message
    alone = ready(site("a"))
    assert isinstance(alone, NoPlan) and alone.code is Code.NO_CAPACITY and "2 shards of big" in alone.message
    assert isinstance(ready(site("a"), site("b", draining=True)), NoPlan)

"""Plans of pipelines: a table of networks and what must come out, and random ones against trying everything."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace as changed
from typing import Any

import pytest

from coordinator.planning import (
    CELLS_WANTED,
    Held,
    NoPlan,
    Plan,
    PlannedStage,
    Site,
    plan,
    replace,
)
from protocol import limits
from protocol.errors import Code
from protocol.prices import Ask
from protocol.shards import LayerRange, ShardManifest
from tests.coordinator.manifests import model

PROCESS_BYTES = 50
NEAR_S, FAR_S = 0.002, 0.2


BIG = model()


def room(low: int, high: int, cells: int = 256) -> int:
    """Memory of a stage of BIG, reckoned by hand."""
    first, last = low == 0, high == 12
    ends = 3_000 * first + 5_000 * last
    compute = 300 if last else 100 if first else 200
    kept = 0 if last else 2 * 4 * cells
    return 10 + ends + (high - low) * (1_000_000 + 4 * cells) + compute + kept + PROCESS_BYTES


def site(island: str, memory: int, **changes: Any) -> Site:
    plain = {"boot": 7, "memory_free_bytes": memory, "ask": Ask(), "process_bytes": PROCESS_BYTES}
    return Site(**{"island": island, **plain, **changes})


def held(low: int, high: int, free: int = 4096, **changes: Any) -> Held:
    return Held(**{"layers": LayerRange(low, high), "cells_free": free, "compute_bytes": 0, "token_s": 0.0, **changes})


def holds(island: str, *shards: Held, **changes: Any) -> Site:
    return site(island, 0, held=shards, **changes)


def planned(sites: Sequence[Site], tokens: int = 200, **changes: Any) -> Plan:
    """The plan for BIG, the same for every order of the Islands."""
    arguments = {"round_trips_s": {}, "cells_wanted": 256, **changes}
    made = plan(BIG, sites, tokens, **arguments)
    assert isinstance(made, Plan), made
    assert made == plan(BIG, sites[::-1], tokens, **arguments)
    check(BIG, sites, tokens, made)
    return made


def route(made: Plan) -> str:
    """``A:0-3 B*4-11``: the star stands for a shard that is held."""
    return " ".join(f"{stage.island}{'*' if stage.held else ':'}{stage.layers}" for stage in made.stages)


def check(manifest: ShardManifest, sites: Sequence[Site], tokens: int, made: Plan) -> None:
    """What every plan has to keep."""
    by_name = {site.island: site for site in sites}
    edges = [(stage.layers.low, stage.layers.high) for stage in made.stages]
    assert [0, *(high for _, high in edges)] == [*(low for low, _ in edges), manifest.total_layers]
    assert len({stage.island for stage in made.stages}) == len(made.stages) <= manifest.max_shards
    assert made.cells >= tokens and made.cells % 256 == 0
    for stage in made.stages:
        found = by_name[stage.island]
        assert not found.draining and stage.boot == found.boot and stage.ask == found.ask
        if stage.held:
            assert usable(found, stage.layers, tokens)
        else:
            assert stage.bytes_needed == weight(manifest, found, stage.layers, made.cells) <= found.memory_free_bytes
    assert made.token_s == pytest.approx(made.wire_s + sum(stage.compute_s for stage in made.stages))
    assert made.reasons


def usable(site: Site, layers: LayerRange, tokens: int) -> bool:
    return any(shard.layers == layers and shard.cells_free >= tokens for shard in site.held)


def weight(manifest: ShardManifest, site: Site, layers: LayerRange, cells: int) -> int:
    """Memory of a stage on an Island, with its own measure of compute buffers."""

    def kind(layers: LayerRange) -> int:
        return 2 if layers.high == manifest.total_layers else 0 if layers.low == 0 else 1

    own = max((shard.compute_bytes for shard in site.held if kind(shard.layers) == kind(layers)), default=0)
    compute = own or manifest.compute_bytes[kind(layers)]
    return manifest.stage_bytes(layers, cells, compute, site.process_bytes or manifest.process_bytes(layers))


def same(names: Sequence[str], memory: int, **changes: Any) -> list[Site]:
    return [site(name, memory, **changes) for name in names]


def near(*pairs: str) -> dict[tuple[str, str], float]:
    """Round trips: short between these pairs, long between all others."""
    names = "ABCDEFGH"
    return {(a, b): NEAR_S if a + b in pairs or b + a in pairs else FAR_S for a in names for b in names if a < b}


ROUTES: list[tuple[str, list[Site], dict[str, Any], str]] = [
    ("the whole model on one", [*same("AB", room(0, 6)), site("C", room(0, 12))], {}, "C:0-11"),
    ("the whole model, held", [site("A", room(0, 12)), holds("B", held(0, 12))], {}, "B*0-11"),
    ("two stages", same("AB", room(0, 7)), {}, "A:0-5 B:6-11"),
    ("three stages", same("ABC", room(0, 4) + 5_000), {}, "A:0-3 B:4-7 C:8-11"),
    ("five stages", same("ABCDE", room(0, 3)), {}, "A:0-2 B:3-4 C:5-7 D:8-9 E:10-11"),
    (
        "eight stages",
        [*same("ABCD", room(0, 1)), *same("EFGH", room(10, 12))],
        {},
        "A:0-0 B:1-1 C:2-2 D:3-3 E:4-5 F:6-7 G:8-9 H:10-11",
    ),
    ("fewest stages, not smallest sites", [*same("ABC", room(0, 5)), *same("DE", room(0, 7))], {}, "D:0-5 E:6-11"),
    ("exactly enough", [site("A", room(0, 5)), site("B", room(5, 12))], {}, "A:0-4 B:5-11"),
    ("exactly enough, any order", [site("B", room(0, 5)), site("A", room(5, 12))], {}, "B:0-4 A:5-11"),
    ("layers by speed", [site("A", 10**8, layer_s=0.001), site("B", room(0, 11), layer_s=0.003)], {}, "A:0-11"),
    ("and by memory", [site("A", room(0, 7), layer_s=0.001), site("B", room(0, 11), layer_s=0.1)], {}, "A:0-6 B:7-11"),
    (
        "a third as fast, a third of the layers",
        [site("A", room(0, 11), layer_s=0.001), site("B", room(0, 11), layer_s=0.003)],
        {},
        "A:0-8 B:9-11",
    ),
    (
        "unknown speed counts as the median",
        [site("A", room(0, 11), layer_s=0.002), site("B", room(0, 11))],
        {},
        "A:0-5 B:6-11",
    ),
    (
        "who is full leaves the rest to both others",
        [site("A", room(0, 1)), *same("BC", room(0, 6))],
        {},
        "A:0-0 B:1-6 C:7-11",
    ),
    ("the fast two", [site("A", room(0, 8), layer_s=0.1), *same("BC", room(0, 8), layer_s=0.01)], {}, "B:0-5 C:6-11"),
    ("the near two", same("ABC", room(0, 8)), {"round_trips_s": near("BC")}, "B:0-5 C:6-11"),
    (
        "the near two although slower",
        [site("A", room(0, 8), layer_s=0.01), *same("BC", room(0, 8), layer_s=0.012)],
        {"round_trips_s": near("BC")},
        "B:0-5 C:6-11",
    ),
    (
        "a ring along short hops",
        same("ABCD", room(0, 4)),
        {"round_trips_s": near("AC", "CB", "BD", "DA")},
        "A:0-2 C:3-5 B:6-8 D:9-11",
    ),
    (
        "unknown delay is better than a long one",
        same("ABC", room(0, 8)),
        {"round_trips_s": {("A", "B"): 0.06, ("A", "C"): 0.06}},
        "B:0-5 C:6-11",
    ),
    (
        "the larger of two measures",
        same("ABC", room(0, 8)),
        {"round_trips_s": {("A", "B"): 0.001, ("B", "A"): 0.1, ("A", "C"): 0.002, ("B", "C"): 0.01}},
        "A:0-5 C:6-11",
    ),
    ("the cheaper of equals", [site("A", room(0, 8), ask=Ask(5)), *same("BC", room(0, 8))], {}, "B:0-5 C:6-11"),
    (
        "asks only break ties",
        [*same("AB", room(0, 8), ask=Ask(5)), site("C", room(0, 8))],
        {"round_trips_s": near("AB")},
        "A:0-5 B:6-11",
    ),
    ("not one that drains", [site("A", 10**8, draining=True), *same("BC", room(0, 8))], {}, "B:0-5 C:6-11"),
    ("not one that offers nothing", [holds("A", held(3, 5, 0)), *same("BC", room(0, 8))], {}, "B:0-5 C:6-11"),
    (
        "held shards although far",
        [*same("AB", room(0, 8)), holds("C", held(0, 5)), holds("D", held(5, 12))],
        {"round_trips_s": near("AB")},
        "C*0-4 D*5-11",
    ),
    (
        "not if it takes more hops",
        [*same("AB", room(0, 8)), holds("C", held(0, 3)), holds("D", held(3, 9)), holds("E", held(9, 12))],
        {},
        "A:0-5 B:6-11",
    ),
    (
        "more hops if there is nothing else",
        [site("A", room(0, 4)), holds("C", held(0, 3)), holds("D", held(3, 7)), holds("E", held(7, 12))],
        {},
        "C*0-2 D*3-6 E*7-11",
    ),
    (
        "as few to load as can be",
        [*same("AB", room(0, 4) + 5_000), holds("C", held(3, 5)), holds("D", held(4, 8))],
        {},
        "A:0-3 D*4-7 B:8-11",
    ),
    (
        "two loaded between held ones",
        [holds("A", held(0, 2)), holds("D", held(9, 12)), *same("BC", room(2, 6))],
        {},
        "A*0-1 B:2-5 C:6-8 D*9-11",
    ),
    ("held with too few free cells", [*same("AB", room(0, 8)), holds("C", held(0, 12, 199))], {}, "A:0-5 B:6-11"),
    ("held with just enough", [*same("AB", room(0, 8)), holds("C", held(0, 12, 200))], {}, "C*0-11"),
    (
        "held and memory for another shard",
        [site("A", room(5, 12), held=(held(0, 5, 0),)), holds("B", held(0, 5))],
        {},
        "B*0-4 A:5-11",
    ),
    (
        "an Island is there once",
        [site("A", room(0, 5), held=(held(0, 5), held(5, 12))), site("B", room(5, 12))],
        {},
        "A*0-4 B:5-11",
    ),
    (
        "held shards of another cut are of no use",
        [holds("A", held(0, 20)), *same("BC", room(0, 8))],
        {},
        "B:0-5 C:6-11",
    ),
    (
        "the faster of two shards of the same layers",
        [holds("A", held(0, 6, token_s=0.02)), holds("B", held(0, 6, token_s=0.01)), holds("C", held(6, 12))],
        {},
        "B*0-5 C*6-11",
    ),
]


@pytest.mark.parametrize(("sites", "changes", "wanted"), [row[1:] for row in ROUTES], ids=[row[0] for row in ROUTES])
def test_plans(sites: list[Site], changes: dict[str, Any], wanted: str) -> None:
    assert route(planned(sites, **changes)) == wanted


def test_one_byte_too_little() -> None:
    enough = [site("A", room(0, 5)), site("B", room(5, 12))]
    assert planned(enough).cells == 256
    for short in range(2):
        sites = [changed(s, memory_free_bytes=s.memory_free_bytes - (i == short)) for i, s in enumerate(enough)]
        assert isinstance(plan(BIG, sites, 200, {}), NoPlan)
    whole = room(0, 12)
    assert len(planned([site("A", whole), site("B", whole - 1)]).stages) == 1
    assert len(planned(same("AB", whole - 1)).stages) == 2


def test_bytes_to_the_byte() -> None:
    for low, high in ((0, 3), (3, 9), (9, 12), (0, 12)):
        layers = LayerRange(low, high)
        compute = BIG.measured_compute_bytes(layers)
        assert BIG.stage_bytes(layers, 512, compute, PROCESS_BYTES) == room(low, high, 512)


def test_own_measures_count() -> None:
    """Compute buffers of a shard in the same position, and the process; else what the manifest and we suppose."""
    shard = held(0, 2, 0, compute_bytes=1_100)
    other = site("B", room(5, 12))
    assert isinstance(plan(BIG, [site("A", room(0, 5), held=(shard,)), other], 200, {}), NoPlan)
    assert route(planned([site("A", room(0, 5) + 1_000, held=(shard,)), other])) == "A:0-4 B:5-11"
    assert (
        route(planned([site("A", room(0, 5), held=(changed(shard, layers=LayerRange(1, 2)),)), other]))
        == "A:0-4 B:5-11"
    )
    unmeasured = site("A", room(0, 5) - PROCESS_BYTES + BIG.process_bytes(LayerRange(0, 5)), process_bytes=0)
    assert route(planned([unmeasured, other])) == "A:0-4 B:5-11"
    assert isinstance(
        plan(BIG, [changed(unmeasured, memory_free_bytes=unmeasured.memory_free_bytes - 1), other], 200, {}), NoPlan
    )


CELLS: list[tuple[str, int, int, int, int]] = [  # memory for so many, tokens, wanted, cells
    ("as wanted", 8192, 200, CELLS_WANTED, 4096),
    ("as many as fit", 1024, 200, CELLS_WANTED, 1024),
    ("less than a step more", 1024 + 255, 200, CELLS_WANTED, 1024),
    ("for the tokens although less is wanted", 8192, 5000, CELLS_WANTED, 5120),
    ("no more than the context", 50_000, 200, 40_000, 8192),
    ("many steps", 7424, 200, 40_000, 7424),
    ("one step", 256, 256, CELLS_WANTED, 256),
    ("wanted is rounded down", 8192, 200, 1000, 768),
    ("no tokens", 8192, 0, 0, 256),
]


@pytest.mark.parametrize(
    ("fit", "tokens", "wanted", "cells"), [row[1:] for row in CELLS], ids=[row[0] for row in CELLS]
)
def test_cells(fit: int, tokens: int, wanted: int, cells: int) -> None:
    stages = [site("A", room(0, 5, fit)), site("B", room(5, 12, fit))]
    assert planned(stages, tokens, cells_wanted=wanted).cells == cells
    assert planned([site("A", room(0, 12, fit))], tokens, cells_wanted=wanted).cells == cells


def test_held_shards_bound_the_cells() -> None:
    assert (
        planned([holds("A", held(0, 5, 1100)), site("B", room(5, 12, 4096))], cells_wanted=CELLS_WANTED).cells == 1024
    )
    assert (
        planned([holds("A", held(0, 5, 1100)), holds("B", held(5, 12, 2000))], cells_wanted=CELLS_WANTED).cells == 1024
    )


def test_of_equal_shards_the_one_with_more_free_cells() -> None:
    made = planned([holds("A", held(0, 5, 600), held(0, 5, 1100)), holds("B", held(5, 12))], cells_wanted=CELLS_WANTED)
    assert made.cells == 1024
    whole = [holds("A", held(0, 12, 600), held(0, 12, 1100))]
    assert planned(whole, cells_wanted=CELLS_WANTED).cells == 1024


def test_predictions() -> None:
    sites = [site("A", room(0, 11), layer_s=0.001), site("B", room(0, 11), layer_s=0.003)]
    made = planned(sites, round_trips_s={("B", "A"): 0.01})
    assert [stage.compute_s for stage in made.stages] == pytest.approx([0.009, 0.009])
    assert made.wire_s == pytest.approx(0.01)
    assert made.token_s == pytest.approx(0.028)
    assert planned(same("AB", room(0, 11))).wire_s == pytest.approx(0.05)
    assert planned([site("A", 10**8, layer_s=0.001)]).wire_s == 0
    # A shard that is held tells the speed of its Island.
    timed = planned([site("A", room(0, 11), held=(held(3, 6, 0, token_s=0.003),)), site("B", room(0, 11))])
    assert [stage.compute_s for stage in timed.stages] == pytest.approx([0.006, 0.006])


def test_asks_add_up() -> None:
    made = planned([site("A", room(0, 8), ask=Ask(1, 20, 300)), site("B", room(0, 8), ask=Ask(4, 50, 600))])
    assert made.ask == Ask(5, 70, 900)
    dear = planned(same("AB", room(0, 8), ask=Ask(limits.PRICE_MICROS_MAX)))
    assert dear.ask == Ask(limits.PRICE_MICROS_MAX)


def test_reasons_explain() -> None:
    sites = [*same("AB", room(0, 4, 1024) + 5_000, layer_s=0.001), holds("D", held(4, 8))]
    made = planned(sites, cells_wanted=CELLS_WANTED)
    assert made.reasons == (
        "3 stages: no two Islands were found to hold 12 MB",
        "island D already holds layers 4-7",
        "1024 cells: there is no room for 4096",
        "predicted 87 ms a token, 75 ms of it on the wire",
    )
    assert planned(same("AB", room(0, 8, 4096))).reasons == (
        "2 stages: no single Island was found to hold 12 MB",
        "predicted 50 ms a token on the wire; no Island has measured its speed",
    )
    assert planned([site("A", 10**8)]).reasons == (
        "1 stage: island A has room for the whole model",
        "no Island has measured its speed",
    )


NEEDED = room(0, 12)
REFUSALS: list[tuple[str, ShardManifest, list[Site], int, Code, str]] = [
    ("nobody", BIG, [], 200, Code.NO_ISLAND, "nobody offers memory for shards of big"),
    (
        "nobody of use",
        BIG,
        [site("A", 10**8, draining=True), site("B", 0)],
        200,
        Code.NO_ISLAND,
        "nobody offers memory for shards of big",
    ),
    (
        "all busy",
        BIG,
        [holds("A", held(0, 12, 10))],
        200,
        Code.NO_CAPACITY,
        "no capacity: the shards of big that are held are busy, and nobody offers memory for more",
    ),
    (
        "only parts are held",
        BIG,
        [holds("A", held(0, 5)), holds("B", held(6, 12))],
        200,
        Code.NO_CAPACITY,
        "no capacity: the shards of big that are held do not make up the whole model, and nobody offers memory",
    ),
    (
        "too little in sum",
        BIG,
        same("ABC", 40_000),
        200,
        Code.NO_CAPACITY,
        f"no capacity: big needs {NEEDED} bytes for 200 tokens, the 3 Islands that offer memory have together 120000",
    ),
    (
        "too little on the only one",
        BIG,
        [site("A", 40_000)],
        200,
        Code.NO_CAPACITY,
        f"no capacity: big needs {NEEDED} bytes for 200 tokens, the only Island that offers memory has 40000",
    ),
    (
        "too many stages",
        model(200),
        same([f"I{number}" for number in range(50)], 5_100_000),
        200,
        Code.NO_CAPACITY,
        "together 255000000, but no cut into at most 8 stages fits",
    ),
    (
        "one layer too large",
        model(12, layer_bytes=(*(1_000_000,) * 4, 6_000_000, *(1_000_000,) * 7)),
        same("ABCDEFGH", 4_000_000),
        200,
        Code.NO_CAPACITY,
        "32000000, but layer 4 alone needs 6003332 with its worker, and no Island has more than 4000000",
    ),
    (
        "longer than the context",
        BIG,
        same("AB", 10**8),
        8193,
        Code.CONTEXT_LENGTH,
        "8193 tokens are more than the context of big, 8192 tokens",
    ),
]


@pytest.mark.parametrize(
    ("manifest", "sites", "tokens", "code", "message"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS]
)
def test_refuses(manifest: ShardManifest, sites: list[Site], tokens: int, code: Code, message: str) -> None:
    refusal = plan(manifest, sites, tokens, {})
    assert isinstance(refusal, NoPlan) and refusal.code is code
    assert refusal.message.endswith(message)


def test_no_more_stages_than_the_manifest_allows() -> None:
    sites = same("ABC", room(0, 4) + 5_000)
    assert isinstance(plan(model(max_shards=2), sites, 200, {}), NoPlan)
    assert len(planned(sites).stages) == 3


def test_many_islands() -> None:
    """More than can be searched completely: eight stages, just enough memory, and the fast ones are far away."""
    manifest = model(64)
    memory = manifest.stage_bytes(LayerRange(0, 9), 256, 100, PROCESS_BYTES)
    sites = [site(f"I{number:02}", memory, layer_s=0.001 * (1 + number % 3)) for number in range(100)]
    round_trips_s = {(a.island, b.island): 0.02 for a in sites[:50] for b in sites[:50]}
    made = plan(manifest, sites, 200, round_trips_s)
    assert isinstance(made, Plan) and len(made.stages) == 8
    check(manifest, sites, 200, made)
    assert made == plan(manifest, random.Random(1).sample(sites, len(sites)), 200, round_trips_s)
    assert made.wire_s == pytest.approx(0.08)
    assert {stage.compute_s / len(stage.layers) for stage in made.stages} == {0.001}


def test_sizes_without_bound_do_no_harm() -> None:
    huge = 2**50
    manifest = model(1024, layer_bytes=(huge,) * 1024, kv_bytes=(huge,) * 1024)
    assert isinstance(plan(manifest, same("ABC", huge), 200, {}), NoPlan)
    assert isinstance(plan(BIG, same("ABC", 2**80), 200, {("A", "B"): float("nan"), ("B", "C"): -1.0}), Plan)
    assert isinstance(plan(model(2, kv_bytes=(0, 0), layer_bytes=(0, 0)), same("AB", 6_000), 200, {}), Plan)


# Replacing a stage


def three_stages(cells: int = 512) -> Plan:
    names = [("A", 0, 4), ("B", 4, 9), ("C", 9, 12)]
    stages = [
        PlannedStage(name, 7, LayerRange(low, high), Ask(1), True, room(low, high, cells), 0.01)
        for name, low, high in names
    ]
    return Plan(tuple(stages), cells, 0.105, 0.075, ("made before",))


@pytest.mark.parametrize("lost", range(3))
def test_replaces_with_the_same_layers(lost: int) -> None:
    old = three_stages()
    layers = old.stages[lost].layers
    exactly = room(layers.low, layers.high, 512)
    sites = [site("X", exactly, layer_s=0.001), site("Y", exactly - 1, layer_s=0.001), *same("ABC", 10**8)]
    for order in (sites, sites[::-1]):
        new = replace(BIG, old, lost, order, {("X", "A"): 0.001, ("X", "B"): 0.001, ("X", "C"): 0.001})
        assert isinstance(new, Plan)
        stage = PlannedStage("X", 7, layers, Ask(), False, exactly, 0.001 * len(layers))
        assert new.stages == (*old.stages[:lost], stage, *old.stages[lost + 1 :])
        assert new.cells == 512
        assert new.wire_s == pytest.approx(0.026)
        assert new.token_s == pytest.approx(0.046 + 0.001 * len(layers))
        assert new.reasons[0] == f"island X takes the place of {'ABC'[lost]}: it loads layers {layers}"


REPLACEMENTS: list[tuple[str, list[Site], dict[tuple[str, str], float], str]] = [
    ("who holds it", [site("X", 10**8), holds("Y", held(4, 9, 512))], {}, "Y*4-8"),
    ("who holds it with free cells", [site("X", 10**8), holds("Y", held(4, 9, 511))], {}, "X:4-8"),
    ("who is near both", [site("X", 10**8), site("Y", 10**8)], {("A", "Y"): 0.001, ("Y", "C"): 0.001}, "Y:4-8"),
    ("who is fast", [site("X", 10**8, layer_s=0.002), site("Y", 10**8, layer_s=0.001)], {}, "Y:4-8"),
    ("who is cheap", [site("X", 10**8, ask=Ask(2)), site("Y", 10**8, ask=Ask(1))], {}, "Y:4-8"),
    ("not who drains", [site("X", 10**8, draining=True), site("Y", 10**8)], {}, "Y:4-8"),
    ("not other layers", [holds("X", held(4, 10)), site("Y", 10**8)], {}, "Y:4-8"),
    ("the first by name", [site("Y", 10**8), site("X", 10**8)], {}, "X:4-8"),
]


@pytest.mark.parametrize(
    ("sites", "round_trips_s", "wanted"), [row[1:] for row in REPLACEMENTS], ids=[row[0] for row in REPLACEMENTS]
)
def test_replacements(sites: list[Site], round_trips_s: dict[tuple[str, str], float], wanted: str) -> None:
    for order in (sites, sites[::-1]):
        new = replace(BIG, three_stages(), 1, order, round_trips_s)
        assert isinstance(new, Plan) and route(new) == f"A*0-3 {wanted} C*9-11"


def test_replaces_the_only_stage() -> None:
    old = planned([site("A", room(0, 12))])
    new = replace(BIG, old, 0, [holds("B", held(0, 12))], {})
    assert isinstance(new, Plan) and route(new) == "B*0-11" and new.wire_s == 0


NO_REPLACEMENTS: list[tuple[str, list[Site], Code, str]] = [
    (
        "nobody",
        [],
        Code.NO_ISLAND,
        "nobody holds layers 4-8 of big, and nobody offers the"
        f" {room(4, 9, 512) - PROCESS_BYTES + BIG.process_bytes(LayerRange(4, 9))} bytes to load them",
    ),
    (
        "too little memory",
        [site("X", room(4, 9, 512) - 1), site("Y", 10**8, draining=True), site("A", 10**8)],
        Code.NO_ISLAND,
        f"nobody holds layers 4-8 of big, and nobody offers the {room(4, 9, 512)} bytes to load them",
    ),
    (
        "no free cells",
        [holds("X", held(4, 9, 511))],
        Code.NO_CAPACITY,
        "no capacity: no Island that holds layers 4-8 of big has 512 cells free",
    ),
]


@pytest.mark.parametrize(
    ("sites", "code", "message"), [row[1:] for row in NO_REPLACEMENTS], ids=[row[0] for row in NO_REPLACEMENTS]
)
def test_no_replacement(sites: list[Site], code: Code, message: str) -> None:
    assert replace(BIG, three_stages(), 1, sites, {}) == NoPlan(code, message)


# Random networks


def random_model(rng: random.Random) -> ShardManifest:
    layers = rng.randrange(2, 9)
    uneven = rng.random() < 0.4
    return model(
        layers,
        width=rng.choice([1, 4]),
        embedding_bytes=rng.choice([0, rng.randrange(3_000)]),
        head_bytes=rng.choice([0, rng.randrange(3_000)]),
        shared_bytes=rng.randrange(100),
        layer_bytes=tuple(rng.randrange(1, 6_000) if uneven else 1_000 for _ in range(layers)),
        kv_bytes=tuple(rng.choice([0, 1, 2]) if uneven else 1 for _ in range(layers)),
        compute_bytes=tuple(rng.randrange(600) for _ in range(3)),
        max_shards=rng.choice([2, 3, 8]),
    )


def random_site(rng: random.Random, island: str, manifest: ShardManifest, count: int) -> Site:
    total = sum(manifest.layer_bytes) + manifest.embedding_bytes + manifest.head_bytes
    memory = int(total * rng.uniform(0.5, 2.2) / count) + rng.choice([300, 2_000, 5_000])
    shards = []
    for _ in range(rng.choice([0, 0, 1, 3])):
        low = rng.randrange(manifest.total_layers)
        high = rng.randrange(low + 1, manifest.total_layers + 1)
        free, token_s = rng.choice([100, 255, 256, 700, 4096]), rng.choice([0.0, 0.001 * (high - low)])
        shards.append(held(low, high, free, compute_bytes=rng.choice([0, rng.randrange(1_000)]), token_s=token_s))
    return site(
        island,
        rng.choice([0, memory, memory, memory]),
        ask=Ask(rng.randrange(3)),
        held=tuple(shards),
        layer_s=rng.choice([0.0, 0.001, 0.002, 0.01]),
        process_bytes=rng.choice([1, 100]),
        draining=rng.random() < 0.1,
    )


def random_network(rng: random.Random, manifest: ShardManifest) -> tuple[list[Site], dict[tuple[str, str], float]]:
    names = "ABCD"[: rng.randrange(1, 5)]
    sites = [random_site(rng, name, manifest, len(names)) for name in names]
    pairs = itertools.permutations(names, 2)
    return sites, {pair: rng.choice([0.001, 0.01, 0.1]) for pair in pairs if rng.random() < 0.5}


def all_routes(
    manifest: ShardManifest, sites: Sequence[Site], stages: int, tokens: int
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Islands and number of shards to load of everything that is possible, by trying all orders and all cuts."""
    cells, total = -(-max(1, tokens) // 256) * 256, manifest.total_layers
    for order in itertools.permutations([site for site in sites if not site.draining], stages):
        for cuts in itertools.combinations(range(1, total), stages - 1):
            ranges = [LayerRange(low, high) for low, high in itertools.pairwise((0, *cuts, total))]
            loads = 0
            for at, layers in zip(order, ranges, strict=True):
                if usable(at, layers, tokens):
                    continue
                if weight(manifest, at, layers, cells) > at.memory_free_bytes:
                    break
                loads += 1
            else:
                yield tuple(at.island for at in order), loads


def best_possible(manifest: ShardManifest, sites: Sequence[Site], tokens: int) -> tuple[int, int] | None:
    """Smallest number of stages, and then of shards to load."""
    for stages in range(1, manifest.max_shards + 1):
        if loads := [loads for _, loads in all_routes(manifest, sites, stages, tokens)]:
            return stages, min(loads)
    return None


def test_random_networks_against_trying_everything() -> None:
    seen = set()
    for seed in range(800):
        rng = random.Random(seed)
        manifest = random_model(rng)
        sites, round_trips_s = random_network(rng, manifest)
        tokens, wanted = rng.choice([1, 200, 256, 300, 700]), rng.choice([256, 1024, 4096, 100_000])
        made = plan(manifest, sites, tokens, round_trips_s, wanted)
        best = best_possible(manifest, sites, tokens)
        if isinstance(made, NoPlan):
            assert best is None, f"seed {seed}: {made.message}"
            continue
        check(manifest, sites, tokens, made)
        assert best == (len(made.stages), sum(not stage.held for stage in made.stages)), f"seed {seed}"
        shuffled = rng.sample(sites, len(sites))
        assert plan(manifest, shuffled, tokens, round_trips_s, wanted) == made, f"seed {seed}"
        seen.add(best)
    assert {(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)} <= seen


def test_random_networks_of_equal_speed_get_the_shortest_ring() -> None:
    """Where all compute equally fast only the ring counts, and that of every possible route can be added up."""
    rings = 0
    for seed in range(600):
        rng = random.Random(seed)
        manifest = random_model(rng)
        sites, round_trips_s = random_network(rng, manifest)
        sites = [changed(at, held=(), layer_s=0.0) for at in sites]
        made = plan(manifest, sites, 200, round_trips_s)
        if isinstance(made, Plan) and len(made.stages) > 1:
            possible = {names for names, _ in all_routes(manifest, sites, len(made.stages), 200)}
            shortest = min(ring_s(names, round_trips_s) for names in possible)
            assert made.wire_s == pytest.approx(shortest), f"seed {seed}"
            rings += len(possible) > 1
    assert rings > 50


def ring_s(names: Sequence[str], round_trips_s: Mapping[tuple[str, str], float]) -> float:
    total = 0.0
    for one, other in itertools.pairwise((*names, names[0])):
        known = [round_trips_s[pair] / 2 for pair in ((one, other), (other, one)) if pair in round_trips_s]
        total += max(known, default=0.025)
    return total

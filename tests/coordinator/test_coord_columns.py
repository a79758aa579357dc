"""Columns against plain loops: prices to the micro-credit, scores to rounding, and rows that come, change and go."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest

from coordinator.columns import Candidate, Columns, Known
from coordinator.matching import CONSIDERED_MAX, TIE_POINTS, Choice, Refusal, Wish, choose
from coordinator.pricing import price_max
from coordinator.regions import EU, SWITZERLAND
from protocol import limits
from protocol.errors import Code
from protocol.prices import Ask
from tests.coordinator.fakes import offer
from tests.coordinator.plain_matching import HASHES, Judged, Pool, judge, pool

NOW_S = 100.0
TOP = limits.PRICE_MICROS_MAX


def priced(ask: Ask, tokens_per_s: float) -> Candidate:
    return Candidate(f"{ask}{tokens_per_s}", 1, 1, False, offer("m", ask=ask, tokens_per_s=tokens_per_s), 0, 0)


def test_prices_are_those_of_the_one_formula_without_overflow() -> None:
    rng = Random(1)
    parts = [0, 1, 999, 1000, 1001, 123_456, 10**9 + 7, 10**12, TOP - 1, TOP]
    speeds = [0.0, 1e-3, 0.1, 4.999, 33.3, 140.0, 1e7]
    asks = [Ask(rng.choice(parts), rng.choice(parts), rng.choice(parts)) for _ in range(300)]
    asks += [Ask(*(rng.randrange(10 ** rng.randrange(1, 16)) for _ in range(3))) for _ in range(300)]
    candidates = [priced(ask, rng.choice(speeds)) for ask in asks]
    facts = Columns.of("m", candidates)
    for prompt, output in [(0, 0), (0, 1), (7, 13), (4000, 4096), (10**6, 10**6), (0, 10**12)]:
        for job_s_max in (0.0005, 0.9, 1.0, 600.0, 86_400.0):
            found = facts.prices(prompt, output, job_s_max).tolist()
            assert len(found) == len(facts)
            for row, price in enumerate(found):
                it = facts.candidate(row).offer
                assert price == price_max(it.ask, prompt, output, it.tokens_per_s, job_s_max)
                assert 0 <= price <= TOP


def test_prices_without_any_time_in_them() -> None:
    facts = Columns.of("m", [priced(Ask(5, 300), 0.0), priced(Ask(7), 0.0)])
    assert facts.prices(10, 10, 600.0).tolist() == [8, 7]


def test_a_speed_that_rounds_to_nothing_has_a_price() -> None:
    facts = Columns.of("m", [priced(Ask(per_second=1000), 5e-324)])
    assert facts.prices(10, 10, 600.0).tolist() == [600_000]


def wishes(rng: Random, pool: Pool) -> Wish:
    names = [it.island for it in pool.candidates]
    some = {name: rng.randrange(20) for name in names if rng.random() < 0.1}
    return Wish(
        cargo="m",
        tokens=rng.choice((10, 500, 3000, 9000)),
        affinity=rng.choice((*names, "", "gone")),
        content_hash=rng.choice(("", "", HASHES[0])),
        engine=rng.choice(("", "", "e1", "e3")),
        context_over=rng.choice((0, 0, 0, 512, 4096)),
        excluded=some if rng.random() < 0.5 else {},
        resting=dict.fromkeys(some, rng.choice((NOW_S, NOW_S + 1))) if rng.random() < 0.5 else {},
        prompt_tokens=rng.randrange(2000),
        output_tokens=rng.randrange(2000),
        price_max_micros=rng.choice((None, None, 10**6, 60_000, 1000)),
        policy=rng.choice((None, None, EU, SWITZERLAND)),
        job_s_max=rng.choice((60.0, 600.0)),
        island=rng.choice(("", "", "", *names[:2], "gone")),
        region=rng.choice(("", "de", "us-west")),
    )


@pytest.mark.parametrize("seed", range(6))
def test_columns_choose_as_a_plain_loop_does(seed: int) -> None:
    rng = Random(seed)
    chosen = 0
    for _ in range(150):
        islands = pool(rng.choice((1, 2, 5, 30)), rng)
        facts, wish = islands.columns(), wishes(rng, islands)
        outcome, judged = choose(facts, wish, NOW_S, rng), judge(islands, wish, NOW_S)
        assert outcome.filtered == judged.filtered
        if isinstance(outcome, Refusal):
            assert not judged.considered
            assert outcome.code in (Code.NO_ISLAND, Code.NO_CAPACITY)
            continue
        chosen += 1
        check(outcome, judged)
    assert chosen > 50


def check(choice: Choice, judged: Judged) -> None:
    """The best ten, the chosen one first, with the points that the plain loop gives them."""
    scored = {one.island: one for one in judged.considered}
    best = judged.considered[0].score
    equals = sum(one.score >= best - TIE_POINTS for one in judged.considered)
    assert choice.candidate.island == choice.considered[0].island
    assert choice.score >= best - TIE_POINTS - 1e-6 and choice.ties == equals
    assert choice.price_micros == judged.prices[choice.candidate.island]
    assert len(choice.considered) == min(len(scored), CONSIDERED_MAX)
    others = [one.score for one in choice.considered[1:]]
    rest = [one.score for one in judged.considered if one.island != choice.candidate.island]
    assert others == pytest.approx(rest[: len(others)])
    for one in choice.considered:
        plain = scored[one.island]
        assert (one.score, one.speed, one.fit) == pytest.approx((plain.score, plain.speed, plain.fit))
        assert one.headroom == pytest.approx(plain.headroom) and one.level is plain.level
        assert dict(one.terms) == pytest.approx(dict(plain.terms))


def test_rows_that_come_change_and_go_leave_what_a_fresh_start_would() -> None:
    rng = Random(5)
    islands = {it.island: it for it in pool(40, rng).candidates}
    facts, there, known = Columns("m"), dict[str, Candidate](), dict[str, Known]()
    for _ in range(1500):
        name = rng.choice(list(islands))
        what = rng.random()
        if name not in there or what < 0.3:
            there[name] = replace(islands[name], sequence=rng.randrange(1, 100), busy_slots=rng.randrange(9))
            known[name] = Known(region=rng.choice(("de", "ch")), karma_milli=rng.randrange(9000))
            facts.put(there[name], known[name])
        elif what < 0.5:
            facts.drop(name)
            del there[name], known[name]
        elif what < 0.8:
            there[name] = replace(there[name], busy_slots=rng.randrange(9), busy_kv=rng.randrange(9000))
            facts.set_busy(name, there[name].busy_slots, there[name].busy_kv)
        else:
            known[name] = Known(region="us", measured_tokens_per_s=rng.uniform(1, 9), cool_until_s=5.0)
            facts.know(name, known[name])
    fresh = Columns.of("m", [there[name] for name in facts.islands], known)
    assert sorted(facts.islands) == sorted(there) and len(facts) == len(there)
    for name in there:
        assert facts.candidate(facts.row_of(name)) == there[name]
    facts.derive()
    fresh.derive()
    for column in (
        "room",
        "slots_left",
        "headroom",
        "speed",
        "measured",
        "memory_share",
        "karma_points",
        "per_1k_rest",
    ):
        assert getattr(facts, column).tolist() == getattr(fresh, column).tolist(), column
    assert facts.is_allowed(SWITZERLAND).tolist() == fresh.is_allowed(SWITZERLAND).tolist()
    assert facts.order_book() == fresh.order_book()


def test_versions_are_those_of_islands_that_stay_and_are_approved() -> None:
    """However often an Island says another one: what nobody has any more is forgotten."""
    rng, facts, there = Random(3), Columns("m"), dict[str, tuple[Candidate, bool]]()
    for _ in range(2000):
        name = rng.choice("ABCDEFGH")
        if name in there and rng.random() < 0.1:
            facts.drop(name)
            del there[name]
            continue
        content_hash = rng.choice((*HASHES, f"{rng.randrange(10**6):064x}"))
        one = replace(named(name, 1.0), offer=offer("m", content_hash=content_hash), draining=rng.random() < 0.3)
        there[name] = one, rng.random() < 0.7
        facts.put(one, Known(is_approved=there[name][1]))
        good = {name: it.offer.content_hash for name, (it, is_approved) in there.items() if is_approved and not it.draining}
        assert facts.content_hashes() == set(good.values())
        has = {HASHES[0]: facts.has_content(HASHES[0]).tolist(), content_hash: facts.has_content(content_hash).tolist()}
        for each, rows in has.items():
            assert rows == [there[island][0].offer.content_hash == each for island in facts.islands]
            assert all(facts.offers(island, each) is (good.get(island) == each) for island in "ABCDEFGH")
    assert not facts.has_content("ab" * 32).any() and len(facts._codes) < 100 and not Columns("m").content_hashes()


def test_a_claim_counts_up_to_twice_what_was_measured() -> None:
    facts = Columns.of(
        "m", [named("A", 1e7), named("B", 30.0), named("C", 0.0)], {"B": Known(measured_tokens_per_s=20)}
    )
    facts.derive()
    assert facts.speed.tolist() == [40.0, 20.0, 40.0]
    facts.know("A", Known(measured_tokens_per_s=3.0))
    facts.derive()
    assert facts.speed.tolist() == [3.0, 20.0, 20.0]


def named(name: str, tokens_per_s: float) -> Candidate:
    return Candidate(name, 1, 1, False, offer("m", tokens_per_s=tokens_per_s), 0, 0)


def test_an_unknown_round_trip_counts_as_a_typical_one() -> None:
    facts = Columns.of("m", [named(name, 1.0) for name in "ABC"])
    facts.derive()
    assert facts.round_trip_points.tolist() == [0.0, 0.0, 0.0]
    facts.set_round_trips({"A": 0.01, "B": 0.03})
    facts.put(named("D", 1.0))
    facts.derive()
    assert facts.round_trip_points.tolist() == pytest.approx([-1.0, -3.0, -2.0, -2.0])
    assert math.isnan(facts.round_trip_s[3])

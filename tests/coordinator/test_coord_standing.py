"""What a Coordinator remembers of Islands: measured speed, cooling down, karma, approval, and that it stays bounded."""

from __future__ import annotations

from random import Random

import pytest

from coordinator import standing as module
from coordinator.standing import (
    COOLING_MAX_S,
    COOLING_MIN_S,
    MEASURED_LIFETIME_S,
    MEASURED_TOKENS_MIN,
    MEASURED_TOKENS_PER_S_MAX,
    MEASURED_WEIGHT,
    Standing,
)
from protocol import limits


def test_the_first_job_replaces_the_claim_and_later_ones_are_averaged() -> None:
    standing = Standing()
    assert standing.tokens_per_s("A", "m", 0.0) == 0.0
    standing.served("A", "m", 100, 2_000_000, 0.0)
    assert standing.tokens_per_s("A", "m", 0.0) == pytest.approx(50.0)
    standing.served("A", "m", 100, 1_000_000, 1.0)
    assert standing.tokens_per_s("A", "m", 1.0) == pytest.approx(50.0 + MEASURED_WEIGHT * 50.0)
    assert standing.tokens_per_s("A", "other", 1.0) == standing.tokens_per_s("B", "m", 1.0) == 0.0


@pytest.mark.parametrize(("tokens", "decode_us"), [(0, 5), (MEASURED_TOKENS_MIN - 1, 10), (100, 0), (100, -1)])
def test_what_measures_nothing_is_not_counted(tokens: int, decode_us: int) -> None:
    standing = Standing()
    standing.served("A", "m", tokens, decode_us, 0.0)
    assert standing.tokens_per_s("A", "m", 0.0) == 0.0


def test_an_absurd_speed_is_capped() -> None:
    standing = Standing()
    standing.served("A", "m", 2**40, 1, 0.0)
    assert standing.tokens_per_s("A", "m", 0.0) == MEASURED_TOKENS_PER_S_MAX


def test_an_old_figure_is_forgotten_and_measured_anew() -> None:
    standing = Standing()
    standing.served("A", "m", 100, 100_000_000, 0.0)  # it was very busy
    assert standing.tokens_per_s("A", "m", MEASURED_LIFETIME_S - 1) == pytest.approx(1.0)
    assert standing.tokens_per_s("A", "m", MEASURED_LIFETIME_S) == 0.0
    standing.served("A", "m", 100, 1_000_000, MEASURED_LIFETIME_S)
    assert standing.tokens_per_s("A", "m", MEASURED_LIFETIME_S) == pytest.approx(100.0)


def test_cooling_doubles_to_a_cap_and_a_success_ends_it() -> None:
    standing, now_s, took_s = Standing(), 1000.0, []
    for _ in range(40):
        standing.failed("A", now_s)
        took_s.append(standing.cool_until_s("A") - now_s)
        now_s = standing.cool_until_s("A")
    assert took_s[:3] == pytest.approx([COOLING_MIN_S, 2 * COOLING_MIN_S, 4 * COOLING_MIN_S])
    assert max(took_s) == took_s[-1] == pytest.approx(COOLING_MAX_S)
    standing.served("A", "m", 1, 0, now_s)
    assert standing.cool_until_s("A") == 0.0
    standing.failed("A", now_s)
    assert standing.cool_until_s("A") - now_s == pytest.approx(COOLING_MIN_S)


def test_jobs_that_fail_together_are_one_failure() -> None:
    standing = Standing()
    for number in range(20):
        standing.failed("A", 10.0 + number * 0.01)
    assert standing.cool_until_s("A") == pytest.approx(10.0 + COOLING_MIN_S)


def test_karma_and_approval() -> None:
    standing = Standing(require_approval=True)
    assert not standing.is_approved("A") and Standing().is_approved("A")
    standing.approve("A")
    assert standing.is_approved("A") and not standing.is_approved("B")
    standing.disapprove("A")
    assert not standing.is_approved("A")
    standing.set_karma({"A": 2500, "B": -1000})
    standing.set_karma({"A": 2600})
    assert (standing.karma_milli("A"), standing.karma_milli("B"), standing.karma_milli("C")) == (2600, 0, 0)


def test_who_has_changed_is_told_once() -> None:
    standing = Standing()
    standing.served("A", "m", 100, 1_000_000, 0.0)
    standing.failed("B", 0.0)
    standing.failed("B", 0.1)
    assert standing.take_changed() == {"A", "B"} and standing.take_changed() == set()
    standing.failed("B", 0.2)  # still cooling down from before
    standing.set_karma({"C": 1, "D": 0})
    standing.approve("E")
    assert standing.take_changed() == {"C", "E"}
    standing.set_karma({"C": 1, "A": 5})
    assert standing.take_changed() == {"A"}


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STANDINGS_MAX", 3)
    standing = Standing()
    for peer in "ABCAD":
        standing.served(peer, "m", 100, 1_000_000, 0.0)
    assert [standing.tokens_per_s(peer, "m", 0.0) > 0 for peer in "ABCD"] == [True, False, True, True]
    for number in range(2 * limits.AD_OFFERS_MAX):
        standing.served("A", f"m{number}", 100, 1_000_000, 0.0)
    known = [standing.tokens_per_s("A", f"m{number}", 0.0) > 0 for number in range(2 * limits.AD_OFFERS_MAX)]
    assert sum(known) == limits.AD_OFFERS_MAX and all(known[limits.AD_OFFERS_MAX :])


def test_any_history_leaves_sane_figures() -> None:
    rng, standing, now_s = Random(3), Standing(), 0.0
    for _ in range(5000):
        now_s += rng.choice([0.0, 0.1, 10.0, 1000.0])
        peer = rng.choice("ABC")
        if rng.random() < 0.5:
            standing.served(peer, "m", rng.randrange(2**20), rng.randrange(2**20), now_s)
        else:
            standing.failed(peer, now_s)
        assert 0.0 <= standing.tokens_per_s(peer, "m", now_s) <= MEASURED_TOKENS_PER_S_MAX
        assert standing.cool_until_s(peer) <= now_s + COOLING_MAX_S

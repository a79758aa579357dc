"""What a step computes, as a table."""

from __future__ import annotations

import pytest

from runtimes.gguf.scheduler import STEP_S, STRETCH, TimeModel, Waiting, chunk_tokens, plan

LONG = [Waiting(1, 5000)]


@pytest.mark.parametrize(
    ("decode_rows", "decode_s", "prompt_token_s", "expected"),
    [
        (0, 0.007, 0.0001, 512),  # nothing runs: the whole batch
        (0, 0.007, 0.005, 70),  # a slow machine: a step of STEP_S
        (1, 0.007, 0.002, 5),  # 1.5 × 7 ms of prompt beside one answer
        (8, 0.040, 0.002, 30),
        (1, 0.001, 0.050, 1),  # prompts never starve
        (510, 0.040, 0.000001, 2),  # the batch has no more rows
        (512, 0.040, 0.001, 0),
    ],
)
def test_chunks(decode_rows: int, decode_s: float, prompt_token_s: float, expected: int) -> None:
    times = TimeModel(decode_s, prompt_token_s)
    assert chunk_tokens(decode_rows, LONG, 0, 512, times) == expected
    if decode_rows and expected > 1 and decode_rows + expected < 512:
        assert decode_s + expected * prompt_token_s <= STRETCH * decode_s + 1e-9
    if not decode_rows and expected < 512:
        assert expected * prompt_token_s <= STEP_S + 1e-9


@pytest.mark.parametrize(
    ("decode_rows", "tokens", "queued", "expected"),
    [
        (0, [50, 50], 6, 50),  # two that finish together would wait for each other
        (0, [5, 5], 0, 20),  # unless that costs next to nothing: 20 tokens are SHARED_STEP_S
        (0, [400, 30], 0, 60),  # the oldest gets its half
        (0, [400], 0, 70),  # STEP_S
        (2, [50, 50], 1, 50),  # three wait and two read: the shortest is brought to its first token
        (2, [50], 1, 3),  # as many wait as read
        (1, [100, 100], 8, 3),  # one step cannot do it
        (1, [100, 30], 8, 60),
    ],
)
def test_while_more_wait_than_read(decode_rows: int, tokens: list[int], queued: int, expected: int) -> None:
    waiting = [Waiting(key, count) for key, count in enumerate(tokens)]
    assert chunk_tokens(decode_rows, waiting, queued, 512, TimeModel(0.010, 0.005)) == expected


def test_the_oldest_gets_half_and_the_shortest_the_rest() -> None:
    times = TimeModel(0.010, 0.001)  # 15 tokens beside answers
    waiting = [Waiting(1, 1000), Waiting(2, 500), Waiting(3, 4), Waiting(4, 100)]
    assert plan(5, waiting, 512, times) == [(1, 8), (3, 4), (4, 3)]
    assert plan(5, [Waiting(1, 10), Waiting(2, 12)], 512, times) == [(1, 10), (2, 5)], "the oldest may be the shortest"


def test_several_prompts_share_one_batch_and_none_gets_more_than_it_needs() -> None:
    times = TimeModel(0.010, 0.0001)
    assert plan(0, [Waiting(1, 40), Waiting(2, 30)], 512, times) == [(1, 40), (2, 30)]
    assert plan(0, [Waiting(1, 400), Waiting(2, 30)], 512, times) == [(1, 400), (2, 30)]
    assert plan(0, [], 512, times) == []


def test_times_are_learned() -> None:
    times = TimeModel(0.007, 0.002)
    for _ in range(40):
        times.observe(8, 0, 0.040)
        times.observe(8, 10, 0.060)
        times.observe(1, 0, 0.009)
    assert times.decode_s(8) == pytest.approx(0.040, rel=0.01)
    assert times.decode_s(1) == pytest.approx(0.009, rel=0.01)
    assert times.decode_s(4) == times.decode_s(1), "an unknown count counts as the next smaller one, which is the careful side"
    assert times.prefill_token_s == pytest.approx(0.002, rel=0.02)
    times.observe(8, 10, 0.001)  # a step faster than any decode says nothing absurd
    assert times.prefill_token_s > 0


def test_prompts_of_all_ages_come_to_an_end() -> None:
    times = TimeModel(0.010, 0.002)
    left = {1: 1000, 2: 50, 3: 300}
    for _ in range(1000):
        for key, count in plan(2, [Waiting(k, n) for k, n in left.items()], 512, times):
            left[key] -= count
        left = {key: count for key, count in left.items() if count}
        if not left:
            return
    pytest.fail(f"{left} was never computed")

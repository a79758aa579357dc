"""Stages of a pipeline: whatever breaks, every row comes round as if nothing had, and nobody computes twice what it still has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from protocol import limits
from protocol.errors import Code, Refused, RemoteProtocolError
from protocol.kept_rows import KeptRows, fill_frames
from protocol.stage_messages import RowsWanted, Span, StageRows, StageTime
from protocol.stages import Action, Back, Compute, Copy, Cut, Forward, StageMachine
from tests.protocol.stage_sim import Plan, Ring, asked, forwarded, opening, ring_rows, row, rows

SEEDS, SOAK_SEEDS = 50, 2000

NO_FAULT = Plan(0, cancels=0.0)  # an engine gives up no sequence with rows under way
PLANS = {
    "none": NO_FAULT,
    "stage": Plan(0, faults=2, kinds=("stage",)),
    "engine": Plan(0, faults=3, kinds=("engine",)),
    "link": Plan(0, faults=3, kinds=("link",)),
    "driver": Plan(0, faults=2, kinds=("driver",)),
    "batch": Plan(0, faults=2, kinds=("batch",), forks=0.5),
    "doubles": Plan(0, doubles=0.2),
    "tight": Plan(0, jobs=12, slots=6, room=4, faults=2),
    "two at once": Plan(0, faults=2, kinds=("stage", "engine"), doubles=0.05),
    "a few rows at a time": Plan(0, jobs=12, slots=5, faults=5, forks=0.5, cancels=0.03, window=3),
    "everything": Plan(0, jobs=12, slots=5, faults=7, doubles=0.1, forks=0.5, cancels=0.03),
}


def ran(plan: Plan, seed: int) -> Ring:
    """A run in which every row was compared and everything came to an end, and nothing is left behind."""
    ring = Ring(dataclasses.replace(plan, seed=seed, stages=Random(seed * 7 + 1).randint(1, 7)))
    ring.run()
    for stage in ring.stages:
        machine, engine = stage.machine, stage.engine
        assert (machine.waiting, machine.computing) == (0, 0)
        for action in machine.forget_orphans():
            assert isinstance(action, Cut)
            engine.todo.append(action)
        while engine.todo:
            engine.work(ring.chance)
        assert machine.kept_bytes == 0
        assert not any(engine.cells.values())
        fill_slots(machine, plan.room or plan.slots)
    return ring


def fill_slots(machine: StageMachine, count: int) -> None:
    """So many sequences can be opened, and not one more."""
    for number in range(count):
        machine.open(opening(10_000 + number, 1), f"room {number}")
    with pytest.raises(Refused):
        machine.open(opening(20_000, 1), "too much")


def needed(ring: Ring, index: int) -> set[int]:
    """Rows of one stage that belong to answers which were given in full."""
    return {row for job in ring.finished for row in job.expected[index]}


@pytest.mark.parametrize("name", PLANS)
def test_every_row_comes_round_and_everything_ends(name: str) -> None:
    for seed in range(SEEDS):
        ran(PLANS[name], seed)


@pytest.mark.soak
@pytest.mark.parametrize("name", PLANS)
def test_every_row_comes_round_and_everything_ends_soak(name: str, record_property: Callable[[str, object], None]) -> None:
    record_property("rows_checked", sum(ran(PLANS[name], seed).rows_checked for seed in range(SOAK_SEEDS)))


def test_a_seed_is_a_run() -> None:
    first, second = (ran(PLANS["everything"], 11) for _ in range(2))
    assert (first.events, first.rows_checked) == (second.events, second.rows_checked)
    assert [stage.machine.counts for stage in first.stages] == [stage.machine.counts for stage in second.stages]


def test_without_a_fault_nothing_is_said_twice_and_each_row_is_computed_once() -> None:
    for seed in range(SEEDS):
        ring = ran(NO_FAULT, seed)
        for index, stage in enumerate(ring.stages):
            counts = stage.machine.counts
            assert (counts.rows_asked, counts.rows_filled, counts.rows_repeated, counts.rows_sent_again) == (0, 0, 0, 0)
            assert set(stage.engine.computed.values()) == {1}
            assert needed(ring, index) <= stage.engine.computed.keys()
            assert counts.rows_computed == stage.engine.computed.total()


@pytest.mark.parametrize("kind", ["stage", "link", "driver"])
def test_who_survives_computes_nothing_twice(kind: str) -> None:
    """Without forks, since a fork that is heard of only after its source has ended has rows that another sequence had."""
    survivors = 0
    for seed in range(SEEDS):
        ring = ran(dataclasses.replace(PLANS[kind], doubles=0.05, forks=0.0, cancels=0.0), seed)
        for index, stage in enumerate(ring.stages):
            if stage is ring.lives[index]:
                assert set(stage.engine.computed.values()) <= {1}
                assert needed(ring, index) <= stage.engine.computed.keys()
                survivors += 1
    assert survivors > SEEDS


@pytest.mark.parametrize("kind", ["stage", "engine", "two at once"])
def test_who_comes_anew_computes_each_row_once(kind: str) -> None:
    for seed in range(SEEDS):
        ring = ran(dataclasses.replace(PLANS[kind], forks=0.0, cancels=0.0, doubles=0.05), seed)
        for stage in ring.lives:
            assert all(set(engine.computed.values()) <= {1} for engine in stage.engines)


def test_an_engine_that_comes_back_computes_only_sequences_that_go_on() -> None:
    again = 0
    for seed in range(SEEDS):
        ring = ran(dataclasses.replace(PLANS["engine"], faults=1, forks=0.0, cancels=0.0), seed)
        for index, stage in enumerate(ring.stages):
            before, after = stage.engines[0].answered, set(stage.engines[-1].computed)
            for whole in (job.expected[index] for job in ring.finished if len(stage.engines) > 1):
                if after & before & set(whole):
                    again += 1
                    assert set(whole) <= after and not set(whole) <= before, "nobody needed these rows"
    assert again > SEEDS // 4


# ---- one stage by hand


class Hand:
    """A stage whose engine gives back what it got."""

    def __init__(self, slots: int = 4, cells: int = 256) -> None:
        self.machine = StageMachine(8, 8, slots, cells)

    def open(self, number: int, job: str = "", **more: int) -> list[Action]:
        return self.machine.open(opening(number, **more), job or f"job {number}")

    def give(self, message: StageRows) -> list[Action]:
        return self.machine.rows(message, 1000)

    def answer(self, compute: Action) -> list[Action]:
        assert isinstance(compute, Compute)
        return self.machine.computed(compute.batch, compute.rows, 7, 1500)

    def settle(self, actions: list[Action]) -> list[Action]:
        """All actions but those of the engine, which answers at once."""
        said: list[Action] = []
        left = list(actions)
        while left:
            action = left.pop(0)
            if isinstance(action, Compute):
                left += self.answer(action)
            else:
                said.append(action)
        return said


def test_the_next_row_is_computed_kept_and_passed_on() -> None:
    hand = Hand()
    assert hand.open(1) == [Forward(opening(1))]
    (compute,) = hand.give(rows(5, (1, 0, 3)))
    assert compute == Compute(1, (Span(1, 0, 3),), rows(5, (1, 0, 3)).rows)
    assert repr(hand.machine) == "<StageMachine 1 sequences, 1 frames, 1 batches computing>"
    (frame,) = forwarded(hand.answer(compute))
    assert (frame.step, frame.spans, frame.times) == (5, (Span(1, 0, 3),), (StageTime(500, 7),))
    assert frame.rows == rows(5, (1, 0, 3)).rows
    assert hand.machine.kept_bytes == 24 and hand.machine.positions() == {"job 1": 3}


def test_a_row_that_was_computed_is_passed_on_and_not_computed() -> None:
    hand = Hand()
    hand.open(1)
    hand.settle(hand.give(rows(5, (1, 0, 3))))
    (frame,) = forwarded(hand.give(rows(5, (1, 0, 3))))
    assert frame.rows == rows(5, (1, 0, 3)).rows and hand.machine.counts.rows_repeated == 3
    again, compute = hand.give(rows(6, (1, 1, 2))), hand.give(rows(7, (1, 2, 3)))
    assert forwarded(again)[0].spans == (Span(1, 1, 2),)
    assert compute == [Compute(2, (Span(1, 3, 2),), row(1, 3) + row(1, 4))]
    assert forwarded(hand.answer(compute[0]))[0].rows == row(1, 2) + row(1, 3) + row(1, 4)


def test_rows_that_are_missing_are_asked_for_once_and_others_do_not_wait() -> None:
    hand = Hand()
    hand.open(1)
    hand.open(2)
    assert asked(hand.give(rows(5, (1, 4, 1)))) == [(1, 0, 4)]
    assert hand.give(rows(5, (1, 4, 1))) == []
    assert asked(hand.give(rows(6, (1, 5, 1)))) == [(1, 4, 5)]
    assert [frame.step for frame in forwarded(hand.settle(hand.give(rows(7, (2, 0, 2)))))] == [7]
    said = hand.settle(hand.give(rows(0, (1, 0, 2), fill=True)))
    assert said == []
    said = hand.settle(hand.give(rows(0, (1, 2, 2), fill=True)))
    assert [frame.step for frame in forwarded(said)] == [5, 5, 6]
    assert hand.settle(hand.give(rows(0, (1, 0, 4), fill=True))) == []
    counts = hand.machine.counts
    assert (counts.rows_asked, counts.rows_filled, counts.rows_computed, counts.rows_repeated) == (5, 4, 8, 1)


def test_exactly_what_was_lost_is_computed_again_and_only_by_the_new_stage() -> None:
    before, new = Hand(), Hand()
    for number, count in ((1, 10), (2, 250)):
        before.open(number, declared=256)
        new.open(number, declared=256)
        before.settle(before.give(rows(number, (number, 0, count))))
    before.machine.downstream_changed()
    for number in (1, 2):
        before.open(number)
    (frame,) = forwarded(before.settle(before.give(rows(9, (1, 10, 1), (2, 250, 1)))))
    wants = asked(new.give(frame))
    assert wants == [(1, 0, 10), (2, 0, 250)]
    frames = [f for want in wants for f in forwarded(before.machine.wanted(RowsWanted(*want)))]
    (last,) = forwarded([action for fill in frames for action in new.settle(new.give(fill))])
    assert last.rows == row(1, 10) + row(2, 250)
    assert (new.machine.counts.rows_filled, new.machine.counts.rows_computed) == (260, 262)
    assert (before.machine.counts.rows_computed, before.machine.counts.rows_sent_again) == (262, 260)


def test_a_new_stage_may_be_asked_before_it_hears_of_the_sequence() -> None:
    hand = Hand()
    assert hand.machine.wanted(RowsWanted(1, 2, 4)) == hand.machine.wanted(RowsWanted(1, 4, 6)) == []
    assert asked(hand.open(1)) == [(1, 0, 6)]
    said = forwarded(hand.settle(hand.give(rows(0, (1, 0, 6), fill=True))))
    assert [(frame.spans, frame.fill) for frame in said] == [((Span(1, 2, 4),), True)]


def test_no_rows_go_to_a_new_neighbour_before_the_opening_does() -> None:
    hand = Hand()
    hand.open(1)
    (compute,) = hand.give(rows(5, (1, 0, 2)))
    hand.machine.downstream_changed()
    assert hand.answer(compute) == []
    first, second = hand.open(1)
    assert first == Forward(opening(1)) and [frame.step for frame in forwarded([second])] == [5]


def test_what_is_still_owed_is_asked_for_again_when_the_stage_before_changes() -> None:
    hand = Hand()
    hand.open(1)
    assert asked(hand.machine.wanted(RowsWanted(1, 0, 3))) == [(1, 0, 3)]
    hand.settle(hand.give(rows(0, (1, 0, 1), fill=True)))
    assert asked(hand.machine.upstream_changed()) == [(1, 1, 3)]


# ---- bad input

BAD: dict[str, tuple[Callable[[Hand], Any], str]] = {
    "rows too short": (lambda h: h.give(StageRows(1, (Span(1, 0, 2),), rows=bytes(15))), "do not make 15 bytes"),
    "rows too long": (lambda h: h.give(StageRows(1, (Span(1, 0, 2),), rows=bytes(17))), "do not make 17 bytes"),
    "no such sequence": (lambda h: h.give(rows(1, (1, 0, 1), (7, 0, 1))), "sequence 7, which is not open"),
    "behind its end": (lambda h: h.give(rows(1, (1, 31, 2))), "row 32 of a sequence that declared 32"),
    "fill behind its end": (lambda h: h.give(rows(0, (1, 32, 1), fill=True)), "row 32 of a sequence that declared 32"),
    "a hole": (lambda h: h.give(rows(0, (1, 3, 1), fill=True)), "leaves a hole behind row 0"),
    "too many stages": (
        lambda h: h.give(dataclasses.replace(rows(1, (1, 0, 1)), times=(StageTime(0, 0),) * limits.ROUTE_STAGES_MAX)),
        "has passed 8 stages",
    ),
    "wants what nobody will have": (lambda h: h.machine.wanted(RowsWanted(1, 32, 40)), "declared 32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(name: str) -> None:
    hand = Hand()
    hand.open(1)
    act, text = BAD[name]
    with pytest.raises(RemoteProtocolError, match=text):
        act(hand)
    assert hand.machine.waiting == 0 and hand.machine.kept_bytes == 0
    assert len(forwarded(hand.settle(hand.give(rows(1, (1, 0, 2)))))) == 1


def test_an_engine_that_answers_with_too_few_rows_is_a_bug() -> None:
    hand = Hand()
    hand.open(1)
    hand.give(rows(1, (1, 0, 2)))
    with pytest.raises(ValueError, match="8 bytes for 2 rows of 8"):
        hand.machine.computed(1, bytes(8), 0, 0)
    assert hand.machine.computed(99, b"", 0, 0) == []


# ---- ends, refusals, room


def test_refused_sequences_are_dropped_from_frames_without_loss_for_others() -> None:
    hand = Hand(slots=2)
    hand.open(1)
    hand.open(2)
    with pytest.raises(Refused) as refused:
        hand.open(3)
    assert refused.value.code is Code.NO_CAPACITY
    hand.machine.refuse(4)
    (frame,) = forwarded(hand.settle(hand.give(rows(1, (3, 0, 2), (1, 0, 2), (4, 5, 1), (2, 0, 1)))))
    assert frame.spans == (Span(1, 0, 2), Span(2, 0, 1)) and frame.rows == row(1, 0) + row(1, 1) + row(2, 0)
    assert hand.give(rows(2, (3, 2, 1))) == []
    assert hand.machine.wanted(RowsWanted(3, 0, 2)) == []
    hand.machine.end((2, 3, 4))
    assert hand.open(3)[-1] == Forward(opening(3))


def test_a_sequence_that_is_opened_again_after_a_refusal_goes_on() -> None:
    hand = Hand()
    hand.open(1)
    hand.machine.refuse(1)
    assert hand.give(rows(1, (1, 0, 1))) == []
    hand.open(1)
    assert len(forwarded(hand.settle(hand.give(rows(1, (1, 0, 1)))))) == 1


@pytest.mark.parametrize("is_computing", [True, False])
def test_an_end_takes_its_rows_out_of_frames_that_wait(is_computing: bool) -> None:
    hand = Hand()
    for number in (1, 2):
        hand.open(number)
    actions = hand.give(rows(1, (1, 0 if is_computing else 3, 1), (2, 0, 2)))
    ended = hand.machine.end((1,))
    said = [*ended, *(hand.answer(actions[0]) if is_computing else [])]
    (frame,) = forwarded(hand.settle(said))
    assert frame.spans == (Span(2, 0, 2),) and frame.rows == row(2, 0) + row(2, 1)
    assert Cut(0, 0) in ended and hand.machine.waiting == 0


def test_slots_are_used_again_after_their_cells_are_cut() -> None:
    hand = Hand(slots=1)
    for number in range(1, 5):
        hand.open(number)
        hand.settle(hand.give(rows(number, (number, 0, 3))))
        assert hand.machine.end((number, 99)) == [Cut(0, 0)]
        assert hand.machine.kept_bytes == 0
    assert hand.machine.end((1,)) == []


def test_orphans_make_room_oldest_first_and_go_when_nobody_comes() -> None:
    hand = Hand(slots=3, cells=40)
    for number in (1, 2, 3):
        hand.open(number, declared=10)
        hand.settle(hand.give(rows(number, (number, 0, 8))))
    hand.machine.orphan()
    assert hand.machine.kept_bytes == 3 * 64
    assert hand.open(1, "new", declared=16) == [Cut(0, 0), Forward(opening(1, 16))]
    with pytest.raises(Refused):
        hand.open(2, "too large", declared=41)
    assert hand.machine.kept_bytes == 2 * 64
    assert hand.machine.forget_orphans() == [Cut(1, 0), Cut(2, 0)]
    assert hand.machine.kept_bytes == 0 and hand.open(3, "another") and hand.open(4, "third")


# ---- another driver


def test_another_driver_goes_on_with_what_was_kept_up_to_keep() -> None:
    hand = Hand()
    hand.open(1, "mine")
    hand.settle(hand.give(rows(1, (1, 0, 8))))
    (late,) = hand.give(rows(2, (1, 8, 4)))
    hand.machine.orphan()
    assert hand.open(1, "other") == [Forward(opening(1))]
    assert hand.open(2, "mine", keep=10) == [Cut(0, 10), Forward(opening(2, keep=10))]
    assert hand.give(rows(1, (2, 0, 10))) == []
    assert forwarded(hand.answer(late))[0].rows == b"".join(row(1, p) for p in range(10))
    assert hand.machine.positions() == {"other": 0, "mine": 10}
    assert len(forwarded(hand.settle(hand.give(rows(2, (1, 0, 1), (2, 10, 1)))))) == 1
    (last,) = forwarded(hand.give(rows(3, (2, 9, 2))))
    assert last.rows == row(1, 9) + row(2, 10)
    assert hand.machine.counts.adopted == 1


def test_what_lies_behind_keep_is_forgotten_even_when_the_engine_was_lost() -> None:
    hand = Hand()
    hand.open(1, "mine")
    hand.settle(hand.give(rows(1, (1, 0, 8))))
    hand.machine.engine_lost()
    hand.machine.orphan()
    hand.machine.engine_back()
    assert hand.open(2, "mine", keep=5) == [Forward(opening(2, keep=5))]
    assert [frame.step for frame in forwarded(hand.give(rows(1, (2, 0, 5))))] == [1]
    assert asked(hand.give(rows(2, (2, 5, 1)))) == [(2, 0, 5)]


# ---- forks


def test_a_fork_copies_what_its_source_has_and_shares_what_was_kept() -> None:
    hand = Hand()
    hand.open(1)
    hand.settle(hand.give(rows(1, (1, 0, 6))))
    assert hand.open(2, source=1, shared=4)[0] == Copy(0, 1, 4)
    hand.settle(hand.give(rows(2, (2, 4, 1))))
    assert hand.machine.kept_bytes == 7 * 8
    hand.machine.end((1,))
    (frame,) = forwarded(hand.give(rows(3, (2, 2, 3))))
    assert frame.rows == row(1, 2) + row(1, 3) + row(2, 4)
    hand.machine.end((2,))
    assert hand.machine.kept_bytes == 0


def test_a_fork_whose_opening_has_overtaken_its_sources_rows_copies_later() -> None:
    hand = Hand()
    hand.open(1)
    assert hand.open(2, source=1, shared=4) == [Forward(opening(2, source=1, shared=4))]
    hand.settle(hand.give(rows(1, (1, 0, 6))))
    actions = hand.give(rows(2, (2, 4, 1)))
    assert actions == [Copy(0, 1, 4), Compute(2, (Span(2, 4, 1),), row(2, 4))]
    assert hand.machine.counts.rows_asked == 0


def test_a_fork_of_a_fork_that_waits_copies_both() -> None:
    hand = Hand()
    hand.open(1)
    hand.open(2, source=1, shared=4)
    hand.open(3, source=2, shared=3)
    hand.settle(hand.give(rows(1, (1, 0, 6))))
    assert hand.give(rows(2, (3, 3, 1)))[:2] == [Copy(0, 1, 4), Copy(1, 2, 3)]


def test_a_fork_copies_before_its_source_ends_and_gets_the_results_that_are_under_way() -> None:
    hand = Hand()
    hand.open(1)
    hand.open(2, source=1, shared=4)
    (compute,) = hand.give(rows(1, (1, 0, 6)))
    assert hand.machine.end((1,)) == [Copy(0, 1, 4), Cut(0, 0)]
    hand.answer(compute)
    (frame,) = forwarded(hand.settle(hand.give(rows(2, (2, 4, 1)))))
    assert frame.rows == row(2, 4)
    assert forwarded(hand.machine.wanted(RowsWanted(2, 0, 5)))[0].rows == b"".join(row(1, p) for p in range(4)) + row(2, 4)


def test_a_fork_outlives_its_source_and_an_engine() -> None:
    hand = Hand()
    hand.open(1)
    (compute,) = hand.give(rows(1, (1, 0, 6)))
    hand.open(2, source=1, shared=6)
    hand.machine.end((1,))
    hand.machine.engine_lost()
    assert hand.answer(compute) == []
    hand.machine.engine_back()
    assert asked(hand.give(rows(2, (2, 6, 1)))) == [(2, 0, 6)]
    (frame,) = forwarded(hand.settle(hand.give(rows(0, (2, 0, 6), fill=True))))
    assert frame.rows == row(2, 6)


def test_a_fork_of_a_lost_driver_copies_nothing_from_a_source_that_goes_on_with_other_rows() -> None:
    hand = Hand()
    hand.open(1, "source")
    hand.open(2, "fork", source=1, shared=4)
    hand.machine.orphan()
    hand.open(1, "source", keep=2)
    hand.settle(hand.give(rows(1, (1, 0, 4))))
    hand.open(2, "fork", keep=4)
    assert hand.give(rows(2, (2, 4, 1))) == [Back(RowsWanted(2, 0, 4))]


# ---- engines


def test_an_engine_that_comes_back_computes_nothing_for_rows_that_are_kept() -> None:
    hand = Hand()
    for number in (1, 2):
        hand.open(number)
        hand.settle(hand.give(rows(number, (number, 0, 5))))
    assert hand.machine.engine_lost() == []
    assert len(forwarded(hand.give(rows(1, (1, 0, 5))))) == 1
    assert hand.give(rows(3, (1, 5, 1))) == []
    assert asked(hand.machine.engine_back()) == [(1, 0, 5)]
    assert hand.machine.positions() == {"job 1": 0, "job 2": 0}


def test_fill_from_before_an_engine_was_lost_is_no_fault_of_the_stage_before() -> None:
    hand = Hand()
    hand.open(1)
    hand.settle([*hand.give(rows(1, (1, 6, 1))), *hand.give(rows(0, (1, 0, 3), fill=True))])
    hand.machine.engine_lost()
    assert asked(hand.machine.engine_back()) == [(1, 0, 6)]
    assert hand.give(rows(0, (1, 3, 3), fill=True)) == []
    (frame,) = forwarded(hand.settle(hand.give(rows(0, (1, 0, 6), fill=True))))
    assert frame.step == 1


def test_who_ends_two_engines_is_named_and_nobody_else() -> None:
    hand = Hand()
    for number in (1, 2, 3):
        hand.open(number)
    hand.settle(hand.give(rows(1, (2, 0, 1))))
    hand.give(rows(2, (1, 0, 2), (3, 0, 1)))
    for turn in range(limits.WORKERS_ENDED_PER_JOB_MAX):
        lost = hand.machine.engine_lost()
        assert lost == ([1] if turn else [])
        actions = hand.machine.engine_back()
        if not turn:
            hand.machine.end((3,))
            hand.open(4)
            assert [type(action) for action in actions] == [Compute]
    assert hand.give(rows(3, (1, 2, 1))) == []
    assert asked(hand.give(rows(4, (1, 2, 1), (2, 1, 1)))) == [(2, 0, 1)]


def test_a_step_that_is_computed_in_between_clears_a_suspect() -> None:
    hand = Hand()
    hand.open(1)
    for step in range(6):
        hand.give(rows(2 * step + 1, (1, step, 1)))
        assert hand.machine.engine_lost() == []
        actions = hand.machine.engine_back()
        if step:
            actions = hand.give(rows(0, (1, 0, step), fill=True))
        hand.settle(actions)


def test_a_batch_that_fails_takes_all_with_it_that_was_built_on_it() -> None:
    hand = Hand()
    for number in (1, 2):
        hand.open(number)
    hand.settle(hand.give(rows(1, (1, 0, 2))))
    (failing,) = hand.give(rows(2, (1, 2, 2)))
    hand.open(3, source=1, shared=4)
    hand.give(rows(3, (3, 4, 1)))
    (other,) = hand.give(rows(4, (2, 0, 1)))
    assert isinstance(failing, Compute)
    assert set(hand.machine.drop(failing.batch)) == {Cut(0, 2), Cut(2, 2)}
    assert hand.machine.positions() == {"job 1": 2, "job 2": 1, "job 3": 2}
    assert [frame.step for frame in forwarded(hand.answer(other))] == [4]
    assert hand.machine.waiting == 0 and hand.machine.drop(failing.batch) == []


def test_a_batch_that_fails_after_its_sequence_ended_harms_nobody_in_its_slot() -> None:
    hand = Hand()
    hand.open(1)
    (failing,) = hand.give(rows(1, (1, 0, 2)))
    hand.machine.end((1,))
    hand.open(2)
    hand.settle(hand.give(rows(2, (2, 0, 2))))
    assert isinstance(failing, Compute) and hand.machine.drop(failing.batch) == []


# ---- what is kept


def test_kept_rows_leave_no_hole_and_keep_what_they_have() -> None:
    kept = KeptRows(2)
    kept.put(0, b"aabb")
    kept.put(1, b"XXcc")
    kept.put(0, b"YY")
    assert (len(kept), kept.take(0, 3), kept.take(1, 2), kept.take(2, 2)) == (3, b"aabbcc", b"bb", b"")
    assert repr(kept) == "<KeptRows 3, 0 of them shared>"
    with pytest.raises(ValueError, match="a hole behind 3"):
        kept.put(4, b"ee")
    with pytest.raises(ValueError, match="3 rows are kept, not 4"):
        kept.take(0, 4)


def test_a_copy_shares_rows_that_are_still_to_come() -> None:
    parent = KeptRows(1)
    parent.put(0, b"ab")
    child = KeptRows(1, parent, 4)
    child.put(4, b"EF")
    assert len(child) == 2
    parent.put(2, b"cdefg")
    assert (len(child), child.take(1, 6), parent.take(0, 7)) == (6, b"bcdEF", b"abcdefg")
    assert KeptRows(1, parent, 0).take(0, 0) == b""


def test_a_copy_fills_what_its_source_never_got() -> None:
    parent = KeptRows(1)
    child = KeptRows(1, KeptRows(1, parent, 3), 5)
    child.put(0, b"abcdefg")
    assert (len(child), child.take(2, 7), parent.take(0, 3)) == (7, b"cdefg", b"abc")


def test_a_shorter_copy_leaves_the_rows_of_other_copies_as_they_were() -> None:
    whole = KeptRows(1)
    whole.put(0, b"abcd")
    fork, shorter = KeptRows(1, whole, 4), KeptRows(1, whole, 2)
    shorter.put(2, b"XY")
    fork.put(4, b"e")
    assert (shorter.take(0, 4), fork.take(0, 5)) == (b"abXY", b"abcde")


def test_a_long_line_of_copies_is_no_deep_recursion() -> None:
    kept = KeptRows(1)
    for length in range(3000):
        kept.put(length, bytes([length % 256]))
        kept = KeptRows(1, kept, length + 1)
    assert len(kept) == 3000 and kept.take(0, 3000) == bytes(n % 256 for n in range(3000))


def test_fill_comes_in_frames_of_a_bounded_size() -> None:
    kept = KeptRows(8)
    kept.put(0, bytes(8 * 700))
    frames = list(fill_frames(3, 10, 700, kept))
    assert [(frame.spans[0].position, frame.count) for frame in frames] == [(10, 256), (266, 256), (522, 178)]
    assert all(frame.fill and not frame.step for frame in frames)


def test_the_simulator_knows_right_from_wrong() -> None:
    found = {ring_rows(3, tokens)[-1][-1] for tokens in ([1, 2, 3, 4], [1, 3, 2, 4], [1, 2, 2, 3], [2, 3, 4], [1, 2, 4])}
    assert len(found) == 5

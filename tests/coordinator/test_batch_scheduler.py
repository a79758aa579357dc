"""Scheduling of a batch on a clock that jumps: windows, stragglers, tries, credit, failing fast, going on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from coordinator.batches.progress import BatchProgress, ItemState
from coordinator.batches.scheduler import BatchTerms
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import Job, JobState
from coordinator.orders import JobCancelled, TakenOver
from protocol import limits
from protocol.errors import Code
from tests.coordinator.batch_work import PRICE, RUN, Inputs, Lane, World, even, refused, worked

AT_HOME = {f"{RUN}.{index}.0": f"island-{index}" for index in (0, 1)}
S, F, C = ItemState.SUCCEEDED, ItemState.FAILED, ItemState.CANCELLED


def states(progress: BatchProgress) -> list[ItemState]:
    return [item.state for item in progress]


async def test_a_batch_on_islands_of_unlike_speed_ends_as_soon_as_it_can(autojump_clock: MockClock) -> None:
    """100 inputs on speeds 1, 1, 1 and 0.2: no schedule ends before 32, and a slow Island's last input must not add its 5."""
    world = World(even(1.0, 1.0, 1.0, 5.0))
    started_s = trio.current_time()
    progress = await worked(world, Inputs(100))
    assert trio.current_time() - started_s == pytest.approx(32.0)
    assert states(progress) == [S] * 100 and progress.is_over
    assert progress.stragglers > 0 and len(world.cancelled) > 0, "the last ones were sent twice"
    assert len(world.paid) == 100, "and paid once"
    assert world.served["island-3"] == 6
    assert all(item.price_micros == PRICE and item.island and item.started_ms <= item.ended_ms for item in progress)


async def test_an_island_that_stands_still_costs_one_and_a_half_inputs(autojump_clock: MockClock) -> None:
    world = World(even(1.0, 1.0), extra_s={f"{RUN}.3.0": 1000.0})
    started_s = trio.current_time()
    progress = await worked(world, Inputs(4))
    assert trio.current_time() - started_s == pytest.approx(1.0 + 1.5 + 1.0)
    assert progress.stragglers == 1 and world.cancelled == [f"{RUN}.3.0"]
    assert progress[3].job_id == f"{RUN}.3.1" and progress[3].island != "" and states(progress) == [S] * 4


async def test_a_copy_goes_to_another_island(autojump_clock: MockClock) -> None:
    inputs = Inputs(2)
    world = World(even(1.0, 5.0), homes=AT_HOME)
    progress = await worked(world, inputs)
    assert sorted(inputs.asked[:2]) == [(0, frozenset()), (1, frozenset())] and inputs.asked[2:] == [(1, frozenset({"island-1"}))]
    assert progress[1].island == "island-0"
    assert world.asked_cache == {f"{RUN}.0.0": True, f"{RUN}.1.0": True, f"{RUN}.1.1": False}, "a copy would wait there for the first one"


async def test_two_copies_that_end_together_are_paid_once(autojump_clock: MockClock) -> None:
    """One took 1.2 with settling, so the other is sent again after 1.8 and would have it at 2.8: the first had it at 2.7 and settles."""
    world = World(even(1.0, 2.7), settle_s=0.2, homes=AT_HOME)
    progress = await worked(world, Inputs(2))
    assert progress.stragglers == 1 and len(world.paid) == 2 and states(progress) == [S, S]


async def test_no_copy_where_there_is_one_island(autojump_clock: MockClock) -> None:
    world = World([Lane("only"), Lane("only")], extra_s={f"{RUN}.1.0": 50.0})
    progress = await worked(world, Inputs(2))
    assert progress.stragglers == 0 and len(world.begun) == 2


async def test_the_window_is_what_the_islands_can_do(autojump_clock: MockClock) -> None:
    for parallel, slots, most in ((None, 3, 3), (2, 3, 2), (50, 3, 3), (None, 0, 1), (None, 10_000, limits.BATCH_RUNNING_MAX)):
        world = World(even(*[1.0] * 300))
        await worked(world, Inputs(300), BatchTerms(parallel), slots=slots)
        assert world.running_max == most


async def test_while_a_result_is_paid_its_island_has_the_next_input(autojump_clock: MockClock) -> None:
    """Paying takes half as long as an input, and no Island waits for it; but no more than a second window is unpaid."""
    world, started_s = World(even(1.0, 1.0), settle_s=0.5), trio.current_time()
    await worked(world, Inputs(10))
    assert trio.current_time() - started_s == pytest.approx(5.5) and world.running_max == 2
    world = World(even(1.0, 1.0), settle_s=50.0)
    await worked(world, Inputs(10))
    assert world.holds_max == 4


async def test_copies_count_for_max_parallelism(autojump_clock: MockClock) -> None:
    world = World(even(1.0, 50.0), extra_s={f"{RUN}.1.0": 5.0})
    await worked(world, Inputs(2), BatchTerms(1))
    assert world.running_max == 1


@pytest.mark.parametrize("code", [Code.DRAINING, Code.LEASE_LOST, Code.TIMEOUT, Code.NO_CAPACITY, Code.CANCELLED, Code.BAD_TICKET])
async def test_what_passes_is_tried_again(code: Code, autojump_clock: MockClock) -> None:
    world = World(even(1.0, 1.0), faults=lambda index, attempt: refused(code) if index == 1 and attempt < 2 else None)
    progress = await worked(world, Inputs(3))
    assert states(progress) == [S] * 3 and progress[1].job_id == f"{RUN}.1.2" and progress[1].error_code == ""


async def test_but_not_for_ever(autojump_clock: MockClock) -> None:
    world = World(even(1.0), faults=lambda index, attempt: refused(Code.DRAINING) if index == 0 else None)
    progress = await worked(world, Inputs(2))
    assert states(progress) == [F, S] and progress[0].error_code == "draining"
    assert [job for job in world.begun if job.startswith(f"{RUN}.0.")] == [f"{RUN}.0.{n}" for n in range(limits.BATCH_ITEM_TRIES_MAX)]


@pytest.mark.parametrize("code", [Code.BAD_INPUT, Code.CARGO_FAILED, Code.CONTEXT_LENGTH, Code.WORKER_DIED, Code.LINK_LOST, Code.NO_ISLAND])
async def test_what_the_input_is_at_fault_for_is_not_tried_again(code: Code, autojump_clock: MockClock) -> None:
    world = World(even(1.0, 1.0), faults=lambda index, attempt: refused(code) if index == 1 else None)
    progress = await worked(world, Inputs(3))
    assert states(progress) == [S, F, S] and len(world.begun) == 3
    assert (progress[1].error_code, progress[1].error_message) == (code.value, "as the test wants it")


async def test_an_input_that_can_never_run(autojump_clock: MockClock) -> None:
    world = World(even(1.0))
    progress = await worked(world, Inputs(3, frozenset({1})))
    assert states(progress) == [S, F, S] and progress[1].error_code == "invalid_value" and len(world.begun) == 2


@pytest.mark.parametrize(
    ("fault", "state"), [(refused(Code.BAD_INPUT), F), (JobCancelled(), C), (BooksRefused(Why.NO_ACCOUNT, "gone"), F)]
)
async def test_fail_fast_cancels_the_rest(fault: Exception, state: ItemState, autojump_clock: MockClock) -> None:
    world = World(even(1.0, 3.0), faults=lambda index, attempt: fault if index == 2 else None, homes=AT_HOME)
    progress = await worked(world, Inputs(9), BatchTerms(fail_fast=True))
    assert states(progress) == [S, C, state, *[C] * 6] and world.cancelled == [f"{RUN}.1.0"]
    assert progress[2].error_code and not progress[3].error_code, "what was cancelled has no error of its own"


async def test_a_batch_that_has_failed_elsewhere_does_not_begin_again(autojump_clock: MockClock) -> None:
    progress = BatchProgress(RUN, 3)
    progress.fail(1, "bad_input", "no", 1)
    world = World(even(1.0))
    assert states(await worked(world, Inputs(3), BatchTerms(fail_fast=True), progress)) == [C, F, C] and not world.begun


def purse(credit: int, world: World) -> Callable[[], Exception | None]:
    """As the books: no hold for one more while ``credit`` jobs have theirs. Whoever asks all the time is found out."""
    return lambda: BooksRefused(Why.NO_CREDIT, "no credit") if world.holds >= credit else None


async def test_credit_for_some_at_a_time_is_enough(autojump_clock: MockClock) -> None:
    world = World(even(1.0, 1.0, 1.0, 1.0))
    world.purse = purse(2, world)
    with trio.fail_after(100):
        progress = await worked(world, Inputs(12))
    assert states(progress) == [S] * 12 and world.holds_max == 2
    assert len(world.begun) <= 12 * 3, "it is asked again when a hold was released, and not all the time"


async def test_no_credit_at_all_fails_each_and_loses_none(autojump_clock: MockClock) -> None:
    world = World(even(1.0, 1.0, 1.0, 1.0))
    world.purse = purse(0, world)
    progress = await worked(world, Inputs(6))
    assert states(progress) == [F] * 6 and {item.error_code for item in progress} == {"insufficient_credits"}
    assert len(world.begun) <= 6 * 4


@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        (BooksUnavailable("away"), BooksUnavailable),
        (TakenOver(), BooksRefused),
        (BooksRefused(Why.NOT_OWNER, "another's"), BooksRefused),
    ],
)
async def test_what_ends_the_work_here_leaves_the_rest_as_it_was(
    fault: Exception, raised: type[Exception], autojump_clock: MockClock
) -> None:
    world = World(even(1.0, 1.5), faults=lambda index, attempt: fault if index == 2 else None)
    progress = BatchProgress(RUN, 6)
    with pytest.raises(raised):
        await worked(world, Inputs(6), progress=progress)
    assert states(progress)[:2] == [S, S] and not progress.is_over and not any(item.error_code for item in progress)


async def test_it_goes_on_where_another_coordinator_was(autojump_clock: MockClock) -> None:
    """What the books say of each input: done, lost, left, failed for good, cancelled by its account, tried in vain, nothing."""
    jobs = [
        job(0, 0, JobState.SUCCEEDED, price_micros=PRICE, island="island-9"),
        job(1, 0, JobState.FAILED, error_code="coordinator_lost"),
        job(2, 0, JobState.CANCELLED, error_code="cancelled"),
        job(3, 0, JobState.FAILED, error_code="cargo_failed", error_message="no such column"),
        job(4, 0, JobState.CANCELLED, error_code="cancelled", cancel_wanted=True),
        *[job(5, attempt, JobState.FAILED, error_code="draining") for attempt in range(limits.BATCH_ITEM_TRIES_MAX)],
        job(7, 0, JobState.CANCELLED, error_code="cancelled"),
        job(7, 1, JobState.SUCCEEDED, price_micros=PRICE),
        job(99, 0, JobState.SUCCEEDED),
        Job("another.0.0", "ann", "echo", "job", JobState.SUCCEEDED, 0, 0, "", "", 0, 1),
    ]
    progress = BatchProgress.of_jobs(RUN, 8, jobs)
    assert states(progress) == [S, ItemState.PENDING, ItemState.PENDING, F, C, F, ItemState.PENDING, S]
    world = World(even(1.0))
    await worked(world, Inputs(8), progress=progress)
    assert world.begun == [f"{RUN}.1.1", f"{RUN}.2.1", f"{RUN}.6.0"]
    assert states(progress) == [S, S, S, F, C, F, S, S]
    assert progress[7].job_id == f"{RUN}.7.1" and progress[0].island == "island-9" and progress[3].error_message == "no such column"


async def test_an_input_that_ends_every_coordinator_is_given_up(autojump_clock: MockClock) -> None:
    lost = [job(0, attempt, JobState.FAILED, error_code="coordinator_lost") for attempt in range(limits.BATCH_ITEM_ATTEMPTS_MAX)]
    assert states(BatchProgress.of_jobs(RUN, 1, lost[:-1])) == [ItemState.PENDING]
    assert states(BatchProgress.of_jobs(RUN, 1, lost)) == [F]


def test_a_batch_that_runs_elsewhere_shows_that() -> None:
    progress = BatchProgress.of_jobs(RUN, 2, [job(0, 0, JobState.SUBMITTED)])
    assert states(progress) == [ItemState.RUNNING, ItemState.PENDING] and progress.counts[ItemState.RUNNING] == 1


async def test_changes_ring_the_bell(autojump_clock: MockClock) -> None:
    progress = BatchProgress(RUN, 2)
    seen: list[int] = []

    async def look() -> None:
        while not progress.is_over:
            await progress.bell.wait()
            seen.append(progress.ended)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await worked(World(even(1.0)), Inputs(2), progress=progress)
    assert seen[-1] == 2 and sorted(seen) == seen and progress.version >= 4
    assert repr(progress) == "<BatchProgress 2 of 2 ended, 0 running>"


def job(index: int, attempt: int, state: JobState, **changes: object) -> Job:
    plain = {
        "id": f"{RUN}.{index}.{attempt}",
        "account": "ann",
        "cargo": "echo",
        "kind": "job",
        "state": state,
        "priority": 0,
        "bid_micros": 1,
        "bid_source": "market",
        "owner": "c",
        "owner_boot": 1,
        "created_at_ms": 1,
        "parent": RUN,
    }
    return Job(**{**plain, **changes})  # type: ignore[arg-type]

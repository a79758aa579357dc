"""Runs of workflows without a Coordinator: when steps begin, what failures do, and how a run goes on after its Coordinator has gone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import JobState
from coordinator.books.runs import RunState
from coordinator.orders import Order, TakenOver
from coordinator.runs.board import RunResult
from protocol import limits
from protocol.errors import Code, Refused
from tests.coordinator.workflows.flow_fakes import PRICE, FakeContext, context, echo, prompt_of, runner, states, step

DIAMOND = (
    step("a", "{{ input.text }}"),
    step("b", "b {{ a.output.text }}"),
    step("c", "c {{ a.output.text }}"),
    step("d", "{{ b.output.text }} and {{ c.output.text }}"),
)


async def ran(where: FakeContext) -> RunResult:
    async with runner() as one:
        return await one.run(where)  # type: ignore[arg-type]


async def test_what_steps_say_goes_into_those_that_need_them(autojump_clock: trio.testing.MockClock) -> None:
    where = context(*DIAMOND, given={"text": "hello"}, output={"said": "{{ d.output.text }}"})
    result = await ran(where)
    assert result.state is RunState.SUCCEEDED and result.value["output"] == {"said": "b hello and c hello"}
    assert sorted(where.names) == ["a.0.1", "b.0.1", "c.0.1", "d.0.1"] and where.names[0] == "a.0.1" and where.names[-1] == "d.0.1"


async def test_steps_begin_as_soon_as_their_needs_are_met(autojump_clock: trio.testing.MockClock) -> None:
    took = {"a": 1.0, "b": 5.0, "c": 1.0, "d": 1.0, "e": 1.0}

    async def do(order: Order) -> str:
        await trio.sleep(took[prompt_of(order)])
        return "x"

    steps = (
        step("a", "a"),
        step("b", "b", depends_on=["a"]),
        step("c", "c", depends_on=["a"]),
        step("d", "d", depends_on=["c"]),
        step("e", "e", depends_on=["b", "d"]),
    )
    where = context(*steps, do=do)
    began_s = trio.current_time()
    assert (await ran(where)).state is RunState.SUCCEEDED
    assert sorted((name[0], round(at_s - began_s)) for name, at_s in where.began) == [("a", 0), ("b", 1), ("c", 1), ("d", 2), ("e", 6)]


async def test_so_many_at_once_and_no_more(autojump_clock: trio.testing.MockClock) -> None:
    async def do(order: Order) -> str:
        await trio.sleep(1.0)
        return prompt_of(order)

    many = step("many", "{{ item }}", for_each="{{ input }}", max_items=200)
    where = context(many, do=do, given=[f"item {n}" for n in range(150)])
    began_s = trio.current_time()
    assert (await ran(where)).state is RunState.SUCCEEDED
    assert where.running_max == limits.FLOW_PARALLEL_MAX and round(trio.current_time() - began_s) == 3
    assert len({name for name in where.names}) == 150


def failing(times: dict[str, int], code: Code = Code.LINK_LOST) -> Any:
    """Each prompt fails so often before it is answered."""

    async def do(order: Order) -> str:
        prompt = prompt_of(order)
        if times.get(prompt, 0) > 0:
            times[prompt] -= 1
            raise Refused(code, "as the test wants it")
        return prompt

    return do


async def test_failures_are_tried_again_with_growing_pauses(autojump_clock: trio.testing.MockClock) -> None:
    retry = {"max_attempts": 4, "backoff_s": 10.0, "factor": 3.0, "jitter": 0.0}
    where = context(step("a", "x", retry=retry), do=failing({"x": 3}))
    assert (await ran(where)).state is RunState.SUCCEEDED
    began = [round(at_s - where.began[0][1]) for _, at_s in where.began]
    assert began == [0, 10, 40, 100] and where.names == ["a.0.1", "a.0.2", "a.0.3", "a.0.4"]


async def test_jitter_takes_some_of_a_pause_the_same_each_time(autojump_clock: trio.testing.MockClock) -> None:
    pauses = []
    for _ in range(2):
        where = context(step("a", "x", retry={"max_attempts": 2, "backoff_s": 10.0, "jitter": 0.5}), do=failing({"x": 1}))
        await ran(where)
        pauses.append(where.began[1][1] - where.began[0][1])
    assert 5.0 <= pauses[0] <= 10.0 and pauses[0] == pytest.approx(pauses[1])


async def test_while_one_rests_others_run(autojump_clock: trio.testing.MockClock) -> None:
    retry = {"max_attempts": 2, "backoff_s": 100.0, "jitter": 0.0}
    where = context(step("a", "x", retry=retry), step("b", "y"), step("c", "z {{ b.output.text }}"), do=failing({"x": 1}))
    await ran(where)
    assert sorted(where.names[:2]) == ["a.0.1", "b.0.1"] and where.names[2:] == ["c.0.1", "a.0.2"]


async def test_a_bad_input_is_not_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    retry = {"max_attempts": 5}
    where = context(step("a", "x", retry=retry), do=failing({"x": 9}, Code.BAD_INPUT))
    result = await ran(where)
    assert where.names == ["a.0.1"] and (result.state, result.error_code) == (RunState.FAILED, "bad_input")
    where = context(step("a", "{{ input.nothing }}", retry=retry), given={})
    result = await ran(where)
    assert where.names == [] and result.error_code == "bad_value" and "input.nothing" in result.error_message
    where = context({"key": "a", "cargo": "echo", "input": {"prompt": "x", "messages": []}, "retry": retry})
    result = await ran(where)
    assert where.names == [] and result.state is RunState.FAILED


async def test_a_step_that_takes_too_long(autojump_clock: trio.testing.MockClock) -> None:
    async def do(order: Order) -> str:
        await trio.sleep(0.0 if prompt_of(order) == "from b" else 100.0)
        return "late"

    retry = {"max_attempts": 2, "backoff_s": 1.0, "jitter": 0.0}
    where = context(step("a", timeout_s=2.0, on_failure="skip", retry=retry), step("b"), do=do)
    result = await ran(where)
    assert result.state is RunState.SUCCEEDED and states(result)["a"] == "skipped"
    assert sorted(where.names) == ["a.0.1", "a.0.2", "b.0.1"]
    where = context(step("a", timeout_s=2.0), do=do)
    result = await ran(where)
    assert (result.state, result.error_code) == (RunState.FAILED, "timeout") and "2 s" in result.error_message
    assert where.rows["wf_1.a.0.1"].state is JobState.CANCELLED


async def test_what_was_paid_at_the_very_end_of_its_time_counts(autojump_clock: trio.testing.MockClock) -> None:
    """The job was settled while its step's time ran out: it is not done a second time."""

    class Late(FakeContext):
        async def job(self, order: Order) -> Any:
            with trio.CancelScope(shield=True):
                await super().job(order)
            await trio.sleep(0)
            raise AssertionError("it was cancelled")

    async def do(order: Order) -> str:
        await trio.sleep(3.0)
        return "just in time"

    plain = context(step("a", timeout_s=2.0, retry={"max_attempts": 3}), do=do)
    where = Late(plain.run, plain.spec, do)
    result = await ran(where)
    assert result.state is RunState.SUCCEEDED and where.names == ["a.0.1"]


@pytest.mark.parametrize("fail_mode", ["fail_fast", "best_effort"])
async def test_fail_modes(fail_mode: str, autojump_clock: trio.testing.MockClock) -> None:
    async def do(order: Order) -> str:
        prompt = prompt_of(order)
        await trio.sleep({"bad": 1.0}.get(prompt, 5.0))
        if prompt == "bad":
            raise Refused(Code.CARGO_FAILED, "as the test wants it")
        return prompt

    steps = (step("a", "bad"), step("b", "good"), step("c", "after", depends_on=["a"]), step("d", "later", depends_on=["b"]))
    where = context(*steps, do=do, fail_mode=fail_mode)
    result = await ran(where)
    assert (result.state, result.error_code) == (RunState.FAILED, "cargo_failed") and result.error_message.startswith("step a: ")
    if fail_mode == "fail_fast":
        assert states(result) == {"a": "failed", "b": "cancelled", "c": "blocked", "d": "cancelled"}
        assert where.rows["wf_1.b.0.1"].state is JobState.CANCELLED and not result.value["partial"]
    else:
        assert states(result) == {"a": "failed", "b": "succeeded", "c": "blocked", "d": "succeeded"} and result.value["partial"]


async def test_abort_ends_a_run_whatever_its_mode(autojump_clock: trio.testing.MockClock) -> None:
    where = context(step("a", "x", on_failure="abort"), step("b", "b", depends_on=["a"]), do=failing({"x": 1}), fail_mode="best_effort")
    result = await ran(where)
    assert result.state is RunState.FAILED and where.names == ["a.0.1"]


async def test_conditions_and_skips() -> None:
    steps = (
        step("a", "yes"),
        step("b", "never", when="{{ a.output.text == 'no' }}"),
        step("c", "c {{ b.state }}", depends_on=["b"]),
        step("d", "bad", on_failure="skip"),
        step("e", "e {{ d.state }} {{ d.error.code }}"),
    )
    result = await ran(where := context(*steps, do=failing({"bad": 9})))
    assert result.state is RunState.SUCCEEDED
    assert states(result) == {"a": "succeeded", "b": "skipped", "c": "succeeded", "d": "skipped", "e": "succeeded"}
    said = {name: events[1].text for name, events in where.said.items()}  # type: ignore[union-attr]
    assert said["wf_1.c.0.1"] == "c skipped" and said["wf_1.e.0.1"] == "e skipped link_lost"


async def test_fan_out_and_join_with_an_item_that_fails() -> None:
    steps = (
        step("each", "{{ item }}", for_each="{{ input }}", on_failure="skip"),
        step("join", "{% for o in each.outputs %}{{ o.text if o else '-' }},{% endfor %}"),
    )
    result = await ran(where := context(*steps, given=["one", "two", "three"], do=failing({"two": 9})))
    assert result.state is RunState.SUCCEEDED and where.said["wf_1.join.0.1"][1].text == "one,-,three,"  # type: ignore[union-attr]
    result = await ran(context(steps[0] | {"on_failure": None}, steps[1], given=["one", "two"], do=failing({"two": 9})))
    assert result.state is RunState.FAILED and states(result)["join"] == "blocked"
    result = await ran(where := context(steps[0], step("join", "all: {{ each.outputs | length }}"), given=[]))
    assert result.state is RunState.SUCCEEDED and where.said["wf_1.join.0.1"][1].text == "all: 0"  # type: ignore[union-attr]


async def test_no_credit_fails_a_step(autojump_clock: trio.testing.MockClock) -> None:
    class Poor(FakeContext):
        async def job(self, order: Order) -> Any:
            raise BooksRefused(Why.NO_CREDIT, "the account has nothing")

    plain = context(step("a"))
    result = await ran(Poor(plain.run, plain.spec))
    assert (result.state, result.error_code) == (RunState.FAILED, "insufficient_credits")


async def test_a_run_costs_no_more_than_it_may(autojump_clock: trio.testing.MockClock) -> None:
    steps = [step(f"s{n}", depends_on=[f"s{n - 1}"] if n else []) for n in range(4)]
    bids: list[int | None] = []

    async def do(order: Order) -> str:
        bids.append(order.bid_micros)
        return "x"

    where = context(*steps, do=do, spec={"max_price_micros": 2 * PRICE + PRICE // 2})
    result = await ran(where)
    assert bids == [PRICE, PRICE, PRICE // 2] and where.names == ["s0.0.1", "s1.0.1", "s2.0.1"]
    assert (result.error_code, states(result)["s3"]) == ("over_max_price", "failed")


# ---- going on after a crash


async def killed(where: FakeContext, after_s: float) -> None:
    """The Coordinator is gone after so long: nothing that it does then gets anywhere."""
    rows = where.rows
    with trio.move_on_after(after_s) as scope:
        await ran(where)
    assert scope.cancelled_caught, "it had ended"
    for job in list(rows.values()):  # it could not write that it had cancelled them
        if job.state is JobState.CANCELLED:
            rows[job.id] = replace(job, state=JobState.SUBMITTED, error_code="")


async def slow(order: Order) -> str:
    await trio.sleep(1.0)
    return prompt_of(order)


async def test_finished_steps_are_not_done_again(autojump_clock: trio.testing.MockClock) -> None:
    where = context(*DIAMOND, given={"text": "hello"}, do=slow, output={"said": "{{ d.output.text }}"})
    await killed(where, 1.5)
    assert sorted(where.names) == ["a.0.1", "b.0.1", "c.0.1"]
    again = where.next()
    result = await ran(again)
    assert result.state is RunState.SUCCEEDED and result.value["output"] == {"said": "b hello and c hello"}
    assert sorted(again.names[3:]) == ["b.0.2", "c.0.2", "d.0.1"]


async def test_what_was_lost_counts_as_no_try(autojump_clock: trio.testing.MockClock) -> None:
    """Three Coordinators go down under a step that may be tried twice; then it fails once, and is tried again."""
    where = context(step("a", "x", retry={"max_attempts": 2, "backoff_s": 0.0}), do=slow)
    for _ in range(3):
        await killed(where, 0.5)
        where = where.next()
    where.do = failing({"x": 1})
    assert (await ran(where)).state is RunState.SUCCEEDED
    assert where.names == [f"a.0.{n}" for n in range(1, 6)]


async def test_failures_before_the_crash_count(autojump_clock: trio.testing.MockClock) -> None:
    times = {"x": 9}
    bad = failing(times)

    async def do(order: Order) -> str:
        await trio.sleep(1.0)
        return str(await bad(order))

    where = context(step("a", "x", retry={"max_attempts": 3, "backoff_s": 10.0, "jitter": 0.0, "factor": 1.0}), do=do)
    await killed(where, 13.0)
    assert where.names == ["a.0.1", "a.0.2"] and where.rows["wf_1.a.0.2"].state is JobState.FAILED
    before_s = trio.current_time()
    again = where.next()
    result = await ran(again)
    assert result.state is RunState.FAILED and again.names == ["a.0.1", "a.0.2", "a.0.3"]
    assert 8.0 < again.began[-1][1] - before_s < 10.0, "the pause goes on from when it failed"


async def test_a_timeout_before_the_crash_counts(autojump_clock: trio.testing.MockClock) -> None:
    async def do(order: Order) -> str:
        await trio.sleep(100.0 if prompt_of(order) == "x" else 3.5)
        return "x"

    steps = step("a", "x", timeout_s=2.0, retry={"max_attempts": 2, "backoff_s": 60.0}), step("b", "y")
    where = context(*steps, do=do)
    with trio.move_on_after(3.0):
        await ran(where)
    again = where.next()
    result = await ran(again)
    assert (result.state, result.error_code) == (RunState.FAILED, "timeout")
    assert [name for name in again.names if name.startswith("a")] == ["a.0.1", "a.0.2"]


async def test_a_run_that_had_failed_begins_nothing_more(autojump_clock: trio.testing.MockClock) -> None:
    """Killed between the failure and the run's end in the books; what had succeeded beside it is still there."""
    steps = step("a", "good"), step("b", "bad", depends_on=["a"]), step("c", "c", depends_on=["a"]), step("d", "d", depends_on=["c"])
    where = context(*steps, do=failing({"bad": 1}))
    first = await ran(where)
    assert first.state is RunState.FAILED
    again = where.next(echo)
    result = await ran(again)
    assert again.names == where.names and (result.state, result.error_code) == (RunState.FAILED, "link_lost")
    assert states(result)["a"] == "succeeded" and states(result)["b"] == "failed"


async def test_an_output_that_is_gone_fails_the_run(autojump_clock: trio.testing.MockClock) -> None:
    where = context(*DIAMOND, given={"text": "hello"}, do=slow)
    await killed(where, 1.5)
    del where.said["wf_1.a.0.1"]
    again = where.next()
    result = await ran(again)
    assert (result.state, result.error_code) == (RunState.FAILED, "output_expired") and "step a" in result.error_message
    assert len(again.names) == 3, "nothing is done again"


async def test_plans_are_made_again_on_the_way_to_what_is_done() -> None:
    """A condition, an item's own condition and a template that fails have no jobs; what comes behind them is found all the same."""
    hangs = trio.Event()

    async def do(order: Order) -> str:
        if prompt_of(order) == "end":
            hangs.set()
            await trio.sleep_forever()
        return prompt_of(order)

    steps = (
        step("a", "one two"),
        step("b", "never", when="{{ a.output.text == 'no' }}"),
        step("c", "{{ item }}", for_each="{{ input.list }}", when="{{ item != 'two' }}", depends_on=["b"]),
        step("d", "{{ input.nothing }}", on_failure="skip", depends_on=["c"]),
        step("e", "last {{ d.state }}"),
        step("f", "end", depends_on=["e"]),
    )
    where = context(*steps, given={"list": ["one", "two", "three"]}, do=do)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(killed, where, 3600.0)
        await hangs.wait()
        nursery.cancel_scope.cancel()
    assert sorted(where.names) == ["a.0.1", "c.0.1", "c.2.1", "e.0.1", "f.0.1"]
    again = where.next(echo)
    result = await ran(again)
    assert result.state is RunState.SUCCEEDED and again.names[5:] == ["f.0.2"]
    assert [each[0] for each in result.value["steps"][2][3]] == ["succeeded", "skipped", "succeeded"]


async def test_without_the_books_a_run_is_left_once_what_runs_has_ended(autojump_clock: trio.testing.MockClock) -> None:
    class Away(FakeContext):
        async def job(self, order: Order) -> Any:
            if prompt_of(order) == "away":
                await trio.sleep(1.0)
                raise BooksUnavailable("as the test wants it")
            return await super().job(order)

    plain = context(step("a", "away"), step("b", "long"), step("c", "c", depends_on=["b"]), do=slow)

    async def do(order: Order) -> str:
        await trio.sleep(5.0)
        return "x"

    where = Away(plain.run, plain.spec, do)
    with pytest.raises(BooksUnavailable):
        await ran(where)
    assert where.names == ["b.0.1"] and where.rows["wf_1.b.0.1"].state is JobState.SUCCEEDED
    again = where.next(echo)
    assert (await ran(again)).state is RunState.SUCCEEDED and sorted(again.names) == ["a.0.1", "b.0.1", "c.0.1"]


async def test_a_run_that_is_anothers_now_is_left(autojump_clock: trio.testing.MockClock) -> None:
    class Lost(FakeContext):
        async def job(self, order: Order) -> Any:
            if prompt_of(order) == "lost":
                raise TakenOver
            return await super().job(order)

    plain = context(step("a", "lost"), step("b", "long"), do=slow)
    where = Lost(plain.run, plain.spec, slow)
    with pytest.raises(BooksRefused) as refused:
        await ran(where)
    assert refused.value.why is Why.NOT_OWNER and where.rows["wf_1.b.0.1"].state is JobState.CANCELLED


async def test_cancelled_runs_keep_what_they_had(autojump_clock: trio.testing.MockClock) -> None:
    where = context(*DIAMOND, given={"text": "hello"}, do=slow)
    async with runner() as one:
        with trio.move_on_after(1.5):
            await one.run(where)  # type: ignore[arg-type]
        result = await one.cancelled(where)  # type: ignore[arg-type]
        assert not one.live
    assert result.state is RunState.CANCELLED
    assert states(result) == {"a": "succeeded", "b": "cancelled", "c": "cancelled", "d": "cancelled"} and result.value["partial"]


async def test_cancelled_before_it_was_begun_again(autojump_clock: trio.testing.MockClock) -> None:
    where = context(*DIAMOND, given={"text": "hello"}, do=slow)
    await killed(where, 1.5)
    again = where.next()
    async with runner() as one:
        result = await one.cancelled(again)  # type: ignore[arg-type]
    assert states(result) == {"a": "succeeded", "b": "cancelled", "c": "cancelled", "d": "cancelled"}


async def test_a_bug_ends_the_run_alone(autojump_clock: trio.testing.MockClock) -> None:
    async def do(order: Order) -> str:
        raise ZeroDivisionError

    with pytest.raises(BaseExceptionGroup):
        await ran(context(step("a"), do=do))


async def test_a_specification_of_another_version_fails(autojump_clock: trio.testing.MockClock) -> None:
    where = context(step("a"))
    where.spec = b'{"version":99}'
    result = await ran(where)
    assert (result.state, result.error_code) == (RunState.FAILED, "bad_definition")


# ---- random graphs


def random_steps(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Edges go from earlier steps to later ones; some fan out, have conditions, are tried again or skipped."""
    made: list[dict[str, Any]] = []
    for number in range(count):
        needs = rng.sample([one["key"] for one in made], min(len(made), rng.randint(0, 3)))
        one = step(f"s{number}", f"s{number} " + " ".join(f"{{{{ {key}.state }}}}" for key in needs))
        if rng.random() < 0.3:
            one |= {"for_each": [f"i{n}" for n in range(rng.randint(0, 4))], "input": {"prompt": one["input"]["prompt"] + " {{ item }}"}}
        if needs and rng.random() < 0.2:
            one["when"] = f"{{{{ {needs[0]}.state }}}}" if rng.random() < 0.5 else False
        if rng.random() < 0.4:
            one["retry"] = {"max_attempts": rng.randint(2, 4), "backoff_s": rng.choice([0.0, 0.5, 2.0])}
        if rng.random() < 0.5:
            one["on_failure"] = rng.choice(["skip", "retry", "skip", "abort"])
        made.append(one)
    return made


@pytest.mark.parametrize("seed", range(40))
async def test_random_graphs_killed_at_random_points(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    """However often its Coordinator goes, a run comes to what it comes to without: steps that are done stay done."""
    rng = random.Random(seed)
    steps, fail_mode = random_steps(rng, rng.randint(1, 15)), rng.choice(["fail_fast", "best_effort"])
    bad = {n: rng.random() for n in range(1000)}

    def maker(chance: float) -> Any:
        async def do(order: Order) -> str:
            name = order.spec.job_id
            await trio.sleep(0.1 + bad[hash_of(name) % 1000])
            if bad[hash_of(prompt_of(order)) % 1000] < chance:
                raise Refused(Code.CARGO_FAILED, "as the test wants it")
            return prompt_of(order)

        return do

    do = maker(0.15)
    whole = await ran(context(*steps, do=do, fail_mode=fail_mode))
    where = context(*steps, do=do, fail_mode=fail_mode)
    for _ in range(rng.randint(1, 4)):
        with trio.move_on_after(rng.random() * 4.0) as scope:
            result = await ran(where)
        done = {name.rsplit(".", 1)[0] for name, job in where.rows.items() if job.state is JobState.SUCCEEDED}
        before = len(where.names)
        where = where.next()
        if not scope.cancelled_caught:
            break
    result = await ran(where)
    new = {f"wf_1.{name.rsplit('.', 1)[0]}" for name in where.names[before:]}
    assert not new & done, "a finished step ran again"
    succeeded = [name.rsplit(".", 1)[0] for name, job in where.rows.items() if job.state is JobState.SUCCEEDED]
    assert len(succeeded) == len(set(succeeded))
    if fail_mode == "best_effort" and not any(one.get("on_failure") == "abort" for one in steps):
        assert (result.state, states(result)) == (whole.state, states(whole))
    else:
        assert result.state is whole.state


def hash_of(text: str) -> int:
    return sum(ord(character) * (at + 1) for at, character in enumerate(text))

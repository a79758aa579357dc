"""The trio side with real worker processes: contract, limits, back-pressure, cancels, deaths."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing

from protocol import limits
from protocol.cargo_io import DoneLine, Line, TokenLine
from protocol.errors import Code, ConfigError, Refused
from runtimes.lines.cargo import LineLimits, LineWorkers
from runtimes.wasm.cargo import MOST, open_wasm_cargo
from tests.runtimes.wasm import hostile
from tests.runtimes.wasm.hostile import says

PATIENCE_S = 30.0


@asynccontextmanager
async def opened(module: bytes, lanes: int = 1, most: LineLimits = MOST) -> AsyncIterator[LineWorkers]:
    with trio.fail_after(PATIENCE_S):
        async with open_wasm_cargo(
            name="test", module=module, content_hash="ab" * 32, module_hash=hostile.sha256(module), lanes=lanes, most=most
        ) as cargo:
            yield cargo


async def lines_of(cargo: LineWorkers, data: bytes = b"{}", most: LineLimits | None = None, seed: bytes = b"") -> list[Line]:
    async with cargo.run_input(data, most=most, seed=seed) as run:
        return [line async for line in run]


async def refusal_of(module: bytes, most: LineLimits | None = None) -> Refused:
    async with opened(module) as cargo:
        pids = cargo.worker_pids
        with pytest.raises(Refused) as error:
            await lines_of(cargo, most=most)
        # and the next job has a lane again, of the same worker
        with pytest.raises(Refused):
            await lines_of(cargo, most=most)
        assert cargo.worker_pids == pids and cargo.restarts == 0
    return error.value


async def test_lines_come_and_the_lane_is_used_again() -> None:
    text = '{"type":"token","content":"a"}\n{"type":"done","seed":7}'
    async with opened(hostile.ECHO) as cargo:
        assert cargo.engine.startswith("wasmtime-") and cargo.alive and cargo.slots_free == 1
        for _ in range(3):  # the input, which is no contract, comes back
            assert await lines_of(cargo, b'{"type":"done","n":1}') == [DoneLine(result='{"n":1}')]
    async with opened(says(text)) as cargo:
        async with cargo.run_input(b"{}") as run:
            assert [line async for line in run] == [TokenLine("a"), DoneLine(seed=7)]
        assert run.fuel_used > 0 and run.stderr == b""
    assert not cargo.alive


@pytest.mark.parametrize(
    ("module", "code", "text"),
    [
        (says("hello\n"), Code.CARGO_FAILED, "line 1 of the Cargo's output is not JSON"),
        (says(b"\xff\n"), Code.CARGO_FAILED, "not UTF-8"),
        (says("[]\n"), Code.CARGO_FAILED, "not a JSON object"),
        (says(""), Code.CARGO_FAILED, "without done or error"),
        (says('{"type":"token","content":"x"}\n'), Code.CARGO_FAILED, "without done or error"),
        (says(hostile.DONE * 2), Code.CARGO_FAILED, "after done or error"),
        (says(hostile.DONE, "(call $proc_exit (i32.const 4))"), Code.CARGO_FAILED, "ended with code 4"),
        (says(hostile.DONE, "unreachable"), Code.CARGO_FAILED, "it aborted"),
        (hostile.TRAP, Code.CARGO_FAILED, "it aborted"),
        (hostile.STACK, Code.CARGO_FAILED, "stack is over"),
        (hostile.WILD, Code.CARGO_FAILED, "out of its memory"),
        (hostile.FLOOD, Code.CARGO_FAILED, "a line of the Cargo's output is over"),
    ],
)
async def test_a_bad_run_is_refused_and_the_worker_serves_on(module: bytes, code: Code, text: str) -> None:
    refusal = await refusal_of(module)
    assert refusal.code is code and text in refusal.message and not refusal.retryable


async def test_a_loop_ends_at_its_time_and_at_its_fuel() -> None:
    late = await refusal_of(hostile.LOOP, LineLimits(0.2, fuel=limits.WASM_FUEL_MAX))
    assert late.code is Code.CARGO_FAILED and "more than 0.2 s" in late.message
    dry = await refusal_of(hostile.LOOP, LineLimits(limits.WASM_TIMEOUT_S, fuel=10_000))
    assert dry.code is Code.CARGO_FAILED and "fuel" in dry.message


async def test_too_much_output_is_refused() -> None:
    refusal = await refusal_of(hostile.CHATTER, LineLimits(limits.WASM_TIMEOUT_S, 1_000_000, limits.WASM_FUEL_MAX))
    assert refusal.code is Code.CARGO_FAILED and "1000000 bytes" in refusal.message


async def test_the_cargos_own_error_is_its_end() -> None:
    async with opened(says('{"type":"error","message":"no such column"}\n', "(call $proc_exit (i32.const 1))")) as cargo:
        with pytest.raises(Refused) as error:
            await lines_of(cargo)
    assert (error.value.code, error.value.message) == (Code.CARGO_FAILED, "no such column")


async def test_what_came_before_a_failure_is_handed_out() -> None:
    async with opened(says(hostile.WORDS + hostile.DONE, "unreachable")) as cargo, cargo.run_input(b"{}") as run:
        got = []
        with pytest.raises(Refused, match="aborted"):
            async for line in run:
                got.append(line)
        assert got == [TokenLine("word ")]  # and no done


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'"x"', b"\xff", b"{}{}"])
async def test_the_input_is_one_json_object(data: bytes) -> None:
    async with opened(hostile.ECHO) as cargo:
        with pytest.raises(Refused) as error:
            await lines_of(cargo, data)
        assert error.value.code is Code.BAD_INPUT


async def test_a_slow_reader_holds_the_module_up() -> None:
    """The module would write without end; what it writes ahead is bounded by the window."""
    async with opened(hostile.CHATTER) as cargo, cargo.run_input(b"{}") as run:
        while run.untold_bytes + 4 * len(hostile.WORDS) < limits.LINE_WINDOW_BYTES:
            await trio.sleep(0.01)
        await trio.sleep(0.1)
        assert run.untold_bytes <= limits.LINE_WINDOW_BYTES
        ahead = len(run.lines)
        assert ahead * len(hostile.WORDS) <= limits.LINE_WINDOW_BYTES
        count = 0
        async for line in run:
            assert line == TokenLine("word ")
            count += 1
            if count == 3 * ahead:
                break


async def test_leaving_ends_the_job_at_once() -> None:
    async with opened(hostile.LOOP) as cargo:
        pids = cargo.worker_pids
        for _ in range(3):
            with trio.move_on_after(0.1):
                await lines_of(cargo)
            with trio.fail_after(limits.LINE_OVERRUN_S / 2):
                while not cargo.slots_free:
                    await cargo.wait_changed()
        assert cargo.worker_pids == pids and cargo.restarts == 0


async def test_leaving_ends_a_job_that_waits_for_its_reader() -> None:
    async with opened(hostile.CHATTER) as cargo:
        async with cargo.run_input(b"{}") as run:
            while run.untold_bytes + 4 * len(hostile.WORDS) < limits.LINE_WINDOW_BYTES:
                await trio.sleep(0.01)
        with trio.fail_after(limits.LINE_OVERRUN_S / 2):
            while not cargo.slots_free:
                await cargo.wait_changed()
        assert cargo.restarts == 0


async def test_a_frozen_worker_is_ended_and_another_one_serves() -> None:
    async with opened(hostile.LOOP, most=LineLimits(0.1, fuel=limits.WASM_FUEL_MAX)) as cargo:
        (pid,) = cargo.worker_pids
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(Refused) as error:
            await lines_of(cargo)
        assert error.value.code is Code.CARGO_FAILED and "had to be ended" in error.value.message
        while not cargo.slots_free:
            await cargo.wait_changed()
        assert cargo.worker_pids != (pid,) and cargo.restarts == 1
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_worker_that_dies_takes_only_its_job() -> None:
    async with opened(hostile.LOOP, lanes=2) as cargo, trio.open_nursery() as nursery:
        ends: list[Refused] = []

        async def job() -> None:
            try:
                await lines_of(cargo)
            except Refused as refusal:
                ends.append(refusal)

        nursery.start_soon(job)
        nursery.start_soon(job)
        while cargo.slots_free:
            await trio.sleep(0.01)
        os.kill(cargo.worker_pids[0], signal.SIGKILL)
        while not ends:
            await trio.sleep(0.01)
        assert [end.code for end in ends] == [Code.WORKER_DIED]
        await cargo.wait_changed()  # the other runs on, and the lane comes back
        while not cargo.slots_free:
            await cargo.wait_changed()
        assert len(ends) == 1 and cargo.restarts == 1
        nursery.cancel_scope.cancel()


async def test_jobs_wait_in_order_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINE_JOBS_WAITING_MAX", 2)
    order: list[int] = []
    async with opened(hostile.LOOP) as cargo, trio.open_nursery() as nursery:

        async def job(number: int) -> None:
            with pytest.raises(Refused, match="ran for more than"):
                await lines_of(cargo, most=LineLimits(0.05, fuel=limits.WASM_FUEL_MAX))
            order.append(number)

        async with cargo.run_input(b"{}"):
            for number in range(2):
                nursery.start_soon(job, number)
                await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(Refused) as error:
                await lines_of(cargo)
            assert error.value.code is Code.NO_CAPACITY and order == []
    assert order == [0, 1]


async def test_who_gives_up_waiting_takes_no_lane() -> None:
    async with opened(hostile.LOOP) as cargo:
        async with cargo.run_input(b"{}"):
            with trio.move_on_after(0.05) as scope:
                await lines_of(cargo)
            assert scope.cancelled_caught
        while not cargo.slots_free:
            await cargo.wait_changed()
        assert cargo.slots_free == 1


async def test_random_numbers_come_from_the_seed() -> None:
    tell = hostile.program(
        """(drop (call $random_get (i32.const 1049) (i32.const 1)))
        (i32.store8 (i32.const 1049) (i32.add (i32.const 97) (i32.rem_u (i32.load8_u (i32.const 1049)) (i32.const 26))))
        (call $say (i32.const 1024) (i32.const 28))""",
        data='{"type":"done","letter":"?"}',
    )
    async with opened(tell) as cargo:
        letters = {seed: await lines_of(cargo, seed=seed) for seed in (b"a", b"b", b"c", b"d")}
        assert letters == {seed: await lines_of(cargo, seed=seed) for seed in letters}
        assert len({str(lines) for lines in letters.values()}) > 1


@pytest.mark.parametrize("module", [b"", b"(module)", hostile.ECHO[:-3]])
async def test_a_module_that_cannot_be_loaded_says_why(module: bytes) -> None:
    with pytest.raises(ConfigError, match=r"test: the (file|module) is n"):
        async with opened(module):
            pass
    with pytest.raises(ConfigError, match="not the one that was signed"):
        async with open_wasm_cargo(name="test", module=hostile.ECHO, content_hash="ab" * 32, module_hash="0" * 64):
            pass


async def test_a_module_that_takes_too_long_to_compile_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINE_LOAD_TIMEOUT_S", 1.0)
    with pytest.raises(ConfigError, match="was not loaded after 1 s"):
        async with opened(hostile.many_functions(500_000)):
            pass
    async with opened(hostile.many_functions(10)):
        pass


async def test_workers_end_with_the_cargo() -> None:
    async with opened(hostile.LOOP, lanes=2) as cargo:
        pids = cargo.worker_pids
        assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_memory_bomb_is_contained() -> None:
    async with opened(hostile.BOMB) as cargo:
        with pytest.raises(Refused, match="ended with code 6"):  # 63 or 64 times 4 MiB
            await lines_of(cargo)
        (pid,) = cargo.worker_pids
        if sys.platform == "linux":
            assert resource.prlimit(pid, resource.RLIMIT_AS)[1] <= 2 * 1024**3
            assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
        # what the job had is given back
        assert psutil.Process(pid).memory_info().rss < limits.WASM_MEMORY_BYTES_MAX


async def test_a_worker_knows_nothing_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIPELAG_SECRET", "key")
    async with opened(hostile.ECHO) as cargo:
        (pid,) = cargo.worker_pids
        process = psutil.Process(pid)
        assert "ARCHIPELAG_SECRET" not in process.environ() and process.cwd() == "/"


_NODE = """
import sys, trio
from runtimes.wasm.cargo import open_wasm_cargo
from tests.runtimes.wasm import hostile

async def main():
    async with open_wasm_cargo(name="test", module=hostile.LOOP, content_hash="ab" * 32, module_hash=hostile.sha256(hostile.LOOP)) as cargo:
        async with cargo.run_input(b"{}") as run:
            print(cargo.worker_pids[0], flush=True)
            async for line in run:
                pass

trio.run(main)
"""


async def test_a_busy_worker_dies_with_its_node() -> None:
    root = Path(__file__).resolve().parents[3]
    with trio.fail_after(PATIENCE_S):
        node = await trio.lowlevel.open_process([sys.executable, "-c", _NODE], stdout=subprocess.PIPE, cwd=root)
        assert node.stdout is not None
        pid = int(await node.stdout.receive_some())
        worker = psutil.Process(pid)
        node.kill()
        await node.wait()
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            await trio.sleep(0.01)
        await node.stdout.aclose()

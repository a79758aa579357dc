"""Workers of lines inside their sandbox: they serve as without it, see nothing of the node, and a Cargo that takes too much ends itself."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import trio

from protocol.cargo_io import DoneLine, encode_input, encode_line
from protocol.errors import Code, ConfigError, Refused
from runtimes.lines.cargo import LineKind, LineLimits, LineWorkers, open_line_cargo
from runtimes.lines.engine import LoadOrder
from runtimes.lines.process import starts
from runtimes.sandbox.command import Bind
from runtimes.sandbox.probe import Level, Sandbox, probe
from runtimes.sandbox.tiers import tier_of
from runtimes.wasm import modules
from runtimes.wasm.cargo import open_wasm_cargo
from runtimes.worker_process import Walls

PROBES = Path(__file__).with_name("line_probe.py")


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    found = probe()
    assert found.level is not Level.NONE, found.reason
    return found


@asynccontextmanager
async def probing(sandbox: Sandbox, trust_level: int = 0, **options: object) -> AsyncIterator[LineWorkers]:
    """A Cargo that does what its input says (line_probe.py)."""
    walls = Walls(sandbox, tier_of(trust_level, "onnx"), reads=(Bind(str(PROBES), "/cargo/line_probe.py"),))
    kind = LineKind("onnx", starts("line_probe", Walls(walls.sandbox, walls.tier, walls.reads, environment=(PROBE_PATH,))))
    order = LoadOrder("probe", "ab" * 32, entry="line_probe.py", files={"line_probe.py": "/cargo/line_probe.py"}, options=options)
    with trio.fail_after(60):
        async with open_line_cargo(kind, order, most=LineLimits(5.0)) as cargo:
            yield cargo


PROBE_PATH = ("PYTHONPATH", f"{Path(__file__).resolve().parents[2]}:/cargo")


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)  # of whoever has inherited it
    except psutil.NoSuchProcess:
        return True


async def result_of(cargo: LineWorkers, **fields: object) -> DoneLine:
    async with cargo.run_input(encode_input(fields), seed=bytes(16)) as run:
        lines = [line async for line in run]
    assert isinstance(lines[-1], DoneLine)
    return lines[-1]


async def refusal_of(cargo: LineWorkers, **fields: object) -> Refused:
    with pytest.raises(Refused) as error:
        await result_of(cargo, **fields)
    return error.value


async def test_a_wasm_worker_serves_from_inside(sandbox: Sandbox) -> None:
    module = modules.load("sha256")
    walls = Walls(sandbox, tier_of(0, "wasm"))
    opened = open_wasm_cargo(name="sha", module=module.wasm, content_hash="ab" * 32, module_hash=module.content_hash, walls=walls)
    async with opened as cargo:
        done = await result_of(cargo, **module.example_input)
        assert json.loads(encode_line(done)) == module.example_output[-1]
        (pid,) = cargo.worker_pids
        if sandbox.level is Level.NAMESPACES:
            assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    assert is_gone(pid)


async def test_an_engine_sees_nothing_of_the_node(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARCHIPELAG_SECRET", "key")
    secret = tmp_path / "node.key"
    secret.write_text("secret")
    async with probing(sandbox) as cargo:
        assert (await result_of(cargo, do="environment", name="ARCHIPELAG_SECRET")).result == '{"value":null}'
        assert (await result_of(cargo, do="connect")).result == '{"connected":false}'
        if sandbox.level is Level.NAMESPACES:
            assert (await result_of(cargo, do="read", path=str(secret))).result == '{"text":null}'
            assert (await result_of(cargo, do="read", path="/cargo/line_probe.py")).result.startswith('{"text":"')
            assert (await result_of(cargo, do="write", path="/cargo/new")).result == '{"written":false}'
        assert (await result_of(cargo, do="fork")).result == '{"forked":false}'


async def test_bad_input_and_faults_have_their_codes(sandbox: Sandbox) -> None:
    async with probing(sandbox) as cargo:
        bad = await refusal_of(cargo, do="bad", text="send numbers")
        assert (bad.code, bad.message) == (Code.BAD_INPUT, "send numbers")
        broken = await refusal_of(cargo, do="broken", text="no such output")
        assert (broken.code, broken.message) == (Code.CARGO_FAILED, "no such output")
        assert (await result_of(cargo, do="environment", name="HOME")).result == '{"value":"/tmp"}'
        assert cargo.restarts == 0


async def test_a_bug_ends_the_worker_and_another_one_serves(sandbox: Sandbox) -> None:
    async with probing(sandbox) as cargo:
        bug = await refusal_of(cargo, do="bug")
        assert bug.code is Code.WORKER_DIED
        assert (await result_of(cargo, do="environment", name="HOME")).result == '{"value":"/tmp"}'
        assert cargo.restarts == 1


async def test_a_memory_bomb_is_the_cargos_fault(sandbox: Sandbox) -> None:
    async with probing(sandbox) as cargo:
        bomb = await refusal_of(cargo, do="memory", megabytes=600)
        assert bomb.code is Code.CARGO_FAILED and "memory" in bomb.message and not bomb.retryable
        assert (await result_of(cargo, do="environment", name="HOME")).result == '{"value":"/tmp"}'


async def test_an_engine_that_does_not_look_is_ended(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.limits.LINE_OVERRUN_S", 0.2)
    async with probing(sandbox) as cargo:
        async with cargo.run_input(encode_input({"do": "sleep", "seconds": 60})):
            (pid,) = cargo.worker_pids
        while not cargo.slots_free or cargo.worker_pids == (pid,):
            await cargo.wait_changed()
        assert cargo.restarts == 1 and is_gone(pid)


async def test_an_engine_stops_when_it_is_told(sandbox: Sandbox) -> None:
    async with probing(sandbox) as cargo:
        async with cargo.run_input(encode_input({"do": "steps", "count": 1_000_000})) as run:
            async for _ in run:
                break
        while not cargo.slots_free:
            await cargo.wait_changed()
        assert cargo.restarts == 0


async def test_what_cannot_be_loaded_says_why(sandbox: Sandbox) -> None:
    with pytest.raises(ConfigError, match="probe: there is no such thing"):
        async with probing(sandbox, refuse="there is no such thing"):
            pass
    with pytest.raises(ConfigError, match="more memory to load than its"):
        async with probing(sandbox, megabytes=600):
            pass

"""Hostile containers: each is contained, none is left running, and whoever sent the job reads what went wrong."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.errors import Code, Refused
from runtimes.container.cargo import remove_leftovers
from runtimes.container.command import name_for
from tests.runtimes.container.conftest import Port
from tests.runtimes.container.container_cargos import MIB, lines_of, needs, opened, request, result_of

SECRET = "very-secret-word"
ENDED_S = 8.0  # a job whose time is one second, on a machine that does other things


@pytest.fixture(autouse=True)
def nothing_left(port: Port) -> Iterator[None]:
    yield
    assert port.containers() == []
    assert port.processes() == []


@pytest.fixture(autouse=True)
def secret_of_the_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What there is to win: a file that everybody may read, and an environment."""
    monkeypatch.setenv("NODE_TOKEN", SECRET)
    monkeypatch.setenv("HTTP_PROXY", f"http://user:{SECRET}@localhost:1")
    monkeypatch.setenv("http_proxy", f"http://user:{SECRET}@localhost:1")
    path = tmp_path / "identity.key"
    path.write_text(SECRET)
    return path


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("memory bomb", {}, "64 MiB of memory"),
    ("flood", {"output_bytes": 4 * MIB}, "output is over 4194304 bytes"),
    ("long line", {}, "a line of the Cargo's output is over"),
    ("not json", {}, "line 1 of the Cargo's output is not JSON"),
    ("not utf-8", {}, "line 1 of the Cargo's output is not UTF-8 at byte 27"),
    ("half a line", {}, "line 1 of the Cargo's output is not JSON"),
    ("after done", {}, "line 2 of the Cargo's output comes after done or error"),
    ("done then fail", {}, "ended with code 7"),
    ("noisy stderr", {}, "ended with code 3"),
    ("unknown", {}, "ended with code 64"),
    ("error", {}, "no such page"),
]


@pytest.mark.parametrize("mode,changes,said", REFUSED, ids=[case[0] for case in REFUSED])
async def test_who_breaks_the_contract_is_ended_and_refused(
    port: Port, mode: str, changes: dict[str, Any], said: str
) -> None:
    async with opened(port, needs=needs(**changes)) as cargo:
        started_s = trio.current_time()
        with pytest.raises(Refused) as caught:
            await lines_of(cargo, mode)
        assert caught.value.code is Code.CARGO_FAILED
        assert said in caught.value.message
        assert SECRET not in caught.value.message
        assert trio.current_time() - started_s < ENDED_S
        assert port.is_clean()
        assert cargo.facts().slots_free == 1


async def test_time_ends_whatever_does_not_end(port: Port) -> None:
    modes = ("loop", "silent", "ignore signals", "daemon and hang", "done then loop")
    refusals: dict[str, str] = {}

    async def refused(mode: str) -> None:
        with pytest.raises(Refused) as caught:
            await lines_of(cargo, mode)
        assert caught.value.code is Code.CARGO_FAILED
        refusals[mode] = caught.value.message

    async with opened(port, slots=len(modes), needs=needs(time_s=1)) as cargo:
        with trio.fail_after(len(modes) * ENDED_S):
            async with trio.open_nursery() as nursery:
                for mode in modes:
                    nursery.start_soon(refused, mode)
        assert refusals == dict.fromkeys(modes, "the Cargo ran for more than 1 s and was ended")
        assert port.is_clean()


async def test_fork_bomb_stops_at_the_limit(port: Port) -> None:
    async with opened(port) as cargo:
        result = await result_of(cargo, "fork bomb")
        assert 0 < result["count"] < 32


async def test_memory_bomb_in_a_child_takes_at_most_its_container(port: Port) -> None:
    async with opened(port) as cargo:
        assert (await result_of(cargo, "memory bomb in a child"))["won"] == []


async def test_disk_is_no_larger_than_granted(port: Port) -> None:
    async with opened(port) as cargo:
        assert 0 < (await result_of(cargo, "disk scratch"))["count"] <= 8 * MIB


async def test_file_is_no_larger_than_the_tier_says(port: Port) -> None:
    async with opened(port, needs=needs(memory_bytes=256 * MIB, disk_bytes=64 * MIB)) as cargo:
        assert (await result_of(cargo, "one big file"))["count"] == 32 * MIB


async def test_nothing_but_scratch_can_be_filled(port: Port) -> None:
    async with opened(port) as cargo:
        result = await result_of(cargo, "disk elsewhere")
        assert result["won"] == []
        assert 0 < result["count"] <= 8 * MIB  # /dev/shm


async def test_network_is_not_there(port: Port) -> None:
    name = f"archipelag-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0{name}")
        local.listen()
        async with opened(port) as cargo:
            result = await result_of(cargo, "network", port=str(server.getsockname()[1]), socket=name)
    assert result["won"] == []


async def test_files_and_environment_of_the_node_are_not_there(port: Port, secret_of_the_node: Path) -> None:
    words = Path("/etc/hosts").read_text().split()
    ours = [
        word for word in words if word.isalpha() and not word.startswith("localhost")
    ]  # names that only this machine has
    async with opened(port) as cargo:
        hosts = max(ours, key=len, default="")
        result = await result_of(cargo, "host files", path=str(secret_of_the_node), secret=SECRET, hosts=hosts)
    assert result["won"] == []


@pytest.mark.parametrize("mode", ["write root", "become root", "mounts", "exec scratch"])
async def test_walls_stand(port: Port, mode: str) -> None:
    async with opened(port) as cargo:
        assert (await result_of(cargo, mode))["won"] == []


async def test_other_processes_are_out_of_reach(port: Port) -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        async with opened(port, slots=2) as cargo, cargo.run_lines(request("ignore signals")) as neighbour:
            assert await anext(aiter(neighbour)) is not None
            assert (await result_of(cargo, "others", pid=str(victim.pid)))["won"] == []
            assert victim.poll() is None
            assert len(port.processes()) == 1
    finally:
        victim.kill()
        victim.wait()


async def test_child_does_not_outlive_its_job(port: Port) -> None:
    async with opened(port) as cargo, cargo.run_lines(request("daemon and done")) as run:
        assert [line async for line in run]
        assert port.processes() == []  # before it is left


async def test_leaving_ends_who_ignores_signals(port: Port) -> None:
    async with opened(port) as cargo:
        async with cargo.run_lines(request("ignore signals")) as run:
            assert await anext(aiter(run)) is not None
            assert len(port.processes()) == 1
        assert port.is_clean()
        assert (await result_of(cargo, "fork bomb"))["won"] == []  # and the next job runs


async def test_cancelling_ends_who_floods(port: Port) -> None:
    """Its pipes are full when it is ended, as nobody reads them."""
    async with opened(port) as cargo:
        with trio.CancelScope() as scope:
            async with cargo.run_lines(request("flood")) as run:
                assert await anext(aiter(run)) is not None
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert port.is_clean()


async def test_cancelling_at_any_time_leaves_nothing(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def noted(random: bytes) -> str:
        names.append(name_for(random))
        return names[-1]

    monkeypatch.setattr("runtimes.container.cargo.name_for", noted)
    async with opened(port) as cargo:
        for after_s in (0.0, 0.02, 0.05, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.22, 0.25, 0.3):
            with trio.move_on_after(after_s):
                async with cargo.run_lines(request("ignore signals")):
                    await trio.sleep_forever()
            assert port.is_clean()
        assert cargo.facts().slots_free == 1
    with trio.fail_after(ENDED_S):  # the engine's own processes have no container left, and end
        while monitors(names):
            await trio.sleep(0.05)


def monitors(names: list[str]) -> list[int]:
    """Processes of the engine that look after these containers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has just ended
        if not set(names).isdisjoint(words):
            found.append(int(folder.name))
    return found


async def test_time_ends_a_job_that_nobody_reads(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.container.run._START_S", 0.5)
    monkeypatch.setattr("runtimes.container.run._REMOVE_TRIES", 1)  # full pipes do not stand in its way
    async with opened(port, needs=needs(time_s=1)) as cargo, cargo.run_lines(request("flood")) as run:
        with trio.fail_after(ENDED_S):
            while run.refusal is None or not port.is_clean():
                await trio.sleep(0.05)
        with pytest.raises(Refused, match="more than 1 s"):
            async for _ in run:
                pass


async def test_job_ends_though_its_node_is_dead(port: Port, tmp_path: Path) -> None:
    """podman's own clock: a node that was killed ends nothing any more."""
    if port.engine.kind != "podman":
        pytest.skip("Docker has no time limit of its own; remove_leftovers ends such jobs at the next start")
    script = (
        "import sys, trio\n"
        "from tests.runtimes.container.container_cargos import *\n"
        "from runtimes.container.engines import find_engine\n"
        "from runtimes.container.image import ImageSource\n"
        "from pathlib import Path\n"
        "async def main():\n"
        "    engine = (await find_engine()).engine\n"
        "    port = Port(engine, sys.argv[1], ImageSource(archive=Path(sys.argv[2])), sys.argv[3], '')\n"
        "    async with opened(port, needs=needs(time_s=2)) as cargo, cargo.run_lines(request('ignore signals')) as run:\n"
        "        await anext(aiter(run))\n"
        "        print('runs', flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    words = [sys.executable, "-c", script, port.entry, str(port.source.archive), port.node]
    node = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[3])
    assert node.stdout is not None and (await trio.to_thread.run_sync(node.stdout.readline)) == b"runs\n"
    node.send_signal(signal.SIGKILL)
    node.communicate()
    assert len(port.processes()) == 1
    with trio.fail_after(ENDED_S):
        while port.processes():
            await trio.sleep(0.05)
    assert await remove_leftovers(port.engine, port.node) == 1

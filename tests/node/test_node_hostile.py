"""Hostile Cargos, opened by their manifests as an Island opens them: each is contained, none is left running, the node is unharmed.

After each of them a healthy Cargo that has been open all the time is asked, the key's file is looked at (the kernel tells whether anybody
has opened it), and processes and files are counted.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import wasmtime

from node import cargo_runtimes
from node.cargo_runtimes import Runtimes, find_runtimes
from protocol import limits
from protocol.cargo_io import TokenLine, encode_input
from protocol.cargos import Runtime
from protocol.errors import Code, ConfigError, Refused
from runtimes.base import LineCargo, LineRequest
from runtimes.container.archive import ARCHIVE_PATH, ArchiveLimits
from runtimes.container.engines import ContainerEngine
from runtimes.container.image import ImageSource, bring_image, remove_image
from runtimes.lines.cargo import LineWorkers
from runtimes.lines.process import Start, starts
from runtimes.sandbox.probe import Level
from runtimes.worker_process import Walls
from tests.node.hostile_cargos import (
    MIB,
    SECRET,
    Bystander,
    Scene,
    asked_again,
    lines_of,
    opened,
    orphans_come_to_us,
    result_of,
    staged,
)
from tests.runtimes.container.conftest import Port
from tests.runtimes.container.container_images import Entry, image, tar
from tests.runtimes.wasm import hostile
from tests.runtimes.wasm.hostile import DONE, program, says

ROOT = Path(__file__).resolve().parents[2]
OpenNative = Callable[..., AbstractAsyncContextManager[LineCargo]]
GONE_S = 10.0  # for a container's monitor to end after its container
NODE = "test-hostile"


@pytest.fixture(scope="module")
def runtimes() -> Runtimes:
    found = trio.run(find_runtimes, NODE)
    if found.sandbox.level is not Level.NAMESPACES:
        pytest.skip(found.sandbox.reason)
    return found


@pytest.fixture(scope="module")
def bystander(runtimes: Runtimes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bystander]:
    with orphans_come_to_us(), Bystander(runtimes, tmp_path_factory.mktemp("bystander")) as healthy:
        yield healthy


@pytest.fixture(autouse=True)
def scene(bystander: Bystander, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """What there is to win, and the look round after each attack."""
    monkeypatch.setenv("ISLAND_SECRET", SECRET)
    with staged(bystander, tmp_path) as here:
        monkeypatch.setattr(tempfile, "tempdir", str(here.scratch))
        monkeypatch.setattr(limits, "LINE_OVERRUN_S", 0.3)
        before = here.files()
        yield here
        trio.run(_wait_alone, here)
        assert not here.key.was_touched(), "somebody has opened the node's key"
        assert here.key.path.read_text() == SECRET
        assert here.files() == before and not list(here.scratch.iterdir())
        assert here.victim.poll() is None, "a process of this machine was hurt"
        assert bystander.answers(), "the healthy Cargo beside it"


async def _wait_alone(scene: Scene) -> None:
    with trio.move_on_after(GONE_S):
        while scene.survivors():
            await trio.sleep(0.05)
    assert not scene.survivors()


def check_refused(refusal: Refused, code: Code, words: str) -> None:
    """Its words are for a person, and hold nothing of what the Cargo wrote."""
    assert refusal.code is code, refusal
    assert words in refusal.message, refusal
    assert len(refusal.message) <= limits.TEXT_CHARS_MAX and refusal.message.isprintable() and SECRET not in refusal.message


# Modules

_FILES = """
  (import "wasi_snapshot_preview1" "path_open" (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_prestat_get" (func $prestat (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_unlink_file" (func $unlink (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
"""
_KEY_PATH = b"../../../../../../../../etc/hostname"
# Ends well only where one of 64 descriptors opens the file of that name, or shows itself as a folder
_THIEF = f"""(local $fd i32)
  (loop $next
    (br_if $next (i32.and
      (i32.and
        (i32.ne (i32.const 0) (call $open (local.get $fd) (i32.const 1) (i32.const 1024) (i32.const {len(_KEY_PATH)})
          (i32.const 0) (i64.const -1) (i64.const -1) (i32.const 0) (i32.const 64)))
        (i32.and (i32.ne (i32.const 0) (call $prestat (local.get $fd) (i32.const 64)))
          (i32.ne (i32.const 0) (call $unlink (local.get $fd) (i32.const 1024) (i32.const {len(_KEY_PATH)})))))
      (i32.lt_u (local.tee $fd (i32.add (local.get $fd) (i32.const 1))) (i32.const 64)))))
  (if (i32.eq (local.get $fd) (i32.const 64)) (then (call $proc_exit (i32.const 41))))"""
# Ends with the number of bytes of the node's environment and arguments that it got
_PRY = """
  (drop (call $environ (i32.const 64) (i32.const 68)))
  (drop (call $args (i32.const 72) (i32.const 76)))
  (call $proc_exit (i32.add (i32.const 41) (i32.add (i32.load (i32.const 64)) (i32.load (i32.const 68)))))"""
# Writes to descriptors that it was not given, as the node's socket or its key
_SCRIBBLE = """(local $fd i32) (local.set $fd (i32.const 3))
  (i32.store (i32.const 0) (i32.const 1024)) (i32.store (i32.const 4) (i32.const 8))
  (loop $next
    (if (i32.eqz (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))) (then (call $proc_exit (i32.const 1))))
    (br_if $next (i32.lt_u (local.tee $fd (i32.add (local.get $fd) (i32.const 1))) (i32.const 256))))
  (call $proc_exit (i32.const 41))"""
_TO_STDERR = """(i32.store (i32.const 0) (i32.const 1024)) (i32.store (i32.const 4) (i32.const 65536))
  (loop $again (drop (call $fd_write (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 8))) (br $again))"""
_IMAGE = '{"type":"image","data":"aGVsbG8=","format":"png","width":%d,"height":%d}\n'

HOSTILE_MODULES: dict[str, tuple[bytes, str]] = {
    "reads_files": (program(_THIEF, imports=_FILES, data=_KEY_PATH), "ended with code 41"),
    "reads_the_environment": (program(_PRY, imports=_FILES), "ended with code 41"),
    "writes_to_other_descriptors": (program(_SCRIBBLE, imports=_FILES), "ended with code 41"),
    "endless_loop": (hostile.LOOP, "more than 1 s"),
    "loop_in_the_host": (hostile.TIMED_LOOP, "more than 1 s"),
    "goes_on_after_done": (says(DONE, "(loop $again (br $again))"), "more than 1 s"),
    "loop_on_stderr": (program(_TO_STDERR), "more than 1 s"),
    "endless_stack": (hostile.STACK, "stack is over"),
    "aborts": (hostile.TRAP, "it aborted"),
    "reads_out_of_its_memory": (hostile.WILD, "out of its memory"),
    "divides_by_zero": (hostile.DIVIDE, "zero"),
    "memory_bomb": (hostile.BOMB, "ended with code "),
    "ten_gigabytes_of_lines": (hostile.CHATTER, "more than 262144 bytes"),
    "ten_gigabytes_of_one_line": (hostile.FLOOD, "a line of the Cargo's output is over"),
    "no_json": (says(f"{SECRET}\n"), "line 1 of the Cargo's output is not JSON"),
    "no_object": (says(f'["{SECRET}"]\n'), "not a JSON object"),
    "no_utf8": (says(b'{"type":"token","content":"\xff"}\n'), "not UTF-8 at byte 27"),
    "half_a_character": (says('{"type":"token","content":"\\ud800"}\n'), "half a surrogate pair"),
    "nested_too_deep": (says('{"type":"done","x":' + "[" * 100_000 + "]" * 100_000 + "}\n"), "is n"),
    "number_without_end": (says('{"type":"done","x":' + "9" * 5000 + "}\n"), "is not JSON"),
    "picture_too_large": (says(_IMAGE % (100_000, 1)), "width must be between"),
    "picture_of_no_size": (says(_IMAGE % (0, -1)), "width must be between"),
    "lines_without_end": (says("\n" * 100_001), "more than 100000 lines"),
    "nothing_at_all": (says(""), "without done or error"),
    "two_ends": (says(DONE * 2), "after done or error"),
    "fails_after_done": (says(DONE, "(call $proc_exit (i32.const 4))"), "ended with code 4"),
    "colours_the_terminal": (says('{"type":"error","message":"\\u001b[2Jgone\\n"}\n'), " [2Jgone "),
}


@pytest.mark.parametrize("name", HOSTILE_MODULES)
async def test_a_hostile_module_is_contained(name: str, scene: Scene, runtimes: Runtimes, tmp_path: Path) -> None:
    module, words = HOSTILE_MODULES[name]
    place = tmp_path / "module.wasm"
    place.write_bytes(module)
    cargo_name = name.replace("_", "-")
    most = {"time_s": 1 if "more than 1 s" in words else 20, "output_bytes": MIB // 4 if "262144" in words else 9 * MIB}
    async with opened(cargo_name, Runtime.WASM, "module.wasm", {"module.wasm": place}, runtimes, **most) as cargo:
        with pytest.raises(Refused) as caught:
            await lines_of(cargo)
        check_refused(caught.value, Code.CARGO_FAILED, words)
        assert isinstance(cargo, LineWorkers)
        while not cargo.slots_free:
            await cargo.wait_changed()
        assert cargo.restarts == 0, "its worker lives, and has a lane for the next job"


def _wat(text: str) -> Callable[[], bytes]:
    return lambda: bytes(wasmtime.wat2wasm(text))


_MEMORY = '(memory (export "memory") 1)'
REFUSED_MODULES: dict[str, tuple[Callable[[], bytes], str]] = {
    "no_entry_point": (_wat(f"(module {_MEMORY})"), "no entry point _start"),
    "wants_a_shell": (_wat(f'(module (import "env" "system" (func (param i32))) {_MEMORY} (func (export "_start")))'), "env.system"),
    "wants_a_socket": (
        _wat(f'(module (import "wasi_snapshot_preview1" "sock_open" (func (param i32))) {_MEMORY} (func (export "_start")))'),
        "sock_open",
    ),
    "begins_with_all_memory": (_wat('(module (memory (export "memory") 65536) (func (export "_start")))'), "begins with more than"),
    "native_code": (lambda: b"\x7fELF" + bytes(1000), "no WebAssembly module"),
    "cut_off": (lambda: hostile.ECHO[:-5], "is not valid"),
    "compiles_for_ever": (lambda: hostile.many_functions(400_000), "was not loaded after"),
}


@pytest.mark.parametrize("name", REFUSED_MODULES)
async def test_a_module_that_is_none_is_not_loaded(
    name: str, scene: Scene, runtimes: Runtimes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINE_LOAD_TIMEOUT_S", 1.5 if name == "compiles_for_ever" else 30.0)
    make, words = REFUSED_MODULES[name]
    place = tmp_path / "module.wasm"
    place.write_bytes(make())
    with pytest.raises(ConfigError) as caught:
        async with opened(name.replace("_", "-"), Runtime.WASM, "module.wasm", {"module.wasm": place}, runtimes):
            pass
    assert words in str(caught.value) and str(caught.value).isprintable()


# Native code: what an engine is once somebody has broken into it

_ATTACKS = "tests/runtimes/line_attacks.py"
_PROBE = "tests/runtimes/line_probe.py"


@pytest.fixture
def native(runtimes: Runtimes, monkeypatch: pytest.MonkeyPatch) -> OpenNative:
    """Opens a Cargo of the runtime onnx whose worker is our hostile program, within the walls that ``open_cargo`` gives it."""

    def started(module: str, walls: Walls) -> Start:
        path = ("PYTHONPATH", f"{ROOT}:/cargo")
        return starts("tests.runtimes.line_attacks", replace(walls, environment=(*walls.environment, path)))

    monkeypatch.setattr(cargo_runtimes, "starts", started)
    files = {path: ROOT / path for path in (_ATTACKS, _PROBE)}

    def open_native(name: str = "thief", **changes: int) -> AbstractAsyncContextManager[LineCargo]:
        return opened(name, Runtime.ONNX, _ATTACKS, files, runtimes, **changes)

    return open_native


THEFTS = """the_key other_files folders secrets network families its_own_code out_by_a_link forks other_processes devices kernel mounts rank
descriptors""".split()


@pytest.mark.parametrize("attack", THEFTS)
async def test_hostile_native_code_wins_nothing(
    attack: str, scene: Scene, native: OpenNative
) -> None:
    facts: dict[str, dict[str, Any]] = {
        "the_key": {"path": str(scene.key.path), "node": os.getpid()},
        "other_files": {"paths": [str(scene.data / "store" / "other.onnx"), str(ROOT / "tests/node/hostile_cargos.py")]},
        "folders": {"paths": [str(scene.data), str(scene.data / "store"), str(ROOT / "node"), str(ROOT / "coordinator")]},
        "secrets": {"word": SECRET},
        "network": {"port": scene.port, "name": scene.socket},
        "its_own_code": {"paths": [f"/cargo/{_ATTACKS}", f"/cargo/{_PROBE}"]},
        "out_by_a_link": {"folder": str(scene.data)},
        "other_processes": {"node": os.getpid(), "victim": scene.victim.pid},
    }
    async with native() as cargo:
        assert (await result_of(cargo, do=attack, **facts.get(attack, {})))["won"] == []
        assert (await result_of(cargo, do="environment", name="ISLAND_SECRET"))["value"] is None


async def test_hostile_native_code_fills_no_more_than_its_own_scratch(
    scene: Scene, native: OpenNative
) -> None:
    async with native() as cargo:
        assert 0 < (await result_of(cargo, do="fill"))["bytes"] <= 64 * MIB
        assert (await result_of(cargo, do="fill"))["bytes"] == 0, "the disk is full for nobody else"


async def test_a_bomb_of_threads_stops_at_the_limit(
    scene: Scene, native: OpenNative
) -> None:
    async with native() as cargo:
        assert 0 < (await result_of(cargo, do="threads"))["count"] <= 32
        assert (await result_of(cargo, do="environment", name="HOME"))["value"] == "/tmp"


WRECKS: dict[str, tuple[Code, str]] = {
    "memory": (Code.CARGO_FAILED, "memory than its"),
    "loop": (Code.CARGO_FAILED, "its worker had to be ended"),
    "deaf": (Code.CARGO_FAILED, "its worker had to be ended"),
    "freeze": (Code.CARGO_FAILED, "its worker had to be ended"),
    "crash": (Code.WORKER_DIED, "has ended"),
    "leave": (Code.WORKER_DIED, "has ended"),
    "hang_up": (Code.WORKER_DIED, "has ended"),
    "words": (Code.CARGO_FAILED, "the Cargo's output is over 9437184 bytes"),
    "garbage": (Code.WORKER_DIED, "has ended"),
    "long_frame": (Code.WORKER_DIED, "has ended"),
    "no_such_frame": (Code.WORKER_DIED, "has ended"),
    "loaded_again": (Code.WORKER_DIED, "has ended"),
    "not_loaded_after_all": (Code.WORKER_DIED, "has ended"),
    "nodes_words": (Code.WORKER_DIED, "has ended"),
    "end_of_another": (Code.WORKER_DIED, "has ended"),
    "end_without_done": (Code.CARGO_FAILED, "without done or error"),
    "end_in_long_words": (Code.CARGO_FAILED, "xxx"),
    "end_as_if_cancelled": (Code.CARGO_FAILED, "did not say why"),
    "no_lines": (Code.CARGO_FAILED, "is not JSON"),
    "no_text": (Code.CARGO_FAILED, "not UTF-8 at byte 27"),
    "nested": (Code.CARGO_FAILED, "is n"),
    "no_picture": (Code.CARGO_FAILED, "width must be between"),
}


@pytest.mark.parametrize("attack", WRECKS)
async def test_a_hostile_worker_is_ended_and_another_one_serves(
    attack: str, scene: Scene, native: OpenNative
) -> None:
    code, words = WRECKS[attack]
    fields = {"megabytes": 600} if attack == "memory" else {}
    async with native("wrecker", time_s=1 if code is Code.CARGO_FAILED and "ended" in words else 20) as cargo:
        assert isinstance(cargo, LineWorkers)
        with pytest.raises(Refused) as caught:
            await lines_of(cargo, do=attack, **fields)
        check_refused(caught.value, code, words)
        assert (await asked_again(cargo, do="environment", name="HOME"))["value"] == "/tmp"


async def test_a_hostile_worker_cannot_run_ahead_of_its_reader(scene: Scene, native: OpenNative) -> None:
    """Lines that nobody takes are kept up to the window, and no longer: the node's memory is not the Cargo's."""
    async with native("wrecker", output_bytes=limits.CARGO_OUTPUT_BYTES_MAX) as cargo:
        assert isinstance(cargo, LineWorkers)
        async with cargo.run_lines(LineRequest("job", encode_input({"do": "ahead_of_its_reader"}), bytes(16))) as run:
            while not run.is_over:
                await trio.sleep(0.01)
            with pytest.raises(Refused) as caught:
                async for _ in run:
                    pass
        check_refused(caught.value, Code.CARGO_FAILED, "before it was taken")
        assert (await asked_again(cargo, do="environment", name="HOME"))["value"] == "/tmp"


@pytest.mark.parametrize("attack", ["end_twice", "linger"])
async def test_what_a_hostile_worker_does_after_its_job_harms_no_other(attack: str, scene: Scene, native: OpenNative) -> None:
    async with native("wrecker") as cargo:
        assert isinstance(cargo, LineWorkers)
        await result_of(cargo, do=attack)
        with trio.move_on_after(0.2):
            await cargo.wait_changed()
        assert (await asked_again(cargo, do="environment", name="HOME"))["value"] == "/tmp"
        assert cargo.restarts == (attack == "end_twice")


async def test_who_leaves_a_deaf_worker_is_free_at_once(scene: Scene, native: OpenNative) -> None:
    async with native("wrecker") as cargo:
        assert isinstance(cargo, LineWorkers)
        async with cargo.run_lines(LineRequest("job", encode_input({"do": "deaf"}), bytes(16))) as run:
            assert await anext(aiter(run)) == TokenLine("deaf")
            pids = cargo.worker_pids
        assert (await asked_again(cargo, do="environment", name="HOME"))["value"] == "/tmp"
        assert cargo.worker_pids != pids


# Containers

CONTAINED: dict[str, str] = {
    "fork bomb": "",
    "memory bomb in a child": "",
    "disk scratch": "",
    "disk elsewhere": "",
    "one big file": "",
    "network": "",
    "host files": "",
    "write root": "",
    "become root": "",
    "mounts": "",
    "exec scratch": "",
    "others": "",
    "daemon and done": "",
    "memory bomb": "64 MiB of memory",
    "flood": "the Cargo's output is over 1048576 bytes",
    "not json": "line 1 of the Cargo's output is not JSON",
    "noisy stderr": "ended with code 3",
    "ignore signals": "more than 1 s",
    "done then loop": "more than 1 s",
}


@pytest.fixture(scope="module")
def port(runtimes: Runtimes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    """An image of the container tests' hostile program, under a name of its own."""
    engine = runtimes.container
    if not isinstance(engine, ContainerEngine):
        pytest.skip(runtimes.why_no_container)
    folder, marker = tmp_path_factory.mktemp("image"), f"archipelag-hostile-{os.getpid()}"
    source = ROOT / "tests" / "runtimes" / "container" / "hostile.c"
    subprocess.run(["gcc", "-static", "-O1", "-o", str(folder / "job"), str(source)], check=True, timeout=60)
    program_bytes = (folder / "job").read_bytes()
    root = tar([Entry("job", program_bytes), Entry("suid", program_bytes, 0o4755), Entry("etc/passwd", b"root:x:0:0::/:/job\n", 0o666)])
    made = image([root], ("/job", marker), is_gzipped=True)
    archive = ImageSource(archive=made.write(folder / "image.tar"))
    entry = f"localhost/hostile-node@sha256:{made.digest}"
    reference = trio.run(bring_image, engine, entry, archive)
    yield Port(engine, entry, archive, NODE, marker)
    trio.run(partial(remove_image, engine, reference))


@pytest.mark.parametrize("mode", CONTAINED)
async def test_a_hostile_container_is_contained(mode: str, scene: Scene, port: Port, runtimes: Runtimes) -> None:
    facts = {
        "network": {"port": str(scene.port), "socket": scene.socket},
        "host files": {"path": str(scene.key.path), "secret": SECRET, "hosts": ""},
        "others": {"pid": str(scene.victim.pid)},
    }
    words = CONTAINED[mode]
    assert port.source.archive is not None
    files = {ARCHIVE_PATH: port.source.archive}
    most = {"time_s": 1 if "more than 1 s" in words else 10, "output_bytes": MIB if "1048576" in words else 9 * MIB}
    async with opened("container", Runtime.CONTAINER, port.entry, files, runtimes, **most) as cargo:
        if words:
            with pytest.raises(Refused) as caught:
                await lines_of(cargo, mode=mode)
            check_refused(caught.value, Code.CARGO_FAILED, words)
        else:
            assert (await result_of(cargo, mode=mode, **facts.get(mode, {})))["won"] == []
        assert port.is_clean()
        assert cargo.facts().slots_free == 1


TRAPS: dict[str, tuple[Entry, str]] = {
    "climbs_out": (Entry("../../etc/cron.d/x", b"x"), "leads out"),
    "links_out": (Entry("link", kind=tarfile.LNKTYPE, link="/etc/shadow"), "leads out"),
    "brings_a_device": (Entry("disk", kind=tarfile.BLKTYPE), "has a device"),
    "unpacks_to_too_much": (Entry("zeros", bytes(20 * MIB)), "unpacks to more than"),
}


@pytest.mark.parametrize("name", TRAPS)
async def test_an_image_with_a_trap_is_not_loaded(
    name: str, scene: Scene, port: Port, runtimes: Runtimes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtimes.container.image.ImageSource", partial(ImageSource, most=ArchiveLimits(unpacked_bytes=16 * MIB)))
    trap, words = TRAPS[name]
    made = image([tar([Entry("job", b"x"), trap])], is_gzipped=True)
    files = {ARCHIVE_PATH: made.write(tmp_path / "image.tar")}
    before = images_of(port)
    with pytest.raises(ConfigError) as caught:
        async with opened("trap", Runtime.CONTAINER, f"localhost/trap@sha256:{made.digest}", files, runtimes):
            pass
    assert words in str(caught.value)
    assert images_of(port) == before and port.is_clean()


def images_of(port: Port) -> list[str]:
    """That carry a name of ours, as all do that we load."""
    command = [*port.engine.prefix, "image", "ls", "--quiet", "--filter", "reference=localhost/trap"]
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout.split()


def test_more_than_forty() -> None:
    """With a process of each kind; what an Island makes of them for a Consumer is in test_node_bad_cargos.py."""
    counts = [len(HOSTILE_MODULES) + len(REFUSED_MODULES), len(THEFTS) + len(WRECKS), len(CONTAINED) + len(TRAPS)]
    assert counts[0] >= 16 and counts[1] >= 12 and counts[2] >= 14

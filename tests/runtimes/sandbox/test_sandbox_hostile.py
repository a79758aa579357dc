"""Hostile native programs: each is contained, none is left running, the node is unharmed. Each attack works where there is no sandbox."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from protocol.errors import ConfigError
from runtimes.sandbox import box as box_module
from runtimes.sandbox import command as command_module
from runtimes.sandbox.box import Sandboxed, open_sandboxed
from runtimes.sandbox.command import Bind, Program
from runtimes.sandbox.probe import Level, Sandbox, probe
from runtimes.sandbox.seccomp import AF_INET, AF_UNIX, Policy
from runtimes.sandbox.tiers import RESTRICTED, Tier
from runtimes.sandbox.usage import Overrun
from tests.runtimes.sandbox.sandbox_attacks import ATTACKS, Attack, arguments

SECRET = "very-secret-word"
LINE_BYTES = 65536
TIER = replace(RESTRICTED, network=False, gpu=False)
ALONE = Sandbox(Level.RLIMITS, "as a test wants it")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def strong() -> Sandbox:
    sandbox = probe()
    if sandbox.level is not Level.NAMESPACES:
        pytest.skip(sandbox.reason)
    return sandbox


@dataclass(frozen=True, slots=True)
class Scene:
    """What there is to win on this host. ``victim`` is a bystander that an attack may hurt in the node's stead."""

    facts: dict[str, object]
    model: Path
    victim: subprocess.Popen[bytes]

    @property
    def marker(self) -> str:
        return str(self.facts["marker"])

    def program(self, body: str, may_fork: bool = False) -> Program:
        return Program(arguments(body, self.facts), reads=(Bind(str(self.model)),), may_fork=may_fork)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A key, two Cargos, a server of each kind, a secret in the environment, and a descriptor that is left open to children."""
    monkeypatch.setenv("ISLAND_SECRET", SECRET)
    key, store = tmp_path / "identity.key", tmp_path / "store"
    store.mkdir()
    model, other = store / "model.bin", store / "other.bin"
    for file in (key, other, model):
        file.write_text(SECRET)
    os.set_inheritable(leaked := os.open(key, os.O_RDONLY), True)
    marker = f"sandbox-test-{os.getpid()}-{time.monotonic_ns()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as named,
    ):
        abstract.bind(f"\0{marker}")
        named.bind(path := f"/tmp/{marker}"[:100])
        abstract.listen()
        named.listen()
        victim = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
        )
        facts: dict[str, object] = {
            "marker": marker,
            "key": str(key),
            "store": str(store),
            "other": str(other),
            "model": str(model),
            "code": str(ROOT / "runtimes" / "__init__.py"),
            "parent": os.getpid(),
            "victim": victim.pid,
            "port": tcp.getsockname()[1],
            "abstract": marker,
            "socket": path,
            "bomb_bytes": TIER.memory_bytes_max,
            "file_bytes": TIER.file_bytes_max,
        }
        try:
            yield Scene(facts, model, victim)
            assert victim.poll() is None, "the bystander was hurt"
            assert not survivors(marker)
        finally:
            victim.kill()
            victim.communicate()
            os.close(leaked)
            os.unlink(path)


def survivors(marker: str) -> list[int]:
    """Processes, other than this one, whose command line has the marker."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if marker.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


async def lines(box: Sandboxed) -> list[list[object]]:
    """All that the program says until it ends."""
    data = b""
    try:
        while part := await box.stream.receive_some(LINE_BYTES):
            data += part
    except trio.BrokenResourceError:
        pass
    return [json.loads(line) for line in data.splitlines()]


async def run(program: Program, sandbox: Sandbox, tier: Tier = TIER) -> tuple[list[list[object]], Sandboxed, int]:
    with trio.fail_after(30):
        async with open_sandboxed(program, tier, sandbox) as box:
            said = await lines(box)
            code = await box.wait()
    return said, box, code


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
async def test_attack_fails_in_namespaces(attack: Attack, scene: Scene, strong: Sandbox) -> None:
    said, _, _ = await run(scene.program(attack.body), strong)
    assert [said[0][0], said[0][1] in attack.errors] == ["failed", True], said
    assert scene.model.read_text() == SECRET


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.alone], ids=lambda attack: attack.name)
async def test_attack_fails_alone(attack: Attack, scene: Scene) -> None:
    said, _, _ = await run(scene.program(attack.body), ALONE)
    assert [said[0][0], said[0][1] in attack.errors] == ["failed", True], said


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.works_bare], ids=lambda attack: attack.name)
def test_attack_works_without_a_sandbox(attack: Attack, scene: Scene) -> None:
    """Else it would prove nothing. Some need root, which a test may not have."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.set_inheritable(True)
        code = f"import os; os.dup2({theirs.fileno()}, 3); os.execv({sys.executable!r}, __import__('sys').argv[1:])"
        command = [sys.executable, "-I", "-S", "-c", code, *arguments(attack.body, scene.facts)]
        # Descriptor 3 is the talk, so what leaks is looked for among the others; they are left open on purpose.
        subprocess.run(command, close_fds=False, stderr=subprocess.DEVNULL, check=False, timeout=30)
        ours.setblocking(False)
        said = json.loads(ours.recv(LINE_BYTES))
    if os.geteuid() and said[0] == "failed":
        pytest.skip(f"needs root here: {said[1]}")
    assert said[0] == "won", said
    scene.model.write_text(SECRET)


# All are bounded by themselves, far above what they may have, so that a broken wall does no harm to the machine that finds it.
FORK_BOMB = """
def attack(f):
    for _ in range(9):
        try:
            os.fork()
        except OSError:
            time.sleep(0.001)
    time.sleep(20)
"""
DAEMON = """
def attack(f):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    reading, writing = os.pipe()
    if os.fork():
        os.read(reading, 1)
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    say("daemon", os.getpid())
    os.write(writing, b"x")
    time.sleep(60)
"""
STUBBORN = """
def attack(f):
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    say("ready")
    while True:
        pass
"""
SHARED_MEMORY_BOMB = """
def attack(f):
    import mmap
    kept = []
    for _ in range(128):
        kept.append(mmap.mmap(-1, 1 << 22))
        kept[-1].write(b"x" * (1 << 22))
"""
FAMILY_MEMORY_BOMB = """
def attack(f):
    for _ in range(6):
        if os.fork() == 0:
            kept = bytearray(b"x") * (60 << 20)
            time.sleep(20)
    time.sleep(20)
"""
DISK_FILLER = """
def attack(f):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    written = 0
    try:
        for number in range(8):
            with open(f"/tmp/{number}", "wb") as file:
                for _ in range(16):
                    written += file.write(b"x" * (1 << 20))
                    file.flush()
    except OSError as error:
        return [errno.errorcode[error.errno], written]
"""
THREAD_BOMB = """
def attack(f):
    threading.stack_size(65536)
    started = 0
    hold = threading.Event()
    for _ in range(1000):
        threading.Thread(target=hold.wait, daemon=True).start()
"""
FLOOD = """
def attack(f):
    while True:
        talk.sendall(b"x" * (1 << 20))
"""
DUMP_CORE = """
def attack(f):
    os.chdir("/tmp")
    say("limits", *resource.getrlimit(resource.RLIMIT_CORE))
    os.abort()
"""
KILL_ALL = """
def attack(f):
    if os.getpid() > 9:
        return "this is no process namespace, and would end the host's"
    for pid in (-1, 1, f["victim"], f["parent"]):
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    return "alive"
"""
FOREIGN_CALL = "def attack(f): return call(0x40000000 + 39)"


async def test_a_fork_bomb_is_ended(scene: Scene, strong: Sandbox) -> None:
    _, box, code = await run(
        scene.program(FORK_BOMB, may_fork=True), strong, replace(TIER, processes_max=16, wall_s=2.0)
    )
    assert code != 0 and box.overrun in (Overrun.PROCESSES, Overrun.TIME)  # as root the kernel does not count, so we do
    assert not survivors(scene.marker)


@pytest.mark.parametrize("level", [Level.NAMESPACES, Level.RLIMITS])
async def test_a_thread_bomb_is_ended(scene: Scene, strong: Sandbox, level: Level) -> None:
    said, box, _ = await run(scene.program(THREAD_BOMB), strong if level is strong.level else ALONE)
    assert box.overrun is Overrun.PROCESSES or said[0] == ["failed", "RuntimeError"]


async def test_a_daemon_ends_with_its_job(scene: Scene, strong: Sandbox) -> None:
    with trio.fail_after(30):
        async with open_sandboxed(scene.program(DAEMON, may_fork=True), TIER, strong) as box:
            assert b"daemon" in await box.stream.receive_some(LINE_BYTES)
            await box.wait()  # the program itself has ended, and the namespace with it
            assert not survivors(scene.marker)


@pytest.mark.parametrize("level", [Level.NAMESPACES, Level.RLIMITS])
async def test_leaving_ends_what_ignores_all_signals(scene: Scene, strong: Sandbox, level: Level) -> None:
    with trio.fail_after(30):
        async with open_sandboxed(scene.program(STUBBORN), TIER, strong if level is strong.level else ALONE) as box:
            assert b"ready" in await box.stream.receive_some(LINE_BYTES)
            assert survivors(scene.marker)
    assert not survivors(scene.marker)


@pytest.mark.parametrize("level", [Level.NAMESPACES, Level.RLIMITS])
async def test_spinning_beyond_the_time_is_ended(scene: Scene, strong: Sandbox, level: Level) -> None:
    sandbox = strong if level is strong.level else ALONE
    _, box, code = await run(scene.program(STUBBORN), sandbox, replace(TIER, wall_s=0.5))
    assert box.overrun is Overrun.TIME and code in (-signal.SIGKILL, 128 + signal.SIGKILL)


async def test_the_kernel_limits_cpu_time_by_itself(
    scene: Scene, strong: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(box_module, "judge", lambda *_: None)
    _, box, code = await run(scene.program(STUBBORN), strong, replace(TIER, wall_s=0.9))
    assert box.overrun is None and code == 128 + signal.SIGKILL


@pytest.mark.parametrize("level", [Level.NAMESPACES, Level.RLIMITS])
async def test_shared_memory_counts(scene: Scene, strong: Sandbox, level: Level) -> None:
    tier = replace(TIER, memory_bytes_max=64 * 1024**2)
    _, box, _ = await run(scene.program(SHARED_MEMORY_BOMB), strong if level is strong.level else ALONE, tier)
    assert box.overrun is Overrun.MEMORY and box.peak.memory_bytes > tier.memory_bytes_max


async def test_memory_of_all_children_counts(scene: Scene, strong: Sandbox) -> None:
    _, box, _ = await run(scene.program(FAMILY_MEMORY_BOMB, may_fork=True), strong)
    assert box.overrun is Overrun.MEMORY and not survivors(scene.marker)


async def test_the_disk_is_not_filled(scene: Scene, strong: Sandbox) -> None:
    tier = replace(TIER, scratch_bytes_max=20 * 1024**2)
    said, _, _ = await run(scene.program(DISK_FILLER), strong, tier)
    assert said[0][0] == "won" and isinstance(said[0][1], list)
    why, written = said[0][1]
    assert why == "ENOSPC" and written <= tier.scratch_bytes_max + 1024**2  # what Python's buffer still held


async def test_a_flood_of_output_waits_for_its_reader(scene: Scene, strong: Sandbox) -> None:
    with trio.fail_after(30):
        async with open_sandboxed(scene.program(FLOOD), TIER, strong) as box:
            while not box.peak.memory_bytes:  # until the supervisor has seen it
                await box.stream.receive_some(LINE_BYTES)
            assert box.peak.memory_bytes < 32 * 1024**2


@pytest.mark.parametrize("level", [Level.NAMESPACES, Level.RLIMITS])
async def test_no_core_is_written(scene: Scene, strong: Sandbox, level: Level) -> None:
    said, _, code = await run(scene.program(DUMP_CORE), strong if level is strong.level else ALONE)
    assert said == [["limits", 0, 0]] and code in (-signal.SIGABRT, 128 + signal.SIGABRT)


async def test_killing_everyone_hurts_nobody(scene: Scene, strong: Sandbox) -> None:
    said, _, _ = await run(scene.program(KILL_ALL), strong)
    assert said == [["won", "alive"]]


@pytest.mark.parametrize("level", [Level.NAMESPACES, Level.RLIMITS])
async def test_a_foreign_calling_convention_ends_the_program(scene: Scene, strong: Sandbox, level: Level) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("x32 is of x86_64")
    said, _, code = await run(scene.program(FOREIGN_CALL), strong if level is strong.level else ALONE)
    assert said == [] and code in (-signal.SIGSYS, 128 + signal.SIGSYS)


NODE = """
import sys, trio
from runtimes.sandbox.box import open_sandboxed
from runtimes.sandbox.command import Program
from runtimes.sandbox.probe import Level, Sandbox
from runtimes.sandbox.tiers import RESTRICTED
async def main():
    sandbox = Sandbox(Level(sys.argv[1]), "test", sys.argv[2])
    async with open_sandboxed(Program(tuple(sys.argv[3:])), RESTRICTED, sandbox) as box:
        await box.stream.receive_some(1)
        print("ready", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.parametrize("level", [Level.NAMESPACES, Level.RLIMITS])
async def test_it_dies_with_its_node(scene: Scene, strong: Sandbox, level: Level, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        NODE,
        level.value,
        strong.bwrap,
        *arguments(STUBBORN, scene.facts | {"marker": "inside-" + scene.marker}),
    ]
    node = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert node.stdout is not None
    with node.stdout:
        assert node.stdout.readline() == b"ready\n"
        inside = [process for process in survivors("inside-" + scene.marker) if process != node.pid]
        assert inside
        watched = [os.pidfd_open(process) for process in inside]
        node.kill()
        node.wait()
    with trio.fail_after(20):
        for descriptor in watched:
            await trio.lowlevel.wait_readable(descriptor)
            os.close(descriptor)


async def test_a_wall_alone_holds_without_the_others(
    scene: Scene, strong: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Namespaces without the filter for sockets: the server of the host is still not there."""
    connect = next(attack for attack in ATTACKS if attack.name == "connect_by_tcp")
    monkeypatch.setattr(box_module, "policy_for", lambda network, may_fork: Policy((AF_UNIX, AF_INET), may_fork))
    said, _, _ = await run(scene.program(connect.body), strong)
    assert said == [["failed", "ConnectionRefusedError"]]


async def test_removing_a_wall_lets_the_attack_through(
    scene: Scene, strong: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail: without the network's two walls the connection is made, without the mounts' the key is read."""
    bodies = {attack.name: attack.body for attack in ATTACKS}
    monkeypatch.setattr(box_module, "policy_for", lambda network, may_fork: Policy((AF_UNIX, AF_INET), may_fork))
    said, _, _ = await run(scene.program(bodies["connect_by_tcp"]), strong, replace(TIER, network=True))
    assert said == [["won", None]]
    key = Bind(str(scene.facts["key"]))
    said, _, _ = await run(replace(scene.program(bodies["read_the_islands_key"]), reads=(key,)), strong)
    assert said == [["won", SECRET]]


async def test_removing_the_limits_lets_the_attack_through(
    scene: Scene, strong: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = {attack.name: attack.body for attack in ATTACKS}
    monkeypatch.setattr(command_module, "limits_for", lambda tier, has_user_namespace: ())
    roomy = replace(TIER, memory_bytes_max=2 * TIER.memory_bytes_max)
    for name in ("exhaust_descriptors", "take_all_memory", "fill_a_file"):
        said, _, _ = await run(
            scene.program(bodies[name]), strong, replace(roomy, scratch_bytes_max=2 * TIER.file_bytes_max)
        )
        assert said[0][0] == "won", (name, said)


async def test_there_is_no_end_for_an_engine(scene: Scene, strong: Sandbox) -> None:
    with trio.fail_after(30):
        async with open_sandboxed(
            scene.program("def attack(f): return talk.recv(1) and 'heard'"), TIER.lasting(), strong
        ) as box:
            assert math.isinf(box.tier.wall_s)
            await box.stream.send_all(b"x")
            assert await lines(box) == [["won", "heard"]]
            assert await box.wait() == 0


@pytest.mark.parametrize("level", [Level.NAMESPACES, Level.RLIMITS])
async def test_no_capability_is_left(scene: Scene, strong: Sandbox, level: Level) -> None:
    wanted = ("CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs", "Seccomp:")
    body = f"def attack(f): return [line.split()[1] for line in open('/proc/self/status') if line.startswith({wanted})]"
    said, _, _ = await run(scene.program(body), strong if level is strong.level else ALONE)
    assert said == [["won", ["0" * 16] * 4 + ["1", "2"]]]


@pytest.mark.parametrize("level", [Level.NAMESPACES, Level.RLIMITS])
async def test_cancelling_ends_everything_and_keeps_no_descriptor(scene: Scene, strong: Sandbox, level: Level) -> None:
    sandbox = strong if level is strong.level else ALONE

    async def once() -> None:
        with trio.CancelScope() as scope:
            async with open_sandboxed(scene.program(STUBBORN), TIER, sandbox) as box:
                await box.stream.receive_some(LINE_BYTES)
                scope.cancel()
                await trio.sleep_forever()

    with trio.fail_after(30):
        await once()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            await once()
    assert len(os.listdir("/proc/self/fd")) == before and not survivors(scene.marker)


async def test_an_error_of_the_caller_comes_out_as_it_is(scene: Scene, strong: Sandbox) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with open_sandboxed(scene.program(STUBBORN), TIER, strong):
            raise KeyError("mine")


async def test_killing_at_once(scene: Scene, strong: Sandbox) -> None:
    with trio.fail_after(30):
        async with open_sandboxed(scene.program(STUBBORN), TIER, strong) as box:
            box.kill_nowait()
            assert await box.wait() in (-signal.SIGKILL, 128 + signal.SIGKILL)
            box.kill_nowait()
            assert box.overrun is None


async def test_what_cannot_start_says_so(scene: Scene, strong: Sandbox, tmp_path: Path) -> None:
    refused = [
        (scene.program(STUBBORN), Sandbox(Level.NONE, "no Linux"), "no Linux"),
        (scene.program(STUBBORN, may_fork=True), ALONE, "install bubblewrap"),
        (replace(scene.program(STUBBORN), reads=(Bind(str(scene.model), "/model"),)), ALONE, "install bubblewrap"),
        (scene.program(STUBBORN), replace(strong, bwrap="/nowhere/bwrap"), "could not be started"),
        (scene.program(STUBBORN), replace(strong, bwrap="/bin/false"), "did not start"),
        (
            replace(scene.program(STUBBORN), reads=(Bind(str(tmp_path / "missing")),)),
            strong,
            "is not there",
        ),
    ]
    for program, sandbox, words in refused:
        with trio.fail_after(30), pytest.raises(ConfigError, match=words):
            async with open_sandboxed(program, TIER, sandbox):
                pass
    for sandbox in (strong, ALONE):
        assert (await run(Program(("/nowhere/program",)), sandbox))[2] == 126

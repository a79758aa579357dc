"""What of the sandbox is decided without doing anything: tiers, limits, the command line, usage, groups, and what the probe concludes."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.errors import ConfigError
from runtimes.sandbox.cgroup import Group, make_group, own_group, settings, usable_parent
from runtimes.sandbox.command import Bind, Descriptors, Host, Program, bwrap_command, cpus_for, environment_of
from runtimes.sandbox.host import host
from runtimes.sandbox.launch import main as launch
from runtimes.sandbox.probe import Level, View, complaint, parse_view, probe
from runtimes.sandbox.rlimits import limits_for
from runtimes.sandbox.tiers import ELEVATED, RESTRICTED, RUNTIMES, STANDARD, tier_of
from runtimes.sandbox.usage import Overrun, Usage, descendants, judge, stat_parent, status_usage

MIB = 1024**2
HOST = Host(
    "/opt/python/bin/python3",
    "/code/launch.py",
    (Bind("/opt/python"),),
    (Bind("/code"),),
    (("usr/lib", "/lib"),),
    "/code",
)
GIVEN = Descriptors(control=7, seccomp=8, info=9, block=10)
PROGRAM = Program(
    ("/opt/python/bin/python3", "-m", "worker"),
    reads=(Bind("/models/a.onnx"),),
    environment=(("OMP_NUM_THREADS", "1"),),
)
GOOD = View(("lo",), True, (), (), 2, ("HOME",), 2, 1, 0)


def test_tiers_are_as_the_mission_says() -> None:
    facts = [(t.memory_bytes_max // MIB, t.wall_s, t.cpus, t.network, t.gpu) for t in (RESTRICTED, STANDARD, ELEVATED)]
    assert facts == [(256, 60, 1, False, False), (1024, 300, 2, False, False), (8192, 600, 4, True, True)]


@pytest.mark.parametrize("runtime", sorted(RUNTIMES))
def test_only_containers_have_the_network(runtime: str) -> None:
    tiers = [tier_of(level, runtime) for level in range(4)]
    assert [tier.network for tier in tiers] == [False, False, runtime == "container", runtime == "container"]
    assert [tier.gpu for tier in tiers] == [tier.network for tier in tiers]
    assert [tier.name for tier in tiers] == ["restricted", "standard", "elevated", "elevated"]


@pytest.mark.parametrize(("level", "runtime"), [(-1, "onnx"), (4, "onnx"), (0, "shell")])
def test_there_are_no_other_tiers(level: int, runtime: str) -> None:
    with pytest.raises(ConfigError):
        tier_of(level, runtime)


def test_limits_follow_the_tier() -> None:
    limits = {name: (soft, hard) for name, soft, hard in limits_for(STANDARD, has_user_namespace=True)}
    assert limits["DATA"] == (1024 * MIB,) * 2 and limits["NPROC"] == (64, 64) and limits["CORE"] == (0, 0)
    assert limits["CPU"] == (600, 601) and limits["NOFILE"] == (256, 256) and limits["FSIZE"] == (128 * MIB,) * 2
    names = {name for name, _, _ in limits_for(STANDARD.lasting(), has_user_namespace=False)}
    assert not names & {"CPU", "NPROC"} and math.isinf(STANDARD.lasting().cpu_s)


def test_the_command_walls_everything_off() -> None:
    words = bwrap_command("/usr/bin/bwrap", PROGRAM, RESTRICTED, HOST, GIVEN)
    for flag in "--unshare-user --unshare-pid --unshare-ipc --unshare-uts --unshare-net --unshare-cgroup-try".split():
        assert flag in words
    for flag in "--disable-userns --die-with-parent --new-session --clearenv".split():
        assert flag in words
    text = " ".join(words)
    assert "--cap-drop ALL" in text and "--seccomp 8" in text and "--chdir /tmp" in text
    assert f"--size {64 * MIB} --tmpfs /tmp" in text and "--symlink usr/lib /lib" in text
    assert not {"--bind", "--dev-bind", "--share-net", "--cap-add"} & set(words)
    sources = [words[i + 1] for i, word in enumerate(words) if word == "--ro-bind"]
    assert sources == ["/opt/python", "/code", "/models/a.onnx"]
    assert words[words.index("--") + 1 :][:4] == ["/opt/python/bin/python3", "-I", "-S", "/code/launch.py"]
    last = max(i for i, word in enumerate(words) if word == "--ro-bind")
    assert [words[i + 1] for i, word in enumerate(words) if word == "--remount-ro" and i > last] == [
        "/proc",
        "/dev",
        "/",
    ]


def test_the_command_grants_what_was_granted() -> None:
    words = bwrap_command(
        "/usr/bin/bwrap", replace(PROGRAM, devices=("/dev/nvidia0",), has_code=False), ELEVATED, HOST, GIVEN
    )
    assert "--unshare-net" not in words and "/code" not in words
    assert words[words.index("--dev-bind") :][:3] == ["--dev-bind", "/dev/nvidia0", "/dev/nvidia0"]


def test_the_environment_is_what_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISLAND_SECRET", "x")
    names = set(environment_of(PROGRAM, HOST))
    assert (
        "OMP_NUM_THREADS" in names
        and "ISLAND_SECRET" not in names
        and names
        <= set(
            "HOME LANG PATH TMPDIR USER GGML_NO_BACKTRACE PYTHONDONTWRITEBYTECODE PYTHONUNBUFFERED PYTHONPATH OMP_NUM_THREADS".split()
        )
    )


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("/", ""),
        ("model", ""),
        ("/a/../etc", ""),
        ("/a/", ""),
        ("//a", ""),
        ("/a\0b", ""),
        ("/proc/1/root", ""),
        ("/dev/sda", "/disk"),
        ("/sys", "/a"),
        ("/a", "/proc/x"),
        ("/a", "/tmp"),
        ("/a", "/"),
        ("/a", "b"),
    ],
)
def test_a_bind_opens_no_more_than_a_file(source: str, target: str) -> None:
    with pytest.raises(ConfigError):
        Bind(source, target)


def test_a_program_is_named_fully() -> None:
    for command in ((), ("python",), ("/usr/../bin/sh",)):
        with pytest.raises(ConfigError):
            Program(command)
    with pytest.raises(ConfigError):
        Program(("/bin/sh",), devices=("/etc/shadow",))


def test_the_host_shows_no_home_and_no_data() -> None:
    shown = {bind.source for bind in (*host().binds, *host().code)}
    assert not shown & {"/", "/usr", "/etc", "/home", "/root", "/var", os.path.expanduser("~")}


@pytest.mark.parametrize(
    ("allowed", "count", "turn", "expected"),
    [
        ([0, 1, 2, 3], 1, 0, [0]),
        ([0, 1, 2, 3], 1, 5, [1]),
        ([0, 1, 2], 2, 1, [0, 2]),
        ([4, 6], 2, 0, []),
        ([0], 4, 0, []),
    ],
)
def test_programs_take_turns_with_cpus(allowed: list[int], count: int, turn: int, expected: list[int]) -> None:
    assert cpus_for(allowed, count, turn) == expected


def test_usage_is_read_from_proc() -> None:
    status = "Name:\tx\nRssAnon:\t  100 kB\nRssFile:\t 9000 kB\nRssShmem:\t 20 kB\nThreads:\t3\nVmSwap:\t  4 kB\n"
    assert status_usage(status) == Usage(124 * 1024, 3)
    assert status_usage("") == Usage(0, 0)
    assert stat_parent("17 (a) b) c) S 5 17 17 0") == 5
    assert sorted(descendants([(2, 1), (3, 2), (4, 2), (5, 9), (6, 4)], [2])) == [3, 4, 6]


@pytest.mark.parametrize(
    ("usage", "elapsed_s", "expected"),
    [
        (Usage(256 * MIB, 32), 60.0, None),
        (Usage(256 * MIB + 1, 1), 0.0, Overrun.MEMORY),
        (Usage(0, 33), 0.0, Overrun.PROCESSES),
        (Usage(0, 0), 60.1, Overrun.TIME),
    ],
)
def test_overruns(usage: Usage, elapsed_s: float, expected: Overrun | None) -> None:
    assert judge(RESTRICTED, usage, elapsed_s) is expected
    assert judge(RESTRICTED.lasting(), Usage(0, 0), 1e9) is None


def test_a_group_is_made_where_it_may_be(tmp_path: Path) -> None:
    own = tmp_path / "app.slice" / "node.service"
    own.mkdir(parents=True)
    assert own_group("3:cpu:/x\n0::/app.slice/node.service\n", f"cgroup2 {tmp_path} cgroup2 rw 0 0\n") == own
    assert own_group("3:cpu:/x\n", f"cgroup2 {tmp_path} cgroup2 rw 0 0\n") is None
    assert usable_parent(own) is None
    (own.parent / "cgroup.procs").write_text("")
    (own.parent / "cgroup.subtree_control").write_text("cpu\n")
    assert usable_parent(own) is None
    (own.parent / "cgroup.subtree_control").write_text("cpu memory pids\n")
    assert usable_parent(own) == own.parent
    group = make_group(own.parent, "cargo", RESTRICTED)
    assert (group.folder / "memory.max").read_text() == str((256 + 64) * MIB)
    assert (group.folder / "pids.max").read_text() == "34" and (group.folder / "cpu.max").read_text() == "100000 100000"
    group.join(17)
    assert (group.folder / "cgroup.procs").read_text() == "17" and "cpu.max" not in settings(RESTRICTED, has_cpu=False)


def test_a_group_tells_why_and_goes(tmp_path: Path) -> None:
    group = Group(tmp_path / "cargo")
    assert group.remove() and not group.is_out_of_memory()
    group.folder.mkdir()
    (group.folder / "memory.events").write_text("oom 1\noom_kill 0\n")
    assert not group.is_out_of_memory()
    (group.folder / "memory.events").write_text("oom 1\noom_kill 2\n")
    assert group.is_out_of_memory()
    (group.folder / "memory.events").unlink()
    group.kill()
    assert group.remove() and not group.folder.exists()


@pytest.mark.parametrize(
    ("view", "word"),
    [
        (GOOD, ""),
        (replace(GOOD, seccomp=0), "seccomp"),
        (replace(GOOD, no_new_privs=0), "privileges"),
        (replace(GOOD, capabilities=1), "privileges"),
        (replace(GOOD, interfaces=("eth0", "lo")), "network"),
        (replace(GOOD, refuses_network=False), "network"),
        (replace(GOOD, processes=9), "processes"),
        (replace(GOOD, home=(".ssh", ".venv"), allowed=(".venv",)), ".ssh"),
        (replace(GOOD, home=(".venv",), allowed=(".venv",)), ""),
    ],
)
def test_the_probe_says_what_is_wrong(view: View, word: str) -> None:
    assert word in complaint(view) and bool(complaint(view)) == bool(word)


def test_the_probe_reads_only_what_it_printed() -> None:
    for text in ("", "[]", "{}", '{"seccomp": 2}'):
        with pytest.raises(ValueError):
            parse_view(text)


def test_without_bubblewrap_it_is_said(tmp_path: Path) -> None:
    missing = probe(bwrap="")
    assert missing.level is Level.RLIMITS and "apt-get install bubblewrap" in missing.reason
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    found = probe(bwrap=str(broken))
    assert found.level is Level.RLIMITS and "uid map: Permission denied" in found.reason
    assert str(found).startswith("sandbox rlimits+no_new_privs: ")
    broken.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')  # walls nothing off
    assert "does not hold" in (found := probe(bwrap=str(broken))).reason and found.level is Level.RLIMITS


def test_the_launcher_needs_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["DATA=1:1"]) == 126
    assert "usage" in capsys.readouterr().err

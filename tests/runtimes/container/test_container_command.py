"""What is asked of an engine, which engines will do, and how the end of a container is judged: all without an engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protocol.cargo_io import DoneLine, LineReader
from protocol.errors import Code, ConfigError, LocalProtocolError, Refused
from runtimes.container.client import EngineFailed, call_program, client_environment, text_writer
from runtimes.container.command import (
    Container,
    create_command,
    leftovers_command,
    limits_of,
    name_for,
    remove_command,
    start_command,
)
from runtimes.container.engines import ContainerEngine, Kind, docker_engine, find_engine, podman_engine, with_profile
from runtimes.container.image import registry_of
from runtimes.container.seccomp import profile
from runtimes.container.verdict import State, judge, not_started, parse_state
from tests.runtimes.container.container_cargos import MIB, needs

PODMAN = ContainerEngine("/usr/bin/podman", Kind.PODMAN, "4.3.1", "runc", "podman", is_chosen=True, seccomp="{}")
DOCKER = ContainerEngine("/usr/bin/docker", Kind.DOCKER, "28.2.2", "runc", "Docker")
IMAGE = "example.org/tools/ocr@sha256:" + "ab" * 32
LIMITS = limits_of(needs(), trust_level=0)
CONTAINER = Container(IMAGE, name_for(bytes(16)), "12D3KooWNode", "cd" * 32, bytes(range(16)), LIMITS)


def after(command: list[str], flag: str) -> list[str]:
    """All values of a flag."""
    return [command[i + 1] for i, word in enumerate(command) if word == flag]


@pytest.mark.parametrize("engine", [PODMAN, DOCKER], ids=["podman", "docker"])
def test_every_wall_is_named(engine: ContainerEngine) -> None:
    command = create_command(engine, CONTAINER)
    assert command[-1] == IMAGE
    assert after(command, "--cap-drop") == ["ALL"]
    assert "no-new-privileges" in after(command, "--security-opt")
    assert after(command, "--network") == ["none"]
    assert {"--read-only", "--privileged=false", "--no-healthcheck"} <= set(command)
    (scratch,) = after(command, "--tmpfs")
    assert scratch.removesuffix(",notmpcopyup") == f"/tmp:rw,size={8 * MIB},noexec,nosuid,nodev,mode=1777"
    assert after(command, "--memory") == after(command, "--memory-swap") == [f"{64 * MIB}b"]
    assert after(command, "--pids-limit") == ["32"]
    assert after(command, "--cpus") == ["1"]
    ulimits = ["nofile=128:128", "nproc=1024:1024", f"fsize={32 * MIB}:{32 * MIB}", "core=0:0"]
    assert after(command, "--ulimit") == ulimits
    assert after(command, "--user") == ["65534:65534"]
    assert after(command, "--pull") == ["never"]
    assert after(command, "--log-driver") == ["none"]
    assert after(command, "--name") == ["archipelag-" + "00" * 16]
    assert after(command, "--label") == ["archipelag.node=12D3KooWNode", "archipelag.cargo=" + "cd" * 32]
    assert after(command, "--ipc") == after(command, "--cgroupns") == ["private"]
    assert not {"--tty", "-t", "--volume", "-v", "--mount", "--device", "--publish", "-p", "--env-host"} & set(command)


def test_defaults_of_podman_that_open_something_are_closed() -> None:
    command = create_command(PODMAN, CONTAINER)
    assert command[:4] == ["/usr/bin/podman", "--runtime", "runc", "create"]
    assert {"--read-only-tmpfs=false", "--no-hosts", "--http-proxy=false"} <= set(command)
    assert after(command, "--image-volume") == ["ignore"]
    assert after(command, "--timeout") == ["10"]
    assert after(command, "--env") == ["CARGO_SEED=000102030405060708090a0b0c0d0e0f"]
    assert after(command, "--security-opt")[1] == "seccomp=/dev/stdin"
    assert "seccomp=/dev/stdin" not in create_command(replace(PODMAN, seccomp=""), CONTAINER)


def test_docker_is_asked_only_what_it_knows_and_its_proxies_are_emptied() -> None:
    command = create_command(DOCKER, CONTAINER)
    assert not {
        "--read-only-tmpfs=false",
        "--no-hosts",
        "--http-proxy=false",
        "--timeout",
        "--image-volume",
        "--pid",
    } & set(command)
    assert {"HTTP_PROXY=", "http_proxy=", "NO_PROXY=", "all_proxy="} <= set(after(command, "--env"))
    assert start_command(DOCKER, "x") == ["/usr/bin/docker", "start", "--attach", "--interactive", "x"]
    assert remove_command(DOCKER, ["x"]) == ["/usr/bin/docker", "rm", "--force", "--volumes", "x"]


def test_network_goes_with_the_tier() -> None:
    granted = replace(CONTAINER, limits=limits_of(needs(), trust_level=2))
    assert after(create_command(PODMAN, granted), "--network") == ["private"]
    assert after(create_command(DOCKER, granted), "--network") == ["bridge"]
    for level in (0, 1):
        assert not limits_of(needs(), level).has_network


def test_cargo_gets_what_it_asks_for_up_to_its_tier() -> None:
    greedy = needs(memory_bytes=2**40, time_s=600, disk_bytes=2**40, cpu_threads=64)
    limits = limits_of(greedy, 0)
    assert (limits.memory_bytes, limits.scratch_bytes, limits.cpus, limits.time_s) == (256 * MIB, 64 * MIB, 1, 60)
    modest = limits_of(needs(memory_bytes=1, disk_bytes=0), 1)
    assert (modest.memory_bytes, modest.scratch_bytes) == (16 * MIB, MIB)  # a size of 0 would mean no limit
    assert "--cpus" not in create_command(replace(PODMAN, limits_cpu=False), CONTAINER)


@pytest.mark.parametrize(
    "image", ["debian", "debian:12", "debian@sha256:ab", "--privileged", "a b@sha256:" + "ab" * 32, ""]
)
def test_image_is_named_by_digest_only(image: str) -> None:
    with pytest.raises(LocalProtocolError):
        replace(CONTAINER, image=image)


@pytest.mark.parametrize("changes", [{"name": "archipelag-1"}, {"node": "a b"}, {"node": ""}, {"cargo": "x,y=z"}])
def test_names_and_labels_are_plain(changes: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError):
        replace(CONTAINER, **changes)
    with pytest.raises(LocalProtocolError):
        leftovers_command(PODMAN, "x --all")


def test_client_gets_nothing_secret() -> None:
    whole = {
        "PATH": "/bin",
        "XDG_RUNTIME_DIR": "/run/user/1",
        "DOCKER_HOST": "unix:///x",
        "AK_KEY": "s",
        "HTTP_PROXY": "s",
    }
    assert set(client_environment(whole)) == {"PATH", "XDG_RUNTIME_DIR", "DOCKER_HOST"}


async def test_call_that_hangs_is_ended_and_says_so() -> None:
    with pytest.raises(EngineFailed, match=r"sleep took more than 0\.2 s"):
        await call_program(["sleep", "600"], 0.2)
    with pytest.raises(EngineFailed, match="cannot be started"):
        await call_program(["/nonexistent/podman"], 1)


async def test_call_is_fed_and_heard() -> None:
    answer = await call_program(["cat"], 10, text_writer("x" * 300_000))
    assert answer.stdout == b"x" * 300_000 and answer.code == 0
    assert (await call_program(["true"], 10, text_writer("x" * 300_000))).code == 0  # it reads nothing


PODMAN_INFO: dict[str, Any] = {
    "host": {
        "cgroupControllers": ["cpu", "memory", "pids"],
        "cgroupVersion": "v2",
        "ociRuntime": {"name": "runc"},
        "security": {"rootless": False, "seccompEnabled": True},
    },
    "version": {"Version": "4.3.1"},
}
DOCKER_INFO: dict[str, Any] = {
    "ServerVersion": "28.2.2",
    "OSType": "linux",
    "MemoryLimit": True,
    "PidsLimit": True,
    "CPUCfsQuota": True,
    "DefaultRuntime": "runc",
    "SecurityOptions": ["name=seccomp,profile=builtin", "name=cgroupns"],
}


def podman_info(**changes: Any) -> dict[str, Any]:
    return PODMAN_INFO | {"host": PODMAN_INFO["host"] | changes}


def test_engines_that_will_do() -> None:
    engine = podman_engine("/usr/bin/podman", PODMAN_INFO)
    assert (engine.kind, engine.version, engine.runtime, engine.limits_cpu) == (Kind.PODMAN, "4.3.1", "runc", True)
    assert not podman_engine("/p", podman_info(cgroupControllers=["memory", "pids"])).limits_cpu
    assert str(docker_engine("/d", DOCKER_INFO)) == "docker 28.2.2 with runc"


@pytest.mark.parametrize(
    "info,said",
    [
        (podman_info(cgroupVersion="v1", security={"rootless": True, "seccompEnabled": True}), "cgroup v1"),
        (podman_info(cgroupControllers=["cpu", "pids"]), "cannot limit memory"),
        (podman_info(security={"rootless": False, "seccompEnabled": False}), "no seccomp"),
        (PODMAN_INFO | {"version": {"Version": "3.0.1"}}, "too old"),
        ({}, "too old"),
    ],
)
def test_podman_that_will_not_do(info: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        podman_engine("/usr/bin/podman", info)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"ServerErrors": ["Cannot connect to the Docker daemon"]}, "Cannot connect"),
        ({"OSType": "windows"}, "no Linux"),
        ({"PidsLimit": False}, "cannot limit processes"),
        ({"SecurityOptions": []}, "no seccomp"),
        ({"ServerVersion": ""}, "too old"),
    ],
)
def test_docker_that_will_not_do(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        docker_engine("/usr/bin/docker", DOCKER_INFO | changes)


def fake_program(folder: Path, name: str, says: dict[str, Any] | str) -> Path:
    path = folder / name
    text = says if isinstance(says, str) else json.dumps(says)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    path.chmod(0o755)
    return path


async def test_first_engine_that_works_is_taken(tmp_path: Path) -> None:
    there = {
        "podman": str(fake_program(tmp_path, "podman", PODMAN_INFO)),
        "docker": str(fake_program(tmp_path, "docker", DOCKER_INFO)),
        "runc": "/usr/sbin/runc",
    }
    found = (await find_engine(there.get)).engine
    assert found is not None and found.prefix == (there["podman"], "--runtime", "runc") and found.seccomp
    fake_program(tmp_path, "podman", "nonsense")
    found = (await find_engine(there.get)).engine
    assert found is not None and found.kind is Kind.DOCKER and found.prefix == (there["docker"],)


async def test_without_an_engine_the_reason_says_what_to_do() -> None:
    search = await find_engine(lambda name: None)
    assert search.engine is None
    assert (
        search.reason
        == "no container engine: podman is not installed; Docker is not installed; `apt-get install podman runc` brings one"
    )


def test_profile_allows_no_new_namespaces_and_few_sockets() -> None:
    fields = json.loads(profile("x86_64"))
    assert (fields["defaultAction"], fields["architectures"]) == ("SCMP_ACT_ERRNO", ["SCMP_ARCH_X86_64"])
    plain, *others = fields["syscalls"]
    assert len(plain["names"]) == len(set(plain["names"]))
    assert not {
        "unshare",
        "setns",
        "mount",
        "keyctl",
        "ptrace",
        "bpf",
        "io_uring_setup",
        "clone",
        "clone3",
        "socket",
    } & set(plain["names"])
    rules = [(rule["names"][0], [(c["index"], c["value"]) for c in rule["args"]]) for rule in others if "args" in rule]
    assert ("clone", [(0, 0x7E020000)]) in rules
    assert [conditions for name, conditions in rules if name == "socket"] == [
        [(0, 1)],
        [(0, 2)],
        [(0, 10)],
        [(0, 16), (2, 0)],
    ]
    assert {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38} in others


def test_machine_without_a_profile_is_said_out_loud() -> None:
    assert profile("riscv64") == ""
    assert "its own seccomp filter only" in with_profile(PODMAN, "riscv64").reason
    assert with_profile(replace(PODMAN, seccomp=""), "aarch64").seccomp


@pytest.mark.parametrize(
    "entry,registry",
    [
        ("docker.io/library/debian@sha256:x", "docker.io"),
        ("localhost/x@sha256:x", "localhost"),
        ("registry:5000/x@sha256:x", "registry:5000"),
        ("library/debian@sha256:x", ""),
        ("debian@sha256:x", ""),
    ],
)
def test_registry_is_what_the_entry_names(entry: str, registry: str) -> None:
    assert registry_of(entry) == registry


def reader_of(output: bytes) -> LineReader:
    reader = LineReader()
    reader.feed(output)
    return reader


DONE = b'{"type":"done","x":1}\n'
ENDED = State(was_started=True, exit_code=0, is_out_of_memory=False)


def test_done_counts_only_after_a_good_end() -> None:
    assert judge(reader_of(DONE), ENDED, LIMITS) == DoneLine(result='{"x":1}')


@pytest.mark.parametrize(
    "output,state,said",
    [
        (DONE, replace(ENDED, exit_code=1), "ended with code 1"),
        (DONE, replace(ENDED, exit_code=137), "as happens to one that uses more than its 64 MiB"),
        (DONE, replace(ENDED, exit_code=137, is_out_of_memory=True), "used more than its 64 MiB"),
        (DONE, replace(ENDED, exit_code=-1), "more than 10 s"),
        (b"", ENDED, "ended after 0 lines without done or error"),
        (b'{"type":', replace(ENDED, exit_code=139), "ended with code 139"),
        (b'{"type":"error","message":"no page"}', replace(ENDED, exit_code=1), "no page"),
    ],
)
def test_bad_end_says_why(output: bytes, state: State, said: str) -> None:
    with pytest.raises(Refused) as caught:
        judge(reader_of(output), state, LIMITS)
    assert caught.value.code is Code.CARGO_FAILED and said in caught.value.message


def test_what_never_ran_is_the_cargos_fault_only_without_its_program() -> None:
    assert not_started('exec: "/job": stat /job: no such file or directory').code is Code.CARGO_FAILED
    assert not_started("error creating cgroup").code is Code.WORKER_DIED


def test_state_of_an_engine() -> None:
    fields = {"StartedAt": "2026-01-01T00:00:00Z", "ExitCode": 3, "OOMKilled": True}
    assert parse_state(json.dumps(fields).encode()) == State(True, 3, True)
    assert not parse_state(json.dumps(fields | {"StartedAt": "0001-01-01T00:00:00Z"}).encode()).was_started
    for data in (b"", b"[]", b"{}", json.dumps(fields | {"ExitCode": None}).encode()):
        with pytest.raises(ValueError):
            parse_state(data)

"""Which container engine is there, works, and can hold its containers to their limits.

An engine that cannot limit memory and processes, or has no seccomp filter, is not used: what it runs is a stranger's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from protocol.errors import ConfigError
from runtimes.container.client import EngineFailed, call_program
from runtimes.container.seccomp import profile

_PROBE_S = 20.0  # an info call takes 0.1 s; the first one after a boot sets up the storage
_NEEDED = ("memory", "pids")  # cgroup controllers
_PODMAN_MAJOR_MIN = 4  # Debian 12's; older ones lack some of the flags
_DOCKER_MAJOR_MIN = 20  # --pull never, --cgroupns
_INSTALL = "`apt-get install podman runc` brings one"

Find = Callable[[str], str | None]


class Kind(StrEnum):
    PODMAN = "podman"
    DOCKER = "docker"


@dataclass(frozen=True, slots=True)
class ContainerEngine:
    """``program``: absolute path; ``runtime``: what starts the containers, such as runc. ``reason`` says in words what was found.
    ``limits_cpu``: whether it can; without root it often cannot. ``is_chosen``: whether the runtime has to be named on each call.
    ``seccomp``: the profile in JSON that containers get; the engine's own if empty."""

    program: str
    kind: Kind
    version: str
    runtime: str
    reason: str
    limits_cpu: bool = True
    is_chosen: bool = False
    seccomp: str = field(default="", repr=False)

    @property
    def prefix(self) -> tuple[str, ...]:
        """What every command line begins with."""
        return (self.program, "--runtime", self.runtime) if self.is_chosen else (self.program,)

    def __str__(self) -> str:
        return f"{self.kind} {self.version} with {self.runtime}"


@dataclass(frozen=True, slots=True)
class EngineSearch:
    """``engine`` is None where there is none that will do; ``reason`` says why, and what would help."""

    engine: ContainerEngine | None
    reason: str


async def find_engine(find: Find = shutil.which) -> EngineSearch:
    """The first that is there and works: podman, with runc where it is installed, then Docker. ``find``: a program's path by its name."""
    reasons: list[str] = []
    for probe in (_probe_podman, _probe_docker):
        try:
            engine = await probe(find)
        except (ConfigError, EngineFailed) as error:
            reasons.append(str(error))
        else:
            engine = with_profile(engine, os.uname().machine)
            return EngineSearch(engine, engine.reason)
    return EngineSearch(None, f"no container engine: {'; '.join(reasons)}; {_INSTALL}")


async def _probe_podman(find: Find) -> ContainerEngine:
    program = find("podman")
    if program is None:
        raise ConfigError("podman is not installed")
    has_runc = find("runc") is not None
    words = ("--runtime", "runc") if has_runc else ()
    engine = podman_engine(program, await _info((program, *words), ("--format", "json")))
    return replace(engine, is_chosen=has_runc)


async def _probe_docker(find: Find) -> ContainerEngine:
    program = find("docker")
    if program is None:
        raise ConfigError("Docker is not installed")
    return docker_engine(program, await _info((program,), ("--format", "{{json .}}")))


async def _info(prefix: tuple[str, ...], form: tuple[str, ...]) -> Mapping[str, Any]:
    """Raises EngineFailed, ConfigError."""
    answer = await call_program((*prefix, "info", *form), _PROBE_S)
    try:
        value = json.loads(answer.stdout)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{prefix[0]} does not work: {answer.complaint}")
    return value


def with_profile(engine: ContainerEngine, machine: str) -> ContainerEngine:
    """With our seccomp profile where there is one for this machine."""
    if text := profile(machine):
        return replace(engine, seccomp=text)
    return replace(engine, reason=f"{engine.reason}, its own seccomp filter only, as we have none for {machine}")


def podman_engine(program: str, info: Mapping[str, Any]) -> ContainerEngine:
    """From what ``podman info`` says. Raises ConfigError for one that will not do."""
    host = _part(info, "host")
    version = _words(_part(info, "version").get("Version"))
    security = _part(host, "security")
    controllers = host.get("cgroupControllers") or []
    is_rootless = security.get("rootless") is True
    _check_version("podman", version, _PODMAN_MAJOR_MIN)
    if is_rootless and host.get("cgroupVersion") != "v2":
        raise ConfigError(
            "podman without root limits nothing under cgroup v1; run the node as root, or boot with cgroup v2"
        )
    if missing := [name for name in _NEEDED if name not in controllers]:
        raise ConfigError(
            f"podman cannot limit {' and '.join(missing)} here; delegate these cgroup controllers to the user"
        )
    if security.get("seccompEnabled") is not True:
        raise ConfigError("podman has no seccomp filter here")
    runtime = _words(_part(host, "ociRuntime").get("name"))
    who = "without root" if is_rootless else "as root"
    return ContainerEngine(
        program, Kind.PODMAN, version, runtime, f"podman {version} with {runtime}, {who}", "cpu" in controllers
    )


def docker_engine(program: str, info: Mapping[str, Any]) -> ContainerEngine:
    """From what ``docker info`` says. Raises ConfigError for one that will not do."""
    if errors := info.get("ServerErrors"):
        raise ConfigError(f"Docker does not work: {_words(errors)}")
    version = _words(info.get("ServerVersion"))
    _check_version("Docker", version, _DOCKER_MAJOR_MIN)
    if info.get("OSType") != "linux":
        raise ConfigError("Docker runs no Linux containers here")
    for fact, name in (("MemoryLimit", "memory"), ("PidsLimit", "processes")):
        if info.get(fact) is not True:
            raise ConfigError(f"Docker cannot limit {name} here")
    options = info.get("SecurityOptions") or []
    if not any(str(option).startswith("name=seccomp") for option in options):
        raise ConfigError("Docker has no seccomp filter here")
    runtime = _words(info.get("DefaultRuntime"))
    has_cpu = info.get("CPUCfsQuota") is True
    return ContainerEngine(program, Kind.DOCKER, version, runtime, f"Docker {version} with {runtime}", has_cpu)


def _part(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = value.get(name)
    return part if isinstance(part, dict) else {}


def _words(value: object) -> str:
    """In one short line; a dash for nothing."""
    text = "; ".join(map(str, value)) if isinstance(value, list) else str(value or "-")
    return " ".join(text.split())[:200]


def _check_version(name: str, version: str, major_min: int) -> None:
    found = re.match(r"[0-9]{1,6}", version)
    if found is None or int(found[0]) < major_min:
        raise ConfigError(f"{name} {version} is too old; {major_min}.0 or newer is needed")

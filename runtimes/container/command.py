"""What is asked of a container engine, word by word. Pure.

Every wall is named, also those that are the engine's default: an operator's configuration may have changed it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from protocol.cargos import Needs
from protocol.errors import LocalProtocolError
from runtimes.container.engines import ContainerEngine, Kind
from runtimes.sandbox.tiers import CONTAINER, tier_of

SCRATCH = "/tmp"
SEED_VARIABLE = "CARGO_SEED"
NODE_LABEL = "archipelag.node"
CARGO_LABEL = "archipelag.cargo"
NAME_PREFIX = "archipelag-"

_MIB = 1024**2
_USER = "65534:65534"  # nobody, in every image
_HOST_NAME = "cargo"
_MEMORY_BYTES_MIN = 16 * _MIB  # what starts the container runs within the limit for a moment
_SCRATCH_BYTES_MIN = _MIB  # a size of 0 would mean none
_SHARED_BYTES_MAX = 16 * _MIB
_PROCESSES_OF_USER_MAX = 1024  # over all containers together, whose user is the same; the limit of one is pids-limit
_OOM_SCORE = 500  # where the whole machine runs out of memory, the Cargo goes before the node
_IMAGE = re.compile(r"(?:[a-z0-9][a-z0-9._:/-]*@)?sha256:[0-9a-f]{64}\Z")
_NAME = re.compile(r"archipelag-[0-9a-f]{32}\Z")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
# Docker's client puts the proxies of its configuration, passwords and all, into containers unless they are set.
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")


@dataclass(frozen=True, slots=True)
class ContainerLimits:
    """Of one job. ``scratch_bytes``: the size of /tmp, which counts as memory. ``processes``: threads too. ``time_s``: from its start."""

    memory_bytes: int
    scratch_bytes: int
    cpus: int
    processes: int
    open_files: int
    file_bytes: int
    time_s: int
    has_network: bool


def limits_of(needs: Needs, trust_level: int) -> ContainerLimits:
    """What the Cargo asks for, as far as its tier gives it. Raises ConfigError for a level that is none."""
    tier = tier_of(trust_level, CONTAINER)
    return ContainerLimits(
        memory_bytes=max(_MEMORY_BYTES_MIN, min(needs.memory_bytes, tier.memory_bytes_max)),
        scratch_bytes=max(_SCRATCH_BYTES_MIN, min(needs.disk_bytes, tier.scratch_bytes_max)),
        cpus=min(needs.cpu_threads, tier.cpus),
        processes=tier.processes_max,
        open_files=tier.open_files_max,
        file_bytes=tier.file_bytes_max,
        time_s=min(needs.time_s, int(tier.wall_s)),
        has_network=tier.network,
    )


@dataclass(frozen=True, slots=True)
class Container:
    """One container to be. ``image``: NAME@sha256:…, or sha256:… for the id that an engine computes from what is in it. ``name``: nobody
    can guess it. ``node``, ``cargo``: labels, by which leftovers are found. ``seed``: 16 bytes."""

    image: str
    name: str
    node: str
    cargo: str
    seed: bytes
    limits: ContainerLimits

    def __post_init__(self) -> None:
        if not _IMAGE.match(self.image):
            raise LocalProtocolError(f"an image is run by its digest only, not as {self.image[:80]!r}")
        if not _NAME.match(self.name):
            raise LocalProtocolError(f"{self.name[:80]!r} is no name that we give to containers")
        _check_label(self.node)
        _check_label(self.cargo)


def name_for(chance: bytes) -> str:
    """A container's name. ``chance``: 16 bytes, so that no other program of the machine can have taken it."""
    return f"{NAME_PREFIX}{chance.hex()}"


def _check_label(value: str) -> None:
    if not _LABEL_VALUE.match(value):
        raise LocalProtocolError(f"a label of a container has letters, digits, dots and dashes, not {value[:80]!r}")


def create_command(engine: ContainerEngine, container: Container) -> list[str]:
    """Makes the container, without starting it; nothing of the Cargo's runs. Its image's own program is what will. Where the engine has
    a ``seccomp``, the command reads that on stdin."""
    return [
        *engine.prefix,
        *("create", "--pull", "never", "--name", container.name),
        *("--label", f"{NODE_LABEL}={container.node}", "--label", f"{CARGO_LABEL}={container.cargo}"),
        *("--interactive", "--log-driver", "none", "--no-healthcheck"),
        *_privileges(engine),
        *_namespaces(engine, container.limits),
        *_files(engine, container.limits),
        *_limits(engine, container.limits),
        *_environment(engine, container.seed),
        container.image,
    ]


def _privileges(engine: ContainerEngine) -> Iterable[str]:
    yield from ("--privileged=false", "--user", _USER, "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    if engine.seccomp:
        yield from ("--security-opt", "seccomp=/dev/stdin")


def _namespaces(engine: ContainerEngine, limits: ContainerLimits) -> Iterable[str]:
    yield from ("--ipc", "private", "--cgroupns", "private", "--hostname", _HOST_NAME)
    is_podman = engine.kind is Kind.PODMAN
    if is_podman:  # with Docker these are private unless shared by name
        yield from ("--pid", "private", "--uts", "private")
    if not limits.has_network:
        yield from ("--network", "none")
    else:
        yield from ("--network", "private" if is_podman else "bridge")


def _files(engine: ContainerEngine, limits: ContainerLimits) -> Iterable[str]:
    is_podman = engine.kind is Kind.PODMAN
    copied = ",notmpcopyup" if is_podman else ""  # else podman begins with what the image has there; Docker does not
    scratch = f"{SCRATCH}:rw,size={limits.scratch_bytes},noexec,nosuid,nodev,mode=1777{copied}"
    yield from ("--read-only", "--tmpfs", scratch, "--shm-size", f"{min(limits.scratch_bytes, _SHARED_BYTES_MAX)}b")
    if is_podman:
        # By default podman adds writable /run and /var/tmp, makes a volume on disk for each that the image names, and copies the
        # host's /etc/hosts.
        yield from ("--read-only-tmpfs=false", "--image-volume", "ignore", "--no-hosts")


def _limits(engine: ContainerEngine, limits: ContainerLimits) -> Iterable[str]:
    memory = f"{limits.memory_bytes}b"
    yield from ("--memory", memory, "--memory-swap", memory, "--pids-limit", str(limits.processes))
    if engine.limits_cpu:
        yield from ("--cpus", str(limits.cpus))
    yield from ("--oom-score-adj", str(_OOM_SCORE))
    ulimits = {
        "nofile": limits.open_files,
        "nproc": _PROCESSES_OF_USER_MAX,
        "fsize": limits.file_bytes,
        "core": 0,
    }
    for name, value in ulimits.items():
        yield from ("--ulimit", f"{name}={value}:{value}")
    if engine.kind is Kind.PODMAN:  # holds even when the node is no more
        yield from ("--timeout", str(limits.time_s))


def _environment(engine: ContainerEngine, seed: bytes) -> Iterable[str]:
    yield from ("--env", f"{SEED_VARIABLE}={seed.hex()}")
    if engine.kind is Kind.PODMAN:
        yield "--http-proxy=false"
        return
    for name in _PROXIES:
        yield from ("--env", f"{name}=", "--env", f"{name.lower()}=")


def start_command(engine: ContainerEngine, name: str) -> list[str]:
    """Starts it and stays with it: its stdin, stdout and stderr are the client's, and its exit code."""
    proxy = ("--sig-proxy=false",) if engine.kind is Kind.PODMAN else ()
    return [*engine.prefix, "start", "--attach", "--interactive", *proxy, name]


def state_command(engine: ContainerEngine, name: str) -> list[str]:
    return [*engine.prefix, "inspect", "--type", "container", "--format", "{{json .State}}", name]


def remove_command(engine: ContainerEngine, names: Iterable[str]) -> list[str]:
    """Kills and removes, with the volumes; without the ten seconds of grace that podman gives otherwise."""
    grace = ("--time", "0") if engine.kind is Kind.PODMAN else ()
    return [*engine.prefix, "rm", "--force", "--volumes", *grace, *names]


def leftovers_command(engine: ContainerEngine, node: str) -> list[str]:
    """Ids of all containers that this node has made, one a line."""
    _check_label(node)
    return [*engine.prefix, "ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={NODE_LABEL}={node}"]

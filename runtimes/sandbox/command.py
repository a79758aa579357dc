"""The command line that starts a program in its sandbox. Pure: what Python needs is a fact that is passed in (``host.py``).

Inside there is an empty root, read-only, with: the interpreter and its libraries, our own code, what the program was given to read, a
private /proc, a minimal /dev, and a /tmp of limited size, the only place to write to. No home, no network, no other processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from protocol.errors import ConfigError
from runtimes.sandbox.launch import CONTROL_FD as CONTROL_FD
from runtimes.sandbox.rlimits import Limits, limits_for
from runtimes.sandbox.tiers import Tier

SCRATCH = "/tmp"
_OWN_MOUNTS = ("/proc", "/dev", "/sys")
_DEVICE_ROOT = "/dev/"
_USER_ID = 1000  # inside; outside it is the node's user, without any capability
_HOST_NAME = "cargo"
_BASE_ENVIRONMENT = (
    ("HOME", SCRATCH),
    ("LANG", "C.UTF-8"),
    ("PATH", "/usr/bin:/bin"),
    ("TMPDIR", SCRATCH),
    ("USER", "cargo"),
    # ggml answers a failed assertion by starting gdb on itself, which is slow and would print what is in memory
    ("GGML_NO_BACKTRACE", "1"),
    ("PYTHONDONTWRITEBYTECODE", "1"),
    ("PYTHONUNBUFFERED", "1"),
)


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or folder of the host, seen inside as ``target`` and never writable. Both absolute; the same unless said otherwise.

    Raises ConfigError where it would open too much or hide what the sandbox mounts itself.
    """

    source: str
    target: str = ""

    def __post_init__(self) -> None:
        if not self.target:
            object.__setattr__(self, "target", self.source)
        for path in (self.source, self.target):
            if not _is_plain(path):
                raise ConfigError(
                    f"{path!r} cannot be shown to a sandboxed program: give an absolute path without '..'"
                )
        if any(is_below(self.target, mount) for mount in _OWN_MOUNTS) or self.target == SCRATCH:
            raise ConfigError(f"{self.target} belongs to the sandbox; show {self.source} elsewhere")
        if any(is_below(self.source, mount) for mount in _OWN_MOUNTS):
            raise ConfigError(f"{self.source} is the host's own and is not shown to a sandboxed program")


def _is_plain(path: str) -> bool:
    """Absolute, written the one way there is, and not the root."""
    parts = PurePosixPath(path).parts
    is_written_once = str(PurePosixPath(path)) == path and not path.startswith("//")
    return path.startswith("/") and len(parts) > 1 and ".." not in parts and "\0" not in path and is_written_once


def is_below(path: str, folder: str) -> bool:
    """Or the same."""
    return PurePosixPath(path).is_relative_to(folder)


@dataclass(frozen=True, slots=True)
class Program:
    """What runs in the sandbox.

    ``command``: an absolute path, and arguments. ``reads``: the model's files or folders and nothing else. ``environment``: all that it
    gets beside a fixed minimum. ``devices``: below /dev, for a GPU that was granted. ``folder``: where it starts. ``may_fork``: whether
    it may have children; no runtime of ours needs any. ``has_code``: whether it sees our own packages.
    """

    command: tuple[str, ...]
    reads: tuple[Bind, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    devices: tuple[str, ...] = ()
    folder: str = SCRATCH
    may_fork: bool = False
    has_code: bool = True

    def __post_init__(self) -> None:
        if not self.command or not _is_plain(self.command[0]):
            raise ConfigError(f"a sandboxed program is named by its absolute path, not {self.command[:1]}")
        for device in self.devices:
            if not (_is_plain(device) and device.startswith(_DEVICE_ROOT)):
                raise ConfigError(f"{device!r} is no device below /dev")


@dataclass(frozen=True, slots=True)
class Host:
    """What of this machine every program needs. ``symlinks``: target and place, such as ``usr/lib`` at ``/lib``. ``hidden``: files of /proc
    that tell of more than the program's own namespaces."""

    python: str
    launcher: str
    binds: tuple[Bind, ...]
    code: tuple[Bind, ...]
    symlinks: tuple[tuple[str, str], ...] = ()
    python_path: str = ""
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Numbers of what bubblewrap inherits: our end of the talk, the filter to read, where it writes its process id, what it waits for."""

    control: int
    seccomp: int
    info: int
    block: int


def environment_of(program: Program, host: Host) -> dict[str, str]:
    path = {"PYTHONPATH": host.python_path} if program.has_code else {}
    return dict(_BASE_ENVIRONMENT) | path | dict(program.environment)


def launch_command(
    program: Program, host: Host, limits: Limits, cpus: Sequence[int], control: int, parent: int | None
) -> list[str]:
    """Our own program that sets the limits and then becomes the Cargo's. ``parent``: the node's process id, outside namespaces."""
    words = ",".join(f"{name}={soft}:{hard}" for name, soft, hard in limits)
    numbers = ",".join(str(cpu) for cpu in cpus) or "-"
    own = "-" if parent is None else str(parent)
    return [host.python, "-I", "-S", host.launcher, words, numbers, str(control), own, *program.command]


def bwrap_command(bwrap: str, program: Program, tier: Tier, host: Host, descriptors: Descriptors) -> list[str]:
    """bubblewrap with everything walled off that the tier does not grant. The CPUs are left to whoever starts it: inside, the filter
    only pretends to choose them.

    Order matters: later mounts cover earlier ones, so what the program may read comes after /tmp, and the root is closed at the end.
    """
    limits = limits_for(tier, has_user_namespace=True)
    return [
        bwrap,
        *_namespaces(tier),
        *_mounts(program, tier, host),
        *_environment(program, host),
        *("--chdir", program.folder),
        *(
            "--seccomp",
            str(descriptors.seccomp),
            "--info-fd",
            str(descriptors.info),
            "--block-fd",
            str(descriptors.block),
        ),
        "--",
        *launch_command(program, host, limits, [], descriptors.control, None),
    ]


def _namespaces(tier: Tier) -> Iterable[str]:
    yield from (
        "--unshare-user",
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--disable-userns",
    )
    if not tier.network:
        yield "--unshare-net"
    yield from ("--uid", str(_USER_ID), "--gid", str(_USER_ID), "--hostname", _HOST_NAME)
    yield from ("--die-with-parent", "--new-session", "--cap-drop", "ALL")


def _mounts(program: Program, tier: Tier, host: Host) -> Iterable[str]:
    yield from ("--proc", "/proc", "--dev", "/dev", "--size", str(tier.scratch_bytes_max), "--tmpfs", SCRATCH)
    for target, place in host.symlinks:
        yield from ("--symlink", target, place)
    for bind in (*host.binds, *(host.code if program.has_code else ()), *program.reads):
        yield from ("--ro-bind", bind.source, bind.target)
    for device in program.devices:
        yield from ("--dev-bind", device, device)
    for path in host.hidden:
        yield from ("--ro-bind", "/dev/null", path)
    # bubblewrap leaves / and /dev as writable file systems in memory without a limit of size, and /proc/sys to whoever owns its files
    # outside, which is the program where the node runs as root: by kernel.core_pattern it would have the whole machine.
    yield from ("--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/")


def _environment(program: Program, host: Host) -> Iterable[str]:
    yield "--clearenv"
    for name, value in environment_of(program, host).items():
        yield from ("--setenv", name, value)


def cpus_for(allowed: Sequence[int], count: int, turn: int) -> list[int]:
    """Which CPUs a program runs on: so many of those that we may use, another stretch each turn so that programs do not share by rule."""
    if count >= len(allowed):
        return []
    return sorted(allowed[(turn * count + i) % len(allowed)] for i in range(count))

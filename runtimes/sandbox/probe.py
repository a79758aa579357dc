"""What sandbox this machine can give, found by trying it: a tiny program looks out of a real one and says what it sees."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError
from runtimes.sandbox.cgroup import find_parent
from runtimes.sandbox.command import Descriptors, Program, bwrap_command
from runtimes.sandbox.host import host
from runtimes.sandbox.seccomp import filter_program, is_known, policy_for
from runtimes.sandbox.tiers import RESTRICTED

_PROBE_TIMEOUT_S = 15.0  # a slow machine under load; usually 0.1 s
_REASON_CHARS_MAX = 200
_SECCOMP_FILTER = 2  # in /proc/self/status
# Runs inside with the standard library alone. The home folder and our process id are its arguments.
_LOOK = """
import json, os, socket, sys
def refuses(family):
    try:
        socket.socket(family, socket.SOCK_STREAM).close()
    except OSError:
        return True
    return False
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
print(json.dumps({
    "interfaces": [line.split(":")[0].strip() for line in open("/proc/self/net/dev") if ":" in line],
    "refuses_network": refuses(socket.AF_INET),
    "home": os.listdir(sys.argv[1]) if os.path.isdir(sys.argv[1]) and sys.argv[1] != "/tmp" else [],
    "allowed": [path for path in sys.argv[2].split(":") if path],
    "processes": len(pids),
    "environment": sorted(os.environ),
    "seccomp": int(status["Seccomp"]),
    "no_new_privs": int(status["NoNewPrivs"]),
    "capabilities": int(status["CapEff"], 16),
}))
"""
_PROCESSES_INSIDE_MAX = 2  # bubblewrap's first process and the program


class Level(StrEnum):
    """How strong the walls are. The words stand in the Island's ad."""

    NAMESPACES = "namespaces+seccomp"
    RLIMITS = "rlimits+no_new_privs"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What ``probe`` found. ``reason`` says in words why it is no more than this; ``cgroup`` is where groups can be made."""

    level: Level
    reason: str
    bwrap: str = ""
    cgroup: Path | None = None

    def __str__(self) -> str:
        return f"sandbox {self.level}: {self.reason}"


@dataclass(frozen=True, slots=True)
class View:
    """What the tiny program saw from inside."""

    interfaces: tuple[str, ...]
    refuses_network: bool
    home: tuple[str, ...]
    allowed: tuple[str, ...]
    processes: int
    environment: tuple[str, ...]
    seccomp: int
    no_new_privs: int
    capabilities: int


def parse_view(text: str) -> View:
    """Raises ValueError where this is not what the program prints."""
    try:
        facts: dict[str, Any] = json.loads(text)
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()
        }
        return View(**fields)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the probe said {text[:_REASON_CHARS_MAX]!r}") from error


def complaint(view: View) -> str:
    """What is wrong with the view from inside, in words; empty where all walls stand."""
    if view.seccomp != _SECCOMP_FILTER:
        return "the seccomp filter is not in force inside"
    if not view.no_new_privs or view.capabilities:
        return "programs inside keep privileges"
    if any(name != "lo" for name in view.interfaces) or not view.refuses_network:
        return "programs inside see the network"
    if view.processes > _PROCESSES_INSIDE_MAX:
        return "programs inside see other processes"
    if hidden := set(view.home) - set(view.allowed):
        return f"programs inside see {min(hidden)} in the home folder"
    return ""


def probe(bwrap: str | None = None) -> Sandbox:
    """Tries the strongest sandbox and says what works. Blocks for about 0.1 s. ``bwrap``: the program's path, found by itself if None."""
    if sys.platform != "linux":
        return Sandbox(Level.NONE, f"native Cargos need Linux, and this is {sys.platform}")
    machine = os.uname().machine
    if not is_known(machine):
        return Sandbox(Level.NONE, f"there is no seccomp filter for {machine}")
    path = shutil.which("bwrap") if bwrap is None else bwrap
    if not path:
        return _weaker("bubblewrap is not installed; `apt-get install bubblewrap` brings it")
    try:
        if why := complaint(_look_out(path)):
            return _weaker(f"bubblewrap does not hold here: {why}")
    except (OSError, ValueError, ConfigError, subprocess.SubprocessError) as error:
        return _weaker(f"bubblewrap does not work here: {_shortened(error)}")
    strong = Sandbox(Level.NAMESPACES, "bubblewrap and its seccomp filter were tried and hold", path, find_parent())
    return (
        strong
        if os.geteuid()
        else replace(strong, reason=f"{strong.reason}; run as an ordinary user, not as root, for one wall more")
    )


def _weaker(why: str) -> Sandbox:
    """Only what a process can do to itself."""
    return Sandbox(Level.RLIMITS, why)


def _shortened(error: Exception) -> str:
    words = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
    text = words.decode("utf-8", "replace") if isinstance(words, bytes) else words
    return " ".join(text.split())[:_REASON_CHARS_MAX]


def _look_out(bwrap: str) -> View:
    """Raises OSError, subprocess.SubprocessError or ValueError where the sandbox does not come up."""
    home = os.path.expanduser("~")
    facts = host()
    shown = [bind.target for bind in (*facts.binds, *facts.code)]
    below = [os.path.relpath(path, home).split(os.sep)[0] for path in shown if path.startswith(home + "/")]
    program = Program((facts.python, "-I", "-S", "-c", _LOOK, home, ":".join(below)), has_code=False)
    ours, theirs = socket.socketpair()
    null = os.open(os.devnull, os.O_WRONLY)
    waiting = filled_pipe(b"\n")
    seccomp = filled_pipe(filter_program(policy_for(network=False, may_fork=False)))
    try:
        command = bwrap_command(bwrap, program, RESTRICTED, facts, Descriptors(theirs.fileno(), seccomp, null, waiting))
        done = subprocess.run(
            command,
            pass_fds=(theirs.fileno(), seccomp, null, waiting),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={},
            cwd="/",
            timeout=_PROBE_TIMEOUT_S,
            check=True,
        )
    finally:
        for descriptor in (seccomp, null, waiting):
            os.close(descriptor)
        ours.close()
        theirs.close()
    return parse_view(done.stdout.decode("utf-8", "replace"))


def filled_pipe(data: bytes) -> int:
    """The reading end of a pipe that holds this, which must fit into it (64 KiB on Linux). Raises OSError."""
    reading, writing = os.pipe()
    try:
        os.write(writing, data)
    except OSError:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    return reading

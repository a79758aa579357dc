"""How a job in a container ended. Pure: from the lines that came and from what the engine says of the container."""

from __future__ import annotations

import json
from dataclasses import dataclass

from protocol.cargo_io import DoneLine, ErrorLine, LineReader
from protocol.errors import Code, LocalProtocolError, Refused, RemoteProtocolError
from runtimes.container.command import ContainerLimits

_KILLED = 137  # 128 + SIGKILL
_TIMED_OUT = -1  # conmon's, after --timeout
_MIB = 1024**2
# How podman, Docker and runc say that there is no such program in the image, or that it is none.
_NO_PROGRAM = ("not found", "no such file or directory", "permission denied", "exec format error")


@dataclass(frozen=True, slots=True)
class State:
    """What the engine says of a container that has ended. ``was_started``: whether its program ever ran."""

    was_started: bool
    exit_code: int
    is_out_of_memory: bool


ENDED_WELL = State(was_started=True, exit_code=0, is_out_of_memory=False)


def parse_state(data: bytes) -> State:
    """From the JSON of an engine's ``.State``. Raises ValueError."""
    try:
        fields = json.loads(data)
        return State(
            was_started=not str(fields["StartedAt"]).startswith("0001-"),  # the zero of Go's time
            exit_code=int(fields["ExitCode"]),
            is_out_of_memory=fields["OOMKilled"] is True,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"the engine's state of a container lacks {error}") from None


def timed_out(limits: ContainerLimits) -> Refused:
    return Refused(Code.CARGO_FAILED, f"the Cargo ran for more than {limits.time_s} s and was ended")


def judge(reader: LineReader, state: State, limits: ContainerLimits) -> DoneLine:
    """The end of a job whose program was started and whose output is over. Raises Refused: the Cargo's own words come first, then
    what the engine saw, then what was wrong with the output."""
    breach = ""
    try:
        reader.finish()
    except RemoteProtocolError as error:
        breach = str(error)
    last = reader.last
    if isinstance(last, ErrorLine):
        raise Refused(Code.CARGO_FAILED, last.message)
    if state.exit_code == _TIMED_OUT:
        raise timed_out(limits)
    if why := _bad_end(state, limits) or breach:
        raise Refused(Code.CARGO_FAILED, why)
    if not isinstance(last, DoneLine):
        raise LocalProtocolError("an output without a breach ends with done or error")
    return last


def _bad_end(state: State, limits: ContainerLimits) -> str:
    """In words; empty where it ended with 0.

    Within its own namespace nothing can kill the first process of a container, so where it was killed and not by us, the kernel was out
    of the container's memory; engines do not always see that (podman 4.3 under cgroup v1).
    """
    memory = f"{limits.memory_bytes // _MIB} MiB of memory"
    if state.is_out_of_memory:
        return f"the Cargo used more than its {memory} and was ended"
    if state.exit_code == _KILLED:
        return f"the Cargo was killed (exit code {_KILLED}), as happens to one that uses more than its {memory}"
    return f"the Cargo ended with code {state.exit_code}" if state.exit_code else ""


def not_started(engine_words: str) -> Refused:
    """The engine's words about a container in which nothing has run. An image without its program fails everywhere; all else only here."""
    if any(words in engine_words.lower() for words in _NO_PROGRAM):
        return Refused(
            Code.CARGO_FAILED, "the image's program cannot be started: it is not there, or no program for this machine"
        )
    return Refused(Code.WORKER_DIED, f"the container engine did not start the container: {engine_words}")

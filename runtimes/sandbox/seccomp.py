"""Which system calls a program may make, as a filter for the kernel. Pure.

A list of what is denied, rather than of what is allowed: engines bring their own libraries, whose calls differ from one build to the
next. Denied is what namespaces do not wall off or what has let programs out of them: other processes' memory, mounts, keys, kernel
interfaces with a history of holes, new namespaces, sockets of other families than the tier has. Calls newer than the list do not exist.
Foreign calling conventions (i386, x32), by which the list could be walked round, end the process.

``Alone`` is the stricter filter for where there are no namespaces: the program may have threads but no children, signal nobody but
itself and open no socket, so that nothing of it can outlive it and nobody else is reached.
"""

from __future__ import annotations

import errno
import platform
from collections.abc import Iterable
from dataclasses import dataclass

from protocol.errors import ConfigError
from runtimes.sandbox.bpf import (
    ALLOW,
    ARCHITECTURE_OFFSET,
    KILL,
    NUMBER_OFFSET,
    Instruction,
    assemble,
    fail,
    give,
    if_above,
    if_bits,
    if_equal,
    load,
    load_argument,
)
from runtimes.sandbox.syscalls import NEWEST_KNOWN, NUMBERS

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_X32_FIRST = 0x40000000  # calls of the x32 ABI have this bit

# Other processes; file systems; keys; the kernel's own interfaces; the clock and the name of the host; memory that no limit counts.
_DENIED = """
ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd migrate_pages move_pages
mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr
open_by_handle_at name_to_handle_at mknod mknodat quotactl quotactl_fd swapon swapoff acct fanotify_init fanotify_mark
add_key request_key keyctl
bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
kexec_load kexec_file_load init_module finit_module delete_module create_module get_kernel_syms query_module
reboot syslog personality modify_ldt iopl ioperm uselib nfsservctl lookup_dcookie vhangup
unshare setns
settimeofday adjtimex clock_settime clock_adjtime sethostname setdomainname
shmget msgget semget mq_open
""".split()
# glibc and wasmtime go another way when these are missing; clone3 keeps its flags in memory, where a filter cannot read them.
_MISSING = ("clone3", "memfd_create", "memfd_secret")
_DENIED_ALONE = """
tkill rt_tgsigqueueinfo pidfd_open pidfd_send_signal
setpriority ioprio_set sched_setscheduler sched_setparam sched_setattr
""".split()
_FORKS = ("fork", "vfork")

_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
_CLONE_THREAD = 0x00010000
_PR_SET_PDEATHSIG = 1
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: put words into the mouth of whoever sits at the terminal

AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10


@dataclass(frozen=True, slots=True)
class Alone:
    """There are no namespaces: ``process_id`` is the one process that the program may signal, itself."""

    process_id: int


@dataclass(frozen=True, slots=True)
class Policy:
    """``families``: of the sockets that may be made, beside pairs. ``may_fork``: whether it may have children."""

    families: tuple[int, ...] = (AF_UNIX,)
    may_fork: bool = False
    alone: Alone | None = None


def policy_for(network: bool, may_fork: bool) -> Policy:
    """Inside namespaces, where AF_UNIX reaches nothing outside."""
    return Policy((AF_UNIX, AF_INET, AF_INET6) if network else (AF_UNIX,), may_fork)


def policy_alone(process_id: int) -> Policy:
    return Policy((), False, Alone(process_id))


def is_known(machine: str) -> bool:
    """Whether there is a filter for this machine."""
    return machine in _ARCHITECTURES


def filter_program(policy: Policy, machine: str = "") -> bytes:
    """The filter, as ``struct sock_filter[]``. Raises ConfigError for a machine that it does not know."""
    machine = machine or platform.machine()
    if not is_known(machine):
        raise ConfigError(
            f"there is no seccomp filter for {machine}; Islands run native Cargos on {' and '.join(_ARCHITECTURES)}"
        )
    return assemble(_program(policy, machine))


def _program(policy: Policy, machine: str) -> Iterable[Instruction]:
    numbers = NUMBERS[machine]
    yield from (load(ARCHITECTURE_OFFSET), if_equal(_ARCHITECTURES[machine], 1, 0), give(KILL), load(NUMBER_OFFSET))
    if machine == "x86_64":
        yield from (if_above(_X32_FIRST - 1, 0, 1), give(KILL))
    yield from (if_above(NEWEST_KNOWN, 0, 1), give(fail(errno.ENOSYS)))
    for name, block in _rules(policy):
        number = numbers[name]
        if number is not None:
            yield if_equal(number, 0, len(block))
            yield from block
    yield give(ALLOW)


def _rules(policy: Policy) -> Iterable[tuple[str, list[Instruction]]]:
    """Calls by name, each with what decides about it; every such block ends in a verdict on all ways."""
    refused = give(fail(errno.EPERM))
    denied = [*_DENIED, *(_DENIED_ALONE if policy.alone else ()), *(() if policy.may_fork else _FORKS)]
    yield from ((name, [refused]) for name in denied)
    yield from ((name, [give(fail(errno.ENOSYS))]) for name in _MISSING)
    yield "clone", _clone_block(policy.may_fork)
    yield "socket", _only_values(0, policy.families, fail(errno.EPERM))
    yield "ioctl", _never_values(1, _TERMINAL_INPUT, fail(errno.EPERM))
    # Pretended: workers ask for it themselves, and one that could take it back would outlive its node where there are no namespaces.
    yield "prctl", _never_values(0, (_PR_SET_PDEATHSIG,), fail(0))
    # Pretended too: onnxruntime and OpenMP complain loudly when they may not, and with it a program would take all cores.
    yield "sched_setaffinity", [give(fail(0))]
    if policy.alone:
        itself = policy.alone.process_id
        yield from (
            (name, _only_values(0, (itself,), fail(errno.EPERM))) for name in ("kill", "tgkill", "rt_sigqueueinfo")
        )
        yield "prlimit64", _only_values(0, (0, itself), fail(errno.EPERM))


def _clone_block(may_fork: bool) -> list[Instruction]:
    """Threads always; children where they are allowed; new namespaces never."""
    refused, allowed = give(fail(errno.EPERM)), give(ALLOW)
    block = [load_argument(0), if_bits(_NAMESPACE_FLAGS, 0, 1), refused]
    return [*block, allowed] if may_fork else [*block, if_bits(_CLONE_THREAD, 1, 0), refused, allowed]


def _only_values(argument: int, values: tuple[int, ...], verdict: int) -> list[Instruction]:
    """Allows the call with these values of an argument and gives the verdict for all others."""
    tests = [if_equal(value, len(values) - i, 0) for i, value in enumerate(values)]
    return [load_argument(argument), *tests, give(verdict), give(ALLOW)]


def _never_values(argument: int, values: tuple[int, ...], verdict: int) -> list[Instruction]:
    """Gives the verdict for these values of an argument and allows all others."""
    tests = [if_equal(value, len(values) - i, 0) for i, value in enumerate(values)]
    return [load_argument(argument), *tests, give(ALLOW), give(verdict)]

"""The seccomp filter, run in a small interpreter of its instructions, for both machines; and the assembler."""

from __future__ import annotations

import errno
import struct

import pytest

from protocol.errors import ConfigError
from runtimes.sandbox.bpf import ALLOW, INSTRUCTIONS_MAX, KILL, Instruction, assemble, fail, give
from runtimes.sandbox.seccomp import AF_INET, AF_UNIX, Policy, filter_program, policy_alone, policy_for
from runtimes.sandbox.syscalls import NEWEST_KNOWN, NUMBERS

MACHINES = ("x86_64", "aarch64")
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
EPERM, ENOSYS, PRETENDED = fail(errno.EPERM), fail(errno.ENOSYS), fail(0)
STRICT = policy_for(network=False, may_fork=False)
FREE = Policy((AF_UNIX, AF_INET), may_fork=True)
SELF = 4711
THREAD = 0x003D0F00  # what glibc's pthread_create gives to clone
CHILD = 0x01200011  # and its fork


def verdict(code: bytes, machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the kernel would answer."""
    data = struct.pack("<iIQ6Q", number, architecture or AUDIT[machine], 0, *arguments, *[0] * (6 - len(arguments)))
    program = list(struct.iter_unpack("<HBBI", code))
    at, register = 0, 0
    while True:
        operation, when, otherwise, value = program[at]
        if operation == 0x06:
            return int(value)
        at += 1
        if operation == 0x20:
            register = struct.unpack_from("<I", data, value)[0]
        else:
            held = {0x15: register == value, 0x25: register > value, 0x45: bool(register & value)}[operation]
            at += when if held else otherwise


def decided(policy: Policy, machine: str, name: str, *arguments: int) -> int | None:
    """None where the machine has no such call."""
    number = NUMBERS[machine][name]
    return None if number is None else verdict(filter_program(policy, machine), machine, number, *arguments)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    "name",
    """ptrace process_vm_readv mount umount2 pivot_root keyctl add_key request_key bpf perf_event_open userfaultfd unshare setns
    kexec_load kexec_file_load init_module finit_module delete_module reboot swapon swapoff io_uring_setup io_uring_enter
    io_uring_register mknodat open_by_handle_at pidfd_getfd personality shmget""".split(),
)
def test_dangerous_calls_are_refused_to_all(machine: str, name: str) -> None:
    assert [decided(policy, machine, name) for policy in (STRICT, FREE, policy_alone(SELF))] == [EPERM] * 3


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("policy", "name", "arguments", "expected"),
    [
        (STRICT, "socket", (AF_UNIX,), ALLOW),
        (STRICT, "socket", (AF_INET,), EPERM),
        (STRICT, "socket", (16,), EPERM),
        (FREE, "socket", (AF_INET,), ALLOW),
        (FREE, "socket", (16,), EPERM),
        (policy_alone(SELF), "socket", (AF_UNIX,), EPERM),
        (STRICT, "clone", (THREAD,), ALLOW),
        (STRICT, "clone", (CHILD,), EPERM),
        (FREE, "clone", (CHILD,), ALLOW),
        (FREE, "clone", (CHILD | 0x10000000,), EPERM),
        (FREE, "clone", (THREAD | 0x40000000,), EPERM),
        (FREE, "clone3", (), ENOSYS),
        (FREE, "memfd_create", (), ENOSYS),
        (STRICT, "ioctl", (0, 0x5412), EPERM),
        (STRICT, "ioctl", (0, 0x541C), EPERM),
        (STRICT, "ioctl", (0, 0xABCD_0000_5412), EPERM),
        (STRICT, "ioctl", (0, 0x5401), ALLOW),
        (STRICT, "prctl", (1,), PRETENDED),
        (STRICT, "prctl", (15,), ALLOW),
        (STRICT, "sched_setaffinity", (0,), PRETENDED),
        (STRICT, "kill", (1,), ALLOW),
        (policy_alone(SELF), "kill", (SELF,), ALLOW),
        (policy_alone(SELF), "kill", (1,), EPERM),
        (policy_alone(SELF), "kill", (0xFFFFFFFF,), EPERM),
        (policy_alone(SELF), "tgkill", (SELF, 5), ALLOW),
        (policy_alone(SELF), "tgkill", (1, 1), EPERM),
        (policy_alone(SELF), "tkill", (SELF,), EPERM),
        (policy_alone(SELF), "prlimit64", (0,), ALLOW),
        (policy_alone(SELF), "prlimit64", (1,), EPERM),
        (policy_alone(SELF), "setpriority", (2, 0), EPERM),
        (policy_alone(SELF), "clone", (CHILD,), EPERM),
    ],
)
def test_arguments_decide(machine: str, policy: Policy, name: str, arguments: tuple[int, ...], expected: int) -> None:
    assert decided(policy, machine, name, *arguments) == expected


@pytest.mark.parametrize("machine", MACHINES)
def test_other_ways_to_call_end_the_program(machine: str) -> None:
    code = filter_program(FREE, machine)
    assert verdict(code, machine, 1, architecture=0x40000003) == KILL  # i386
    assert verdict(code, machine, 0x40000000 + 1) == (KILL if machine == "x86_64" else ENOSYS)


@pytest.mark.parametrize("machine", MACHINES)
def test_unknown_calls_do_not_exist_and_known_ones_are_allowed(machine: str) -> None:
    code = filter_program(STRICT, machine)
    assert verdict(code, machine, NEWEST_KNOWN) == ALLOW
    assert verdict(code, machine, NEWEST_KNOWN + 1) == ENOSYS
    ordinary = set(range(NEWEST_KNOWN)) - {number for number in NUMBERS[machine].values() if number is not None}
    assert {verdict(code, machine, number) for number in ordinary} == {ALLOW}


def test_fork_exists_on_one_machine_only() -> None:
    assert decided(STRICT, "x86_64", "fork") == EPERM and decided(FREE, "x86_64", "vfork") == ALLOW
    assert decided(STRICT, "aarch64", "fork") is None


def test_every_number_of_a_machine_is_one_call() -> None:
    for machine in MACHINES:
        numbers = [number for number in NUMBERS[machine].values() if number is not None]
        assert len(numbers) == len(set(numbers)) and max(numbers) <= NEWEST_KNOWN


def test_other_machines_have_no_filter() -> None:
    with pytest.raises(ConfigError, match="riscv64"):
        filter_program(STRICT, "riscv64")


def test_the_assembler_refuses_what_the_kernel_would() -> None:
    with pytest.raises(ValueError):
        Instruction(0x15, 1, when=256)
    for count in (0, INSTRUCTIONS_MAX + 1):
        with pytest.raises(ValueError):
            assemble([give(ALLOW)] * count)
    assert assemble([give(ALLOW)]) == bytes.fromhex("060000000000ff7f")

"""The program between the sandbox and the Cargo's: sets what only the process itself can set, then becomes the Cargo's program.

    python -I -S runtimes/sandbox/launch.py LIMITS CPUS CONTROL_FD PARENT PROGRAM [ARGUMENT]...

``LIMITS``: ``NAME=SOFT:HARD,...`` of the kernel's limits. ``CPUS``: numbers with commas, or ``-`` for all. ``CONTROL_FD``: becomes the
program's descriptor 3. ``PARENT``: ``-`` inside namespaces; else the process id of the node, which asks for the weaker sandbox: no new
privileges and none of the old ones, the seccomp filter for a process without namespaces, and death with that parent.

Run as a file, not as a module, and with few imports: starting Python is most of what the sandbox costs. Nothing of ours runs in the
node between fork and exec, where its locks and threads would be in an unknown state.
"""

from __future__ import annotations

import os
import resource
import sys

CONTROL_FD = 3  # the program's end of the socket pair; all others but the standard three are closed
_DESCRIPTORS_MAX = 2**31 - 1
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_PR_CAPBSET_DROP = 24
_CAPABILITY_VERSION = 0x20080522  # the third: two times 32 capabilities
_CAPABILITIES_MAX = 64
_SIGKILL = 9  # importing signal costs 2 ms
_EXIT_NOT_STARTED = 126  # as shells say it
_USAGE_WORDS = 5


def set_limits(limits: str) -> None:
    """Never above what the process may have. Raises OSError or ValueError where the kernel refuses."""
    for limit in filter(None, limits.split(",")):
        name, _, values = limit.partition("=")
        number: int = getattr(resource, f"RLIMIT_{name}")
        ceiling = resource.getrlimit(number)[1]
        soft, hard = (
            int(value) if ceiling == resource.RLIM_INFINITY else min(int(value), ceiling) for value in values.split(":")
        )
        resource.setrlimit(number, (soft, hard))


def keep_only(control_fd: int) -> None:
    """Closes all descriptors but the standard three and ``CONTROL_FD``, which becomes a copy of this one."""
    if control_fd == CONTROL_FD:
        os.set_inheritable(CONTROL_FD, True)
    else:
        os.dup2(control_fd, CONTROL_FD)
    os.closerange(CONTROL_FD + 1, _DESCRIPTORS_MAX)


def stand_alone(parent: int) -> None:
    """The walls that bubblewrap would have built, as far as a process can build them round itself. Raises OSError."""
    import ctypes

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from runtimes.sandbox.seccomp import filter_program, policy_alone

    libc = ctypes.CDLL(None, use_errno=True)

    class FilterProgram(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    def control(option: int, *arguments: object) -> None:
        if libc.prctl(option, *arguments, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option}) failed")

    control(_PR_SET_PDEATHSIG, ctypes.c_ulong(_SIGKILL))
    if os.getppid() != parent:
        os._exit(_EXIT_NOT_STARTED)  # it had ended before the kernel knew that we follow
    if os.geteuid() == 0:  # with an empty bounding set, root's next program starts without any either
        for number in range(_CAPABILITIES_MAX):
            libc.prctl(
                _PR_CAPBSET_DROP, ctypes.c_ulong(number), *[ctypes.c_ulong(0)] * 3
            )  # fails beyond the last one that there is
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")
    control(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1))
    code = filter_program(policy_alone(os.getpid()))
    control(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(FilterProgram(len(code) // 8, code)))


def main(arguments: list[str]) -> int:
    """Does not return where all went well. The code of a program that was not started otherwise."""
    if len(arguments) < _USAGE_WORDS:
        print("usage: launch.py LIMITS CPUS CONTROL_FD PARENT PROGRAM [ARGUMENT]...", file=sys.stderr)
        return _EXIT_NOT_STARTED
    limits, cpus, control_fd, parent, *program = arguments
    try:
        keep_only(int(control_fd))
        if cpus != "-":
            os.sched_setaffinity(0, [int(cpu) for cpu in cpus.split(",")])
        if parent != "-":
            stand_alone(int(parent))
        set_limits(limits)
        os.execv(program[0], program)
    except (OSError, ValueError, AttributeError) as error:
        print(f"the sandbox could not start {program[0]}: {error}", file=sys.stderr)
    return _EXIT_NOT_STARTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

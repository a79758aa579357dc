"""Which system calls a container may make, as a profile in JSON that podman and Docker both take. Pure.

A list of what is allowed, made from podman's own (containers/common 0.50, pkg/seccomp), which allows more than a Cargo needs, as does that
of older Dockers: new user namespaces, within which a program has all capabilities and reaches parts of the kernel with a history of holes;
mounts; the keys of the node's user; other processes' memory; and sockets that no network namespace holds, such as AF_VSOCK, by which the
hypervisor of a virtual machine is reached. All else is answered with "no such call". Programs for other machines than this one (i386,
x32), whose calls have other numbers, are ended. The form: https://github.com/opencontainers/runtime-spec/blob/main/config-linux.md#seccomp
"""

from __future__ import annotations

import errno
import json
from typing import Any

# Files and memory; processes, signals and time; waiting; System V's and POSIX' ways to talk, which the IPC namespace holds.
_ALLOWED = """
access faccessat faccessat2 chdir fchdir chmod fchmod fchmodat fchmodat2 chown fchown fchownat lchown close
close_range copy_file_range creat dup dup2 dup3 fadvise64 fallocate fcntl fdatasync fsync flock ftruncate truncate
futimesat getcwd getdents getdents64 ioctl link linkat lseek mkdir mkdirat mknod mknodat open openat openat2 pipe
pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv rename renameat
renameat2 rmdir sendfile splice tee stat fstat lstat newfstatat statfs fstatfs statx symlink symlinkat sync
sync_file_range syncfs umask unlink unlinkat utime utimensat utimes write writev cachestat
getxattr fgetxattr lgetxattr listxattr flistxattr llistxattr setxattr fsetxattr lsetxattr removexattr fremovexattr
lremovexattr
inotify_add_watch inotify_init inotify_init1 inotify_rm_watch landlock_add_rule landlock_create_ruleset
landlock_restrict_self
brk get_mempolicy madvise map_shadow_stack mbind membarrier memfd_create mincore mlock mlock2 mlockall mmap mprotect
mremap msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect remap_file_pages set_mempolicy
set_mempolicy_home_node
arch_prctl capget capset execve execveat exit exit_group fork vfork getcpu getegid geteuid getgid getgroups getpgid
getpgrp getpid getppid getpriority getresgid getresuid getrlimit getrusage getsid gettid getuid get_robust_list
ioprio_get ioprio_set kill pause pidfd_open pidfd_send_signal prctl prlimit64 restart_syscall rseq rt_sigaction
rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo
sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp setfsgid
setfsuid setgid setgroups setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid setuid
set_robust_list set_tid_address sigaltstack sysinfo tgkill time times tkill uname wait4 waitid
alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep setitimer timer_create timer_delete
timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime getrandom
epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 futex futex_requeue
futex_wait futex_waitv futex_wake io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit poll ppoll
pselect6 select signalfd signalfd4
accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg recvmsg sendmmsg sendmsg
sendto setsockopt shutdown socketpair mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl
msgget msgrcv msgsnd semctl semget semop semtimedop shmat shmctl shmdt shmget
""".split()
_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_NETLINK, _NETLINK_ROUTE = 16, 0  # by which libraries list the interfaces
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)  # Linux' own, with old uname or without, and asking which
_ALLOW, _ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"


def profile(machine: str) -> str:
    """In JSON. ``machine``: as ``os.uname`` says; empty for one that we do not know, where the engine's own profile has to do."""
    if machine not in _ARCHITECTURES:
        return ""
    fields = {
        "defaultAction": _ERRNO,
        "defaultErrnoRet": errno.ENOSYS,
        "architectures": [_ARCHITECTURES[machine]],
        "syscalls": [{"names": _ALLOWED, "action": _ALLOW}, *_conditional()],
    }
    return json.dumps(fields)


def _conditional() -> list[dict[str, Any]]:
    clone = {"index": 0, "value": _NAMESPACE_FLAGS, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    return [
        _allowed("clone", clone),
        # It keeps its flags where no filter can read them. Libraries fall back to clone for this errno only, and engines that do not
        # know defaultErrnoRet would give another.
        {"names": ["clone3"], "action": _ERRNO, "errnoRet": errno.ENOSYS},
        *(_allowed("socket", _equal(0, family)) for family in _FAMILIES),
        _allowed("socket", _equal(0, _NETLINK), _equal(2, _NETLINK_ROUTE)),
        *(_allowed("personality", _equal(0, persona)) for persona in _PERSONALITIES),
    ]


def _allowed(name: str, *conditions: dict[str, Any]) -> dict[str, Any]:
    return {"names": [name], "action": _ALLOW, "args": list(conditions)}


def _equal(index: int, value: int) -> dict[str, Any]:
    return {"index": index, "value": value, "valueTwo": 0, "op": "SCMP_CMP_EQ"}

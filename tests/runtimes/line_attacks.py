"""A Cargo of lines that attacks whoever runs it, as its input says: ``python -m tests.runtimes.line_attacks`` inside a sandbox.

Attacks of the first kind (``Thief``) end well and tell in their result what they have ``won``. Those of the second kind (``Wrecker``) break
the contract with the node, or do not end. None of them would harm a host whose walls are broken: processes are looked for with signal 0,
a file system that is mounted is of a kind that there is not, and what is filled or multiplied has an end.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from protocol.cargo_io import TokenLine
from protocol.framing import encode_frame
from runtimes.lines.engine import LineJob, LoadOrder
from runtimes.lines.messages import LINE_WORKER, Cancel, Ended, Loaded, LoadFailed, Outcome, Output, Run, Taken
from runtimes.lines.worker import serve
from tests.runtimes import line_probe

_FILL_BYTES_MAX = 256 * 1024**2
_FORKS_MAX = 200
_THREADS_MAX = 400
_FAMILIES = {"netlink": 16, "packet": 17, "bluetooth": 31, "algorithms": 38, "hypervisor": 40, "xdp": 44, "key": 15, "can": 29}
# x86_64, aarch64; each with arguments that do nothing where the call is let through
_CALLS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "keyctl": (250, 219, (0, -3, 0)),
    "add_key": (248, 217, (0, 0, 0, 0, 0)),
    "bpf": (321, 280, (99, 0, 0)),
    "perf_event_open": (298, 241, (0, 0, -1, -1, 0)),
    "userfaultfd": (323, 282, (1,)),
    "io_uring_setup": (425, 425, (0, 0)),
    "unshare": (272, 97, (0,)),
    "setns": (308, 268, (-1, 0)),
    "kexec_load": (246, 104, (0, 99, 0, 1 << 62)),
    "init_module": (175, 105, (0, 0, 0)),
    "pivot_root": (155, 41, (0, 0)),
    "open_by_handle_at": (304, 265, (-1, 0, 0)),
    "process_vm_readv": (310, 270, (1, 0, 0, 0, 0, 1)),
    "memfd_create": (319, 279, (0, 0)),
}
_DENIED = (errno.EPERM, errno.ENOSYS, errno.EACCES)
_LIBC = ctypes.CDLL(None, use_errno=True)


def _is_let(number: int, arguments: Iterable[int]) -> bool:
    """Whether the kernel looks at a call at all, whatever it says to the arguments."""
    result = _LIBC.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    return result >= 0 or ctypes.get_errno() not in _DENIED


def _works(action: Callable[[], object]) -> bool:
    try:
        action()
    except (OSError, ValueError):
        return False
    return True


def _won(**attempts: Callable[[], object]) -> dict[str, object]:
    return {"won": [name for name, action in attempts.items() if _works(action)]}


class Thief(line_probe.Probe):
    """Attacks that try to get something."""

    def the_key(self, job: LineJob, path: str, node: int) -> dict[str, object]:
        link = f"/tmp/link-{os.getpid()}"
        os.symlink(path, link)
        by_link = _won(link=Path(link).read_bytes)
        os.unlink(link)
        direct = _won(
            plain=Path(path).read_bytes,
            dots=Path("/tmp/../../.." + path).read_bytes,
            own_root=Path("/proc/self/root" + path).read_bytes,
            node_root=Path(f"/proc/{node}/root" + path).read_bytes,
            first_root=Path("/proc/1/root" + path).read_bytes,
        )
        return {"won": [*_list(by_link), *_list(direct)]}

    def other_files(self, job: LineJob, paths: list[str]) -> dict[str, object]:
        return _won(**{path: Path(path).read_bytes for path in [*paths, "/etc/shadow", "/etc/gshadow", "/proc/kcore", "/proc/keys"]})

    def folders(self, job: LineJob, paths: list[str]) -> dict[str, object]:
        return _won(**{path: lambda path=path: os.listdir(path) for path in [*paths, "/sys", "/run", "/var", "/boot"]})

    def secrets(self, job: LineJob, word: str) -> dict[str, object]:
        """In any environment or command line that can be read, its own too."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            for name in ("environ", "cmdline"):
                try:
                    if word.encode() in (folder / name).read_bytes():
                        found.append(f"{folder.name}/{name}")
                except OSError:
                    continue
        return {"won": [*found, *(["os.environ"] if word in str(os.environ) else [])]}

    def network(self, job: LineJob, port: int, name: str) -> dict[str, object]:
        def tcp(host: str) -> None:
            with socket.socket() as to:
                to.setblocking(False)
                code = to.connect_ex((host, port))
                if code not in (0, errno.EINPROGRESS):
                    raise OSError(code, "refused")

        def local() -> None:
            with socket.socket(socket.AF_UNIX) as to:
                to.connect("\0" + name)

        udp = socket.SOCK_DGRAM
        return _won(
            loopback=lambda: tcp("127.0.0.1"),
            outside=lambda: tcp("192.0.2.1"),
            cloud=lambda: tcp("169.254.169.254"),
            udp=lambda: socket.socket(socket.AF_INET, udp).sendto(b"x", ("127.0.0.1", port)),
            six=lambda: socket.socket(socket.AF_INET6),
            bind=lambda: socket.create_server(("0.0.0.0", 0)),
            abstract=local,
            name=lambda: socket.getaddrinfo("localhost.localdomain", 80),
        )

    def families(self, job: LineJob) -> dict[str, object]:
        kinds = (socket.SOCK_RAW, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
        won = {
            f"{name} {kind}": lambda family=family, kind=kind: socket.socket(family, kind)
            for name, family in _FAMILIES.items()
            for kind in kinds
        }
        return _won(**won)

    def its_own_code(self, job: LineJob, paths: list[str]) -> dict[str, object]:
        import runtimes

        code = Path(runtimes.__file__ or "")
        mine = [Path(path) for path in paths]
        return _won(
            **{f"append {path}": lambda path=path: open(path, "ab") for path in (*mine, code)},
            **{f"chmod {path}": lambda path=path: path.chmod(0o777) for path in (*mine, code)},
            **{f"beside {path}": lambda path=path: (path.parent / "new").touch() for path in (*mine, code)},
            **{f"unlink {path}": path.unlink for path in mine},
            **{f"{place}new": Path(place, "new").touch for place in ("/", "/dev/", "/dev/shm/", "/proc/", "/etc/", "/usr/lib/", "/home/")},
            core_pattern=lambda: open("/proc/sys/kernel/core_pattern", "r+").close(),
            sysrq=lambda: open("/proc/sysrq-trigger", "w").close(),
        )

    def out_by_a_link(self, job: LineJob, folder: str) -> dict[str, object]:
        """A file planted in a folder of the host, through a symbolic link in /tmp and through a hard one."""
        link = f"/tmp/out-{os.getpid()}"
        os.symlink(folder, link)
        won = _won(
            planted=Path(link, "planted").touch,
            hard=lambda: os.link(f"{folder}/key", f"{link}-hard"),
            moved=lambda: os.rename(link, f"{folder}/moved"),
        )
        os.unlink(link)
        return won

    def fill(self, job: LineJob) -> dict[str, object]:
        """/tmp, by many files, until there is no room. Leaves them lying about."""
        piece, written = bytes(1024**2), 0
        try:
            for _ in range(_FILL_BYTES_MAX // (16 * len(piece))):
                with open(f"/tmp/fill-{time.monotonic_ns()}", "wb", buffering=0) as file:
                    for _ in range(16):
                        written += file.write(piece)
        except OSError:
            pass
        return {"bytes": written}

    def forks(self, job: LineJob) -> dict[str, object]:
        count = 0
        for _ in range(_FORKS_MAX):
            try:
                if os.fork() == 0:
                    os._exit(0)
                count += 1
            except OSError:
                continue
        spawned = _won(
            spawn=lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}),
            run=lambda: subprocess.run([sys.executable, "-c", ""], check=True),
        )
        return {"won": [*_list(spawned), *([f"{count} forks"] if count else [])]}

    def threads(self, job: LineJob) -> dict[str, object]:
        """As many as it gets; each waits, and ends with the job."""
        over, started = threading.Event(), []
        try:
            for _ in range(_THREADS_MAX):
                started.append(threading.Thread(target=over.wait, daemon=True))
                started[-1].start()
        except RuntimeError:
            started.pop()
        over.set()
        for thread in started:
            thread.join()
        return {"count": len(started)}

    def other_processes(self, job: LineJob, node: int, victim: int) -> dict[str, object]:
        number = 0 if platform.machine() == "x86_64" else 1
        ptrace, attach = (101, 117)[number], 0x4206
        seen = [name for name in os.listdir("/proc") if name.isdecimal() and int(name) > 50]
        won = _won(
            signal_node=lambda: os.kill(node, 0),
            signal_victim=lambda: os.kill(victim, 0),
            limit_node=lambda: resource.prlimit(node, resource.RLIMIT_CORE, (0, 0)),
            pidfd=lambda: os.pidfd_open(victim),
            memory=lambda: open(f"/proc/{victim}/mem", "rb").close(),
            memory_of_first=lambda: open("/proc/1/mem", "r+b").close(),
            priority=lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
        )
        traced = {"trace": victim, "trace_parent": os.getppid()}
        let = [name for name, process in traced.items() if _is_let(ptrace, (attach, process, 0, 0))]
        return {"won": [*_list(won), *let, *seen]}

    def devices(self, job: LineJob) -> dict[str, object]:
        names = "mem kmsg sda vda nvme0n1 loop0 loop-control fuse kvm net/tun nvidia0 dri/card0 dri/renderD128 mapper/control tty0"
        path = f"/tmp/disk-{os.getpid()}"
        return _won(
            **{name: lambda name=name: open(f"/dev/{name}", "rb") for name in names.split()},
            mknod=lambda: os.mknod(path, 0o60600, os.makedev(254, 0)),
        )

    def kernel(self, job: LineJob) -> dict[str, object]:
        is_intel = platform.machine() == "x86_64"
        return {"won": [name for name, (here, there, words) in _CALLS.items() if _is_let(here if is_intel else there, words)]}

    def mounts(self, job: LineJob) -> dict[str, object]:
        _LIBC.mount(b"none", b"/tmp", b"no-such-kind", 0, 0)  # whoever may mount is told that there is no such kind
        won = ["mount"] if ctypes.get_errno() != errno.EPERM else []
        return {"won": [*won, *_list(_won(chroot=lambda: os.chroot("/tmp")))]}

    def rank(self, job: LineJob) -> dict[str, object]:
        """To be somebody else, or to have more than was given."""
        return _won(
            setuid=lambda: os.setuid(0),
            setgid=lambda: os.setgid(0),
            setgroups=lambda: os.setgroups([0]),
            setresuid=lambda: os.setresuid(-1, 0, 0),
            files=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (4000, 4000)),
            core=lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, 1 << 40)),
            hostname=lambda: socket.sethostname(socket.gethostname()),
            realtime=lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
        )

    def descriptors(self, job: LineJob) -> dict[str, object]:
        """What it was born with, beside its standard ones and the node's socket."""
        mine = int(sys.argv[1])
        won = []
        for name in os.listdir("/proc/self/fd"):
            try:
                place = os.readlink(f"/proc/self/fd/{name}")
            except OSError:
                continue
            if int(name) > 2 and int(name) != mine and not place.startswith(("/proc", "pipe:", "anon_inode:", "/usr", "/dev/urandom")):
                won.append(place)
        return {"won": won}


class Wrecker(Thief):
    """Attacks on the talk with the node, and on its patience."""

    label = "wrecker/1"

    def loop(self, job: LineJob) -> dict[str, object]:
        while True:
            pass

    def deaf(self, job: LineJob) -> dict[str, object]:
        """Says one line, then nothing, and takes no notice of any signal."""
        for number in range(1, signal.NSIG):
            _works(partial(signal.signal, number, signal.SIG_IGN))
        job.say(TokenLine("deaf"))
        while True:
            time.sleep(60)

    def freeze(self, job: LineJob) -> dict[str, object]:
        os.kill(os.getpid(), signal.SIGSTOP)
        return {}

    def crash(self, job: LineJob) -> dict[str, object]:
        ctypes.string_at(8)
        return {}

    def leave(self, job: LineJob) -> dict[str, object]:
        os._exit(0)

    def words(self, job: LineJob) -> dict[str, object]:
        """10 GB of them."""
        line = TokenLine("x" * 60_000)
        for _ in range(10 * 1024**3 // 60_000):
            job.say(line)
        return {}

    def linger(self, job: LineJob) -> dict[str, object]:
        """Ends well and computes on, in a thread that nobody sees."""
        threading.Thread(target=self.loop, args=(job,), daemon=True).start()
        return {}

    def hang_up(self, job: LineJob) -> dict[str, object]:
        with socket.socket(fileno=os.dup(int(sys.argv[1]))) as talk:
            talk.shutdown(socket.SHUT_RDWR)
        return self.deaf(job)

    def garbage(self, job: LineJob) -> dict[str, object]:
        return self._send(job, os.urandom(100_000), then=self.loop)

    def long_frame(self, job: LineJob) -> dict[str, object]:
        return self._send(job, struct.pack(">II", 5, 2**32 - 1) + bytes(100_000), then=self.loop)

    def no_such_frame(self, job: LineJob) -> dict[str, object]:
        return self._send(job, struct.pack(">II", 2, 0) + b"\x91\x63", then=self.loop)

    def loaded_again(self, job: LineJob) -> dict[str, object]:
        """Whoever is loaded owes nothing: it would never be ended, and be given a second job."""
        return self._tell(job, Loaded("other/1"), then=self.loop)

    def not_loaded_after_all(self, job: LineJob) -> dict[str, object]:
        return self._tell(job, LoadFailed("no\x1b[2Jmodel" * 1000), then=self.loop)

    def nodes_words(self, job: LineJob) -> dict[str, object]:
        number = self._number(job)
        return self._tell(job, Taken(number, 10**9), Cancel(number), Run(number, 0, 1000, 1, bytes(16), b"{}"), then=self.loop)

    def end_of_another(self, job: LineJob) -> dict[str, object]:
        return self._tell(job, Ended(self._number(job) + 1, Outcome.EXITED, ""), then=self.loop)

    def end_twice(self, job: LineJob) -> dict[str, object]:
        ended = Ended(self._number(job), Outcome.EXITED, "")
        return self._tell(job, Output(ended.job, b'{"type":"done"}\n'), ended, ended, then=self.loop)

    def end_without_done(self, job: LineJob) -> dict[str, object]:
        return self._tell(job, Ended(self._number(job), Outcome.EXITED, ""), then=self.leave)

    def end_in_long_words(self, job: LineJob) -> dict[str, object]:
        text = "\x1b[2J\n" + "x" * 100_000
        return self._tell(job, Ended(self._number(job), Outcome.BROKEN, text, stderr=bytes(1024**2)), then=self.leave)

    def end_as_if_cancelled(self, job: LineJob) -> dict[str, object]:
        return self._tell(job, Ended(self._number(job), Outcome.INTERRUPTED, ""), then=self.leave)

    def no_lines(self, job: LineJob) -> dict[str, object]:
        return self._tell(job, Output(self._number(job), b"hello very-secret-word\n"), then=self.loop)

    def no_text(self, job: LineJob) -> dict[str, object]:
        return self._tell(job, Output(self._number(job), b'{"type":"token","content":"\xff\xfe"}\n'), then=self.loop)

    def nested(self, job: LineJob) -> dict[str, object]:
        deep = b'{"type":"done","x":' + b"[" * 50_000 + b"]" * 50_000 + b"}\n"
        return self._tell(job, Output(self._number(job), deep), then=self.loop)

    def no_picture(self, job: LineJob) -> dict[str, object]:
        line = b'{"type":"image","data":"aGVsbG8=","format":"png","width":1000000000,"height":-1}\n'
        return self._tell(job, Output(self._number(job), line), then=self.loop)

    def ahead_of_its_reader(self, job: LineJob) -> dict[str, object]:
        """More lines than anybody has taken, without a look at the window."""
        lines = b'{"type":"token","content":"word"}\n' * 1000
        while True:
            self._tell(job, Output(self._number(job), lines), then=lambda job: {})

    def _number(self, job: LineJob) -> int:
        return int(job._job.order.job)  # type: ignore[attr-defined]  # it looks where it should not

    def _tell(self, job: LineJob, *frames: object, then: Callable[[LineJob], dict[str, object]]) -> dict[str, object]:
        return self._send(job, b"".join(encode_frame(LINE_WORKER, frame) for frame in frames), then)

    def _send(self, job: LineJob, data: bytes, then: Callable[[LineJob], dict[str, object]]) -> dict[str, object]:
        with socket.socket(fileno=os.dup(int(sys.argv[1]))) as talk:
            talk.sendall(data)
        return then(job)


def _list(won: dict[str, object]) -> list[object]:
    found = won["won"]
    assert isinstance(found, list)
    return found


def load(order: LoadOrder) -> Wrecker:
    return Wrecker()


if __name__ == "__main__":
    serve(load)

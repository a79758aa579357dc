"""Hostile programs, as source. Each runs with the standard library alone and tells what it got over descriptor 3.

Each defines ``attack(facts)``, which returns what it won, or raises. What is sent back is ``["won", value]`` or ``["failed", error]``.
"""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import dataclass

PRELUDE = """
import ctypes, errno, json, os, platform, resource, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
talk = socket.socket(fileno=3)
def say(*words):
    talk.sendall(json.dumps(words).encode() + b"\\n")
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, errno.errorcode.get(code, str(code)))
    return result
"""
FINALE = """
facts = json.loads(sys.argv[1])
try:
    say("won", attack(facts))
except BaseException as error:
    say("failed", type(error).__name__)
"""


def source(attack: str) -> str:
    return PRELUDE + textwrap.dedent(attack) + FINALE


def arguments(attack: str, facts: dict[str, object]) -> tuple[str, ...]:
    """The command, by this interpreter. ``facts["marker"]`` in it is how a survivor would be found."""
    return (sys.executable, "-I", "-S", "-c", source(attack), json.dumps(facts))


@dataclass(frozen=True, slots=True)
class Attack:
    """``errors``: what it may fail with in the sandbox. ``won``: what it gets without one, None where that is not tried.

    ``alone``: whether the weaker sandbox holds it too.
    """

    name: str
    body: str
    errors: frozenset[str]
    works_bare: bool = True
    alone: bool = False


def _attack(name: str, errors: str, body: str, bare: bool = True, alone: bool = False) -> Attack:
    return Attack(name, body, frozenset(errors.split()), bare, alone)


_GONE = "FileNotFoundError"
_DENIED = "PermissionError"

ATTACKS = [
    _attack("read_the_islands_key", _GONE, "def attack(f): return open(f['key']).read()"),
    _attack("read_another_cargo", _GONE, "def attack(f): return open(f['other']).read()"),
    _attack("list_the_store", "AssertionError", "def attack(f):\n  assert len(os.listdir(f['store'])) > 1"),
    _attack("read_shadow", _GONE, "def attack(f): return open('/etc/shadow').read()"),
    _attack(
        "key_through_proc_root",
        _GONE,
        "def attack(f): return open(os.path.join('/proc/self', 'root', '..') + f['key']).read()",
    ),
    _attack(
        "key_through_a_link_in_tmp",
        _GONE,
        "def attack(f):\n  os.symlink(f['key'], f'/tmp/link-{os.getpid()}')\n"
        "  try: return open(f'/tmp/link-{os.getpid()}').read()\n  finally: os.unlink(f'/tmp/link-{os.getpid()}')",
    ),
    _attack(
        "key_through_the_nodes_files",
        _GONE,
        "def attack(f): return open(f'/proc/{f[\"parent\"]}/root' + f['key']).read()",
    ),
    _attack(
        "environment",
        "KeyError",
        """
        def attack(f):
            for name in filter(str.isdecimal, os.listdir("/proc")):
                try:
                    if "very-secret-word" in open(f"/proc/{name}/environ").read():
                        return "very-secret-word"
                except OSError:
                    continue
            return os.environ["ISLAND_SECRET"]
        """,
    ),
    _attack("own_environment", "KeyError", "def attack(f): return os.environ['ISLAND_SECRET']", alone=True),
    _attack(
        "connect_by_tcp",
        _DENIED,
        "def attack(f): socket.create_connection(('127.0.0.1', f['port']), 5).close()",
        alone=True,
    ),
    _attack(
        "send_by_udp",
        _DENIED,
        "def attack(f): socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', f['port']))",
        alone=True,
    ),
    _attack("netlink", _DENIED, "def attack(f): socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()", alone=True),
    _attack(
        "abstract_socket_of_the_host",
        f"ConnectionRefusedError {_DENIED}",
        "def attack(f):\n  s = socket.socket(socket.AF_UNIX)\n  s.connect('\\0' + f['abstract'])",
        alone=True,
    ),
    _attack(
        "named_socket_of_the_host",
        f"{_GONE} {_DENIED}",
        "def attack(f):\n  s = socket.socket(socket.AF_UNIX)\n  s.connect(f['socket'])",
        alone=True,
    ),
    _attack("fork", _DENIED, "def attack(f):\n  if os.fork() == 0: os._exit(0)\n  os.wait()", alone=True),
    _attack(
        "spawn",
        _DENIED,
        "def attack(f): os.waitpid(os.posix_spawn(sys.executable, ['p', '-c', '0'], {}), 0)",
        alone=True,
    ),
    _attack("write_the_model", "OSError", "def attack(f): open(f['model'], 'ab').write(b'x')"),
    _attack("delete_the_model", "OSError", "def attack(f): os.unlink(f['model'])"),
    _attack("chmod_the_model", "OSError", "def attack(f): os.chmod(f['model'], 0o777)"),
    _attack("write_our_code", "OSError PermissionError", "def attack(f): open(f['code'], 'a').close()"),
    _attack("fill_the_root", "OSError", "def attack(f):\n  open('/x', 'w').close()\n  os.unlink('/x')"),
    _attack("fill_dev", "OSError", "def attack(f):\n  open('/dev/x', 'w').close()\n  os.unlink('/dev/x')"),
    _attack("fill_dev_shm", "OSError", "def attack(f):\n  open('/dev/shm/x', 'w').close()\n  os.unlink('/dev/shm/x')"),
    _attack(
        "ptrace_the_node",
        _DENIED,
        "def attack(f): call(101 if platform.machine() == 'x86_64' else 117, 0x4206, f['victim'], 0, 0)",
        alone=True,
    ),
    _attack(
        "read_the_nodes_memory",
        f"{_GONE} {_DENIED}",
        "def attack(f): open(f'/proc/{f[\"victim\"]}/mem', 'rb').close()",
    ),
    _attack("signal_the_node", f"ProcessLookupError {_DENIED}", "def attack(f): os.kill(f['victim'], 0)", alone=True),
    _attack(
        "limit_the_node",
        f"ProcessLookupError {_DENIED}",
        "def attack(f): resource.prlimit(f['victim'], resource.RLIMIT_CORE, (0, 0))",
        alone=True,
    ),
    _attack("see_host_processes", "AssertionError", "def attack(f): assert os.path.exists(f'/proc/{f[\"victim\"]}')"),
    _attack(
        "mount",
        "PermissionError",
        """
        def attack(f):
            # Of a kind that there is not: whoever may mount is told so, and nothing happens to a host whose walls are broken
            libc.mount(b"none", b"/tmp", b"no-such-kind", 0, 0)
            if ctypes.get_errno() == errno.EPERM:
                raise PermissionError
        """,
        alone=True,
    ),
    _attack(
        "unshare",
        _DENIED,
        "def attack(f): call(272 if platform.machine() == 'x86_64' else 97, 0x10000000)",
        alone=True,
    ),
    _attack(
        "clone_a_user_namespace",
        _DENIED,
        "def attack(f):\n  if call(56 if platform.machine() == 'x86_64' else 220, 0x10000000 | 17, 0, 0, 0, 0) == 0: os._exit(0)",
        alone=True,
    ),
    _attack(
        "clone3", "OSError", "def attack(f):\n  if call(435, (ctypes.c_uint64 * 8)(), 64) == 0: os._exit(0)", alone=True
    ),
    _attack(
        "keyctl",
        _DENIED,
        "def attack(f): call(250 if platform.machine() == 'x86_64' else 219, 0, -3, 1)",
        alone=True,
    ),
    _attack(
        "device_node",
        _DENIED,
        "def attack(f): os.mknod(f'/tmp/disk-{os.getpid()}', 0o60600, os.makedev(8, 0)); os.unlink(f'/tmp/disk-{os.getpid()}')",
        bare=False,
        alone=True,
    ),
    _attack(
        "io_uring",
        _DENIED,
        "def attack(f): call(425, 1, (ctypes.c_uint64 * 15)())",
        bare=False,  # many machines have it switched off
        alone=True,
    ),
    _attack("anonymous_file", "OSError", "def attack(f): os.close(os.memfd_create('x'))", alone=True),
    _attack(
        "core_pattern", "OSError PermissionError", "def attack(f): open('/proc/sys/kernel/core_pattern', 'r+').close()"
    ),
    _attack(
        "sysrq",
        "OSError PermissionError FileNotFoundError",
        "def attack(f): open('/proc/sysrq-trigger', 'w').close()",
        bare=False,
    ),
    _attack(
        "raise_the_core_limit",
        "ValueError",
        "def attack(f): resource.setrlimit(resource.RLIMIT_CORE, (1, 1 << 40))",
        alone=True,
    ),
    _attack(
        "raise_the_file_limit",
        "ValueError",
        "def attack(f): resource.setrlimit(resource.RLIMIT_NOFILE, (4000, 4000))",
        alone=True,
    ),
    _attack(
        "leaked_descriptors",
        "AssertionError",
        "def attack(f):\n  names = [os.readlink(f'/proc/self/fd/{n}') for n in range(3, 100) if os.path.exists(f'/proc/self/fd/{n}')]\n"
        "  assert any(name == f['key'] for name in names)",
        alone=True,
    ),
    _attack(
        "exhaust_descriptors",
        "OSError",
        "def attack(f):\n  kept = [os.open('/dev/null', 0) for _ in range(600)]",
        alone=True,
    ),
    _attack(
        "take_all_memory",
        "MemoryError",
        "def attack(f):\n  kept = bytearray(f['bomb_bytes'])",
        alone=True,
    ),
    _attack(
        "fill_a_file",
        "OSError",
        """
        def attack(f):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            path = f"/tmp/big-{os.getpid()}"
            try:
                with open(path, "wb") as file:
                    file.truncate(f["file_bytes"] + 1)
            finally:
                os.unlink(path)
        """,
        alone=True,
    ),
    _attack(
        "take_all_cores",
        "AssertionError",
        "def attack(f):\n  os.sched_setaffinity(0, range(os.cpu_count()))\n  assert len(os.sched_getaffinity(0)) > 1",
        bare=False,  # a machine may have one core
        alone=True,
    ),
]

"""What of this machine a sandboxed Python needs, read once: the interpreter, its libraries, the C library, our own packages."""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

from runtimes.sandbox.command import Bind, Host, is_below

_ROOT = Path(__file__).resolve().parents[2]
_LAUNCHER = Path(__file__).with_name("launch.py")
_PACKAGES = ("protocol", "privacy", "runtimes")  # what workers import; the node's own packages and data are not shown
_LIBRARY_FOLDERS = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")
# Names of libraries, not configuration: the linker's cache, and the links by which Debian chooses a BLAS.
_LINKER_FILES = ("/etc/ld.so.cache", "/etc/alternatives")
_HIDDEN = ("/proc/keys", "/proc/key-users")  # the key rings of the node's user by name; their contents no program may ask for
_SHARED_PREFIXES = ("/usr", "/usr/local", "/")  # there is more below these than Python


@lru_cache(maxsize=1)
def host() -> Host:
    """Facts for ``bwrap_command``."""
    links = [folder for folder in _LIBRARY_FOLDERS if os.path.islink(folder)]
    folders = [
        folder for folder in (*_LIBRARY_FOLDERS, *_LINKER_FILES) if folder not in links and os.path.exists(folder)
    ]
    binds = [Bind(path) for path in _outermost([*folders, *_python_paths()])]
    code = [Bind(str(_ROOT / package)) for package in _PACKAGES if (_ROOT / package).is_dir()]
    return Host(
        python=sys.executable,
        launcher=str(_LAUNCHER),
        binds=tuple(binds),
        code=tuple(code) if not any(is_below(str(_ROOT), bind.source) for bind in binds) else (),
        symlinks=tuple((os.readlink(link), link) for link in links),
        python_path=str(_ROOT),
        hidden=tuple(path for path in _HIDDEN if os.path.exists(path)),
    )


def _python_paths() -> list[str]:
    """Of a Python of its own, such as pyenv's, the whole prefix; of the system's, program and library; and the virtual environment."""
    prefix = os.path.realpath(sys.base_prefix)
    program = os.path.realpath(sys.executable)
    paths = [str(_LAUNCHER)]  # its folder may be bound or not: the launcher is needed in any case
    if prefix in _SHARED_PREFIXES:
        paths += [program, *{os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}]
        paths += [folder for folder in (os.path.join(prefix, "lib"),) if os.path.isdir(folder)]
    else:
        paths += [prefix, os.path.normpath(sys.base_prefix)]
    if sys.prefix != sys.base_prefix:
        paths.append(os.path.normpath(sys.prefix))
    return paths + _link_chain(sys.executable)


def _link_chain(path: str) -> list[str]:
    """Every place on the way from a virtual environment's ``python`` to the program: each must be there for the next to be found."""
    chain = []
    while os.path.islink(path):
        chain.append(path)
        path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
    return chain


def _outermost(paths: list[str]) -> list[str]:
    """Without those below another one. In a stable order."""
    found: list[str] = []
    for path in sorted(set(paths)):
        if not any(is_below(path, other) for other in found):
            found.append(path)
    return found

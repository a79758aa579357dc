"""The house stands: imports only go down, coordinator and runtimes never meet, protocol and privacy do no IO.

Everything is read from the source with ``ast``, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"protocol": 1, "privacy": 2, "coordinator": 3, "runtimes": 3, "node": 4}
PURE = ("protocol", "privacy")

# What reaches the world, keeps time, rolls dice or runs a loop. `secrets` and `uuid` are chance; `os` is all of it.
IMPURE_MODULES = frozenset(
    """aiohttp aiofiles anyio asyncio concurrent ctypes fcntl fileinput ftplib glob grpc http httpx importlib io libp2p llama_cpp
    mmap multiprocessing os pathlib pickle platform psutil random requests resource runpy sched secrets select selectors shelve
    shutil signal smtplib socket socketserver sqlalchemy sqlite3 ssl subprocess sys tempfile threading time tqdm trio urllib urllib3
    uuid wasmtime webbrowser zeroconf zipfile""".split()
)
# Pure corners of impure packages: a Random that is given as an argument brings its seed with it.
PURE_MODULES = frozenset({"urllib.parse", "random.Random"})
IMPURE_BUILTINS = frozenset({"open", "input", "print", "exec", "eval", "breakpoint", "__import__"})
IMPURE_CALLS = frozenset({"now", "utcnow", "today"})  # of datetime and date
OUTSIDE = frozenset({"tests", "bench", "specs"})


def complaints(root: Path) -> list[str]:
    """All breaches below ``root``, one line each; empty when the house stands."""
    found = []
    for package in FLOORS:
        for path in sorted((root / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            where = path.relative_to(root)
            found += [f"{where}:{line}: {what}" for line, what in breaches(package, where, tree)]
    return found


def breaches(package: str, where: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for line, module in imported(where, tree):
        if (what := floor_breach(package, module)) or (package in PURE and (what := purity_breach(package, module))):
            yield line, what
    if package in PURE:
        yield from impure_calls(package, tree)


def imported(where: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every imported module with its line; of ``from a import b`` both ``a`` and ``a.b``, since either may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(where, node)
            yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)


def absolute(where: Path, node: ast.ImportFrom) -> str:
    """``from ..x import y`` as seen from the top."""
    parents = where.with_suffix("").parts[: -node.level] if node.level else ()
    return ".".join([*parents, *([node.module] if node.module else [])])


def floor_breach(package: str, module: str) -> str | None:
    other = module.partition(".")[0]
    if other in OUTSIDE:
        return f"{package} imports {other}, which is no part of the program"
    if other not in FLOORS or other == package:
        return None
    if FLOORS[other] > FLOORS[package]:
        return f"{package} (floor {FLOORS[package]}) imports {other} (floor {FLOORS[other]})"
    if FLOORS[other] == FLOORS[package]:
        return f"{package} and {other} may never meet"
    return None


def purity_breach(package: str, module: str) -> str | None:
    impure = module.partition(".")[0] in IMPURE_MODULES
    if not impure or any(module == pure or module.startswith(pure + ".") for pure in PURE_MODULES):
        return None
    return f"{package} does no IO and takes time and chance as arguments, but imports {module}"


def impure_calls(package: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in IMPURE_BUILTINS:
            yield node.lineno, f"{package} does no IO, but calls {called.id}()"
        if isinstance(called, ast.Name) and called.id == "Random" and not node.args:
            yield node.lineno, f"{package} takes chance as an argument, but calls Random() without a seed"
        if isinstance(called, ast.Attribute) and called.attr in IMPURE_CALLS:
            yield node.lineno, f"{package} takes time as an argument, but calls {ast.unparse(called)}()"


def test_the_house_stands() -> None:
    assert complaints(ROOT) == []


def test_every_floor_is_there_and_is_looked_at() -> None:
    for package in FLOORS:
        assert (ROOT / package / "__init__.py").is_file(), f"{package} is missing"
    with_setup = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert with_setup == set(FLOORS), "a new top-level package needs a floor"


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("protocol/a.py", "import privacy", "protocol (floor 1) imports privacy (floor 2)"),
        ("protocol/a.py", "from node.cli import main", "protocol (floor 1) imports node (floor 4)"),
        ("privacy/deep/a.py", "def f():\n    import runtimes.base", "privacy (floor 2) imports runtimes (floor 3)"),
        ("coordinator/a.py", "from runtimes import base", "coordinator and runtimes may never meet"),
        ("runtimes/a.py", "import coordinator.book", "runtimes and coordinator may never meet"),
        (
            "runtimes/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import node",
            "runtimes (floor 3) imports node (floor 4)",
        ),
        ("node/a.py", "from tests import helper", "node imports tests"),
        ("coordinator/deep/a.py", "from ...runtimes import base", "coordinator and runtimes may never meet"),
        ("protocol/a.py", "import socket", "imports socket"),
        ("protocol/a.py", "import os.path", "imports os.path"),
        ("protocol/a.py", "from time import monotonic", "imports time.monotonic"),
        ("privacy/a.py", "import random", "imports random"),
        ("privacy/a.py", "async def f():\n    import trio", "imports trio"),
        ("privacy/a.py", "import asyncio, aiohttp", "imports aiohttp"),
        ("protocol/a.py", "from urllib import request", "imports urllib.request"),
        ("protocol/a.py", "from random import Random\nx = Random()", "calls Random() without a seed"),
        ("protocol/a.py", "x = open('file')", "calls open()"),
        ("protocol/a.py", "import datetime\nx = datetime.datetime.now()", "calls datetime.datetime.now()"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    write(tmp_path, file, source)
    found = complaints(tmp_path)
    assert found, "nothing was noticed"
    assert any(complaint in line for line in found), found
    assert all(line.startswith(file + ":") for line in found)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("node/a.py", "import coordinator.http, runtimes.base, privacy, protocol, trio, os\nopen('file')"),
        ("runtimes/a.py", "from protocol.errors import ConfigError\nimport time, socket"),
        ("runtimes/deep/a.py", "from . import b\nfrom ..base import Run"),
        ("privacy/a.py", "from protocol import limits\nimport hashlib, struct"),
        ("protocol/a.py", "from urllib.parse import urlsplit\nimport msgpack, nacl.signing, enum"),
        ("protocol/a.py", "from random import Random\ndef f(chance: Random) -> Random:\n    return Random(7)"),
        ("protocol/a.py", "def f(now: float, open: bool) -> float:\n    return now"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, file: str, source: str) -> None:
    write(tmp_path, file, source)
    assert complaints(tmp_path) == []


def write(root: Path, file: str, source: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True)
    path.write_text(source)

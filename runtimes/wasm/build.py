"""Compiles modules/*.c to WebAssembly and pins what comes out: ``python -m runtimes.wasm.build``, with ``--check`` to compare only.

Needs Debian's ``clang lld wasi-libc libclang-rt-14-dev-wasm32``. The result depends on the compiler and the C library alone: no paths, no
times, no names of functions are in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from protocol.errors import ConfigError
from runtimes.wasm.modules import FOLDER, pins

PACKAGES = "clang lld wasi-libc libclang-rt-14-dev-wasm32"
_STACK_BYTES = 256 * 1024
_TIMEOUT_S = 120.0
_FLAGS = (
    "--target=wasm32-wasi",
    "--sysroot=/usr",
    "-std=gnu11",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-function",  # each module takes what it needs of cargo.h
    "-fno-ident",
    "-Wl,--strip-all",
    "-Wl,--stack-first",  # a stack that is too deep leaves the memory, rather than writing over data
    f"-Wl,-z,stack-size={_STACK_BYTES}",
)


def sources() -> list[Path]:
    return sorted(FOLDER.glob("*.c"))


def compiler() -> str:
    """The compiler's version in one line. Raises ConfigError where there is none."""
    if shutil.which("clang") is None:
        raise ConfigError(f"there is no clang; install it with `apt-get install {PACKAGES}`")
    run = subprocess.run(["clang", "--version"], capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
    return run.stdout.partition("\n")[0].strip()


def compile_module(source: Path) -> bytes:
    """Raises ConfigError with what the compiler says."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "module.wasm"
        command = ["clang", *_FLAGS, source.name, "-o", str(target)]
        run = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
        if run.returncode != 0:
            raise ConfigError(f"{source.name} does not compile; are `{PACKAGES}` installed?\n{run.stderr}")
        return target.read_bytes()


def recorded_compiler() -> str:
    """The one that made what is pinned."""
    return str(json.loads((FOLDER / "hashes.json").read_text(encoding="utf-8"))["compiler"])


def build() -> dict[str, bytes]:
    """All modules by name. Raises ConfigError."""
    compiler()
    return {source.stem: compile_module(source) for source in sources()}


def main() -> None:
    parser = argparse.ArgumentParser(description="compiles the WASM modules that ship")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a module differs from its pin")
    check = parser.parse_args().check
    try:
        version, built = compiler(), build()
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    hashes = {name: hashlib.sha256(wasm).hexdigest() for name, wasm in built.items()}
    if check:
        pinned = pins()
        differ = sorted(name for name in hashes.keys() | pinned.keys() if hashes.get(name) != pinned.get(name))
        raise SystemExit(f"not as pinned: {', '.join(differ)}" if differ else 0)
    for name, wasm in built.items():
        (FOLDER / f"{name}.wasm").write_bytes(wasm)
    facts = {"compiler": version, "modules": hashes}
    (FOLDER / "hashes.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{len(built)} modules, {sum(map(len, built.values()))} bytes, by {version}")


if __name__ == "__main__":
    main()

"""The modules that ship: C sources, what they compile to, hashes, and an example for each. ``python -m runtimes.wasm.build`` compiles.

    NAME.c               the source, under the licence of this repository; the comment at its top says what goes in and comes out
    NAME.wasm            compiled by Debian's clang, the same bytes each time
    hashes.json          the compiler, and the SHA-256 of each NAME.wasm
    examples/NAME.json   {"input": …, "output": [line, …]}; whatever is drawn comes from EXAMPLE_SEED
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError

FOLDER = Path(__file__).parent
EXAMPLE_SEED = bytes(16)


@dataclass(frozen=True, slots=True)
class Module:
    """``example_input``, ``example_output``: a JSON object, and the lines that come of it."""

    name: str
    content_hash: str
    wasm: bytes
    about: str
    example_input: dict[str, Any]
    example_output: list[dict[str, Any]]


def pins() -> dict[str, str]:
    """Names of the modules, and the SHA-256 of each."""
    modules: dict[str, str] = json.loads((FOLDER / "hashes.json").read_text(encoding="utf-8"))["modules"]
    return modules


def load(name: str) -> Module:
    """Raises ConfigError for an unknown name, and for a file that is not the one that was pinned."""
    pinned = pins().get(name)
    if pinned is None:
        raise ConfigError(f"there is no module {name!r}; there are {', '.join(pins())}")
    wasm = (FOLDER / f"{name}.wasm").read_bytes()
    if hashlib.sha256(wasm).hexdigest() != pinned:
        raise ConfigError(f"{name}.wasm is not the file that was pinned; build it again with `python -m runtimes.wasm.build`")
    example = json.loads((FOLDER / "examples" / f"{name}.json").read_text(encoding="utf-8"))
    return Module(name, pinned, wasm, _about(name), example["input"], example["output"])


def _about(name: str) -> str:
    """The comment at the top of the source, as one line."""
    comment, _, _ = (FOLDER / f"{name}.c").read_text(encoding="utf-8").removeprefix("/*").partition("*/")
    return " ".join(line.strip().removeprefix("* ") for line in comment.splitlines()).strip()

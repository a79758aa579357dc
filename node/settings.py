"""Settings of one process: flags over environment over the TOML file in the data folder, settled once, then frozen.

The environment variable of ``--memory-limit`` is ``ARCHIPELAG_MEMORY_LIMIT``, its name in ``config.toml`` is ``memory_limit``. What may
be given several times is a comma-separated list in the environment and an array in TOML.
"""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError

PREFIX = "ARCHIPELAG_"
CONFIG_FILE = "config.toml"
CACHE_MODEL_DEFAULT = "minilm-l6-v2"  # whose vectors say which questions are alike
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\Z", re.IGNORECASE)
_SIMILARITY = re.compile(r"([01])(?:\.([0-9]{1,3}))?\Z")


def parse_bytes(text: str) -> int:
    """``"512M"``, ``"1.5GiB"`` or plain bytes; K, M, G, T are powers of 1,024. Raises ValueError."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write bytes or something like 512M or 4G")
    number, unit, _ = match.groups()
    return int(float(number) * 1024 ** " KMGT".index(unit.upper() or " "))


def parse_host_port(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPv6]:PORT``. Raises ValueError."""
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


def parse_switch(text: str) -> bool:
    """``on`` or ``off``. Raises ValueError."""
    try:
        return _parse_bool(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is neither on nor off") from None


def parse_similarity(text: str) -> int:
    """``0.85`` in thousandths: 850. Raises ValueError."""
    found = _SIMILARITY.match(text)
    milli = int(found[1]) * 1000 + int((found[2] or "").ljust(3, "0")) if found else 0
    if not 0 < milli <= 1000:
        raise ValueError(f"a similarity is above 0 and at most 1, with at most three decimals, such as 0.85, not {text[:40]!r}")
    return milli


def settle(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    environment: Mapping[str, str] = os.environ,
    strict: bool = True,
) -> argparse.Namespace:
    """Fills what no flag gave (None) from the environment, then from config.toml. Raises ConfigError for an unknown name or a bad value.

    Every option of the parser must have the default None for this to work; real defaults are filled in by ``defaults``. Not ``strict``:
    the file is another command's, the node's whose folder it is; names that are not known here are its business.
    """
    options = {a.dest: a for a in parser._actions if a.dest not in ("help", "command")}
    file_values = _read_config(
        Path(arguments.data_dir).expanduser() if getattr(arguments, "data_dir", None) else None,
        set(options) if strict else None,
    )
    for name, action in options.items():
        if getattr(arguments, name, None) is not None:
            continue
        raw: Any = environment.get(PREFIX + name.upper())
        source = PREFIX + name.upper()
        if raw is None:
            raw, source = file_values.get(name), f"{CONFIG_FILE}: {name}"
        if raw is not None:
            setattr(arguments, name, _convert(action, raw, source))
    return arguments


def defaults(arguments: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """Fills what nobody set."""
    for name, value in values.items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    return arguments


def _read_config(folder: Path | None, known: set[str] | None) -> dict[str, Any]:
    if folder is None or not (folder / CONFIG_FILE).exists():
        return {}
    try:
        values = tomllib.loads((folder / CONFIG_FILE).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE}: {error}") from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = set(values) if known is None else known
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"{folder / CONFIG_FILE} has unknown settings: {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    return values


def _convert(action: argparse.Action, raw: Any, source: str) -> Any:
    """A value from the environment or TOML as the flag's own type would read it."""
    try:
        if action.nargs == 0:
            return raw if isinstance(raw, bool) else _parse_bool(str(raw))
        convert = action.type if callable(action.type) else str
        if action.choices is not None and str(raw) not in action.choices:
            raise ValueError(f"{raw!r} is none of {', '.join(map(str, action.choices))}")
        if isinstance(action, argparse._AppendAction):
            items = raw if isinstance(raw, list) else [part for part in str(raw).split(",") if part]
            return [convert(str(item)) for item in items]
        return convert(str(raw))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ConfigError(f"{source}: {error}") from error


def _parse_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(f"{text!r} is neither true nor false")

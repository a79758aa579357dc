"""Files that hold the body of a request, JSON or TOML, as commands read them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError

FILE_BYTES_MAX = 1_000_000


def object_in(path: Path) -> dict[str, Any]:
    """What a .toml file or a file of JSON says. Raises ConfigError that names the file."""
    try:
        data = bytes_of(path).decode()
        value = tomllib.loads(data) if path.suffix == ".toml" else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is no object")
    try:
        json.dumps(value, allow_nan=False)
    except TypeError:  # TOML has dates
        raise ConfigError(f"{path} holds a date; write it as a text, in quotes") from None
    except ValueError:
        raise ConfigError(f"{path} holds a number that is none, or infinite") from None
    return value


def bytes_of(path: Path) -> bytes:
    """All of a file that is to be sent. Raises ConfigError."""
    try:
        with open(path.expanduser(), "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{path} is over {FILE_BYTES_MAX:,} bytes")
    return data

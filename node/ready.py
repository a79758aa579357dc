"""The ready file: tells a supervisor that the node serves, and where."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from node.datadir import write_atomically
from protocol.errors import ConfigError


def write_ready(path: str | None, **fields: Any) -> None:
    """JSON with ``pid`` and the given fields, written by rename; nothing without a path."""
    if path is not None:
        check_ready_file(path)
        write_atomically(Path(path), json.dumps({"pid": os.getpid(), **fields}).encode(), mode=0o644)


def check_ready_file(path: str | None) -> None:
    """Raises ConfigError where it could not be written later."""
    if path is not None and not os.access(Path(path).absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--ready-file {path} cannot be written; its folder must exist and be yours")


def remove_ready(path: str | None) -> None:
    """A node that has stopped is not ready."""
    if path is not None:
        Path(path).unlink(missing_ok=True)

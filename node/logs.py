"""Logs: one line each on stderr, plain or JSON. Prompts, outputs and keys never come here: messages name ids, counts and reasons."""

from __future__ import annotations

import json
import logging
import sys
import time

_NOISY = ("libp2p", "multiaddr", "zeroconf", "asyncio", "aiohttp.access", "async_service", "alembic")


class _Line(logging.Formatter):
    """``12:00:01 INFO  island: text``; an exception becomes its last line, so that no data in a traceback gets out."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage().replace("\n", " | ")
        stamp = self.formatTime(record, "%Y-%m-%dT%H:%M:%SZ")
        return f"{stamp} {record.levelname:<7} {_short(record.name)}: {text}{_cause(record)}"


class _Json(_Line):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%SZ"),
            "level": record.levelname.lower(),
            "logger": _short(record.name),
            "message": record.getMessage() + _cause(record),
        }
        return json.dumps(entry, ensure_ascii=False)


def _short(name: str) -> str:
    return name.removeprefix("node.")


def _cause(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    trace = record.exc_info[2]
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}" if trace is not None else ""
    return f" ({record.exc_info[0].__name__}{where})"


def setup(as_json: bool = False, level: str = "info") -> None:
    """Configures the root logger of this process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if as_json else _Line())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)

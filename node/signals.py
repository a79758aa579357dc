"""SIGTERM and SIGINT ask for a drain; a second SIGINT stops at once."""

from __future__ import annotations

import logging
import os
import signal

import trio

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130


async def watch_signals(stop: trio.Event, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Sets ``stop`` at the first signal; at a second SIGINT the process ends on the spot."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        task_status.started()
        async for number in received:
            if stop.is_set() and number == signal.SIGINT:
                log.warning("stopping at once")
                os._exit(EXIT_INTERRUPTED)
            if not stop.is_set():
                log.info("%s: finishing what runs (Ctrl-C again to stop at once)", signal.Signals(number).name)
                stop.set()

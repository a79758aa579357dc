"""Says where a test hangs before its time limit ends it: the stacks of all tasks of trio, of all threads, and the processes beneath.

pytest's own report of a time-out shows the event loop, which only waits. What a hang needs is what each task waits for.
"""

from __future__ import annotations

import faulthandler
import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import CoroutineType, FrameType, GeneratorType

import pytest
import trio

_PERIOD_S = 5.0
_BEFORE_THE_LIMIT_S = 20.0
_BEYOND_THE_LIMIT_S = 60.0


class HangReport:
    """A plugin for pytest: one thread that looks at the clock of the test that runs. ``limit_s``: after which a signal ends a test. One
    that does not hear signals, since native code holds its thread, ends with its whole process a minute later; the others go on in a new
    one."""

    def __init__(self, limit_s: float) -> None:
        self._report_s, self._exit_s = limit_s - _BEFORE_THE_LIMIT_S, limit_s + _BEYOND_THE_LIMIT_S
        self._running: tuple[str, float] | None = None
        signal.signal(signal.SIGUSR2, say_tasks)
        threading.Thread(target=self._watch, name="hang report", daemon=True).start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._running = (item.nodeid, time.monotonic())
        if item.get_closest_marker("timeout") is None:
            faulthandler.dump_traceback_later(self._exit_s, exit=True)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._running = None

    def _watch(self) -> None:
        reported: tuple[str, float] | None = None
        while True:
            time.sleep(_PERIOD_S)
            running = self._running
            if running is not None and running != reported and time.monotonic() - running[1] > self._report_s:
                reported = running
                _say(f"\n{running[0]} has run for {time.monotonic() - running[1]:.0f} s.")
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                time.sleep(_PERIOD_S)
                faulthandler.dump_traceback(2)
                _say(processes())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def processes() -> str:
    """All but the kernel's own, which are children of 2, and those that have ended and only wait to be asked."""
    command = ["ps", "-N", "--ppid", "2", "-o", "pid,ppid,stat,etimes,wchan:20,args", "--cols", "150"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return "\n".join(line for line in lines if not line.endswith("<defunct>"))


def say_tasks(*_: object) -> None:
    """What all tasks wait for. In the main thread only: elsewhere the collector gives objects that are still being made."""
    tasks = [thing for thing in gc.get_objects() if isinstance(thing, trio.lowlevel.Task)]
    _say("\n".join([f"{len(tasks)} tasks of trio:", *(line for task in tasks for line in _stack(task))]))


def _stack(task: trio.lowlevel.Task) -> Iterator[str]:
    yield f"  {task.name}"
    awaited: object = task.coro
    while awaited is not None:
        frame: FrameType | None = None
        if isinstance(awaited, CoroutineType):
            frame, awaited = awaited.cr_frame, awaited.cr_await
        elif isinstance(awaited, GeneratorType):
            frame, awaited = awaited.gi_frame, awaited.gi_yieldfrom
        else:
            frame, awaited = getattr(awaited, "ag_frame", None), getattr(awaited, "ag_await", None)
        if frame is not None:
            yield f"    {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"

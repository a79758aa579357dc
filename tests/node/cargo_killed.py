"""Hears of a revocation and is killed at its n-th step on the disk, for each n: ``python -m tests.node.cargo_killed FOLDER``.

Each time in a process of its own, in FOLDER/N. A line for each: N, whether the process was killed, what it had done by then.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from node.cargo_news import CargoNews
from tests.protocol.cargo_samples import cargo, killed, listed
from tests.protocol.samples import NETWORK

_STEPS = ("open", "fsync", "replace", "unlink")
_MOST = 60


def main(folder: Path) -> None:
    for number in range(1, _MOST):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _live(folder / str(number), number, writer)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            done = pipe.read().split()
        status = os.waitpid(child, 0)[1]
        print(number, os.WIFSIGNALED(status), *done, flush=True)
        if not os.WIFSIGNALED(status):
            return


def _live(folder: Path, die_at: int, done: int) -> None:
    folder.mkdir()
    count = 0

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **more)

        return call

    def said(what: str) -> None:
        os.write(done, f"{what}\n".encode())

    async def hear() -> None:
        news = CargoNews(folder, NETWORK)
        await news.hear([listed()])
        news.on_revoked.append(lambda address: said("ended"))
        news.pass_on = lambda notices, sender: said("passed")
        for step in _STEPS:
            setattr(os, step, counted(getattr(os, step)))
        await news.hear([killed()], "somebody")
        assert news.may_run(cargo().address)

    trio.run(hear)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

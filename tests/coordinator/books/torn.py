"""What a power cut may do to a SQLite database in WAL mode: lose, or leave in pieces, what was not yet flushed to disk.

A commit is told once its frames in the log are flushed (synchronous=FULL). So everything up to the end of the last commit that was told is
safe, and everything after it may be anything. Pages of the database file that the log has too may be in pieces as well: a checkpoint may
have been writing them. https://www.sqlite.org/fileformat2.html#walformat
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

_HEADER, _FRAME_HEADER, _SECTOR = 32, 24, 512
_MAGIC_BIG_ENDIAN = 0x377F0683


def commit_ends(log: bytes) -> list[int]:
    """Where each commit in the log ends, in bytes."""
    if len(log) < _HEADER:
        return []
    magic, _, page_bytes, _, salt, _, _ = struct.unpack(">III I 8s II", log[:_HEADER])
    order = ">" if magic == _MAGIC_BIG_ENDIAN else "<"
    sums = struct.unpack(">II", log[24:32])
    ends, at = [], _HEADER
    while at + _FRAME_HEADER + page_bytes <= len(log):
        head = log[at : at + _FRAME_HEADER]
        end = at + _FRAME_HEADER + page_bytes
        if head[8:16] != salt:
            break
        is_commit = struct.unpack(">I", head[4:8])[0] != 0
        if is_commit and _sums(head[:8] + log[at + _FRAME_HEADER : end], order, sums) != struct.unpack(">II", head[16:24]):
            break
        if is_commit:
            ends.append(end)
        sums = struct.unpack(">II", head[16:24])
        at = end
    return ends


def _sums(data: bytes, order: str, start: tuple[int, ...]) -> tuple[int, int]:
    """The log's running checksum. Only of frames that end a commit: those before are what their sums say, or theirs is wrong too."""
    first, second = start
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second


def tear(database: Path, rng: random.Random, may_lose_last: bool) -> str:
    """Damages it in one way, drawn by chance, and says in which. ``may_lose_last``: the last commit in the log was not told to anybody."""
    file = Path(f"{database}-wal")
    log = bytearray(file.read_bytes() if file.exists() else b"")
    ends = commit_ends(bytes(log))
    safe = ([0, *ends][-2] if may_lose_last and ends else [0, *ends][-1]) if log else 0
    way = rng.choice(["cut", "zeros", "noise", "sectors", "bit", "more", "pages"])
    if way == "pages":
        _tear_pages(database, bytes(log), ends, rng)
        return way
    at = rng.randint(safe, len(log))
    match way:
        case "cut":
            del log[at:]
        case "zeros":
            log[at:] = bytes(len(log) - at)
        case "noise":
            log[at:] = rng.randbytes(len(log) - at)
        case "sectors":
            _tear_sectors(log, safe, rng)
        case "bit" if at < len(log):
            log[at] ^= 1 << rng.randrange(8)
        case _:
            log += rng.randbytes(rng.randrange(10_000))
    file.write_bytes(log)
    return way


def _tear_sectors(log: bytearray, safe: int, rng: random.Random) -> None:
    """Some sectors after what is safe have been written, in no order."""
    for start in range(safe - safe % _SECTOR, len(log), _SECTOR):
        if rng.random() < 0.5:
            begin = max(start, safe)
            log[begin : start + _SECTOR] = bytes(len(log[begin : start + _SECTOR]))


def _tear_pages(database: Path, log: bytes, ends: list[int], rng: random.Random) -> None:
    """Half of the pages of the file that the log has too. Not the first: its header says what the file is."""
    if not ends:
        return
    page_bytes = struct.unpack(">I", log[8:12])[0]
    step = _FRAME_HEADER + page_bytes
    numbers = {struct.unpack(">I", log[at : at + 4])[0] for at in range(_HEADER, ends[-1], step)}
    with database.open("r+b") as file:
        for number in sorted(numbers - {1}):
            if rng.random() < 0.5:
                file.seek((number - 1) * page_bytes)
                file.write(rng.randbytes(page_bytes))

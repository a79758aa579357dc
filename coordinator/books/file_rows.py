"""Files in the books: what accounts have sent, and what batches have written, in sealed pieces.

Theory of operation. A file is a row and its pieces, numbered from 0. It is begun, grows by a piece at a time, and is whole at its end; what
is not whole is nobody's to see. Each piece is a transaction of its own, so a file of 100 MB holds no other writer up for long; that is why
a file is also erased in steps, hidden first. One that broke off in the middle, by whosever fault, is erased by upkeep.

A file from which a batch reads has to stay: the batch's run bears the file's id as its name.

``connection`` of a change is inside ``Database.writing``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

import sqlalchemy as sql

from coordinator.books.runs import Run, RunKind, RunState
from coordinator.books.schema import file_pieces, files, jobs, runs
from protocol import limits
from protocol.errors import ArchipelagError

PIECES_ERASED_AT_ONCE = 8  # SQLite overwrites what it forgets, so each costs a write


class FileFault(StrEnum):
    """Why a file cannot be had, kept or deleted."""

    UNKNOWN = "file_not_found"
    TOO_MANY = "too_many_files"
    NO_ROOM = "files_full"
    TOO_LARGE = "file_too_large"
    IN_USE = "file_in_use"


class FileRefused(ArchipelagError):
    """Its text is for the account."""

    def __init__(self, fault: FileFault, message: str) -> None:
        super().__init__(message)
        self.fault, self.message = fault, message


@dataclass(frozen=True, slots=True)
class FileRow:
    """Times in Unix milliseconds. ``bytes``: as it was sent, without the seals."""

    id: str
    account: str
    purpose: str
    filename: str
    bytes: int
    is_whole: bool
    created_at_ms: int
    expires_at_ms: int

    @property
    def pieces(self) -> int:
        return -(-self.bytes // limits.FILE_PIECE_BYTES)


_FIELDS = tuple(field.name for field in fields(FileRow))
_ROW = sql.select(*(files.c[name] for name in _FIELDS))
_RUN_FIELDS = tuple(field.name for field in fields(Run))


def _file(row: sql.Row[Any]) -> FileRow:
    values = dict(row._mapping)
    return FileRow(**{**values, "is_whole": bool(values["is_whole"])})


# ---- making one


def begin_file(connection: sql.Connection, row: FileRow, files_max: int) -> None:
    """A file that has nothing in it yet. Raises FileRefused: TOO_MANY."""
    mine = sql.select(sql.func.count()).select_from(files).where(files.c.account == row.account)
    if connection.execute(mine).scalar_one() >= files_max:
        text = f"the account has {files_max} files, which is the limit; delete some (DELETE /v1/files/ID)"
        raise FileRefused(FileFault.TOO_MANY, text)
    connection.execute(sql.insert(files), asdict(row))


def append_piece(connection: sql.Connection, row: FileRow, number: int, sealed: bytes, size: int, account_bytes_max: int) -> None:
    """The next piece, of ``size`` bytes before it was sealed. Raises FileRefused: UNKNOWN where the file was given up, NO_ROOM."""
    grown = sql.update(files).where(files.c.id == row.id, files.c.is_whole.is_(False)).values(bytes=files.c.bytes + size)
    if not connection.execute(grown).rowcount:
        raise FileRefused(FileFault.UNKNOWN, "the file was given up before it was whole; send it again")
    mine = sql.select(sql.func.coalesce(sql.func.sum(files.c.bytes), 0)).where(files.c.account == row.account)
    if connection.execute(mine).scalar_one() > account_bytes_max:
        text = f"the account's files may have {account_bytes_max} bytes together; delete some (DELETE /v1/files/ID)"
        raise FileRefused(FileFault.NO_ROOM, text)
    connection.execute(sql.insert(file_pieces), {"file_id": row.id, "number": number, "data": sealed})


def finish_file(connection: sql.Connection, row: FileRow) -> None:
    """All of it is there; ``row`` says what it is. Raises FileRefused: UNKNOWN."""
    values = {"purpose": row.purpose, "filename": row.filename, "expires_at_ms": row.expires_at_ms, "is_whole": True}
    changed = sql.update(files).where(files.c.id == row.id, files.c.is_whole.is_(False)).values(**values)
    if not connection.execute(changed).rowcount:
        raise FileRefused(FileFault.UNKNOWN, "the file was given up before it was whole; send it again")


# ---- looking at them


def _seen(account: str, now_ms: int) -> sql.ColumnElement[bool]:
    return (files.c.account == account) & files.c.is_whole & (files.c.expires_at_ms > now_ms)


def file_of(connection: sql.Connection, file_id: str, account: str, now_ms: int) -> FileRow | None:
    row = connection.execute(_ROW.where(files.c.id == file_id, _seen(account, now_ms))).first()
    return _file(row) if row is not None else None


def files_of(
    connection: sql.Connection, account: str, now_ms: int, purpose: str, after: str, limit: int, newest_first: bool
) -> list[FileRow]:
    """At most ``limit`` in the order of their making, behind the file ``after``; none where that is not there."""
    wanted = _seen(account, now_ms)
    if purpose:
        wanted &= files.c.purpose == purpose
    if after:
        last = connection.execute(_ROW.where(files.c.id == after, files.c.account == account)).first()
        if last is None:
            return []
        wanted &= _behind(files.c.created_at_ms, files.c.id, last.created_at_ms, last.id, newest_first)
    order = (files.c.created_at_ms.desc(), files.c.id.desc()) if newest_first else (files.c.created_at_ms, files.c.id)
    return [_file(row) for row in connection.execute(_ROW.where(wanted).order_by(*order).limit(limit))]


def _behind(
    time: sql.ColumnElement[Any], key: sql.ColumnElement[Any], at_ms: int, at_key: str, newest_first: bool
) -> sql.ColumnElement[bool]:
    if newest_first:
        return (time < at_ms) | ((time == at_ms) & (key < at_key))
    return (time > at_ms) | ((time == at_ms) & (key > at_key))


def piece_of(connection: sql.Connection, file_id: str, number: int) -> bytes | None:
    """One sealed piece."""
    chosen = sql.select(file_pieces.c.data).where(file_pieces.c.file_id == file_id, file_pieces.c.number == number)
    found = connection.execute(chosen).scalar_one_or_none()
    return bytes(found) if found is not None else None


# ---- taking them away


def hide_file(connection: sql.Connection, file_id: str, account: str) -> None:
    """A file that its account does not want any more; its pieces are still there. Raises FileRefused: UNKNOWN, IN_USE."""
    if _is_used(connection, file_id, account):
        raise FileRefused(FileFault.IN_USE, "a batch still reads this file; wait for its end, or cancel it first")
    hidden = sql.update(files).where(files.c.id == file_id, files.c.account == account, files.c.is_whole).values(is_whole=False)
    if not connection.execute(hidden).rowcount:
        raise FileRefused(FileFault.UNKNOWN, "there is no such file")


def _is_used(connection: sql.Connection, file_id: str, account: str) -> bool:
    open_batch = (runs.c.account == account) & (runs.c.kind == RunKind.FILE_BATCH.value) & (runs.c.name == file_id)
    return connection.execute(sql.select(runs.c.id).where(open_batch, runs.c.state == RunState.RUNNING.value)).first() is not None


def erase_some(connection: sql.Connection, file_id: str) -> bool:
    """Takes some pieces of a file that nobody may see away, and with the last ones its row; whether nothing is left of it."""
    if connection.execute(sql.select(files.c.id).where(files.c.id == file_id, files.c.is_whole)).first() is not None:
        return True
    chosen = sql.select(file_pieces.c.number).where(file_pieces.c.file_id == file_id).order_by(file_pieces.c.number.desc())
    numbers = list(connection.execute(chosen.limit(PIECES_ERASED_AT_ONCE)).scalars())
    if numbers:
        connection.execute(sql.delete(file_pieces).where(file_pieces.c.file_id == file_id, file_pieces.c.number.in_(numbers)))
    if len(numbers) == PIECES_ERASED_AT_ONCE:
        return False
    connection.execute(sql.delete(files).where(files.c.id == file_id))
    return True


def hide_over(connection: sql.Connection, now_ms: int, limit: int) -> list[str]:
    """Hides files whose time is over and from which no batch reads, and tells all that are to be erased: those, and what has not become
    whole in time."""
    over = files.c.is_whole & (files.c.expires_at_ms <= now_ms)
    hidden = [
        row.id
        for row in connection.execute(_ROW.where(over).order_by(files.c.expires_at_ms).limit(limit))
        if not _is_used(connection, row.id, row.account)
    ]
    if hidden:
        connection.execute(sql.update(files).where(files.c.id.in_(hidden)).values(is_whole=False))
    broken = files.c.is_whole.is_(False) & (files.c.created_at_ms < now_ms - int(limits.FILE_UPLOAD_S * 1000))
    left = connection.execute(sql.select(files.c.id).where(broken).limit(limit)).scalars()
    return [*hidden, *(file_id for file_id in left if file_id not in hidden)]


# ---- batches of their lines


def set_total(connection: sql.Connection, run_id: str, total: int) -> None:
    """How many lines a batch has, once they are counted (a write)."""
    connection.execute(sql.update(runs).where(runs.c.id == run_id).values(total=total))


def succeeded_of(connection: sql.Connection, run_id: str) -> int:
    """How many jobs of a batch have succeeded so far."""
    its_own = (jobs.c.parent == run_id) & (jobs.c.parent != "") & (jobs.c.state == "succeeded")
    return int(connection.execute(sql.select(sql.func.count()).select_from(jobs).where(its_own)).scalar_one())


def open_batches_of(connection: sql.Connection, account: str) -> int:
    """How many batches of an account have not ended."""
    mine = (runs.c.account == account) & (runs.c.kind == RunKind.FILE_BATCH.value) & (runs.c.state == RunState.RUNNING.value)
    return int(connection.execute(sql.select(sql.func.count()).select_from(runs).where(mine)).scalar_one())


def batches_of(connection: sql.Connection, account: str, after: str, limit: int) -> Sequence[Run]:
    """At most ``limit``, newest first, behind the batch ``after``, with their sealed specifications and results: those that are kept."""
    mine = (runs.c.account == account) & (runs.c.kind == RunKind.FILE_BATCH.value)
    wanted = mine & (sql.func.length(runs.c.spec) > 0)
    if after:
        last = connection.execute(sql.select(runs.c.created_at_ms).where(mine, runs.c.id == after)).first()
        if last is None:
            return ()
        wanted &= _behind(runs.c.created_at_ms, runs.c.id, last.created_at_ms, after, newest_first=True)
    chosen = sql.select(*(runs.c[name] for name in _RUN_FIELDS)).where(wanted)
    found = connection.execute(chosen.order_by(runs.c.created_at_ms.desc(), runs.c.id.desc()).limit(limit))
    return [_run(dict(row._mapping)) for row in found]


def _run(values: dict[str, Any]) -> Run:
    return Run(**{**values, "kind": RunKind(values["kind"]), "state": RunState(values["state"])})

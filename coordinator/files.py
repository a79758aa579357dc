"""Files of accounts: written and read a sealed piece at a time, so that no file is ever whole in memory.

Theory of operation. A ``FileWriter`` gathers bytes until they fill a piece, seals it under the file's id and the piece's number, and has it
written; a file that is not finished is erased, by whoever gave it up or by upkeep. Whoever reads asks for pieces by number.
All pieces but the last have ``FILE_PIECE_BYTES``, so where a byte lies follows from its offset.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import trio

from coordinator.books import file_rows
from coordinator.books.books import Books
from coordinator.books.errors import BooksUnavailable
from coordinator.books.file_rows import FileFault, FileRefused, FileRow
from coordinator.config import FileLimits
from privacy.sealed_rows import NONCE_BYTES, RowSealer
from protocol import limits

log = logging.getLogger(__name__)

_OVER_AT_ONCE = 50
_ANY = 2**62


class Files:
    """Runs on trio. ``clock_ms`` gives Unix milliseconds."""

    def __init__(
        self,
        books: Books,
        sealer: RowSealer,
        clock_ms: Callable[[], int],
        random_bytes: Callable[[int], bytes],
        limits_of: FileLimits,
    ) -> None:
        self._books, self._sealer, self._clock_ms, self._random_bytes = books, sealer, clock_ms, random_bytes
        self.limits = limits_of

    def __repr__(self) -> str:
        return f"<Files {self._books!r}>"

    def new_id(self) -> str:
        return f"file-{self._random_bytes(12).hex()}"

    async def begin(self, account: str) -> FileWriter:
        """A file that its account sends, within the limits.

        Raises FileRefused or BooksUnavailable.
        """
        row = FileRow(self.new_id(), account, "", "", 0, False, self._clock_ms(), 0)
        await self._books.change(file_rows.begin_file, row, self.limits.account_files_max)
        return FileWriter(self, row, self.limits.file_bytes_max, self.limits.account_bytes_max)

    async def begin_output(self, account: str, file_id: str) -> FileWriter:
        """A file that a batch writes, which has been paid for: it is not refused for want of room. It is not there yet; what an earlier try
        to write it has left is erased first. Raises BooksUnavailable."""
        await self.erase(file_id)
        row = FileRow(file_id, account, "", "", 0, False, self._clock_ms(), 0)
        await self._books.change(file_rows.begin_file, row, _ANY)
        return FileWriter(self, row, _ANY, _ANY)

    async def find(self, file_id: str, account: str) -> FileRow:
        """Raises FileRefused or BooksUnavailable."""
        found = await self._books.ask(file_rows.file_of, file_id, account, self._clock_ms())
        if found is None:
            raise FileRefused(FileFault.UNKNOWN, "there is no such file")
        return found

    async def find_any(self, file_id: str, account: str) -> FileRow | None:
        """Also one whose time is over, while it is still there: a batch may read it to its end. Raises BooksUnavailable."""
        return await self._books.ask(file_rows.file_of, file_id, account, 0)

    async def list(self, account: str, purpose: str, after: str, limit: int, newest_first: bool) -> tuple[list[FileRow], bool]:
        """Some files of an account, and whether there are more. Raises BooksUnavailable."""
        arguments = account, self._clock_ms(), purpose, after, limit + 1, newest_first
        found = await self._books.ask(file_rows.files_of, *arguments)
        return found[:limit], len(found) > limit

    async def piece(self, row: FileRow, number: int) -> bytes:
        """Raises FileRefused where it has been deleted, SealBroken or BooksUnavailable."""
        sealed = await self._books.ask(file_rows.piece_of, row.id, number)
        if sealed is None:
            raise FileRefused(FileFault.UNKNOWN, "the file has been deleted")
        return self._sealer.open(sealed, _piece_id(row.id, number))

    async def pieces(self, row: FileRow) -> AsyncIterator[bytes]:
        """All of them, one after the other. Raises as ``piece`` does."""
        for number in range(row.pieces):
            yield await self.piece(row, number)

    async def append(self, row: FileRow, number: int, piece: bytes, account_bytes_max: int) -> None:
        sealed = self._sealer.seal(piece, _piece_id(row.id, number), self._random_bytes(NONCE_BYTES))
        await self._books.change(file_rows.append_piece, row, number, sealed, len(piece), account_bytes_max)

    async def finish(self, row: FileRow, expires_after_s: float) -> FileRow:
        row = replace(row, is_whole=True, expires_at_ms=row.created_at_ms + int(expires_after_s * 1000))
        await self._books.change(file_rows.finish_file, row)
        return row

    async def delete(self, file_id: str, account: str) -> None:
        """Raises FileRefused or BooksUnavailable."""
        await self._books.change(file_rows.hide_file, file_id, account)
        await self.erase(file_id)

    async def erase(self, file_id: str) -> None:
        """Whatever is left of a file that nobody may see. Raises BooksUnavailable."""
        while not await self._books.change(file_rows.erase_some, file_id):
            pass

    async def forget(self, now_ms: int) -> None:
        """Erases files whose time is over, and what has not become whole. Raises BooksUnavailable."""
        for file_id in await self._books.change(file_rows.hide_over, now_ms, _OVER_AT_ONCE):
            await self.erase(file_id)


class FileWriter:
    """A file that grows. Finish it or discard it."""

    def __init__(self, files: Files, row: FileRow, bytes_max: int, account_bytes_max: int) -> None:
        self._files, self.row, self._bytes_max, self._account_bytes_max = files, row, bytes_max, account_bytes_max
        self._waiting = bytearray()
        self._number = 0
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<FileWriter {self.row.id}: {self._bytes} bytes>"

    async def write(self, data: bytes) -> None:
        """Raises FileRefused or BooksUnavailable; then it is to be discarded."""
        self._bytes += len(data)
        if self._bytes > self._bytes_max:
            raise FileRefused(FileFault.TOO_LARGE, f"the file is over {self._bytes_max} bytes; send it in several files")
        self._waiting += data
        while len(self._waiting) >= limits.FILE_PIECE_BYTES:
            await self._append(limits.FILE_PIECE_BYTES)

    async def _append(self, size: int) -> None:
        piece = bytes(self._waiting[:size])
        del self._waiting[:size]
        await self._files.append(self.row, self._number, piece, self._account_bytes_max)
        self._number += 1

    async def finish(self, purpose: str, filename: str, expires_after_s: float) -> FileRow:
        """The file, for its account to see from now on. Raises FileRefused or BooksUnavailable."""
        if self._waiting:
            await self._append(len(self._waiting))
        return await self._files.finish(replace(self.row, purpose=purpose, filename=filename, bytes=self._bytes), expires_after_s)

    async def discard(self) -> None:
        """Nothing is left of it; where the books are away, upkeep sees to that later."""
        with trio.CancelScope(shield=True):
            try:
                await self._files.erase(self.row.id)
            except BooksUnavailable as error:
                log.info("file %s is erased later: %s", self.row.id, error)


def _piece_id(file_id: str, number: int) -> str:
    """Under which a piece is sealed: it opens in this place only."""
    return f"{file_id}:{number}"

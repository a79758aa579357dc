"""The file that a blob grows in, chunk by chunk, in any order and from several sources at once.

``KEY.partial`` has the blob's full length from the start and holes where nothing has come yet; ``KEY.state`` holds the blob's tree, written
before the first byte. Which chunks are there is written nowhere: whoever goes on with a download hashes what he finds against the tree, so
neither a killed process nor a power cut can leave a chunk that counts and is wrong. A download that partial.py began is taken over as far
as it is right, and the other way round partial.py begins anew, since the state is none of its own.

Nothing becomes the finished file but by ``finish``: every chunk verified, the whole hashed, all bytes on the disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from protocol.blobs import BlobTree
from protocol.errors import LocalProtocolError
from runtimes.store.errors import DiskFull, FetchCancelled
from runtimes.store.files import Cancelled, disk_full_is_clear, never, read_json, write_json
from runtimes.store.progress import Progress, no_progress

_STATE_KIND = "blob/1"
_KEPT_CHUNKS = 32  # that are not hashed yet and need not be read again for it


def stored_tree(state_path: Path) -> BlobTree | None:
    """The tree of a download that was broken off, if there is one."""
    state = read_json(state_path)
    size, leaves = state.get("size"), state.get("leaves")
    if state.get("kind") != _STATE_KIND or type(size) is not int or not isinstance(leaves, str):
        return None
    try:
        return BlobTree(size, bytes.fromhex(leaves))
    except ValueError:
        return None


class BlobPartial:
    """One download under way; the caller holds its lock. Use as a context manager; no thread may be at work in it when it ends. Several
    threads may call ``put`` at once.

    Opening verifies what an earlier try left: 0.7 ms a chunk. Raises DiskFull where the blob does not fit, and FetchCancelled.
    """

    def __init__(
        self, path: Path, state_path: Path, tree: BlobTree, progress: Progress = no_progress, cancelled: Cancelled = never
    ) -> None:
        self.path, self.tree = path, tree
        self._state_path = state_path
        self._there = bytearray(tree.chunks)
        self._whole, self._hashed = hashlib.sha256(), 0
        self._kept: dict[int, bytes | memoryview] = {}
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        with disk_full_is_clear(path.parent):
            self._file = os.open(path, flags, 0o600)
        try:
            self._begin()
            self._find_again(progress, cancelled)
            self._reserve()
        except BaseException:
            os.close(self._file)
            raise

    def __repr__(self) -> str:
        return f"<BlobPartial {self.path.name}: {self._there.count(1)} of {self.tree.chunks} chunks>"

    def __enter__(self) -> BlobPartial:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)

    # -- what is there

    def there(self) -> Sequence[bool]:
        """By chunk: whether it is there and verified."""
        return [bool(one) for one in self._there]

    def bytes_there(self) -> int:
        chunks = self._there.count(1)
        last = self.tree.chunks - 1
        return chunks * self.tree.chunk_bytes(0) - (self.tree.chunk_bytes(0) - self.tree.chunk_bytes(last)) * self._there[last]

    @property
    def is_complete(self) -> bool:
        return self._there.count(0) == 0

    # -- chunks

    def put(self, index: int, data: bytes | memoryview) -> bool:
        """Verify a chunk and write it; False, and nothing written, where it is not the blob's. A chunk that is there stays as it is.

        Raises DiskFull, and then leaves nothing behind.
        """
        if not self.tree.fits(index, data):
            return False
        if self._there[index]:
            return True
        try:
            with disk_full_is_clear(self.path.parent):
                self._write(memoryview(data), self.tree.offset(index))
        except (DiskFull, OSError):
            self.discard()
            raise
        if index < self._hashed + _KEPT_CHUNKS:
            self._kept[index] = data
        self._there[index] = 1
        return True

    def _write(self, rest: memoryview, at: int) -> None:
        while rest:
            written = os.pwrite(self._file, rest, at)
            rest, at = rest[written:], at + written

    def read(self, index: int) -> bytes:
        """A chunk that is there. Raises LocalProtocolError where it is not."""
        if not self._there[index]:
            raise LocalProtocolError(f"chunk {index} is not there yet")
        return os.pread(self._file, self.tree.chunk_bytes(index), self.tree.offset(index))

    def hash_ahead(self, chunks_max: int) -> bool:
        """Take what has become whole from the first byte on into the hash of the file; whether there is more to take. One thread at a
        time; called beside the download it leaves ``finish`` little to do."""
        end = min(self.tree.chunks, self._hashed + chunks_max)
        while self._hashed < end and self._there[self._hashed]:
            kept = self._kept.pop(self._hashed, None)
            self._whole.update(self.read(self._hashed) if kept is None else kept)
            self._hashed += 1
        return self._hashed < self.tree.chunks and bool(self._there[self._hashed])

    # -- the end

    def finish(self) -> str:
        """All chunks are verified and on the disk; returns the SHA-256 of the whole. Raises LocalProtocolError where one is missing."""
        if not self.is_complete:
            raise LocalProtocolError(f"{self!r} is not complete")
        self.hash_ahead(self.tree.chunks)
        with disk_full_is_clear(self.path.parent):
            os.fsync(self._file)
        return self._whole.hexdigest()

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._state_path.unlink(missing_ok=True)

    # -- the beginning

    def _begin(self) -> None:
        """Bytes of a file under another tree are kept as long as they may be of this one; what they are shows when they are hashed."""
        if stored_tree(self._state_path) == self.tree:
            return
        try:
            write_json(self._state_path, {"kind": _STATE_KIND, "size": self.tree.size, "leaves": self.tree.leaves.hex()})
        except (DiskFull, OSError):
            self.discard()
            raise

    def _find_again(self, progress: Progress, cancelled: Cancelled) -> None:
        size = min(os.fstat(self._file).st_size, self.tree.size)
        index = 0
        while index < self.tree.chunks and self.tree.offset(index) < size:
            start = self.tree.offset(index)
            if (data_at := self._next_data(start)) is None:
                return
            if data_at >= start + self.tree.chunk_bytes(index):
                index = data_at // self.tree.chunk_bytes(0)
                continue
            if cancelled():
                raise FetchCancelled(f"cancelled while {self.path.name} was checked")
            chunk = os.pread(self._file, self.tree.chunk_bytes(index), start)
            self._there[index] = self.tree.fits(index, chunk)
            index += 1
            progress(f"{self.path.name}: checking", min(size, start + len(chunk)), size)

    def _next_data(self, start: int) -> int | None:
        """Where the next bytes are that somebody wrote; None behind the last ones."""
        if not hasattr(os, "SEEK_DATA"):
            return start
        try:
            return os.lseek(self._file, start, os.SEEK_DATA)
        except OSError:  # ENXIO: only holes follow
            return None

    def _reserve(self) -> None:
        """Room for all of it, so that a full disk is known before anybody is asked for a byte; nothing stays where there is none."""
        try:
            with disk_full_is_clear(self.path.parent):
                os.ftruncate(self._file, self.tree.size)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._file, 0, self.tree.size)
        except (DiskFull, OSError):
            self.discard()
            raise

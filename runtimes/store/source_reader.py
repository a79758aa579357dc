"""Ranges of a file at its source, over https: so a publisher's server can help peers out in the middle of a download.

One request is kept open and read on as long as the ranges follow one another; a jump is a new request. What is read is not verified here:
whoever has the file's tree does that, chunk by chunk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import httpx

from runtimes.store.errors import FetchError
from runtimes.store.hub import hub_token, resolve_hub
from runtimes.store.sources import HubSource, Part, WebSource, parse_origin
from runtimes.store.web import TRY_AGAIN, WebPolicy, bad_status, new_client, open_stream, range_of


class SourceReader:
    """Blocking; one ``read`` at a time, from any thread. ``size_bytes``: of the file, as its manifest says."""

    def __init__(self, part: Part, size_bytes: int, policy: WebPolicy) -> None:
        self._part, self._size, self._policy = part, size_bytes, policy
        self._client: httpx.Client | None = None  # made by the first read: that takes 30 ms, and most readers are never needed
        self._url = ""
        self._stream = ExitStack()
        self._pieces: Iterator[bytes] = iter(())
        self._left = bytearray()  # came already, behind what was read
        self._at = -1  # where the open request goes on; -1 where there is none
        self._lock = threading.Lock()
        self._closed = False

    def __repr__(self) -> str:
        return f"<SourceReader of {self._part.text} at {self._at}>"

    def read(self, offset: int, count: int) -> bytes:
        """Raises FetchError (SourceRefused) where the source does not give it, also after several tries."""
        with self._lock:
            try:
                return self._read(offset, count)
            finally:
                if self._closed:  # meanwhile; whoever closed did not wait
                    self._end(for_good=True)

    def close(self) -> None:
        """Does not wait for a read under way: that one cleans up when it is over."""
        self._closed = True
        if self._lock.acquire(blocking=False):
            try:
                self._end(for_good=True)
            finally:
                self._lock.release()

    def _read(self, offset: int, count: int) -> bytes:
        for attempt in range(1, self._policy.tries + 1):
            if self._closed:
                raise FetchError("the source is not needed any more")
            try:
                if self._at != offset:
                    self._end()
                    self._begin(offset)
                return self._take(count)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                self._end()
                if attempt == self._policy.tries:
                    raise FetchError(f"{self._part.text} cannot be read ({str(error) or type(error).__name__}).") from error
            except FetchError:
                self._end()
                raise
            time.sleep(self._policy.backoff_s * 2**attempt)
        raise FetchError(f"{self._part.text} cannot be read.")

    def _begin(self, offset: int) -> None:
        client = self._client = self._client or new_client(self._policy)
        if not self._url:
            source = self._part.source
            self._url = resolve_hub(source, client, self._policy) if isinstance(source, HubSource) else self._web_url()
        token = hub_token(self._policy) if isinstance(self._part.source, HubSource) else None
        headers = {"accept-encoding": "identity", "range": f"bytes={offset}-"}
        response = self._stream.enter_context(open_stream(client, self._url, self._policy, headers, token))
        self._check(response, offset)
        self._pieces, self._at = response.iter_raw(), offset

    def _web_url(self) -> str:
        assert isinstance(self._part.source, WebSource)
        return self._part.source.url

    def _check(self, response: httpx.Response, offset: int) -> None:
        """Raises FetchError for an answer that is not the rest of the file, httpx.TransportError for one to ask again for."""
        if response.status_code in TRY_AGAIN:
            raise httpx.ReadError(f"status {response.status_code}")
        if response.status_code not in (200, 206):
            raise FetchError(bad_status(self._url, response.status_code))
        if response.headers.get("content-encoding", "identity") != "identity":
            raise FetchError(f"{self._url} is sent compressed although we asked for it as it is.")
        if response.status_code == 200:
            if offset:
                raise FetchError(f"{self._url} does not give parts of a file.")
            length = response.headers.get("content-length", "")
            total = int(length) if length.isdigit() else None
        else:
            start, total = range_of(response)
            if start != offset:
                raise FetchError(f"{self._url} gives another part than was asked for.")
        if total not in (None, self._size):
            raise FetchError(f"{self._url} has {total:,} bytes, the file {self._size:,}.")

    def _take(self, count: int) -> bytes:
        while len(self._left) < count:
            piece = next(self._pieces, None)
            if piece is None:
                raise httpx.ReadError("the connection ended too early")
            self._left += piece
        taken = bytes(self._left[:count])
        del self._left[:count]
        self._at += count
        return taken

    def _end(self, for_good: bool = False) -> None:
        self._stream.close()
        self._pieces, self._at = iter(()), -1
        self._left.clear()
        if for_good and self._client is not None:
            self._client.close()


def open_reader(sources: Sequence[str], size_bytes: int, policy: WebPolicy) -> SourceReader | None:
    """None where the file is no single one on the web: parts have sizes that nobody knows, a wheel comes whole. Raises ConfigError for
    sources that are none."""
    if len(sources) != 1:
        return None
    (part,) = parse_origin(sources).parts
    return SourceReader(part, size_bytes, policy) if isinstance(part.source, (WebSource, HubSource)) else None

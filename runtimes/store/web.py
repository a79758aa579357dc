"""Bringing a file over https: resumed where the server's validator still fits, redirects watched, every wait bounded."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import httpx

from protocol import limits
from runtimes.store.errors import DiskFull, FetchCancelled, FetchError, WrongContent
from runtimes.store.files import Cancelled
from runtimes.store.partial import Partial
from runtimes.store.progress import Progress
from runtimes.store.public_web import PublicOnly, PublicTransport
from runtimes.store.sources import check_redirect, check_url

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)$")


@dataclass(frozen=True, slots=True)
class WebPolicy:
    """How patient we are. A stalled transfer is noticed after ``read_timeout_s``, which also bounds how long a cancel may take.

    ``public``: the rules for sources that others have named; None for those of the operator's own.
    """

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    tries: int = 5  # in a row without a byte of progress
    tries_total: int = 200  # a server that drips is given up at last
    backoff_s: float = 0.5  # doubles with each try
    redirects_max: int = limits.SOURCE_REDIRECTS_MAX
    public: PublicOnly | None = None


class _TransferBroken(Exception):
    """This try ended early; another may go on from here."""


class _StaleResume(Exception):
    """The server no longer has the file that the partial is of."""


def new_client(policy: WebPolicy) -> httpx.Client:
    """Proxies and certificates come from the environment, as users of curl and pip know it; under ``public`` there are no proxies."""
    timeout = httpx.Timeout(policy.read_timeout_s, connect=policy.connect_timeout_s)
    headers = {"user-agent": "archipelag-node"}
    if policy.public is None:
        return httpx.Client(timeout=timeout, follow_redirects=False, headers=headers)
    # An account of the operator's in his .netrc is nothing to show to whoever a stranger names.
    transport = PublicTransport(policy.public)
    return httpx.Client(timeout=timeout, follow_redirects=False, headers=headers, transport=transport, trust_env=False)


@contextmanager
def open_stream(
    client: httpx.Client, url: str, policy: WebPolicy, headers: dict[str, str], token: str | None = None
) -> Iterator[httpx.Response]:
    """The final answer after at most ``redirects_max`` redirects; ``token`` is only ever shown to the first host.

    Raises ConfigError for a redirect that we do not follow, httpx.HTTPError from the transport.
    """
    check_url(url)
    first_host = urlsplit(url).netloc
    for _ in range(policy.redirects_max + 1):
        sent = dict(headers)
        if token and urlsplit(url).netloc == first_host:
            sent["authorization"] = f"Bearer {token}"
        with client.stream("GET", url, headers=sent) as response:
            location = response.headers.get("location")
            if response.status_code not in _REDIRECTS or not location:
                yield response
                return
        target = urljoin(url, location)
        check_redirect(url, target)
        url = target
    raise FetchError(f"{first_host} redirects more than {policy.redirects_max} times. Check the address.")


@dataclass(frozen=True, slots=True)
class WebFetch:
    """One file to bring. ``reserve`` makes room for a file of that size and returns how many bytes there is room for; ``bytes_max``: what
    the file may have at all, as far as that is known."""

    url: str
    stage: str
    reserve: Callable[[int | None], int]
    hash_known: bool
    token: str | None = None
    bytes_max: int | None = None


def download(
    fetch: WebFetch, partial: Partial, client: httpx.Client, policy: WebPolicy, progress: Progress, cancelled: Cancelled
) -> None:
    """Bring the part under way to its end. Raises FetchError (WrongContent for more than it may have), DiskFull, FetchCancelled."""
    failures = 0
    for _ in range(policy.tries_total):
        before = partial.part_bytes
        try:
            _attempt(fetch, partial, client, policy, progress, cancelled)
            return
        except _StaleResume:
            partial.restart_part()
        except (_TransferBroken, httpx.TransportError) as error:
            failures = 0 if partial.part_bytes > before else failures + 1
            if failures >= policy.tries:
                raise FetchError(_gave_up(fetch, partial, error)) from error
            _pause(policy.backoff_s * 2**failures * (0.5 + random.random() / 2), cancelled)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise FetchError(f"{fetch.url} cannot be read: {error}. Check the address.") from error
    raise FetchError(f"{fetch.url} broke off {policy.tries_total} times. Try again later, or take another source.")


def _attempt(
    fetch: WebFetch, partial: Partial, client: httpx.Client, policy: WebPolicy, progress: Progress, cancelled: Cancelled
) -> None:
    headers = {"accept-encoding": "identity"} | _resume_headers(fetch, partial)
    with open_stream(client, fetch.url, policy, headers, fetch.token) as response:
        if _is_complete(response, partial):
            return
        _accept(fetch, response, partial)
        total = _total_bytes(response)
        _check_size(fetch, total)
        bytes_max = fetch.reserve(total)
        for chunk in response.iter_raw():
            if cancelled():
                raise FetchCancelled(f"cancelled; {partial.size:,} bytes are kept for the next try")
            _check_size(fetch, partial.part_bytes + len(chunk))
            if partial.part_bytes + len(chunk) > bytes_max:
                partial.discard()
                raise DiskFull(_too_large(fetch.url, bytes_max))
            partial.write(chunk)
            before = partial.size - partial.part_bytes
            progress(fetch.stage, partial.size, None if total is None else before + total)
        if total is not None and partial.part_bytes < total:
            raise _TransferBroken(f"the connection ended after {partial.part_bytes:,} of {total:,} bytes")


def _check_size(fetch: WebFetch, size: int | None) -> None:
    """Raises WrongContent for more bytes than the file has."""
    if fetch.bytes_max is not None and size is not None and size > fetch.bytes_max:
        raise WrongContent(f"{fetch.url} sends more than the {fetch.bytes_max:,} bytes that the file has. What came is deleted.")


def _resume_headers(fetch: WebFetch, partial: Partial) -> dict[str, str]:
    """Ask for the rest if a validator, or at least the hash in the end, can tell whether it is the rest of the same file."""
    if not partial.part_bytes:
        return {}
    if partial.validator is not None:
        return {"range": f"bytes={partial.part_bytes}-", "if-range": partial.validator}
    if fetch.hash_known:
        return {"range": f"bytes={partial.part_bytes}-"}
    partial.restart_part()
    return {}


def _accept(fetch: WebFetch, response: httpx.Response, partial: Partial) -> None:
    """Make the partial fit the answer: go on, or begin again. Raises FetchError for an answer that no retry mends."""
    status = response.status_code
    if status in TRY_AGAIN:
        raise _TransferBroken(f"status {status}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise FetchError(f"{fetch.url} is sent compressed although we asked for it as it is. Use another source.")
    validator = _validator(response)
    if status == 206 and partial.part_bytes:
        if not _continues(response, partial) or (partial.validator and validator and validator != partial.validator):
            raise _StaleResume
        return
    if status == 416 and partial.part_bytes:
        raise _StaleResume
    if status != 200:
        raise FetchError(bad_status(fetch.url, status))
    partial.restart_part()
    partial.note(validator)


def _is_complete(response: httpx.Response, partial: Partial) -> bool:
    """We asked for what follows the last byte, and the server says that this is where the file ends."""
    ends_here = response.headers.get("content-range", "").strip() == f"bytes */{partial.part_bytes}"
    return response.status_code == 416 and partial.part_bytes > 0 and ends_here


def range_of(response: httpx.Response) -> tuple[int, int | None]:
    """Where an answer's part begins, -1 where it does not say so, and how long the whole is."""
    found = _CONTENT_RANGE.match(response.headers.get("content-range", ""))
    if found is None:
        return -1, None
    return int(found.group(1)), None if found.group(3) == "*" else int(found.group(3))


def _continues(response: httpx.Response, partial: Partial) -> bool:
    return range_of(response)[0] == partial.part_bytes


def _validator(response: httpx.Response) -> str | None:
    """A strong ETag, else the date of change. RFC 9110, 13.1.5: "A client MUST NOT generate an If-Range header field containing
    an entity tag that is marked as weak."
    """
    etag = response.headers.get("etag", "")
    if etag and not etag.startswith("W/"):
        return str(etag)
    changed = response.headers.get("last-modified")
    return str(changed) if changed else None


def _total_bytes(response: httpx.Response) -> int | None:
    """Of the whole file, as the server says."""
    if response.status_code == 206:
        return range_of(response)[1]
    length = response.headers.get("content-length", "")
    return int(length) if length.isdigit() else None


def bad_status(url: str, status: int) -> str:
    if status in (401, 403):
        return (
            f"{url} may not be read (status {status}). If it asks for a licence, accept it there and set HF_TOKEN; else check "
            "the address."
        )
    if status in (404, 410):
        return f"{url} does not exist (status {status}). Check the address."
    return f"{url} answered with status {status}. Check the address, or try again later."


def _too_large(url: str, bytes_max: int) -> str:
    return (
        f"{url} sends more than the {bytes_max:,} bytes that there is room for. Check the address; if it is right, free disk space "
        "or raise ARCHIPELAG_CACHE_BYTES."
    )


def _gave_up(fetch: WebFetch, partial: Partial, error: Exception) -> str:
    kept = f" {partial.size:,} bytes are kept; the next start goes on from there." if partial.size else ""
    return f"{fetch.url} cannot be reached ({str(error) or type(error).__name__}). Check the network and start again.{kept}"


def _pause(seconds: float, cancelled: Cancelled) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if cancelled():
            raise FetchCancelled("cancelled between two tries")
        time.sleep(min(0.1, left))


def get_json(client: httpx.Client, url: str, policy: WebPolicy, bytes_max: int, token: str | None) -> object:
    """A small JSON document. Raises FetchError."""
    try:
        with open_stream(client, url, policy, {"accept": "application/json"}, token) as response:
            if response.status_code != 200:
                raise FetchError(bad_status(url, response.status_code))
            body = b""
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > bytes_max:
                    raise FetchError(f"{url} answers with more than {bytes_max:,} bytes. Check the address.")
        return httpx.Response(200, content=body).json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise FetchError(
            f"{url} cannot be read ({str(error) or type(error).__name__}). Check the network and start again."
        ) from error

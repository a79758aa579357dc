"""Workflows that accounts save: versions by content, references to them, and publishing.

Theory of operation. A definition's address (``Definition.address``) is the SHA-256 of its canonical JSON, so saving the same again makes no
new version. A private version is sealed for its row. A published one lies open, for good: anybody may see and run it, by
``ACCOUNT/NAME@VERSION``. Its publisher may sign it: then the envelope lies there, and whoever reads it can check by himself who wrote what
he is about to run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.books import workflow_rows as rows
from coordinator.books.books import Books
from coordinator.books.workflow_rows import SavedFlow, TooManySaved
from privacy.sealed_rows import NONCE_BYTES, RowSealer
from protocol import limits
from protocol.envelope import Label, open_envelope, peek
from protocol.errors import ArchipelagError, RemoteProtocolError

NAME_CHARS_MAX = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_VERSION = re.compile(r"[1-9][0-9]{0,6}\Z")


class StoreRefused(ArchipelagError):
    """``code``: unknown_workflow, workflow_published, too_many_workflows, bad_signature or invalid_value."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


@dataclass(frozen=True, slots=True)
class Reference:
    """``NAME``, ``NAME@2`` or ``ACCOUNT/NAME@2``. ``account`` empty: one's own; ``version`` None: the newest."""

    account: str
    name: str
    version: int | None


@dataclass(frozen=True, slots=True)
class FoundFlow:
    """A saved version and what it says. ``signer``: peer id of who has signed it; empty: nobody."""

    row: SavedFlow
    definition: Mapping[str, Any]
    signer: str = ""


def canonical(definition: Mapping[str, Any]) -> bytes:
    """The same definition, in its canonical form (``Definition.to_json``), is the same bytes."""
    return json.dumps(definition, sort_keys=True, separators=(",", ":")).encode()


def check_name(name: object) -> str:
    """Raises StoreRefused."""
    if not isinstance(name, str) or len(name) > NAME_CHARS_MAX or not _NAME.match(name):
        text = f"a workflow's name has at most {NAME_CHARS_MAX} letters, digits, dots, dashes and underscores, the first a letter or digit"
        raise StoreRefused("invalid_value", text)
    return name


def parse_reference(text: object) -> Reference:
    """Raises StoreRefused."""
    if not isinstance(text, str):
        raise StoreRefused("invalid_value", "workflow is NAME, NAME@VERSION or ACCOUNT/NAME@VERSION")
    account, _, named = text.rpartition("/")
    name, at, version = named.partition("@")
    if at and not _VERSION.match(version):
        raise StoreRefused("invalid_value", "a version is a whole number: NAME@2")
    if len(account) > 2 * NAME_CHARS_MAX or not account.isprintable():
        raise StoreRefused("unknown_workflow", "there is no such workflow")
    return Reference(account, check_name(name), int(version) if at else None)


class FlowStore:
    """Runs on trio. ``clock_ms`` gives Unix milliseconds. All methods raise BooksUnavailable."""

    def __init__(
        self, books: Books, sealer: RowSealer, clock_ms: Callable[[], int], random_bytes: Callable[[int], bytes]
    ) -> None:
        self._books, self._sealer, self._clock_ms, self._random_bytes = books, sealer, clock_ms, random_bytes

    async def save(self, account: str, name: str, definition: Mapping[str, Any]) -> tuple[SavedFlow, bool]:
        """A checked definition as the newest version, and whether it is new. Raises StoreRefused."""
        body = canonical(definition)
        address = hashlib.sha256(body).hexdigest()

        def sealed(id: str) -> bytes:
            return self._sealer.seal(body, id, self._random_bytes(NONCE_BYTES))

        try:
            return await self._books.change(rows.save_flow, account, check_name(name), address, sealed, self._clock_ms())
        except TooManySaved:
            text = f"an account may keep {limits.FLOW_VERSIONS_MAX} versions; delete a workflow that you do not need"
            raise StoreRefused("too_many_workflows", text) from None

    async def open(self, account: str, reference: Reference) -> FoundFlow:
        """What ``account`` may see of it: all of its own, of others what is published. Raises StoreRefused, SealBroken."""
        owner = reference.account or account
        row = await self._books.ask(rows.find_flow, owner, reference.name, reference.version, owner != account)
        if row is None:
            raise StoreRefused("unknown_workflow", "there is no such workflow, or it is not published")
        return self._found(row)

    def _found(self, row: SavedFlow) -> FoundFlow:
        if not row.is_published:
            return FoundFlow(row, json.loads(self._sealer.open(row.body, row.id)))
        if row.body.startswith(b"{"):
            return FoundFlow(row, json.loads(row.body))
        envelope = peek(row.body)
        return FoundFlow(row, json.loads(envelope.payload), envelope.signer)

    async def versions(self, account: str, name: str) -> list[SavedFlow]:
        """The newest first; none where there is none."""
        return await self._books.ask(rows.versions_of, account, check_name(name))

    async def newest(self, account: str) -> list[SavedFlow]:
        """The newest version of each name."""
        return await self._books.ask(rows.newest_flows, account)

    async def published(self, limit: int, offset: int) -> list[SavedFlow]:
        """Everybody's, the newest first."""
        return await self._books.ask(rows.published_flows, limit, offset)

    async def publish(self, account: str, reference: Reference, envelope: bytes = b"") -> FoundFlow:
        """One of its own versions becomes anybody's to run; saying it again changes nothing. ``envelope``: the publisher's, round the
        very bytes that were saved. Raises StoreRefused, SealBroken."""
        if reference.account not in ("", account):
            raise StoreRefused("unknown_workflow", "only its own account publishes a workflow")
        found = await self.open(account, Reference("", reference.name, reference.version))
        if found.row.is_published:
            return found
        body = canonical(found.definition)
        if envelope:
            self._check_signed(envelope, body)
        return self._found(await self._books.change(rows.publish_flow, found.row, envelope or body))

    def _check_signed(self, envelope: bytes, body: bytes) -> None:
        try:
            payload = open_envelope(Label.WORKFLOW, envelope).payload
        except RemoteProtocolError as error:
            raise StoreRefused("bad_signature", str(error)) from None
        if payload != body:
            raise StoreRefused("bad_signature", "another definition was signed than the one that is saved; save it first")

    async def forget(self, account: str, name: str) -> int:
        """Deletes what is not published of a name; how many versions. Raises StoreRefused."""
        gone = await self._books.change(functools.partial(rows.forget_flows, account=account, name=check_name(name)))
        if not gone:
            left = await self.versions(account, name)
            if left:
                raise StoreRefused("workflow_published", "what is published stays: others may run it")
            raise StoreRefused("unknown_workflow", "there is no such workflow")
        return gone

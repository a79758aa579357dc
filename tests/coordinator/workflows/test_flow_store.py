"""Saved workflows: versions by content, what others see of them, signatures; on both kinds of databases."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from coordinator.books.books import open_books
from coordinator.workflows.store import FlowStore, Reference, StoreRefused, canonical, check_name, parse_reference
from privacy.keys import NodeKey
from privacy.sealed_rows import RowSealer
from protocol import limits
from protocol.envelope import Label, seal

ONE: dict[str, Any] = {"steps": [{"key": "a", "cargo": "echo", "input": {"prompt": "a secret prompt"}}]}
TWO: dict[str, Any] = {"steps": [{"key": "b", "cargo": "echo", "input": {"prompt": "other"}}]}
PUBLISHER = NodeKey(bytes([5]) * 32)


@asynccontextmanager
async def stored(database_url: str) -> AsyncIterator[FlowStore]:
    async with open_books(database_url) as books:
        yield FlowStore(books, RowSealer(bytes(32)), lambda: 1_000, secrets.token_bytes)


def own(name: str, version: int | None = None) -> Reference:
    return Reference("", name, version)


async def test_only_other_contents_make_a_version(database_url: str) -> None:
    async with stored(database_url) as store:
        first, is_new = await store.save("ann", "talk", ONE)
        assert (first.version, is_new, first.id) == (1, True, "ann/talk@1")
        reordered = {"steps": [dict(reversed(ONE["steps"][0].items()))]}
        again, is_new = await store.save("ann", "talk", reordered)
        assert (again.id, is_new) == (first.id, False)
        second, is_new = await store.save("ann", "talk", TWO)
        assert (second.version, is_new) == (2, True)
        third, _ = await store.save("ann", "talk", ONE)
        assert third.version == 3 and third.address == first.address, "what is old may be the newest again"
        await store.save("ann", "another", ONE)
        await store.save("bob", "talk", TWO)
        assert [flow.id for flow in await store.newest("ann")] == ["ann/another@1", "ann/talk@3"]
        assert [flow.version for flow in await store.versions("ann", "talk")] == [3, 2, 1]
        assert (await store.open("ann", own("talk"))).definition == ONE
        assert (await store.open("ann", own("talk", 2))).definition == TWO
        assert (await store.open("bob", own("talk"))).definition == TWO


async def test_what_is_private_is_sealed_and_nobody_elses(database_url: str) -> None:
    async with stored(database_url) as store:
        row, _ = await store.save("ann", "talk", ONE)
        assert b"secret" not in row.body
        for reference in (Reference("ann", "talk", 1), Reference("ann", "talk", None), own("talk")):
            with pytest.raises(StoreRefused) as refused:
                await store.open("bob", reference)
            assert refused.value.code == "unknown_workflow"
            with pytest.raises(StoreRefused):
                await store.publish("bob", reference)
        assert await store.published(10, 0) == []


async def test_what_is_published_is_anybodys_for_good(database_url: str) -> None:
    async with stored(database_url) as store:
        await store.save("ann", "talk", ONE)
        await store.save("ann", "talk", TWO)
        found = await store.publish("ann", own("talk", 1))
        assert found.row.is_published and found.definition == ONE and found.row.body == canonical(ONE) and not found.signer
        assert await store.publish("ann", own("talk", 1)) == found, "saying it again changes nothing"
        assert (await store.open("bob", Reference("ann", "talk", None))).definition == ONE, "the newest that is published"
        assert (await store.open("ann", own("talk"))).definition == TWO
        assert [flow.id for flow in await store.published(10, 0)] == ["ann/talk@1"]
        assert await store.forget("ann", "talk") == 1
        assert [flow.version for flow in await store.versions("ann", "talk")] == [1]
        with pytest.raises(StoreRefused) as refused:
            await store.forget("ann", "talk")
        assert refused.value.code == "workflow_published"
        with pytest.raises(StoreRefused) as refused:
            await store.forget("ann", "nothing")
        assert refused.value.code == "unknown_workflow"


async def test_a_publisher_may_sign(database_url: str) -> None:
    async with stored(database_url) as store:
        await store.save("ann", "talk", ONE)
        for envelope in (
            b"nothing",
            seal(Label.CARGO, canonical(ONE), PUBLISHER),
            seal(Label.WORKFLOW, canonical(TWO), PUBLISHER),
            seal(Label.WORKFLOW, canonical(ONE), PUBLISHER)[:-1] + b"x",
        ):
            with pytest.raises(StoreRefused) as refused:
                await store.publish("ann", own("talk"), envelope)
            assert refused.value.code == "bad_signature"
        found = await store.publish("ann", own("talk"), seal(Label.WORKFLOW, canonical(ONE), PUBLISHER))
        assert (found.signer, found.definition) == (PUBLISHER.peer_id, ONE)
        assert (await store.open("bob", Reference("ann", "talk", 1))).signer == PUBLISHER.peer_id


async def test_an_account_keeps_so_many(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FLOW_VERSIONS_MAX", 2)
    async with stored(database_url) as store:
        await store.save("ann", "one", ONE)
        await store.save("ann", "two", ONE)
        await store.save("bob", "one", ONE)
        assert not (await store.save("ann", "two", ONE))[1]
        with pytest.raises(StoreRefused) as refused:
            await store.save("ann", "one", TWO)
        assert refused.value.code == "too_many_workflows"


@pytest.mark.parametrize(
    "text, reference",
    [
        ("talk", Reference("", "talk", None)),
        ("talk@12", Reference("", "talk", 12)),
        ("ann/talk@2", Reference("ann", "talk", 2)),
        ("org/ann/talk", Reference("org/ann", "talk", None)),
    ],
)
def test_references(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference


@pytest.mark.parametrize("text", ["", "@1", "talk@", "talk@0", "talk@x", "talk@1@2", "ann/", "a b", "x" * 65, "\0/talk", "-x", 7, None])
def test_what_is_no_reference(text: object) -> None:
    with pytest.raises(StoreRefused):
        parse_reference(text)


@pytest.mark.parametrize("name", ["a/b", "a@1", "ä", "", ".hidden", "x" * 65, "a\n", None])
def test_what_is_no_name(name: object) -> None:
    with pytest.raises(StoreRefused):
        check_name(name)

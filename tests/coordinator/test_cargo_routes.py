"""Cargos over HTTP, on both databases: who may publish what, what others see, and how it is taken back."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
import trio

from coordinator.books import cargos as cargo_rows
from coordinator.cargo_rules import NAMES_MAX, RELEASES_MAX, CargoState, Fault, PublisherLevel
from coordinator.http.cargo_routes import LISTED_DEFAULT, LISTED_MAX, STATUS
from coordinator.keys import create_key
from coordinator.registry import POLL_S
from protocol import limits
from protocol.cargos import Runtime, SignedCargo, canonical_manifest, read_cargo
from protocol.envelope import Label, seal
from tests.coordinator.clients import http
from tests.coordinator.desks import OTHER, error_of, get, opened, until, url_of
from tests.coordinator.fakes import Running
from tests.protocol.cargo_samples import MODULE, cargo, killed, revocation
from tests.protocol.samples import FIRST, HOLDER, MIDDLE, NOW_MS

PATH = "/api/v1/cargos"
REVOKE = f"{PATH}/revoke"
BYTES = {"Content-Type": "application/octet-stream"}


async def post(running: Running, data: bytes, key: str | None = None, path: str = PATH) -> httpx.Response:
    async with http(running, key) as client:
        return await client.post(path, content=data, headers=BYTES)


async def publish(running: Running, one: SignedCargo, key: str | None = None) -> dict[str, Any]:
    response = await post(running, one.envelope, key)
    assert response.status_code == 201, response.text
    return dict(response.json())


async def refused(running: Running, one: SignedCargo, fault: Fault, key: str | None = None) -> str:
    response = await post(running, one.envelope, key)
    return str(error_of(response, STATUS[fault], fault.value, "cargo")["message"])


async def names(running: Running, query: str = "") -> list[str]:
    return [f"{one['name']} {one['release']}" for one in (await get(running, f"{PATH}{query}", "")).json()["data"]]


async def test_published_listed_shown_and_fetched(database_url: str) -> None:
    one = cargo(description="counts words", options='{"fuel":7}')
    async with opened(database_url) as running:
        response = await post(running, one.envelope)
        assert response.status_code == 201 and response.headers["location"] == f"{PATH}/{one.address}"
        told = response.json()
        assert (told["address"], told["state"], told["name"], told["release"]) == (one.address, "approved", "text-stats", "1.0.0")
        assert (told["ask"], told["revoked_at"], told["published_at"]) == ("0.001+0+0", None, "2026-11-18T11:06:40.000Z")
        again = await post(running, one.envelope)
        assert again.status_code == 200 and again.json() == told, "published once"

        listed = (await get(running, PATH, "")).json()
        assert listed == {"data": [told], "meta": {"total": 1, "limit": 50, "offset": 0}}, "open to everybody"
        for reference in ("text-stats", "text-stats@1.0.0", one.address):
            shown = (await get(running, f"{PATH}/{reference}", "")).json()
            assert {name: shown[name] for name in told} == told
            assert shown["manifest"]["options"] == {"fuel": 7} and shown["manifest"]["files"][0]["path"] == "module.wasm"
        fetched = await get(running, f"{PATH}/text-stats/envelope", "")
        assert read_cargo(fetched.content).address == one.address and fetched.headers["content-type"] == BYTES["Content-Type"]
        error_of(await get(running, f"{PATH}/other", ""), 404, "unknown_cargo", "cargo")
        error_of(await get(running, f"{PATH}/text-stats@9.0.0", ""), 404, "unknown_cargo", "cargo")
        assert running.server.registry.manifest("text-stats") == one.manifest
        assert running.server.registry.manifest("other") is None


async def test_json_with_base64_will_do(database_url: str) -> None:
    one = cargo()
    async with opened(database_url) as running, http(running) as client:
        response = await client.post(PATH, json={"cargo": base64.b64encode(one.envelope).decode()})
        assert response.status_code == 201 and response.json()["address"] == one.address
        error_of(await client.post(PATH, json={"cargo": "***"}), 400, "invalid_value", "cargo")
        error_of(await client.post(PATH, json={"manifest": {}}), 400, "missing_required_parameter", "cargo")
        error_of(await client.post(PATH, content=b"{", headers={"Content-Type": "application/json"}), 400, "invalid_json")


async def test_a_key_with_the_right_scope_is_needed(database_url: str) -> None:
    reader = create_key(database_url, "reader", ("read",))
    async with opened(database_url) as running:
        for path in (PATH, REVOKE):
            error_of(await post(running, cargo().envelope, "", path), 401, "invalid_api_key")
            error_of(await post(running, cargo().envelope, reader, path), 403, "insufficient_scope")
        error_of(await get(running, f"{PATH}?mine=true", ""), 401, "invalid_api_key")


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", ["alpha 1.0.0", "beta 2.0.0", "beta 1.0.0"]),
        ("?runtime=onnx", ["alpha 1.0.0"]),
        ("?name=beta", ["beta 2.0.0", "beta 1.0.0"]),
        ("?limit=1&offset=1", ["beta 2.0.0"]),
        ("?name=gamma", []),
    ],
)
async def test_lists_can_be_narrowed(tmp_path: Path, query: str, found: list[str]) -> None:
    async with opened(url_of(tmp_path)) as running:
        await publish(running, cargo("beta"))
        await publish(running, cargo("alpha", runtime=Runtime.ONNX))
        await publish(running, cargo("beta", "2.0.0"))
        assert await names(running, query) == found
        for wrong, name in (("runtime=java", "runtime"), ("limit=0", "limit"), ("limit=201", "limit"), ("mine=yes", "mine")):
            error_of(await get(running, f"{PATH}?{wrong}", ""), 400, "invalid_value", name)


def tampered() -> bytes:
    """The envelope of one manifest round another."""
    parts = msgpack.unpackb(cargo().envelope)
    parts[2] = canonical_manifest(cargo(release="1.0.1").manifest)
    return bytes(msgpack.packb(parts))


def with_file_source() -> bytes:
    fields = msgpack.unpackb(canonical_manifest(cargo().manifest))
    fields[6][0][3] = ["file:/etc/passwd"]
    return seal(Label.CARGO, msgpack.packb(fields), HOLDER)


BAD: dict[str, tuple[bytes, int, str, str]] = {
    "tampered": (tampered(), 400, "bad_signature", "signature"),
    "signed by another": (seal(Label.CARGO, canonical_manifest(cargo().manifest), MIDDLE), 400, "bad_signature", "was signed by"),
    "no envelope": (b"hello", 400, "bad_signature", "envelope"),
    "nothing": (b"", 400, "bad_signature", "envelope"),
    "a revocation": (revocation(), 400, "bad_signature", "envelope for"),
    "no manifest": (seal(Label.CARGO, b"\x90", HOLDER), 400, "invalid_cargo", "malformed"),
    "a file: source": (with_file_source(), 400, "invalid_cargo", "https:"),
    "too large": (b"x" * (limits.ENVELOPE_BYTES_MAX + 1), 413, "cargo_too_large", "at most"),
    "expired": (cargo(expires_at_ms=NOW_MS + 1).envelope, 400, "cargo_expired", "expired"),
    "from the future": (cargo(published_at_ms=2**52).envelope, 400, "cargo_expired", "future"),
    "reserved": (cargo("echo").envelope, 409, "name_taken", "another publisher"),
}
PRIVATE = ("https://127.0.0.1/m", "https://10.1.2.3/m", "https://[::1]/m", "https://localhost/m", "https://nas.local/m", "https://[x/m")


@pytest.mark.parametrize("name", BAD)
async def test_what_is_wrong_is_refused_in_words(tmp_path: Path, name: str) -> None:
    data, status, code, words = BAD[name]
    async with opened(url_of(tmp_path)) as running:
        message = error_of(await post(running, data), status, code, "cargo")["message"]
        assert words in message
        assert await names(running) == [] and running.server.registry.entries() == ()


async def test_sources_that_are_not_public_are_refused(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path)) as running:
        for number, source in enumerate(PRIVATE):
            private = type(MODULE)("module.wasm", "ab" * 32, 1000, (source,))
            assert source in await refused(running, cargo(release=f"1.0.{number}", files=(private,)), Fault.SOURCE)
        public = type(MODULE)("module.wasm", "ab" * 32, 1000, ("https://93.184.216.34/m", "hf:a/b:c"))
        await publish(running, cargo(files=(public,)))


async def test_releases_only_go_up(database_url: str) -> None:
    async with opened(database_url) as running:
        await publish(running, cargo(release="1.2.0"))
        assert "step back" in await refused(running, cargo(release="1.1.9"), Fault.ROLLBACK)
        assert "other contents" in await refused(running, cargo(release="1.2.0", description="another"), Fault.CONFLICT)
        await publish(running, cargo(release="1.10.0"))
        registry = running.server.registry
        newest, older = registry.find("text-stats"), registry.find("text-stats@1.2.0")
        assert newest is not None and newest.cargo.manifest.release == "1.10.0"
        assert older is not None, "an older one can still be named"


async def test_after_its_newest_release_is_revoked_a_name_stands_for_the_one_before(tmp_path: Path) -> None:
    old, new = cargo(release="1.0.0"), cargo(release="2.0.0")
    async with opened(url_of(tmp_path)) as running:
        await publish(running, old)
        await publish(running, new)
        assert (await post(running, revocation(new), path=REVOKE)).json()["revoked"] == [new.address]
        assert running.server.registry.manifest("text-stats") == old.manifest
        assert running.server.registry.manifest(new.address) is None
        assert "other contents" in await refused(running, cargo(description="mended", release="2.0.0"), Fault.CONFLICT)
        await publish(running, cargo(release="1.5.0"))


async def test_a_name_and_a_key_belong_to_who_came_first(database_url: str) -> None:
    ann, bob = create_key(database_url, "ann"), create_key(database_url, "bob")
    async with opened(database_url) as running:
        await publish(running, cargo(), ann)
        assert "another publisher" in await refused(running, cargo(publisher=MIDDLE, release="2.0.0"), Fault.NAME_TAKEN, bob)
        assert "another publisher" in await refused(running, cargo(publisher=MIDDLE, release="2.0.0"), Fault.NAME_TAKEN, ann)
        assert "another account" in await refused(running, cargo("other"), Fault.KEY_TAKEN, bob)
        assert "another account" in await refused(running, cargo(), Fault.KEY_TAKEN, bob)
        await publish(running, cargo("other", publisher=MIDDLE), bob)
        await publish(running, cargo("more", publisher=FIRST), ann)  # an account may have several keys

        # a key that was revoked: its account goes on under the name with another, nobody else does
        assert (await post(running, revocation(whole_key=True), ann, REVOKE)).json()["revoked"] == [cargo().address]
        assert "its key was revoked" in await refused(running, cargo(release="1.0.1"), Fault.REVOKED, ann)
        await refused(running, cargo(publisher=MIDDLE, release="2.0.0"), Fault.NAME_TAKEN, bob)
        await publish(running, cargo(publisher=FIRST, release="2.0.0"), ann)
        assert await names(running) == ["more 1.0.0", "other 1.0.0", "text-stats 2.0.0"]


async def test_an_account_has_so_many_active_cargos(database_url: str) -> None:
    ann = create_key(database_url, "ann")
    async with opened(database_url) as running:
        most = NAMES_MAX[PublisherLevel.INDIVIDUAL]
        assert most == 3 and NAMES_MAX[PublisherLevel.VERIFIED] == 10
        for number in range(most):
            await publish(running, cargo(f"cargo-{number}"), ann)
        assert "at most 3" in await refused(running, cargo("one-more"), Fault.TOO_MANY, ann)
        await publish(running, cargo("cargo-0", "1.0.1"), ann)  # a release of the same is none more
        await post(running, revocation(cargo("cargo-1")), ann, REVOKE)
        await publish(running, cargo("one-more"), ann)
        await refused(running, cargo("two-more"), Fault.TOO_MANY, ann)
        await running.server.books.change(cargo_rows.set_level, "ann", PublisherLevel.VERIFIED)
        await publish(running, cargo("two-more"), ann)


async def test_a_name_has_so_many_releases(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path)) as running, http(running) as client:
        for number in range(RELEASES_MAX):
            response = await client.post(PATH, content=cargo(release=f"1.0.{number}").envelope, headers=BYTES)
            assert response.status_code == 201
        assert "releases" in await refused(running, cargo(release="2.0.0"), Fault.TOO_MANY)
        await post(running, revocation(cargo(release="1.0.0")), path=REVOKE)
        await publish(running, cargo(release="2.0.0"))


async def test_revocations_need_the_right_signature(database_url: str) -> None:
    one = cargo()
    async with opened(database_url) as running:
        await publish(running, one)
        told = (await post(running, revocation(cargo("other")), path=REVOKE)).json()["error"]
        assert told["code"] == "unknown_cargo"
        stranger = revocation(one, MIDDLE, publisher=MIDDLE.peer_id)
        error_of(await post(running, stranger, path=REVOKE), 400, "bad_signature", "cargo")
        of_nobody = revocation(one, MIDDLE, whole_key=True, publisher=MIDDLE.peer_id)
        error_of(await post(running, of_nobody, path=REVOKE), 404, "unknown_cargo", "cargo")
        by_coordinator = killed(one).envelope
        assert "--as-operator" in error_of(await post(running, by_coordinator, path=REVOKE), 400, "bad_signature", "cargo")["message"]
        error_of(await post(running, one.envelope, path=REVOKE), 400, "bad_signature", "cargo")
        assert await names(running) == ["text-stats 1.0.0"], "nothing has changed"

        async with http(running) as client:
            said = await client.post(REVOKE, json={"revocation": base64.b64encode(revocation(one)).decode()})
        assert said.json() == {
            "object": "revocation",
            "publisher": HOLDER.peer_id,
            "cargo": one.address,
            "reason": "it leaks",
            "revoked": [one.address],
        }
        assert (await post(running, revocation(one), path=REVOKE)).json()["revoked"] == [], "said again"
        assert await names(running) == []
        assert (await get(running, f"{PATH}/{one.address}", "")).json()["revoked_at"], "and is still explained"
        assert "was revoked by its publisher" in await refused(running, one, Fault.REVOKED)


async def test_an_operator_who_looks_first(database_url: str) -> None:
    one, ann = cargo(), create_key(database_url, "ann")
    async with opened(database_url, auto_approve_cargos=False) as running:
        registry = running.server.registry
        assert (await publish(running, one, ann))["state"] == "submitted"
        assert await names(running) == [] and registry.manifest("text-stats") is None
        error_of(await get(running, f"{PATH}/{one.address}"), 404, "unknown_cargo", "cargo")  # another account's
        assert (await get(running, f"{PATH}/{one.address}", ann)).json()["state"] == "submitted"
        assert [it["state"] for it in (await get(running, f"{PATH}?mine=true", ann)).json()["data"]] == ["submitted"]

        async def become(state: CargoState) -> None:
            await running.server.books.change(cargo_rows.set_state, one.address, state, NOW_MS)
            await registry.refresh()

        await become(CargoState.APPROVED)
        assert registry.manifest("text-stats") == one.manifest and await names(running) == ["text-stats 1.0.0"]
        await become(CargoState.SUSPENDED)
        assert registry.manifest("text-stats") is None and await names(running) == []
        assert (await get(running, f"{PATH}/{one.address}", "")).json()["state"] == "suspended"
        await become(CargoState.REJECTED)
        await refused(running, one, Fault.REJECTED, ann)


async def test_coordinators_of_one_database_see_each_others_registry(database_url: str) -> None:
    one = cargo()
    async with opened(database_url) as first, opened(database_url, key=OTHER, api_key=first.key) as second:
        await publish(first, one)
        theirs = second.server.registry
        with trio.fail_after(5):
            while theirs.manifest("text-stats") is None:
                await theirs.wait_changed()
        assert theirs.manifest("text-stats") == one.manifest
        await post(second, revocation(one), path=REVOKE)
        await until(lambda: first.server.registry.manifest("text-stats") is None, 5.0)
    async with opened(database_url, api_key=first.key) as third:
        assert third.server.registry.manifest(one.address) is None and len(third.server.registry.revocations()) == 1


async def test_two_who_publish_at_the_same_time_cannot_both_have_a_name(database_url: str) -> None:
    ann, bob = create_key(database_url, "ann"), create_key(database_url, "bob")
    async with opened(database_url) as first, opened(database_url, key=OTHER, api_key=first.key) as second:
        statuses: list[int] = []

        async def one_of(running: Running, one: SignedCargo, key: str) -> None:
            statuses.append((await post(running, one.envelope, key)).status_code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one_of, first, cargo(), ann)
            nursery.start_soon(one_of, second, cargo(publisher=MIDDLE), bob)
        assert sorted(statuses) == [201, 409]


async def test_the_page_says_what_the_code_does(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "specs" / "http-api.md").read_text()
    part = page[page.index("### Cargos") : page.index("### Market")]
    async with opened(url_of(tmp_path)) as running:
        told = await publish(running, cargo())
    shown = part[part.index("A Cargo: `{") + len("A Cargo: `{") :]
    assert shown[: shown.index("}`")].split(", ") == list(told)
    assert {fault for fault in Fault if f"`{fault.value}`" not in part} == set()
    for state in set(CargoState) - {CargoState.DRAFT}:
        assert f"`{state}`" in part
    individual, verified, most = (f"{NAMES_MAX[level]:,}" for level in list(PublisherLevel)[:3])
    assert f"{individual} active names" in part and f"{verified} (`verified`)" in part and f"or {most} (" in part
    assert f"at most {RELEASES_MAX} releases" in part and f"after {POLL_S:g} s" in part
    assert f"({LISTED_DEFAULT}; at most {LISTED_MAX})" in part

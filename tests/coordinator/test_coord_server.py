"""The server as a process sees it: clients that hang up, keep-alive, draining, shutting down, TLS, and many requests without a leak."""

from __future__ import annotations

import gc
import json
import ssl
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trio

from coordinator import standing
from coordinator.config import CoordinatorConfig
from coordinator.server import open_coordinator
from protocol.errors import ConfigError
from tests.coordinator.clients import HELLO, http, lines_of
from tests.coordinator.fakes import COORDINATOR, NETWORK, FakePort, Running, Script, coordinator, island, offer

TEXT = "one two three four five"


async def wait_for(what: Any, timeout_s: float = 5.0) -> None:
    with trio.fail_after(timeout_s):
        while not what():
            await trio.sleep(0.005)


pytestmark = pytest.mark.filterwarnings(
    "ignore:ssl.TLSVersion:DeprecationWarning"
)  # an old client is what one test is about


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hang_after", [0, 3])
async def test_a_client_that_hangs_up_frees_the_slot_within_a_second(
    tmp_path: Path, stream: bool, hang_after: int
) -> None:
    one = island(1, Script(hang_after=hang_after))
    async with coordinator(tmp_path, one) as running:

        async def ask() -> None:
            async with (
                http(running) as client,
                client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": stream}) as response,
            ):
                await response.aread()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_for(lambda: one.open_now == 1)
            await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
        await wait_for(lambda: one.cancelled == 1, 1.0)
        await wait_for(lambda: running.server.statistics()["bridge_tasks"] == 0, 1.0)
        counts = running.server.statistics()
    assert one.open_now == 0 and counts["open_jobs"] == counts["running"] == 0 and counts["jobs_cancelled"] == 1


async def test_a_client_that_hangs_up_while_it_waits_for_room(tmp_path: Path) -> None:
    one = island(1, Script(hang_after=0), slots_total=1, slots_free=1)
    async with coordinator(tmp_path, one) as running:

        async def ask() -> None:
            async with http(running) as client:
                await client.post("/v1/chat/completions", json=HELLO)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_for(lambda: one.open_now == 1)
            async with trio.open_nursery() as second:
                second.start_soon(ask)
                await wait_for(lambda: running.server.statistics()["waiting"] == 1)
                second.cancel_scope.cancel()
            await wait_for(lambda: running.server.statistics()["waiting"] == 0, 1.0)
            nursery.cancel_scope.cancel()


async def test_comments_keep_a_silent_stream_alive(tmp_path: Path) -> None:
    one = island(1, Script(token_s=0.15))
    async with coordinator(tmp_path, one, keep_alive_comment_s=0.05) as running, http(running) as client:
        response = await client.post("/v1/chat/completions", json={**HELLO, "stream": True})
        data = [line async for line in lines_of(response)]
    comments = [line for line in response.text.splitlines() if line.startswith(":")]
    text = "".join(c["delta"].get("content", "") for line in data[:-1] for c in json.loads(line)["choices"])
    assert text == TEXT and 5 <= len(comments) <= 20


async def test_no_comment_where_tokens_flow(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island(), keep_alive_comment_s=1.0) as running, http(running) as client:
        response = await client.post("/v1/chat/completions", json={**HELLO, "stream": True})
    assert "\n:" not in response.text


async def test_a_client_that_never_reads_does_not_fill_the_memory(tmp_path: Path) -> None:
    words = tuple("x" * 2000 for _ in range(4000))
    one = island(1, Script(words=words))
    body = json.dumps({**HELLO, "stream": True, "max_tokens": 4096}).encode()
    async with coordinator(tmp_path, one) as running:
        host, port = running.url.removeprefix("http://").split(":")
        stream = await trio.open_tcp_stream(host, int(port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.key}\r\n"
        await stream.send_all(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await wait_for(lambda: one.open_now == 1)
        await trio.sleep(0.5)
        # 8 MB were to come: the sender waits, since nobody takes them
        assert one.open_now == 1
        await stream.aclose()
        await wait_for(lambda: one.open_now == 0, 1.0)


async def test_many_words_in_a_burst_are_few_chunks(tmp_path: Path) -> None:
    words = tuple(f" {number}" for number in range(2000))
    body = {**HELLO, "stream": True, "max_tokens": 4096}
    async with coordinator(tmp_path, island(1, Script(words=words))) as running, http(running) as client:
        response = await client.post("/v1/chat/completions", json=body)
        data = [line async for line in lines_of(response)]
    text = "".join(c["delta"].get("content", "") for line in data[:-1] for c in json.loads(line)["choices"])
    assert text == "".join(words) and len(data) < 1000


async def test_draining_lets_answers_end_and_refuses_new_ones(tmp_path: Path) -> None:
    one = island(1, Script(token_s=0.05))
    answers: list[httpx.Response] = []
    async with coordinator(tmp_path, one) as running, http(running) as idle:
        assert (await idle.get("/health")).json()["status"] == "ok"

        async def ask() -> None:
            async with http(running) as client:
                answers.append(await client.post("/v1/chat/completions", json=HELLO))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_for(lambda: one.open_now == 1)
            drained: list[bool] = []

            async def drain() -> None:
                drained.append(await running.server.drain(5))

            nursery.start_soon(drain)
            await trio.sleep(0.05)
            late = await idle.post("/v1/chat/completions", json=HELLO)
            assert (await idle.get("/health")).json()["status"] == "draining"
        assert late.status_code == 503 and late.headers["retry-after"] and late.json()["error"]["code"] == "draining"
        with pytest.raises(httpx.ConnectError):
            async with http(running) as client:
                await client.get("/health")
    assert drained == [True] and answers[0].json()["choices"][0]["message"]["content"] == TEXT


async def test_draining_gives_up_after_its_time(tmp_path: Path) -> None:
    one = island(1, Script(hang_after=2))
    errors: list[str] = []
    async with coordinator(tmp_path, one) as running, trio.open_nursery() as nursery:

        async def ask() -> None:
            async with http(running) as client:
                response = await client.post("/v1/chat/completions", json={**HELLO, "stream": True})
                errors.append(response.text)

        nursery.start_soon(ask)
        await wait_for(lambda: one.open_now == 1)
        assert await running.server.drain(0.1) is False
        nursery.cancel_scope.cancel()
    assert one.open_now == 0


async def test_leaving_ends_running_answers_with_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    threads = threading.active_count()
    one = island(1, Script(hang_after=2))
    texts: list[str] = []
    async with trio.open_nursery() as nursery, coordinator(tmp_path, one) as running:
        url, key = running.url, running.key

        async def ask() -> None:
            headers = {"Authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(base_url=url, headers=headers) as client:
                response = await client.post("/v1/chat/completions", json={**HELLO, "stream": True})
                texts.append(response.text)

        nursery.start_soon(ask)
        await wait_for(lambda: one.open_now == 1)
        await trio.sleep(0.05)
    assert one.open_now == 0 and '"error"' in texts[0] and "shutting down" in texts[0]
    # trio keeps one idle thread for the next call; asyncio's and the key lookups' are gone
    assert threading.active_count() <= threads + 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("key-lookup")]


async def test_a_port_that_is_taken_is_said_clearly(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island()) as running:
        taken = int(running.url.rsplit(":", 1)[1])
        (tmp_path / "other").mkdir()
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{taken}"):
            async with coordinator(tmp_path / "other", island(), http_port=taken):
                pytest.fail("it must not start")


async def test_cancelling_from_outside_ends_it(tmp_path: Path) -> None:
    with trio.move_on_after(0.3) as scope:
        async with coordinator(tmp_path, island()):
            await trio.sleep_forever()
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    ("settings", "good"),
    [
        ({"http_host": "127.0.0.1"}, True),
        ({"http_host": "127.9.9.9"}, True),
        ({"http_host": "::1"}, True),
        ({"http_host": "localhost"}, True),
        ({"http_host": "0.0.0.0"}, False),
        ({"http_host": "192.168.1.5"}, False),
        ({"http_host": "example.org"}, False),
        ({"http_host": "0.0.0.0", "insecure_http": True}, True),
        ({"http_host": "0.0.0.0", "tls_cert": "c", "tls_key": "k"}, True),
        ({"tls_cert": "c"}, False),
        ({"trusted_proxies": ("10.0.0.0/8", "::1")}, True),
        ({"trusted_proxies": ("somewhere",)}, False),
    ],
)
def test_settings_check_themselves(settings: dict[str, Any], good: bool) -> None:
    if good:
        CoordinatorConfig(database_url="sqlite://", **settings)
        return
    with pytest.raises(ConfigError):
        CoordinatorConfig(database_url="sqlite://", **settings)


def make_certificate(folder: Path) -> tuple[str, str]:
    from datetime import datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    start = datetime(2020, 1, 1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=36500))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.PKCS8
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
    return str(cert_file), str(key_file)


async def test_tls(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    async with coordinator(tmp_path, island(), tls_cert=cert, tls_key=key) as running:
        assert running.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=cert)
        headers = {"Authorization": f"Bearer {running.key}"}
        async with httpx.AsyncClient(base_url=running.url, headers=headers, verify=trusted) as client:
            answer = await client.post("/v1/chat/completions", json=HELLO)
            assert answer.json()["choices"][0]["message"]["content"] == TEXT
        old = ssl.create_default_context(cafile=cert)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.ConnectError):
            async with httpx.AsyncClient(base_url=running.url, verify=old) as client:
                await client.get("/health")


async def test_tls_files_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("nothing")
    config = CoordinatorConfig("sqlite://", tls_cert=str(tmp_path / "cert.pem"), tls_key=str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match="TLS certificate"):
        async with open_coordinator(config, FakePort(), COORDINATOR, NETWORK, bytes(32), dict):
            pytest.fail("it must not start")


async def test_health_well_known_and_metrics_need_no_key_and_show_no_prompt(tmp_path: Path) -> None:
    dying = island(1, Script(fail_after=2, times=1), tokens_per_s=9.0)
    async with coordinator(tmp_path, dying, island(2, tokens_per_s=1.0), version="1.2.3") as running:
        async with http(running) as client:
            for _ in range(2):
                await client.post("/v1/chat/completions", json=HELLO)
        async with http(running, "") as client:
            health = (await client.get("/health")).json()
            well_known = (await client.get("/.well-known/archipelag.json")).json()
            metrics = (await client.get("/metrics")).text
    assert health.pop("cache")["enabled"] is False
    assert health == {"status": "ok", "version": "1.2.3", "islands": 2}
    assert well_known == {"peer_id": "x"}
    assert "archipelag_jobs_done_total 2.0" in metrics and "archipelag_takeovers_mid_stream_total 1.0" in metrics
    assert 'archipelag_refusals_total{code="link_lost"} 1.0' in metrics and "archipelag_islands 2.0" in metrics
    assert 'archipelag_http_requests_total{route="/v1/chat/completions",status="200"} 2.0' in metrics
    assert "three" not in metrics and running.key not in metrics


async def test_a_request_id_comes_back(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island()) as running, http(running) as client:
        given = await client.get("/health", headers={"x-request-id": "my-id_1"})
        odd = await client.get("/health", headers={"x-request-id": "a b;c" * 50})
    assert given.headers["x-request-id"] == "my-id_1" and odd.headers["x-request-id"].startswith("req_")


async def test_a_bug_in_a_handler_ends_one_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = "-".join(["not", "for", "logs"])

    def broken() -> dict[str, Any]:
        raise RuntimeError(secret)

    url = f"sqlite:///{tmp_path / 'c.db'}"
    async with (
        open_coordinator(CoordinatorConfig(url), FakePort(), COORDINATOR, NETWORK, bytes(32), broken) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        failed = await client.get("/.well-known/archipelag.json")
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal_error"
        assert (await client.get("/health")).status_code == 200
    assert "RuntimeError" in caplog.text and secret not in caplog.text + failed.text


async def chats(running: Running, count: int, workers: int) -> int:
    """``count`` chats, half of them streamed, by ``workers`` clients at once; how many were answered in full."""
    left, good = count, 0

    async def work(number: int) -> None:
        nonlocal left, good
        async with http(running) as client:
            while left > 0:
                left -= 1
                stream = left % 2 == 0
                response = await client.post("/v1/chat/completions", json={**HELLO, "stream": stream})
                if stream:
                    data = [line async for line in lines_of(response)]
                    parts = [c["delta"].get("content", "") for line in data[:-1] for c in json.loads(line)["choices"]]
                    good += "".join(parts) == TEXT and data[-1] == "[DONE]"
                else:
                    good += response.json()["choices"][0]["message"]["content"] == TEXT

    async with trio.open_nursery() as nursery:
        for number in range(workers):
            nursery.start_soon(work, number)
    return good


POOLED_FILES = 5 * 2  # SQLAlchemy keeps five connections, each with the database and its log


async def test_many_chats_and_none_is_lost(tmp_path: Path) -> None:
    """1,000 one after the other and 200 at once, on Islands with far fewer slots."""
    islands = [island(number, slots_total=4, slots_free=4) for number in (1, 2, 3)]
    process = psutil.Process()
    async with coordinator(tmp_path, *islands) as running:
        assert await chats(running, 100, 100) == 100
        gc.collect()
        tasks = trio.lowlevel.current_statistics().tasks_living
        files = process.num_fds()
        assert await chats(running, 1000, 1) == 1000
        assert await chats(running, 200, 200) == 200
        counts = running.server.statistics()
        assert counts["jobs_done"] == 1300 and not counts["jobs_failed"] and counts["jobs_cancelled"] == 0
        assert counts["running"] == counts["waiting"] == counts["open_jobs"] == counts["bridge_tasks"] == 0
        assert max(one.open_max for one in islands) == 4
        gc.collect()
        files += POOLED_FILES  # connections to the database that were not yet needed
        with trio.fail_after(5):
            while process.num_fds() > files or trio.lowlevel.current_statistics().tasks_living > tasks:
                await trio.sleep(0.01)


async def test_recovery_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third job of one Island is cut off somewhere; every answer is whole all the same."""
    monkeypatch.setattr(standing, "COOLING_MIN_S", 0.0)  # else it would be left alone from its first failure on
    scripts = [script for cut in range(60) for script in (Script(times=2), Script(fail_after=cut % 6, times=1))]
    shaky, steady = island(1, *scripts), island(2, slots_total=2, slots_free=2)  # most have to go to the shaky one
    async with coordinator(tmp_path, shaky, steady) as running:
        assert await chats(running, 200, 16) == 200
        counts = running.server.statistics()
    assert counts["takeovers_mid_stream"] > 10 and counts["takeovers_before_first_token"] > 1
    assert counts["jobs_done"] == 200 and counts["open_jobs"] == 0


async def test_a_fresh_island_is_used_as_soon_as_its_ad_is_heard(tmp_path: Path) -> None:
    async with coordinator(tmp_path) as running, http(running) as client:
        assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 404
        running.port.advertise(island(1))
        assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200
        fresh = island(2, tokens_per_s=10.0)
        fresh.offers = (offer("other"),)
        running.port.advertise(fresh)
        assert (await client.post("/v1/chat/completions", json={**HELLO, "model": "other"})).status_code == 200

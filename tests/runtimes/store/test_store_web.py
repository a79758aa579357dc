"""Downloads from a server of our own that cuts, lies, redirects and changes its mind."""

from __future__ import annotations

import datetime
import hashlib
import http.server
import ipaddress
import json
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from protocol.errors import ConfigError
from runtimes.store import DiskFull, FetchCancelled, FetchError, ModelStore, WebPolicy, WrongContent

CONTENT = random.Random(1).randbytes(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
QUICK = WebPolicy(connect_timeout_s=2.0, read_timeout_s=2.0, tries=3, tries_total=20, backoff_s=0.001)


@dataclass
class Behaviour:
    """What the server does next, and what it was asked."""

    content: bytes = CONTENT
    etag: str | None = '"one"'
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # close after so many bytes of the body, one entry an answer
    length_lie: int = 0  # added to the Content-Length
    chunked: bool = False  # no Content-Length; the end of the connection ends the body
    bare_rests: bool = False  # the same, for answers to a Range
    statuses: list[int] = field(default_factory=list)  # answered first, one a request
    redirects: dict[str, str] = field(default_factory=dict)
    documents: dict[str, bytes] = field(default_factory=dict)
    head_headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range of each request
    validators: list[str | None] = field(default_factory=list)  # If-Range of each request
    tokens: list[str | None] = field(default_factory=list)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    behaviour: Behaviour


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.send_response(302)
        for name, value in self.server.behaviour.head_headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        does = self.server.behaviour
        wanted = self.headers.get("Range")
        does.asked.append((self.path, wanted))
        does.validators.append(self.headers.get("If-Range"))
        does.tokens.append(self.headers.get("Authorization"))
        self.close_connection = True
        if does.statuses:
            self._short(does.statuses.pop(0))
        elif self.path in does.redirects:
            self._short(302, {"Location": does.redirects[self.path]})
        elif self.path in does.documents:
            self._send(200, does.documents[self.path], {}, 0)
        elif wanted and does.ranges and self.headers.get("If-Range") in (None, does.etag):
            self._rest(int(wanted.removeprefix("bytes=").removesuffix("-")))
        else:
            self._send(200, does.content, {"ETag": does.etag} if does.etag else {}, does.length_lie)

    def _short(self, status: int, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", headers or {}, 0)

    def _rest(self, start: int) -> None:
        does = self.server.behaviour
        total = len(does.content)
        if start >= total:
            self._short(416, {"Content-Range": f"bytes */{total}"})
            return
        headers = {"Content-Range": f"bytes {start}-{total - 1}/{total}"} | ({"ETag": does.etag} if does.etag else {})
        self._send(206, does.content[start:], headers, 0)

    def _send(self, status: int, body: bytes, headers: dict[str, str], lie: int) -> None:
        does = self.server.behaviour
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not (does.chunked or (does.bare_rests and status == 206)):
            self.send_header("Content-Length", str(len(body) + lie))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[: does.cuts.pop(0)] if does.cuts and body else body)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.behaviour = Behaviour()
    if context is not None:
        made.socket = context.wrap_socket(made.socket, server_side=True)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return ModelStore(tmp_path / "cache", web=QUICK)


def url(server: Server, path: str = "/m.bin") -> str:
    return f"http://127.0.0.1:{server.server_port}{path}"


def pinned(server: Server) -> str:
    return f"{url(server)}#sha256={DIGEST}"


def leftovers(store: ModelStore) -> list[str]:
    return sorted(
        path.name for path in store.cache_dir.iterdir() if path.suffix in (".partial", ".state", ".wheel", ".tmp")
    )


def test_a_download_is_verified_named_and_kept(server: Server, store: ModelStore) -> None:
    seen: list[tuple[str, int, int | None]] = []
    model = store.fetch(pinned(server), lambda *step: seen.append(step))
    assert model.path.read_bytes() == CONTENT
    assert (model.sha256, model.name, model.bytes) == (DIGEST, "m", len(CONTENT))
    assert seen[-1] == ("m: downloading", len(CONTENT), len(CONTENT))
    assert leftovers(store) == []
    assert store.fetch(pinned(server)) == model
    assert len(server.behaviour.asked) == 1, "the second fetch asks nobody"


def test_a_source_without_a_hash_is_remembered(server: Server, store: ModelStore) -> None:
    model = store.fetch(url(server))
    assert model.sha256 == DIGEST
    assert ModelStore(store.cache_dir).fetch(url(server)) == model
    assert len(server.behaviour.asked) == 1


def test_a_cut_connection_is_resumed_where_it_broke(server: Server, store: ModelStore) -> None:
    server.behaviour.cuts = [1_000_000, 500_000]
    assert store.fetch(pinned(server)).path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.behaviour.asked] == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_download_goes_on_in_the_next_start(server: Server, store: ModelStore) -> None:
    server.behaviour.cuts = [1_000_000, 0, 0, 0]
    with pytest.raises(FetchError, match=r"1,000,000 bytes are kept; the next start goes on from there"):
        store.fetch(pinned(server))
    assert leftovers(store) == [f"{DIGEST}.partial", f"{DIGEST}.state"]
    server.behaviour.asked.clear()
    server.behaviour.cuts.clear()
    assert ModelStore(store.cache_dir, web=QUICK).fetch(pinned(server)).path.read_bytes() == CONTENT
    assert server.behaviour.asked == [("/m.bin", "bytes=1000000-")]
    assert server.behaviour.validators[-1] == '"one"'
    assert leftovers(store) == []


def test_a_rest_that_ends_early_without_saying_so(server: Server, store: ModelStore) -> None:
    server.behaviour.cuts = [1_000_000, 500_000]
    server.behaviour.bare_rests = True
    assert store.fetch(pinned(server)).path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.behaviour.asked] == [None, "bytes=1000000-", "bytes=1500000-"]


def test_the_rest_of_a_finished_partial_is_nothing(server: Server, store: ModelStore) -> None:
    store.cache_dir.joinpath(f"{DIGEST}.partial").write_bytes(CONTENT)
    store.cache_dir.joinpath(f"{DIGEST}.state").write_text(json.dumps({"starts": [0], "validator": '"one"'}))
    assert store.fetch(pinned(server)).sha256 == DIGEST
    assert server.behaviour.asked == [("/m.bin", f"bytes={len(CONTENT)}-")]


def test_a_changed_etag_begins_again(server: Server, store: ModelStore) -> None:
    server.behaviour.content = bytes(2_000_000)
    server.behaviour.cuts = [1_000_000, 0, 0, 0]
    with pytest.raises(FetchError):
        store.fetch(url(server))
    server.behaviour.content, server.behaviour.etag, server.behaviour.cuts = CONTENT, '"two"', []
    assert store.fetch(url(server)).path.read_bytes() == CONTENT


def test_a_change_that_no_validator_shows_is_seen_by_the_hash(server: Server, store: ModelStore) -> None:
    server.behaviour.content = bytes(3_000_000)
    server.behaviour.cuts = [1_000_000, 0, 0, 0]
    with pytest.raises(FetchError):
        store.fetch(pinned(server))
    server.behaviour.content, server.behaviour.cuts = CONTENT, []
    server.behaviour.asked.clear()
    assert store.fetch(pinned(server)).path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.behaviour.asked] == ["bytes=1000000-", None]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_validator_and_hash_nothing_is_resumed(server: Server, store: ModelStore, etag: str | None) -> None:
    server.behaviour.etag = etag
    server.behaviour.cuts = [1_000_000]
    assert store.fetch(url(server)).path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.behaviour.asked] == [None, None]


def test_a_server_without_ranges_begins_again(server: Server, store: ModelStore) -> None:
    server.behaviour.ranges = False
    server.behaviour.cuts = [1_000_000]
    assert store.fetch(pinned(server)).path.read_bytes() == CONTENT


def test_a_wrong_hash_leaves_nothing_and_says_what_to_do(server: Server, store: ModelStore) -> None:
    with pytest.raises(WrongContent, match=r"was expected. What was downloaded is deleted. Start again"):
        store.fetch(f"{url(server)}#sha256={'0' * 64}")
    assert leftovers(store) == []
    assert store.list() == []


def test_a_length_that_is_too_large_never_passes(server: Server, store: ModelStore) -> None:
    server.behaviour.length_lie = 1000
    server.behaviour.ranges = False
    with pytest.raises(FetchError):
        store.fetch(url(server))
    assert store.list() == []


def test_a_length_that_is_too_small_is_seen_by_the_hash(server: Server, store: ModelStore) -> None:
    server.behaviour.length_lie = -1000
    with pytest.raises(WrongContent):
        store.fetch(pinned(server))
    assert leftovers(store) == []


def test_a_length_that_nobody_said(server: Server, store: ModelStore) -> None:
    server.behaviour.chunked = True
    assert store.fetch(pinned(server)).path.read_bytes() == CONTENT


def test_more_than_the_cap_is_refused_before_and_while_it_comes(server: Server, tmp_path: Path) -> None:
    small = ModelStore(tmp_path / "small", cap_bytes=1_000_000, web=QUICK)
    with pytest.raises(DiskFull, match="ARCHIPELAG_CACHE_BYTES"):
        small.fetch(url(server))
    server.behaviour.chunked = True
    with pytest.raises(DiskFull, match="1,000,000 bytes"):
        small.fetch(url(server, "/other.bin"))
    assert leftovers(small) == []


def test_what_was_just_fetched_is_what_stays(server: Server, tmp_path: Path) -> None:
    """Nobody said how long it is, and the clock was set back: the older model looks newer, and goes all the same."""
    store = ModelStore(tmp_path / "cache", cap_bytes=4_000_000, web=QUICK)
    server.behaviour.chunked = True
    first = store.fetch(url(server, "/first.bin"))
    later = time.time() + 1e6
    os.utime(store.cache_dir / f"{first.sha256}.note", (later, later))
    server.behaviour.content = bytes(3_000_000)
    second = store.fetch(url(server, "/second.bin"))
    assert [entry.model for entry in store.list()] == [second]
    assert second.path.exists() and not first.path.exists()


def test_a_busy_server_is_asked_again(server: Server, store: ModelStore) -> None:
    server.behaviour.statuses = [503, 429]
    assert store.fetch(pinned(server)).sha256 == DIGEST


@pytest.mark.parametrize(
    ("status", "says"),
    [(404, "does not exist"), (410, "does not exist"), (403, "HF_TOKEN"), (401, "HF_TOKEN"), (418, "418")],
)
def test_a_refusal_is_final_and_clear(server: Server, store: ModelStore, status: int, says: str) -> None:
    server.behaviour.statuses = [status]
    with pytest.raises(FetchError, match=says):
        store.fetch(pinned(server))
    assert len(server.behaviour.asked) == 1
    assert leftovers(store) == []


def test_nobody_there(server: Server, store: ModelStore) -> None:
    with pytest.raises(FetchError, match=r"cannot be reached .* Check the network"):
        store.fetch(f"http://127.0.0.1:1/m.bin#sha256={DIGEST}")


def test_redirects_are_followed_a_few_times(server: Server, store: ModelStore) -> None:
    server.behaviour.redirects = {f"/{step}": f"/{step + 1}" for step in range(5)} | {"/5": "/m.bin"}
    assert store.fetch(url(server, "/1")).sha256 == DIGEST
    with pytest.raises(FetchError, match="redirects more than 5 times"):
        store.fetch(url(server, "/0"))


@pytest.mark.parametrize("target", ["http://example.org/m.bin", "ftp://127.0.0.1/m.bin", "file:///etc/passwd"])
def test_bad_redirects_are_refused(server: Server, store: ModelStore, target: str) -> None:
    server.behaviour.redirects = {"/m.bin": target}
    with pytest.raises(ConfigError):
        store.fetch(url(server))
    assert leftovers(store) == []


def test_https_and_no_way_down_from_it(
    server: Server, store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(self_signed())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving(context) as secure:
        address = f"https://127.0.0.1:{secure.server_port}/m.bin"
        with pytest.raises(FetchError, match="certificate"):
            store.fetch(address)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert store.fetch(address).sha256 == DIGEST
        secure.behaviour.redirects = {"/down": url(server)}
        with pytest.raises(ConfigError, match="from https to http"):
            store.fetch(f"https://127.0.0.1:{secure.server_port}/down")
    assert server.behaviour.asked == []


def self_signed() -> bytes:
    """Key and certificate for 127.0.0.1, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.private_bytes(*form) + certificate.public_bytes(serialization.Encoding.PEM)


def test_a_cancel_keeps_what_came(server: Server, store: ModelStore) -> None:
    steps: list[int] = []

    def cancelled() -> bool:
        return len(steps) > 0

    with pytest.raises(FetchCancelled):
        store.fetch(pinned(server), lambda stage, done, total: steps.append(done), cancelled)
    assert store.cache_dir.joinpath(f"{DIGEST}.partial").stat().st_size == steps[-1] > 0
    assert store.fetch(pinned(server)).path.read_bytes() == CONTENT
    assert server.behaviour.asked[-1][1] == f"bytes={steps[-1]}-"


def test_parts_are_joined_in_order_and_done_parts_stay(server: Server, store: ModelStore) -> None:
    first, second = CONTENT[:1_000_000], CONTENT[1_000_000:]
    server.behaviour.documents = {"/m.gguf.part0": first}
    server.behaviour.content = second
    server.behaviour.cuts = [len(first), 500_000, 0, 0, 0]
    parts = [f"{url(server, '/m.gguf.part0')}#sha256={hashlib.sha256(first).hexdigest()}", url(server, "/rest")]
    with pytest.raises(FetchError):
        store.fetch(parts, sha256=DIGEST)
    server.behaviour.cuts.clear()
    server.behaviour.asked.clear()
    with pytest.raises(WrongContent, match="is not a GGUF model"):
        store.fetch(parts, sha256=DIGEST)
    resumed = [("/rest", "bytes=500000-")]
    assert server.behaviour.asked[:1] == resumed, "the first part is not fetched again"
    plain = [url(server, "/m.bin.part0"), url(server, "/rest")]
    server.behaviour.documents = {"/m.bin.part0": first}
    model = store.fetch(plain, sha256=DIGEST)
    assert model.path.read_bytes() == CONTENT
    assert (model.name, model.path.suffix) == ("m", ".bin")


def test_a_wrong_part_is_named(server: Server, store: ModelStore) -> None:
    parts = [f"{url(server, '/a.bin')}#sha256={'1' * 64}", url(server, "/b.bin")]
    with pytest.raises(WrongContent, match=r"/a.bin has the SHA-256"):
        store.fetch(parts)
    assert leftovers(store) == []


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    names = [{"rfilename": name} for name in ("README.md", "m.Q8_0.bin.gguf", "m.Q4_K_M.gguf")]
    server.behaviour.documents = {"/api/models/owner/name": json.dumps({"siblings": names}).encode()}
    server.behaviour.head_headers = {"X-Linked-ETag": f'"{DIGEST}"', "Location": "https://example.org/"}
    return server.behaviour


def test_a_hub_file_is_verified_by_the_hash_that_the_hub_publishes(hub: Behaviour, store: ModelStore) -> None:
    hub.redirects = {"/owner/name/resolve/main/m.bin": "/cdn"}
    model = store.fetch("hf:owner/name:m.bin")
    assert (model.sha256, model.name) == (DIGEST, "m")
    assert [path for path, _ in hub.asked] == ["/owner/name/resolve/main/m.bin", "/cdn"]
    hub.content = bytes(100)
    with pytest.raises(WrongContent):
        store.fetch("hf:owner/name:other.bin")


def test_a_hub_repository_alone_means_its_best_file(hub: Behaviour, store: ModelStore) -> None:
    with pytest.raises(WrongContent, match="is not a GGUF model"):
        store.fetch("hf:owner/name")
    assert [path for path, _ in hub.asked][:2] == ["/api/models/owner/name", "/owner/name/resolve/main/m.Q4_K_M.gguf"]


@pytest.mark.parametrize("listing", [b"{", b"[]", b'{"siblings": 3}', b'{"siblings": [{"rfilename": "README.md"}]}'])
def test_a_hub_that_answers_nonsense(hub: Behaviour, store: ModelStore, listing: bytes) -> None:
    hub.documents = {"/api/models/owner/name": listing}
    with pytest.raises(ConfigError, match=r"cannot be read|does not list|holds no GGUF"):
        store.fetch("hf:owner/name")


def test_the_hub_token_goes_to_the_hub_only(hub: Behaviour, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving() as cdn:
        hub.redirects = {"/owner/name/resolve/main/m.bin": url(cdn, "/cdn")}
        store.fetch("hf:owner/name:m.bin")
        assert hub.tokens == ["Bearer hf_secret"]
        assert cdn.behaviour.tokens == [None]


def test_two_threads_fetch_once(server: Server, store: ModelStore) -> None:
    barrier = threading.Barrier(4)
    found: list[str] = []

    def fetch() -> None:
        barrier.wait()
        found.append(ModelStore(store.cache_dir, web=QUICK).fetch(pinned(server)).sha256)

    run_all([fetch] * 4)
    assert found == [DIGEST] * 4
    assert len(server.behaviour.asked) == 1


def run_all(functions: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_no_error_text_leaves_the_reader_alone(server: Server, store: ModelStore) -> None:
    """Every refusal of this module ends in an advice: a verb that the user can follow."""
    server.behaviour.statuses = [404]
    with pytest.raises(FetchError) as caught:
        store.fetch(pinned(server))
    assert re.search(r"\b(Check|Start|start|Free|free|Raise|raise|Use|try)\b", str(caught.value))

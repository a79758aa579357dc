"""A publisher's https server for tests: names that a resolver of our own gives addresses, a certificate for them, and bad habits."""

from __future__ import annotations

import datetime
import functools
import http.server
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from runtimes.store import WebPolicy
from runtimes.store.public_web import PublicOnly, is_public

ADDRESS = "127.0.0.5"  # the one that the tests take for public; 127.0.0.1 stays what it is
NAMES = ("models.example", "mirror.example", "inside.example", "torn.example", "nowhere.example")


@dataclass
class Site(http.server.ThreadingHTTPServer):
    """``files`` by path. ``asked``: path, Range and Host of each request."""

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    length: bool = True  # says how long an answer is
    extra: bytes = b""  # follows each file
    cuts: list[int] = field(default_factory=list)  # bytes of an answer's body after which the connection ends, one entry an answer
    statuses: list[int] = field(default_factory=list)  # answered first
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    resolved: list[str] = field(default_factory=list)
    addresses: dict[str, list[list[str]]] = field(default_factory=dict)  # by name: one entry a look-up, the last one stays
    policy: WebPolicy = field(default_factory=WebPolicy)
    daemon_threads = True

    def __post_init__(self) -> None:
        super().__init__((ADDRESS, 0), _Handler)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def url(self, path: str, name: str = "models.example") -> str:
        return f"https://{name}:{self.port}{path}"

    def resolve(self, host: str, port: int) -> Sequence[str]:
        self.resolved.append(host)
        answers = self.addresses.get(host)
        if answers is None:
            return [host] if host[0].isdigit() or ":" in host else []
        return answers.pop(0) if len(answers) > 1 else answers[0]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        site, wanted = self.server, self.headers.get("Range")
        site.asked.append((self.path, wanted, self.headers.get("Host")))
        site.tokens.append(self.headers.get("Authorization"))
        self.close_connection = True
        if site.statuses:
            self._answer(site.statuses.pop(0), b"", {})
        elif self.path in site.redirects:
            self._answer(302, b"", {"Location": site.redirects[self.path]})
        elif self.path not in site.files:
            self._answer(404, b"", {})
        else:
            body = site.files[self.path] + site.extra
            if wanted and site.ranges:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                self._answer(206, body[start:], {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body) if site.length else '*'}"})
            else:
                self._answer(200, body, {})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.server.length or not body:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET" and body:
            try:
                self.wfile.write(body[: self.server.cuts.pop(0)] if self.server.cuts else body)
            except OSError:
                self.close_connection = True  # whoever asked has had enough


@functools.cache
def _certificate() -> tuple[bytes, bytes]:
    """Certificate and key for NAMES, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    begins = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begins)
        .not_valid_after(begins + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in NAMES if one != "mirror.example"]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return certificate.public_bytes(serialization.Encoding.PEM), private


@contextmanager
def serving_site(folder: Path) -> Iterator[Site]:
    """Its ``policy`` takes ADDRESS for public and its port for allowed."""
    certificate, key = _certificate()
    pem = folder / "site.pem"
    pem.write_bytes(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    site = Site()
    site.socket = context.wrap_socket(site.socket, server_side=True)
    site.addresses = {"models.example": [[ADDRESS]], "mirror.example": [[ADDRESS]], "inside.example": [["10.0.0.7"]]}
    site.addresses["torn.example"] = [[ADDRESS, "10.0.0.7"]]
    trusted = ssl.create_default_context(cadata=certificate.decode())
    rules = PublicOnly(site.resolve, lambda address: address == ADDRESS or is_public(address), frozenset({443, site.port}), trusted)
    site.policy = WebPolicy(2.0, 2.0, tries=3, tries_total=20, backoff_s=0.001, public=rules)
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        site.shutdown()
        thread.join()
        site.server_close()

"""Sources that strangers name: which addresses are public, what is refused on the way there, and ranges read in the middle."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from runtimes.store import FetchError, ModelStore, WebPolicy, WrongContent
from runtimes.store.errors import SourceRefused
from runtimes.store.public_web import PublicOnly, is_public
from runtimes.store.source_reader import SourceReader, open_reader
from runtimes.store.web import new_client
from tests.runtimes.store.source_server import ADDRESS, Site, serving_site

CONTENT = random.Random(4).randbytes(2_500_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()

PUBLIC = ["93.184.216.34", "8.8.8.8", "1.1.1.1", "2606:2800:220:1::1", "2a00:1450:4001:80e::200e"]
CLOSED = [
    *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("192.0.0.8", "192.0.2.1", "192.88.99.1", "198.18.0.1", "203.0.113.9", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "fec0::1", "100::1", "2001:db8::1", "3fff::1"),
    *("::ffff:8.8.8.8", "::ffff:127.0.0.1", "::8.8.8.8", "2002:7f00:1::", "2002:808:808::1", "64:ff9b::7f00:1", "64:ff9b::808:808"),
    *("64:ff9b:1::1", "2001::1", "2001:0:53aa:64c:0:fbff::1", "2001:10::1", "4000::1", "2606:2800::1%1", "", "localhost", "8.8.8"),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", CLOSED)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with serving_site(tmp_path) as made:
        made.files["/model.bin"] = CONTENT
        yield made


def fetch(site: Site, folder: Path, source: str, size: int | None = len(CONTENT)) -> bytes:
    store = ModelStore(folder / "cache", 2**30, site.policy)
    return store.fetch([source], sha256=DIGEST, size_bytes=size).path.read_bytes()


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in (folder / "cache").iterdir() if path.suffix != ".lock"]


def test_a_public_source_is_read_by_its_name_at_the_address_that_was_checked(site: Site, tmp_path: Path) -> None:
    """A second look-up would lead elsewhere (DNS rebinding); there is none."""
    site.addresses["models.example"] = [[ADDRESS], ["127.0.0.1"]]
    assert fetch(site, tmp_path, site.url("/model.bin")) == CONTENT
    assert site.resolved == ["models.example"] and site.asked == [("/model.bin", None, f"models.example:{site.port}")]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("inside.example", "leads to 10.0.0.7"),
        ("torn.example", "leads to 10.0.0.7"),
        ("127.0.0.1", "leads to 127.0.0.1"),
        ("[::1]", "leads to ::1"),
        ("[::ffff:127.0.0.5]", "no public address"),
        ("user:secret@models.example", "user name or password"),
        ("nowhere.example", "has no address"),
    ],
)
def test_sources_that_are_not_asked(site: Site, tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(Exception, match=said) as caught:
        fetch(site, tmp_path, f"https://{name}:{site.port}/model.bin")
    assert "secret" not in str(caught.value) and not site.asked and left_behind(tmp_path) == []


@pytest.mark.parametrize("number", ["2130706433", "0x7f000001", "127.1", "017700000001"])
def test_numbers_that_mean_this_machine_are_resolved_before_they_are_judged(number: str) -> None:
    """The system reads them as addresses, whatever they look like."""
    with new_client(WebPolicy(public=PublicOnly())) as client, pytest.raises((SourceRefused, FetchError)):
        client.get(f"https://{number}/")


@pytest.mark.parametrize(("url", "said"), [("https://models.example:8443/", "port 8443"), ("http://models.example/", "not https")])
def test_other_ports_and_schemes_are_refused(site: Site, url: str, said: str) -> None:
    with new_client(replace(site.policy, public=PublicOnly(site.resolve))) as client, pytest.raises(SourceRefused, match=said):
        client.get(url)
    assert not site.resolved


REDIRECTS = [
    ("https://127.0.0.1:{port}/model.bin", "address on this machine"),
    ("https://inside.example:{port}/model.bin", "leads to 10.0.0.7"),
    ("https://torn.example:{port}/model.bin", "leads to 10.0.0.7"),
    ("https://10.0.0.7:{port}/model.bin", "leads to 10.0.0.7"),
    ("https://169.254.169.254:443/latest", "leads to 169.254.169.254"),
    ("http://models.example:{port}/model.bin", "not encrypted"),
    ("http://127.0.0.1:{port}/model.bin", "redirects from https to http"),
    ("file:///etc/passwd", "not a web address"),
    ("ftp://models.example/model.bin", "not a web address"),
    ("https://a:b@models.example:{port}/model.bin", "user name or password"),
    ("https://models.example:22/model.bin", "port 22"),
    ("/loop", "redirects more than 5 times"),
]


@pytest.mark.parametrize(("target", "said"), REDIRECTS)
def test_redirects_that_are_not_followed(site: Site, tmp_path: Path, target: str, said: str) -> None:
    site.redirects = {"/start": target.format(port=site.port), "/loop": "/loop"}
    with pytest.raises(Exception, match=said):
        fetch(site, tmp_path, site.url("/start"))
    assert [path for path, _, _ in site.asked] == ["/start"] + ["/loop"] * (5 if target == "/loop" else 0)
    assert left_behind(tmp_path) == []


def test_a_redirect_to_another_public_name_is_followed(site: Site, tmp_path: Path) -> None:
    site.redirects = {"/start": "/next", "/next": site.url("/model.bin")}
    assert fetch(site, tmp_path, site.url("/start")) == CONTENT


def test_the_certificate_is_the_names(site: Site, tmp_path: Path) -> None:
    """mirror.example leads to the same address, and has no certificate."""
    with pytest.raises(FetchError, match=r"(?i)certificate|hostname"):
        fetch(site, tmp_path, site.url("/model.bin", "mirror.example"))
    assert not site.asked


def test_the_next_address_of_a_name_is_tried(site: Site, tmp_path: Path) -> None:
    site.addresses["models.example"] = [["127.0.0.6", ADDRESS]]
    rules = site.policy.public
    assert rules is not None
    site.policy = replace(site.policy, public=replace(rules, is_allowed=lambda address: address.startswith("127.0.0.")))
    assert fetch(site, tmp_path, site.url("/model.bin")) == CONTENT


@pytest.mark.parametrize("says_length", [True, False])
def test_a_source_that_sends_more_than_the_manifest_says_is_cut(site: Site, tmp_path: Path, says_length: bool) -> None:
    site.extra, site.length = bytes(5_000_000), says_length
    with pytest.raises(WrongContent, match=r"more than the 2,500,000 bytes"):
        fetch(site, tmp_path, site.url("/model.bin"))
    assert left_behind(tmp_path) == []


def test_proxies_and_tokens_of_the_operator_are_not_a_strangers(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (tmp_path / ".netrc").write_text("machine models.example login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_ENDPOINT", site.url("")[:-1] if site.url("").endswith("/") else site.url(""))
    site.files["/a/b/resolve/main/model.bin"] = CONTENT
    assert fetch(site, tmp_path, "hf:a/b:model.bin") == CONTENT
    assert set(site.tokens) == {None}


def test_a_hub_goes_through_the_same_door(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"https://inside.example:{site.port}")
    with pytest.raises(SourceRefused, match=r"10\.0\.0\.7"):
        fetch(site, tmp_path, "hf:a/b:model.bin")


# Ranges


def reader(site: Site, path: str = "/model.bin") -> SourceReader:
    found = open_reader([site.url(path)], len(CONTENT), site.policy)
    assert found is not None
    return found


def test_ranges_that_follow_one_another_are_one_request(site: Site) -> None:
    source = reader(site)
    assert source.read(1_000_000, 300_000) == CONTENT[1_000_000:1_300_000]
    assert source.read(1_300_000, 700_000) == CONTENT[1_300_000:2_000_000]
    assert [wanted for _, wanted, _ in site.asked] == ["bytes=1000000-"]
    assert source.read(0, 10) == CONTENT[:10] and source.read(2_400_000, 100_000) == CONTENT[2_400_000:]
    assert len(site.asked) == 3
    source.close()
    with pytest.raises(FetchError, match="not needed"):
        source.read(0, 1)


def test_a_range_that_breaks_off_is_asked_for_again(site: Site) -> None:
    site.cuts, site.statuses = [5_000], [503]
    source = reader(site)
    assert source.read(500_000, 100_000) == CONTENT[500_000:600_000] and len(site.asked) == 3
    site.cuts = [1] * 10
    with pytest.raises(FetchError, match="cannot be read"):
        source.read(0, 1_000)
    source.close()


@pytest.mark.parametrize(
    ("habit", "said"), [("no ranges", "does not give parts"), ("longer", "2,500,004 bytes"), ("gone", "does not exist")]
)
def test_sources_that_give_no_ranges(site: Site, habit: str, said: str) -> None:
    site.ranges = habit != "no ranges"
    site.extra = b"more" if habit == "longer" else b""
    source = reader(site, "/other" if habit == "gone" else "/model.bin")
    with pytest.raises(FetchError, match=said):
        source.read(1_000, 10)
    source.close()


def test_closing_does_not_wait_for_a_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    source = reader(site)
    reached, go = threading.Event(), threading.Event()
    begin = SourceReader._begin

    def slow(self: SourceReader, offset: int) -> None:
        reached.set()
        assert go.wait(10)
        begin(self, offset)

    monkeypatch.setattr(SourceReader, "_begin", slow)
    thread = threading.Thread(target=source.read, args=(0, 100))
    thread.start()
    assert reached.wait(10)
    source.close()
    go.set()
    thread.join(10)
    assert not thread.is_alive()
    assert source._client is not None and source._client.is_closed


def test_what_is_no_single_file_on_the_web_has_no_ranges() -> None:
    for sources in ([], ["https://a/b", "https://a/c"], ["pypi:a==1/b"], ["peer:" + "ab" * 32]):
        assert open_reader(sources, 10, WebPolicy()) is None
    found = open_reader(["hf:a/b:c"], 10, WebPolicy())
    assert found is not None
    found.close()


def test_the_transport_is_httpx_own_underneath(site: Site) -> None:
    """A HEAD, a header of ours and a body that is read in pieces pass through."""
    with new_client(site.policy) as client, client.stream("GET", site.url("/model.bin"), headers={"range": "bytes=5-"}) as response:
        assert response.status_code == 206 and b"".join(response.iter_raw()) == CONTENT[5:]
        assert isinstance(response, httpx.Response)

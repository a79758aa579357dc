"""What is a source and what is not: tables."""

from __future__ import annotations

import pytest

from protocol import checks
from protocol.errors import ConfigError
from runtimes.catalogue import CATALOGUE
from runtimes.store.sources import (
    FileSource,
    HubSource,
    PeerSource,
    Source,
    WebSource,
    WheelSource,
    check_redirect,
    choose_gguf,
    parse_origin,
    parse_part,
)

HASH = "ab" * 32


@pytest.mark.parametrize(
    ("text", "source", "file_name"),
    [
        ("file:/models/a.gguf", FileSource("/models/a.gguf"), "a.gguf"),
        ("file:models/a b.gguf", FileSource("models/a b.gguf"), "a b.gguf"),
        ("file:///models/a%20b.gguf", FileSource("/models/a b.gguf"), "a b.gguf"),
        ("https://example.org/x/a.gguf?download=1", WebSource("https://example.org/x/a.gguf?download=1"), "a.gguf"),
        ("http://127.0.0.1:81/a.gguf", WebSource("http://127.0.0.1:81/a.gguf"), "a.gguf"),
        ("http://[::1]/a.gguf", WebSource("http://[::1]/a.gguf"), "a.gguf"),
        ("hf:owner/name", HubSource("owner/name", None), "name.gguf"),
        ("hf:owner/name-GGUF:sub/x.Q8_0.gguf", HubSource("owner/name-GGUF", "sub/x.Q8_0.gguf"), "x.Q8_0.gguf"),
        ("hf://owner/name:x.gguf", HubSource("owner/name", "x.gguf"), "x.gguf"),
        ("pypi:a-b==1.0.0/a_b/m.gguf", WheelSource("a-b", "1.0.0", "a_b/m.gguf", None), "m.gguf"),
        ("pypi:a==2!1.0+cpu/m.zip!in/t.json", WheelSource("a", "2!1.0+cpu", "m.zip", "in/t.json"), "t.json"),
        (f"peer:{HASH}", PeerSource(HASH), HASH),
    ],
)
def test_sources_are_read(text: str, source: Source, file_name: str) -> None:
    part = parse_part(text)
    assert part.source == source
    assert part.file_name == file_name
    pinned = parse_part(f"{text}#sha256={HASH.upper()}")
    assert (pinned.source, pinned.sha256, pinned.text) == (source, HASH, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ftp://example.org/a.gguf", "Possible are"),
        ("nonsense", "Possible are"),
        ("file:", "names no file"),
        ("file://elsewhere/a.gguf", "another machine"),
        ("http://example.org/a.gguf", "not encrypted"),
        ("http://127.0.0.1.example.org/a.gguf", "not encrypted"),
        ("https://user:secret@example.org/a.gguf", "take it out"),
        ("https:///a.gguf", "not a web address"),
        ("https://example.org:99999/a.gguf", "not a web address"),
        ("https://example.org/a.gguf#sha1=00", "64 hexadecimal digits"),
        ("https://example.org/a\n.gguf", "control characters"),
        (f"https://example.org/a.gguf#sha256={HASH}0", "64 hexadecimal digits"),
        ("https://example.org/a.gguf#sha256=", "64 hexadecimal digits"),
        ("hf:name", "hf:OWNER/NAME"),
        ("hf:owner/name/more", "hf:OWNER/NAME"),
        ("hf:owner/name:../x.gguf", "hf:OWNER/NAME"),
        ("hf:owner/name:", "hf:OWNER/NAME"),
        ("pypi:name/path", "pypi:NAME==VERSION"),
        ("pypi:name==1.0", "pypi:NAME==VERSION"),
        ("pypi:--index-url==1.0/path", "pypi:NAME==VERSION"),
        ("pypi:name==-r/path", "pypi:NAME==VERSION"),
        ("pypi:name==1.0/../path", "pypi:NAME==VERSION"),
        ("pypi:name==1.0/a.zip!", "pypi:NAME==VERSION"),
        ("pypi:name==1.0/a.zip!/etc/passwd", "pypi:NAME==VERSION"),
        ("peer:1234", "64 hexadecimal digits"),
    ],
)
def test_nonsense_is_refused_with_what_to_write(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_part(text)


def test_secrets_in_an_address_are_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_part("https://user:hunter2@example.org/a.gguf")
    assert "hunter2" not in str(caught.value)


def test_a_single_source_and_the_whole_must_agree() -> None:
    assert parse_origin(f"file:/a#sha256={HASH}").sha256 == HASH
    assert parse_origin(["file:/a", f"file:/b#sha256={HASH}"]).sha256 is None
    assert parse_origin(["file:/a", "file:/b"], HASH).sha256 == HASH
    with pytest.raises(ConfigError, match="Two different hashes"):
        parse_origin(f"file:/a#sha256={HASH}", "00" * 32)
    with pytest.raises(ConfigError, match="1 to 256 parts"):
        parse_origin([])


@pytest.mark.parametrize(
    ("text", "stem", "suffix"),
    [
        ("file:/m/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1", ".gguf"),
        ("pypi:a==1/d/gemma.gguf.part00", "gemma", ".gguf"),
        ("file:/m/my model (1).GGUF", "my-model-1-", ".gguf"),
        ("https://example.org/", "model", ""),
        ("file:/m/.hidden", "hidden", ""),
        ("file:/m/a.partial", "a", ""),
        ("file:/m/a.note", "a", ""),
        (f"peer:{HASH}", HASH, ""),
    ],
)
def test_names_and_suffixes_are_harmless(text: str, stem: str, suffix: str) -> None:
    origin = parse_origin(text)
    assert (origin.stem, origin.suffix) == (stem, suffix)
    checks.label("name", origin.stem, 128)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["m.Q8_0.gguf", "m.Q4_K_S.gguf", "m.Q4_K_M.gguf"], "m.Q4_K_M.gguf"),
        (["m.Q8_0.gguf", "m-q4_k_s.gguf", "m.Q5_K_M.gguf"], "m-q4_k_s.gguf"),
        (["m.Q8_0.gguf", "m.Q5_K_M.gguf", "m.F16.gguf"], "m.Q5_K_M.gguf"),
        (["m.Q2_K.gguf", "m.Q8_0.gguf"], "m.Q8_0.gguf"),
        (["z.F16.gguf", "b.Q2_K.gguf", "README.md"], "b.Q2_K.gguf"),
        (["mmproj-Q8_0.gguf", "m.Q6_K.gguf"], "m.Q6_K.gguf"),
        (["m.Q4_K_M-00001-of-00002.gguf", "m.Q4_K_M-00002-of-00002.gguf", "m.Q3_K.gguf"], "m.Q3_K.gguf"),
        (["m.IQ4_K_M.gguf", "m.Q4_K_M_L.gguf", "m.Q8_0.gguf"], "m.Q8_0.gguf"),
        (["README.md"], None),
    ],
)
def test_the_hub_choice(names: list[str], chosen: str | None) -> None:
    assert choose_gguf(names) == chosen


@pytest.mark.parametrize(
    ("origin", "target", "allowed"),
    [
        ("https://a.org/x", "https://cdn.b.org/y", True),
        ("http://127.0.0.1/x", "http://localhost/y", True),
        ("http://127.0.0.1/x", "https://a.org/y", True),
        ("https://a.org/x", "http://a.org/x", False),
        ("https://a.org/x", "http://127.0.0.1/x", False),
        ("https://a.org/x", "https://127.0.0.1/x", False),
        ("https://localhost/x", "http://localhost/x", False),
        ("https://a.org/x", "ftp://a.org/x", False),
        ("https://a.org/x", "file:///etc/passwd", False),
    ],
)
def test_redirects(origin: str, target: str, allowed: bool) -> None:
    if allowed:
        check_redirect(origin, target)
    else:
        with pytest.raises(ConfigError):
            check_redirect(origin, target)


def test_the_catalogue_parses_and_its_names_can_travel() -> None:
    assert {"smollm2-135m", "gemma3-270m", "minilm-l6-v2", "minilm-l6-v2-tokenizer"} <= set(CATALOGUE)
    for entry in CATALOGUE.values():
        origin = parse_origin(entry.parts, entry.sha256)
        assert origin.suffix == entry.suffix
    assert [part.file_name[-2:] for part in parse_origin(CATALOGUE["gemma3-270m"].parts).parts] == [
        "00",
        "01",
        "02",
        "03",
    ]

"""The modules that ship: examples, answers beside those of Python's library, errors, and that they rebuild to the byte."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import random
import re
import uuid
import zlib
from functools import cache
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from protocol.cargo_io import DoneLine, ErrorLine, ImageLine, Line, LineReader, encode_input, encode_line
from protocol.errors import ConfigError
from runtimes.wasm import build, modules
from runtimes.wasm.cargo import open_wasm_cargo
from runtimes.wasm.engine import RunLimits, WasmEngine

NAMES = sorted(modules.pins())


@cache
def engine() -> WasmEngine:
    return WasmEngine()


def run(name: str, fields: dict[str, Any], seed: bytes = b"") -> list[Line]:
    """Lines of a run; it may end with code 1 after an error."""
    module, out = modules.load(name), bytearray()
    compiled = engine().compile(module.wasm, module.content_hash)
    result = engine().run(compiled, encode_input(fields), out.extend, RunLimits(), seed)
    reader = LineReader()
    lines = reader.feed(out) + reader.finish()
    assert result.is_good or (isinstance(lines[-1], ErrorLine) and result.exit_code == 1), result
    return lines


def answer(name: str, **fields: Any) -> dict[str, Any]:
    *_, last = run(name, fields)
    assert isinstance(last, DoneLine), last
    result: dict[str, Any] = json.loads(last.result)
    return result


def complaint(name: str, **fields: Any) -> str:
    (line,) = run(name, fields)
    assert isinstance(line, ErrorLine)
    return line.message


def words(seed: int, count: int, alphabet: str = "abé \n,\"'.\\\t😀x1") -> str:
    chance = random.Random(seed)
    return "".join(chance.choice(alphabet) for _ in range(count))


@pytest.mark.parametrize("name", NAMES)
async def test_the_example_through_a_worker(name: str) -> None:
    module = modules.load(name)
    assert len(module.about) > 40
    opened = open_wasm_cargo(name=name, module=module.wasm, content_hash="ab" * 32, module_hash=module.content_hash)
    async with opened as cargo, cargo.run_input(encode_input(module.example_input), seed=modules.EXAMPLE_SEED) as running:
        lines = [line async for line in running]
    assert [json.loads(encode_line(line)) for line in lines] == module.example_output


def test_there_are_at_least_twelve() -> None:
    assert len(NAMES) >= 12
    assert [source.stem for source in build.sources()] == NAMES
    assert sorted(path.stem for path in modules.FOLDER.glob("*.wasm")) == NAMES


def test_a_file_that_is_not_the_pinned_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "pins", lambda: {"slug": "0" * 64})
    with pytest.raises(ConfigError, match="not the file that was pinned"):
        modules.load("slug")
    with pytest.raises(ConfigError, match="there is no module"):
        modules.load("../build")


def test_a_rebuild_gives_the_same_bytes() -> None:
    try:
        version = build.compiler()
    except ConfigError as error:
        pytest.skip(str(error))
    if version != build.recorded_compiler():
        pytest.skip(f"{version} is not the compiler of the pins, {build.recorded_compiler()}")
    hashes = {name: hashlib.sha256(wasm).hexdigest() for name, wasm in build.build().items()}
    assert hashes == modules.pins()


@pytest.mark.parametrize("size", [0, 1, 3, 55, 56, 63, 64, 65, 119, 127, 128, 129, 256, 1000])
def test_hashes_are_those_of_hashlib(size: int) -> None:
    data = random.Random(size).randbytes(size)
    text = base64.b64encode(data).decode()
    assert answer("sha256", base64=text) == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": size}
    for digest, key in ((64, ""), (20, ""), (32, "key"), (1, "k" * 64)):
        expected = hashlib.blake2b(data, digest_size=digest, key=key.encode()).hexdigest()
        assert answer("blake2b", base64=text, size=digest, key=key)["blake2b"] == expected
    sums = answer("checksum", base64=text)
    assert (int(sums["crc32"], 16), int(sums["adler32"], 16)) == (zlib.crc32(data), zlib.adler32(data))
    encoded = answer("base64", hex=data.hex())["base64"]
    assert encoded == text
    decoded = answer("base64", op="decode", text=encoded)
    assert decoded["hex"] == data.hex()
    assert ("text" in decoded) == _is_text(data)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("data", [b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe0\x80\x80", b"\xf0\x9f\x8f\x9d", b"\xc3"])
def test_what_is_no_text_is_not_called_so(data: bytes) -> None:
    decoded = answer("base64", op="decode", text=base64.b64encode(data).decode())
    assert ("text" in decoded) == _is_text(data)


@pytest.mark.parametrize("seed", range(6))
def test_csv_is_read_as_the_csv_module_does(seed: int) -> None:
    rows = [[words(seed * 100 + 10 * i + k, 5, 'ab ,"\né') or "x" for k in range(3)] for i in range(5)]
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    assert answer("csv_to_json", csv=text.getvalue(), header=False) == {"rows": rows, "count": 5}


def test_csv_corners() -> None:
    assert answer("csv_to_json", csv="a;b\n1;-2.5\n007;1.\n", delimiter=";")["rows"] == [{"a": 1, "b": -2.5}, {"a": "007", "b": "1."}]
    assert answer("csv_to_json", csv="a\n1", numbers=False)["rows"] == [{"a": "1"}]
    assert answer("csv_to_json", csv="")["rows"] == []
    assert answer("csv_to_json", csv="a,b\n\n1,\n")["rows"] == [{"a": 1, "b": ""}]
    assert "row 1 has more fields" in complaint("csv_to_json", csv="a\n1,2\n")
    assert "has no end" in complaint("csv_to_json", csv='a\n"x\n')


@pytest.mark.parametrize("seed", range(8))
def test_a_diff_can_be_applied_and_is_short(seed: int) -> None:
    chance = random.Random(seed)
    old = [chance.choice("abcd") for _ in range(chance.randint(0, 30))]
    new = [chance.choice("abcd") for _ in range(chance.randint(0, 30))]
    if seed == 0:
        new = list(old)
    said = answer("line_diff", old="".join(f"{x}\n" for x in old), new="".join(f"{x}\n" for x in new))
    edits = said["diff"].splitlines()
    assert [line[1:] for line in edits if line[0] != "+"] == old
    assert [line[1:] for line in edits if line[0] != "-"] == new
    common = _common(old, new)
    assert (said["removed"], said["added"]) == (len(old) - common, len(new) - common)


def _common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        last = list(row)
        for j, y in enumerate(b):
            row[j + 1] = last[j] + 1 if x == y else max(last[j + 1], row[j])
    return row[-1]


def test_edit_distance_counts_characters() -> None:
    assert answer("edit_distance", a="größe", b="grosse") == {"distance": 3, "similarity": 0.5}
    assert answer("edit_distance", a="", b="") == {"distance": 0, "similarity": 1}
    assert answer("edit_distance", a="", b="😀é")["distance"] == 2


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org",
        "https://user@host.example:443/p/q;x?a=1&b=%26&c=%E2%82%AC+%2B#f?g",
        "http://[2001:db8::1]:8080/x?%41=%zz",
        "mailto:ada@example.org",
        "/relative/path?x=%F0%9F%98%80",
        "?q",
        "",
    ],
)
def test_urls_are_parsed_as_urllib_does(url: str) -> None:
    said, expected = answer("url_parse", url=url), urlsplit(url)
    assert (said["scheme"], said["path"], said["query"], said["fragment"]) == expected[:1] + expected[2:]
    assert said.get("port") == expected.port
    assert said.get("user") == expected.username
    if expected.hostname:
        assert said["host"].strip("[]") == expected.hostname
    assert said["fields"] == [list(pair) for pair in parse_qsl(expected.query, keep_blank_values=True)]


def test_regex_finds_what_re_finds() -> None:
    text = words(3, 400, "abc1 2\n.é")
    for pattern in ("[a-c]+", "(a|b)(1?)", "^[a-c]", "[0-9]$", "é."):
        expected = [(m.group(), len(text[: m.start()].encode())) for m in re.finditer(pattern, text, re.MULTILINE)]
        assert [(m["text"], m["start"]) for m in answer("regex_extract", text=text, pattern=pattern)["matches"]] == expected
    assert answer("regex_extract", text="aXbx", pattern="x", ignore_case=True, limit=1)["count"] == 1
    assert answer("regex_extract", text="éa", pattern="b*")["count"] == 3  # between characters, not within one
    assert "no regular expression" in complaint("regex_extract", text="", pattern="(")


@pytest.mark.parametrize("seed", range(4))
def test_words_and_characters_are_counted(seed: int) -> None:
    text = words(seed, 500)
    said = answer("text_stats", text=text)
    found = re.findall(r"(?:[^\x00-\x7f]|[0-9A-Za-z_'])+", text)
    assert (said["bytes"], said["characters"], said["words"]) == (len(text.encode()), 500, len(found))
    assert said["different_words"] == len(set(found))
    counts = answer("word_count", text=text, top=1000)
    assert {w["word"]: w["count"] for w in counts["words"]} == {w: found.count(w) for w in found}
    assert answer("text_stats", text="")["words"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_json_comes_through_as_it_was(seed: int) -> None:
    chance = random.Random(seed)

    def value(depth: int) -> Any:
        kind = chance.randrange(8 if depth < 4 else 5)
        if kind >= 6:
            return {words(chance.randrange(10**6), 3): value(depth + 1) for _ in range(chance.randrange(4))}
        if kind == 5:
            return [value(depth + 1) for _ in range(chance.randrange(4))]
        return (None, True, chance.randrange(-(10**9), 10**9), chance.random(), words(chance.randrange(10**6), 8))[kind]

    data = {"a": value(0), "b": value(0), "c": "\x00\x1f\x7f\u2028"}
    assert json.loads(answer("json_format", data=data, indent=4, sort_keys=True)["text"]) == data
    assert answer("json_format", data=data)["text"] == json.dumps(data, ensure_ascii=False, separators=(",", ":")) or seed
    assert answer("json_query", data=data, path="a")["matches"] == [data["a"]]
    assert answer("json_query", data=data, path="**")["matches"][0] == data


def test_json_paths() -> None:
    data = {"a": [{"b": 1}, {"b": 2, "c.d": 3}], "": 4}
    cases: dict[str, list[Any]] = {
        "": [data],
        "a[0].b": [1],
        "a[-1].b": [2],
        "a[*].b": [1, 2],
        "a.*.b": [1, 2],
        "**.b": [1, 2],
        'a[1]."c.d"': [3],
        "a[5].b": [],
        "x.y": [],
        '""': [4],
    }
    for path, expected in cases.items():
        assert answer("json_query", data=data, path=path) == {"matches": expected, "count": len(expected)}, path
    for path in ("a[", "a[x]", "a..b", '"a', "a[1"):
        assert "path" in complaint("json_query", data=data, path=path)


def test_html_that_may_be_shown() -> None:
    html = answer("markdown", markdown='<img src=x onerror=y> [a](JavaScript:x) [b](data:text/html,x) ![c](/d"e.png) `<i>`')["html"]
    assert "<i" not in html.replace("<img src=\"/d&quot;e.png\" alt=\"c\">", "")
    assert "href" not in html
    assert answer("markdown", markdown="a\\*b* _c_ ~~d~~ ***")["html"] == "<p>a*b* <em>c</em> <del>d</del> ***</p>\n"
    assert answer("markdown", markdown="```\n<x>")["html"] == "<pre><code>&lt;x&gt;\n</code></pre>\n"
    assert answer("markdown", markdown="**" * 30_000 + "[" * 3000)["html"].startswith("<p>")


def test_slugs() -> None:
    assert answer("slug", text="Œuvre d'Ærø — ÿ Ł ß ž Þ")["slug"] == "oeuvre-daero-y-l-ss-z-th"
    assert answer("slug", text="one two three", limit=8, separator="_")["slug"] == "one_two"
    assert answer("slug", text="日本")["slug"] == ""
    for code in range(0xC0, 0x180):
        assert re.fullmatch("[a-z]*", answer("slug", text=chr(code))["slug"]), chr(code)


def test_uuids_come_from_the_seed() -> None:
    def made(seed: bytes) -> list[str]:
        (line,) = run("uuid", {"count": 50}, seed)
        assert isinstance(line, DoneLine)
        result: list[str] = json.loads(line.result)["uuids"]
        return result

    found = made(b"a")
    assert found == made(b"a") and found != made(b"b") and len(set(found)) == 50
    assert all(uuid.UUID(text).version == 4 and uuid.UUID(text).variant == uuid.RFC_4122 for text in found)


def test_pictures_keep_their_mean_and_their_flat_colours() -> None:
    def resized(pixels: bytes, width: int, height: int, to_width: int, to_height: int) -> bytes:
        fields = {"data": base64.b64encode(pixels).decode(), "width": width, "height": height}
        image, _ = run("image_resize", fields | {"to_width": to_width, "to_height": to_height, "raw": True})
        assert isinstance(image, ImageLine) and (image.width, image.height) == (to_width, to_height)
        return base64.b64decode(image.data)

    pixels = random.Random(1).randbytes(3 * 12 * 8)
    assert resized(pixels, 12, 8, 12, 8) == pixels
    small = resized(pixels, 12, 8, 6, 4)
    for at in range(0, len(small), 3):
        x, y = at // 3 % 6, at // 18
        four = [pixels[3 * (12 * (2 * y + j) + 2 * x + i)] for i in (0, 1) for j in (0, 1)]
        assert abs(small[at] - sum(four) / 4) <= 1
    for to in ((1, 1), (5, 3), (40, 33)):
        assert set(resized(bytes([9, 8, 7] * 96), 12, 8, *to)[::3]) == {9}
    assert "between 1 and 4096" in complaint("image_resize", data="", width=0, height=1, to_width=1)
    assert "width x height x 3" in complaint("image_resize", data="AAAA", width=2, height=1, to_width=1)
    assert "no PPM" in complaint("image_resize", data=base64.b64encode(b"P6 x").decode(), to_width=1)
    assert "width x height x 3" in complaint("image_resize", data=base64.b64encode(b"P6 1 1 255").decode(), to_width=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_input_is_an_error_line(name: str) -> None:
    if name != "uuid":
        assert "must be" in complaint(name) or "needs" in complaint(name)
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    assert complaint(name, data=deep) == "the input is nested too deeply"

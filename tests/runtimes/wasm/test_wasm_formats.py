"""Modules of formats: XML beside expat, TOML beside tomllib, patches, templates and QR codes beside the tables of their standards."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import tomllib
from datetime import date, datetime, time
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

import pytest

from tests.runtimes.wasm.test_wasm_modules import answer, complaint

# -- JSON patches


# RFC 7396, appendix A: original, patch, result.
_MERGES = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("data", "patch", "expected"), _MERGES)
def test_merges_of_the_standard(data: Any, patch: Any, expected: Any) -> None:
    assert answer("json_patch", data=data, patch=patch) == {"data": expected}


# RFC 6902, appendix A, and its corners: document, operations, result; a text is a part of the error.
_PATCHES: list[tuple[Any, list[dict[str, Any]], Any]] = [
    ({"foo": "bar"}, [{"op": "add", "path": "/baz", "value": "qux"}], {"foo": "bar", "baz": "qux"}),
    ({"foo": ["bar", "baz"]}, [{"op": "add", "path": "/foo/1", "value": "qux"}], {"foo": ["bar", "qux", "baz"]}),
    ({"baz": "qux", "foo": "bar"}, [{"op": "remove", "path": "/baz"}], {"foo": "bar"}),
    ({"foo": ["bar", "qux", "baz"]}, [{"op": "remove", "path": "/foo/1"}], {"foo": ["bar", "baz"]}),
    ({"baz": "qux", "foo": 1}, [{"op": "replace", "path": "/baz", "value": "boo"}], {"baz": "boo", "foo": 1}),
    ({"a": {"b": 1}, "c": {}}, [{"op": "move", "from": "/a/b", "path": "/c/d"}], {"a": {}, "c": {"d": 1}}),
    ({"foo": ["all", "grass", "cows"]}, [{"op": "move", "from": "/foo/1", "path": "/foo/2"}], {"foo": ["all", "cows", "grass"]}),
    ({"b": [1, {"x": 2, "y": 3}]}, [{"op": "test", "path": "/b/1", "value": {"y": 3, "x": 2e0}}], {"b": [1, {"x": 2, "y": 3}]}),
    ({"baz": "qux"}, [{"op": "test", "path": "/baz", "value": "bar"}], "operation 1: the value is not the one"),
    ({"foo": "bar"}, [{"op": "add", "path": "/child", "value": {"grandchild": {}}}], {"foo": "bar", "child": {"grandchild": {}}}),
    ({"foo": "bar"}, [{"op": "add", "path": "/baz/bat", "value": "qux"}], "operation 1: there is nothing at the pointer"),
    ({"/": 9, "~1": 10}, [{"op": "test", "path": "/~01", "value": 10}], {"/": 9, "~1": 10}),
    ({"/": 9, "~1": 10}, [{"op": "test", "path": "/~01", "value": "10"}], "not the one that was expected"),
    ({"foo": ["bar"]}, [{"op": "add", "path": "/foo/-", "value": ["abc"]}], {"foo": ["bar", ["abc"]]}),
    ({"a": 1}, [{"op": "replace", "path": "", "value": [2]}, {"op": "add", "path": "/0", "value": 1}], [1, 2]),
    ({"a": [1]}, [{"op": "copy", "from": "/a", "path": "/b"}, {"op": "add", "path": "/a/0", "value": 0}], {"a": [0, 1], "b": [1]}),
    ({"a": {}}, [{"op": "move", "from": "/a", "path": "/a/b"}], "moved into itself"),
    ({"a": [1]}, [{"op": "add", "path": "/a/2", "value": 0}], "no such entry"),
    ({"a": [1]}, [{"op": "remove", "path": "/a/-"}], "no entry of an array has that number"),
    ({"a": [1, 2]}, [{"op": "remove", "path": "/a/01"}], "no entry of an array has that number"),
    ({"a": 1}, [{"op": "remove", "path": "/a"}, {"op": "remove", "path": "/a"}], "operation 2: there is nothing"),
    ({"a": 1}, [{"op": "add", "path": "a", "value": 1}], "begins with /"),
    ({"a": 1}, [{"op": "add", "path": "/~2", "value": 1}], "~ stands before"),
    ({"a": 1}, [{"op": "add", "path": "/b"}], 'needs a "value"'),
    ({"a": 1}, [{"op": "swap", "path": "/a"}], '"op" must be'),
    ({"a": 1}, [{"op": "remove", "path": ""}], "whole document"),
    ({"a": 1}, [{"path": "/a"}], 'with "op"'),
    ({"a": 1}, [{"op": "add", "value": 1}], "must be a string"),
    ({"a": 1}, [{"op": "add", "path": "/a/b", "value": 1}], "neither object nor array"),
]


@pytest.mark.parametrize(("data", "patch", "expected"), _PATCHES)
def test_patches_of_the_standard(data: Any, patch: Any, expected: Any) -> None:
    if isinstance(expected, str):
        assert expected in complaint("json_patch", data=data, patch=patch)
    else:
        assert answer("json_patch", data=data, patch=patch) == {"data": expected}


@pytest.mark.parametrize("seed", range(5))
def test_many_operations_together(seed: int) -> None:
    """Beside the same on a Python object."""
    chance = random.Random(seed)
    data: dict[str, Any] = {"list": [0], "map": {}}
    expected, steps = copy.deepcopy(data), []
    for value in range(40):
        place = chance.randint(0, len(expected["list"]))
        if chance.random() < 0.6 or not expected["list"]:
            expected["list"].insert(place, value)
            steps.append({"op": "add", "path": f"/list/{place}", "value": value})
        else:
            place = min(place, len(expected["list"]) - 1)
            expected["map"][f"k{value}"] = expected["list"].pop(place)
            steps.append({"op": "move", "from": f"/list/{place}", "path": f"/map/k{value}"})
    assert answer("json_patch", data=data, patch=steps) == {"data": expected}


# -- XML


def _by_expat(xml: str) -> dict[str, Any]:
    """What the module says, with all white space."""
    top: dict[str, Any] = {"children": []}
    open_elements = [top]
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def begins(name: str, attributes: dict[str, str]) -> None:
        element: dict[str, Any] = {"name": name, "attributes": attributes, "children": []}
        open_elements[-1]["children"].append(element)
        open_elements.append(element)

    def says(text: str) -> None:
        children = open_elements[-1]["children"]
        if children and isinstance(children[-1], str):
            children[-1] += text
        else:
            children.append(text)

    parser.StartElementHandler, parser.CharacterDataHandler = begins, says
    parser.EndElementHandler = lambda name: open_elements.pop() and None
    parser.Parse(xml, True)
    root: dict[str, Any] = top["children"][0]
    return root


def _random_xml(chance: random.Random, depth: int = 0) -> str:
    name = chance.choice(["a", "ns:b", "élan", "_c-1.2"])
    keys = chance.sample(["k", "l:m", "z"], chance.randint(0, 3))
    values = {key: "".join(chance.choice("xé<&>\"'\n\t 😀") for _ in range(4)) for key in keys}
    attributes = "".join(f" {key}={quoteattr(value)}" for key, value in values.items())
    if depth > 4 or chance.random() < 0.2:
        return f"<{name}{attributes}\n/>"
    parts = []
    for _ in range(chance.randint(0, 4)):
        kind = chance.randrange(6)
        if kind == 0:
            parts.append(chance.choice(["<!-- a - b <c> -->", "<?do it?>", "<![CDATA[<x>&]]]>", "&#xE9;&#10;&#128512;"]))
        elif kind < 3:
            parts.append(escape("".join(chance.choice("ab é<&>\r\n\t]") for _ in range(6))))
        else:
            parts.append(_random_xml(chance, depth + 1))
    return f"<{name}{attributes}>{''.join(parts)}</{name} >"


@pytest.mark.parametrize("seed", range(20))
def test_xml_is_read_as_expat_does(seed: int) -> None:
    xml = '<?xml version="1.0" encoding="UTF-8"?>\n<!-- first -->' + _random_xml(random.Random(seed)) + "\n<!-- last -->\n"
    said = answer("xml_to_json", xml=xml, space=True)
    assert said["root"] == _by_expat(xml)
    assert said["elements"] == json.dumps(said["root"]).count('"children"')


def test_white_space_between_elements_is_left_out() -> None:
    assert answer("xml_to_json", xml="<a>\n <b> x </b>\n</a>")["root"]["children"] == [{"name": "b", "attributes": {}, "children": [" x "]}]


_BAD_XML = [
    *("", "x", "<a>", "<a></b>", "<a/><b/>", "<a/>x", "<a b/>", "<a b=c/>", "<a b='1' b='2'/>", "<a b='<'/>", "<a b='1'c='2'/>"),
    *("<a>&x;</a>", "<a>&amp</a>", "<a>&#0;</a>", "<a>&#xD800;</a>", "<a>&#x110000;</a>", "<a>&#;</a>", "<a>]]></a>", "<a><!-- -- --></a>"),
    *("<a><![CDATA[x</a>", "<a>\x01</a>", "<1/>", "<a", "<a><?xml version='1.0'?></a>", " <?xml version='1.0'?><a/>", "<a/ >"),
    *("< a/>", "</a>"),
]


@pytest.mark.parametrize("xml", _BAD_XML)
def test_what_expat_refuses_is_refused(xml: str) -> None:
    with pytest.raises(expat.ExpatError):
        _by_expat(xml)
    assert complaint("xml_to_json", xml=xml).startswith("line ")


def test_nothing_can_be_declared_in_xml() -> None:
    bomb = '<!DOCTYPE a [<!ENTITY x "xx"><!ENTITY y "&x;&x;">]><a>&y;</a>'
    assert complaint("xml_to_json", xml=bomb) == "line 1: a DOCTYPE is not allowed"
    assert "nested too deeply" in complaint("xml_to_json", xml="<a>" * 101 + "</a>" * 101)
    assert answer("xml_to_json", xml="<a>" * 100 + "</a>" * 100)["elements"] == 100


# -- TOML

_TOMLS = [
    "",
    "a = 1 # one\r\n[b]\r\nc.d = 2\r\n\"e f\".'g' = 3\r\n",
    "a = [1, [2.5, \"x\"], # c\n {y = {z = 1}, w.v = 2},\n]\n",
    "[[p]]\nn = 1\n[[p.q]]\nr = 1\n[[p.q]]\nr = 2\n[p.s]\nt = 1\n[[p]]\n[p.s]\nt = 2\n",
    "[a.b.c]\nx = 1\n[a]\ny = 2\n[a.b]\nz = 3\n",
    "fruit.apple.smooth = true\nfruit.orange = 2\n[other]\n[fruit.apple.taste]\nsweet = true\n",
    'a = "\\b\\t\\n\\f\\r\\"\\\\\\u00e9\\U0001F600"\nb = \'c:\\n\'\nc = """\nx \\\n   \n  y""z\\""""""\nd = \'\'\'\n\'two\'\'\'\'\'\n',
    "a = 0xDEAD_beef\nb = 0o7_7\nc = 0b1_01\nd = +1_000\ne = -0\nf = 6.626e-3_4\ng = -1E+06\nh = 9223372036854775807\ni = 0x7fffffff\n",
    "a = 1979-05-27T07:32:00Z\nb = 1979-05-27 07:32:00.5-07:00\nc = 1979-05-27T07:32:00\nd = 1979-05-27 # x\ne = 07:32:00.999\n",
    "1234 = 1\n3.14 = 2\n\"\" = 3\n-_ = true\n[\"a.b\" . c]\n[ d ]",
    "a = { }\nb = []\nc = {d = 1,   e = [ {f = 2} ]}\n",
    "[x.y.z.w]\n[x]\n[[a.b]]\nc = 1\n",
]


def _plain(value: Any) -> Any:
    """As the module writes it: dates as texts."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.isoformat() if isinstance(value, datetime | date | time) else value


def _instants(value: Any) -> Any:
    """Texts that are dates in one spelling, for fractions and zones have several."""
    if isinstance(value, dict):
        return {key: _instants(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_instants(each) for each in value]
    if isinstance(value, str) and value[2:3] == ":":
        return time.fromisoformat(value).isoformat()
    if isinstance(value, str) and value[4:5] == "-" and "T" in value:
        return datetime.fromisoformat(value).isoformat()
    return value


@pytest.mark.parametrize("toml", _TOMLS)
def test_toml_is_read_as_tomllib_does(toml: str) -> None:
    assert _instants(answer("toml_to_json", toml=toml)["data"]) == _plain(tomllib.loads(toml))


def test_toml_that_json_cannot_say() -> None:
    assert answer("toml_to_json", toml="a = inf\nb = -inf\nc = nan\nd = +inf")["data"] == {"a": "inf", "b": "-inf", "c": "nan", "d": "inf"}
    assert answer("toml_to_json", toml="a = 1979-05-27 07:32:00z")["data"] == {"a": "1979-05-27T07:32:00Z"}
    assert "nested too deeply" in complaint("toml_to_json", toml="a = " + "[" * 200 + "]" * 200)
    assert "too many parts" in complaint("toml_to_json", toml=".".join("a" * 51) + " = 1")
    assert complaint("toml_to_json", toml="a = 1\n\nb = ?").startswith("line 3: ")
    assert "63 bits" in complaint("toml_to_json", toml="a = 0xffffffffffffffff")


_BAD_TOML = [
    *("a", "a =", "= 1", "a = 1 b = 2", "a = 1\na = 2", "a.b = 1\na = 2", "a = 1\na.b = 2", "a = {b = 1}\na.c = 2", "a = {b = 1}\n[a.c]"),
    *("[a]\n[a]", "[a]\nb = 1\n[a.b]", "[a.b]\n[a]\nb.c = 1", "a = []\n[[a]]", "[[a]]\n[a]", "[a]\n[[a]]", "[[a.b]]\n[a]\nb.c = 1"),
    *("[a]\nb.c = 1\n[a.b]", "[a", "[]", "[a]]", "[[a]", "[a] x", "a = [1 2]", "a = [1,,2]", "a = [", "a = {b = 1,}", "a = {b = 1\n}"),
    *("a = {b = 1, b = 2}", "a = {b.c = 1, b = 2}", "a = 01", "a = 1__0", "a = _1", "a = 1_", "a = 1.", "a = .5", "a = 1.e5", "a = 0x"),
    *("a = -0x1", "a = {", "a = 1e", "a = truex", "a = True", "a = '", "a = \"\\x\"", "a = \"\\ud800\"", "a = \"\n\"", "a = \"\x01\""),
    "a = '''x''''''",
    *("a = \"\"\"x", "a = 2023-02-29", "a = 2024-13-01", "a = 25:00:00", "a = 07:32", "a = 2024-01-01T07:32:00+25:00", "# \x01"),
    *("a = 1\rb = 2", "a b = 1", "a.'''b''' = 1", "é = 1", "a = [{b = 1}]\n[a.c]", "a = {}\n[a]", "[a.b]\nc = 1\n[a]\nb = 1"),
    *("a = inf1", "a = 1\n[a]\n"),
]


@pytest.mark.parametrize("toml", _BAD_TOML)
def test_toml_that_tomllib_refuses_is_refused(toml: str) -> None:
    with pytest.raises(tomllib.TOMLDecodeError):
        tomllib.loads(toml)
    assert complaint("toml_to_json", toml=toml).startswith("line ")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_toml_is_judged_as_tomllib_does(seed: int) -> None:
    """One character of a good document is taken out or replaced."""
    chance = random.Random(seed)
    for _ in range(60):
        toml = chance.choice(_TOMLS[1:])
        place = chance.randrange(len(toml))
        damaged = toml[:place] + chance.choice(["", *"[]{}.,=\"'\\#\n _1ax"]) + toml[place + 1 :]
        try:
            expected = _plain(tomllib.loads(damaged))
        except ValueError:
            assert complaint("toml_to_json", toml=damaged).startswith("line "), damaged
        else:
            assert _instants(answer("toml_to_json", toml=damaged)["data"]) == _instants(expected), damaged


# -- Templates

# After the tests of Mustache's specification, https://github.com/mustache/spec (MIT): template, data, text; "!" begins an error.
_TEMPLATES: list[tuple[str, Any, str]] = [
    ("Hello, {{subject}}!\n", {"subject": "world"}, "Hello, world!\n"),
    ("{{a}} {{{a}}} {{& a }}", {"a": '& " < >'}, '&amp; &quot; &lt; &gt; & " < > & " < >'),
    ("{{n}} {{f}} {{t}} {{z}}|", {"n": 85, "f": 1.21, "t": True, "z": None}, "85 1.21 true |"),
    ("I ({{cannot}}) be seen!", {}, "I () be seen!"),
    ('"{{a.b.c.d.e.name}}" == "Phil"', {"a": {"b": {"c": {"d": {"e": {"name": "Phil"}}}}}}, '"Phil" == "Phil"'),
    ("{{#a}}{{b.c}}{{/a}}", {"a": {"b": {}}, "b": {"c": "ERROR"}}, ""),
    ("{{#list}}({{.}}){{/list}}", {"list": [1, 2.5, "<"]}, "(1)(2.5)(&lt;)"),
    ("{{#list}}{{#.}}{{.}},{{/.}};{{/list}}", {"list": [[1, 2], [3]]}, "1,2,;3,;"),
    ("{{#a}}{{one}}{{#b}}{{one}}{{two}}{{/b}}{{/a}}", {"a": {"one": 1}, "b": {"two": 2}}, "112"),
    ("{{^a}}none{{/a}}{{^b}}ERROR{{/b}}{{^c}}no{{/c}}", {"a": [], "b": 0, "c": False}, "noneno"),
    ("{{#s}}{{#s}}{{s}}{{/s}}{{/s}}", {"s": "x"}, "x"),
    ("| This Is\n{{#boolean}}\n|\n{{/boolean}}\n| A Line", {"boolean": True}, "| This Is\n|\n| A Line"),
    ("|\r\n{{#boolean}}\r\n{{/boolean}}\r\n|", {"boolean": True}, "|\r\n|"),
    ("  {{#boolean}}\n#{{/boolean}}\n/", {"boolean": True}, "#\n/"),
    ("#{{#boolean}}\n/\n  {{/boolean}}", {"boolean": True}, "#\n/\n"),
    (" {{#boolean}}YES{{/boolean}}\n {{#boolean}}GOOD{{/boolean}}\n", {"boolean": True}, " YES\n GOOD\n"),
    ("Begin.\n{{! Indented\n   }}\nEnd.\n  12 {{! x }}\n", {}, "Begin.\nEnd.\n  12 \n"),
    ("12345{{! Comment Block! }}67890", {}, "1234567890"),
    ("{{# a }}={{/ a }}", {"a": True}, "="),
    ("{{{{x}}", {"{{x": 1}, "!has no end"),
    ("{{#a}}{{/b}}", {"a": 1}, "!b is closed and was not open"),
    ("{{/a}}", {}, "!a is closed and was not open"),
    ("\n{{#a}}", {}, "!a is not closed"),
    ("{{a", {}, "!line 1 of \"template\": a tag has no end"),
    ("{{ }}", {}, "!a tag has no name"),
    ("{{>part}}", {}, "!partials and other delimiters are not known"),
    ("{{=<% %>=}}", {}, "!partials and other delimiters are not known"),
]


@pytest.mark.parametrize(("template", "data", "expected"), _TEMPLATES)
def test_templates_of_the_specification(template: str, data: Any, expected: str) -> None:
    if expected.startswith("!"):
        assert expected[1:] in complaint("template", template=template, data=data)
    else:
        assert answer("template", template=template, data=data) == {"text": expected}


def test_a_template_may_insist_on_its_names() -> None:
    assert complaint("template", template="{{a}} {{b.c}}", data={"a": None, "b": {}}, strict=True) == '"data" has no b.c'
    assert answer("template", template="{{a}}", data={"a": None}, strict=True) == {"text": ""}
    deep = "{{#a}}" * 201 + "{{/a}}" * 201
    assert "nested too deeply" in complaint("template", template=deep, data={"a": 1})
    assert answer("template", template="{{#a}}" * 199 + "x" + "{{/a}}" * 199, data={"a": 1}) == {"text": "x"}


# -- QR codes

# Table 7 of the standard: bytes that fit into versions 1 to 40.
_BYTES_MAX = {
    "L": [
        17, 32, 53, 78, 106, 134, 154, 192, 230, 271, 321, 367, 425, 458, 520, 586, 644, 718, 792, 858, 929, 1003, 1091, 1171, 1273,
        1367, 1465, 1528, 1628, 1732, 1840, 1952, 2068, 2188, 2303, 2431, 2563, 2699, 2809, 2953,
    ],
    "M": [
        14, 26, 42, 62, 84, 106, 122, 152, 180, 213, 251, 287, 331, 362, 412, 450, 504, 560, 624, 666, 711, 779, 857, 911, 997, 1059,
        1125, 1190, 1264, 1370, 1452, 1538, 1628, 1722, 1809, 1911, 1989, 2099, 2213, 2331,
    ],
    "Q": [
        11, 20, 32, 46, 60, 74, 86, 108, 130, 151, 177, 203, 241, 258, 292, 322, 364, 394, 442, 482, 509, 565, 611, 661, 715, 751, 805,
        868, 908, 982, 1030, 1112, 1168, 1228, 1283, 1351, 1423, 1499, 1579, 1663,
    ],
    "H": [
        7, 14, 24, 34, 44, 58, 64, 84, 98, 119, 137, 155, 177, 194, 220, 250, 280, 310, 338, 382, 403, 439, 461, 511, 535, 593, 625,
        658, 698, 742, 790, 842, 898, 958, 983, 1051, 1093, 1139, 1219, 1273,
    ],
}  # fmt: skip
# SHA-256 of the rows of all these, which were compared, module by module, with those of the package qrcode 8.2 at the same mask.
_ALL_CODES = "16a9bb81338ab4ec5c045e27d34e2e6a2fdc88a2d3dbed98cab0cdf1af98d631"


def test_codes_of_every_version_are_the_standards() -> None:
    digest = hashlib.sha256()
    for correction, sizes in _BYTES_MAX.items():
        for version, size in enumerate(sizes, 1):
            said = answer("qr_code", text="q" * size, correction=correction)
            assert (said["version"], said["size"]) == (version, 17 + 4 * version)
            digest.update("\n".join(said["rows"]).encode())
        assert answer("qr_code", text="q" * (sizes[4] + 1), correction=correction)["version"] == 6
        assert "too long" in complaint("qr_code", text="q" * (sizes[-1] + 1), correction=correction)
    assert digest.hexdigest() == _ALL_CODES


def _masked(mask: int, x: int, y: int) -> bool:
    """Table 10 of the standard; i is the row, j the column."""
    i, j = y, x
    conditions = (
        (i + j) % 2, i % 2, j % 3, (i + j) % 3, (i // 2 + j // 3) % 2, (i * j) % 2 + (i * j) % 3,
        ((i * j) % 2 + (i * j) % 3) % 2, ((i * j) % 3 + (i + j) % 2) % 2,
    )  # fmt: skip
    return conditions[mask] == 0


def _read_version_1(rows: list[str]) -> tuple[int, bytes]:
    """Mask and codewords of the smallest code, as a reader finds them."""
    along, up = "".join(rows[8][x] for x in (0, 1, 2, 3, 4, 5, 7, 8)), "".join(rows[y][8] for y in (7, 5, 4, 3, 2, 1, 0))
    format_bits = int(along + up, 2) ^ 0x5412
    rest = format_bits
    for shift in range(4, -1, -1):
        rest ^= (0x537 << shift) * (rest >> (shift + 10) & 1)
    assert rest == 0, "the format is a word of its BCH code"
    mask, bits, upwards = format_bits >> 10 & 7, "", True
    for right in (20, 18, 16, 14, 12, 10, 8, 5, 3, 1):
        for y in range(20, -1, -1) if upwards else range(21):
            for x in (right, right - 1):
                if y != 6 and not (y < 9 and (x < 9 or x > 12)) and not (y > 12 and x < 9):
                    bits += str(int(rows[y][x]) ^ _masked(mask, x, y))
        upwards = not upwards
    return mask, bytes(int(bits[at : at + 8], 2) for at in range(0, 208, 8))


def _field_powers() -> list[int]:
    powers = [1]
    while len(powers) < 255:
        powers.append(powers[-1] << 1 ^ (0x11D if powers[-1] & 128 else 0))
    return powers


@pytest.mark.parametrize(("correction", "checks"), [("L", 7), ("M", 10), ("Q", 13), ("H", 17)])
def test_a_code_can_be_read_and_mended(correction: str, checks: int) -> None:
    powers = _field_powers()
    for text in ("Island", "é0", ""):
        said = answer("qr_code", text=text, correction=correction)
        assert said["version"] == 1
        mask, words = _read_version_1(said["rows"])
        bits = "".join(f"{word:08b}" for word in words)
        size = int(bits[4:12], 2)
        assert (mask, bits[:4]) == (said["mask"], "0100")
        assert bytes(int(bits[at : at + 8], 2) for at in range(12, 12 + 8 * size, 8)).decode() == text
        for root in range(checks):  # a codeword of Reed and Solomon is 0 at each root of its divisor
            total = 0
            for place, word in enumerate(reversed(words)):
                if word:
                    total ^= powers[(powers.index(word) + root * place) % 255]
            assert total == 0


def test_a_code_as_a_picture() -> None:
    said = answer("qr_code", text="x", svg=True)
    root = _by_expat(said["svg"])
    assert root["name"] == "svg" and root["attributes"]["viewBox"] == "0 0 29 29"
    drawn = [["0"] * 21 for _ in range(21)]
    for run in root["children"][1]["attributes"]["d"].removesuffix("z").split("z"):
        at, length = run.removeprefix("M").split("v")[0].split("h")
        x, y = map(int, at.split())
        for step in range(int(length)):
            drawn[y - 4][x - 4 + step] = "1"
    assert ["".join(row) for row in drawn] == said["rows"]
    assert '"correction" must be' in complaint("qr_code", text="x", correction="LM")
    assert '"correction" must be' in complaint("qr_code", text="x", correction="")

"""JSON pointers (RFC 6901)."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.workflows.errors import FlowError
from coordinator.workflows.pointers import MISSING, parse_pointer, placed
from protocol import limits

# "the following JSON strings evaluate to the accompanying values" (RFC 6901, section 5)
RFC_DOCUMENT = {"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, "g|h": 4, "i\\j": 5, 'k"l': 6, " ": 7, "m~n": 8}
RFC_VALUES: dict[str, Any] = {"": RFC_DOCUMENT, "/foo": ["bar", "baz"], "/foo/0": "bar", "/": 0, "/a~1b": 1, "/c%d": 2, "/e^f": 3}
RFC_VALUES |= {"/g|h": 4, "/i\\j": 5, '/k"l': 6, "/ ": 7, "/m~0n": 8}


@pytest.mark.parametrize("text", RFC_VALUES)
def test_as_in_the_rfc(text: str) -> None:
    pointer = parse_pointer(text)
    assert pointer.find(RFC_DOCUMENT) == RFC_VALUES[text] and str(pointer) == text


NOWHERE = ["/foo/2", "/foo/00", "/foo/-", "/foo/-1", "/foo/x", "/foo/0/0", "/nope", "/a/b", "/foo/９", "/foo/" + "9" * 30]


@pytest.mark.parametrize("text", NOWHERE)
def test_where_nothing_stands(text: str) -> None:
    assert parse_pointer(text).find(RFC_DOCUMENT) is MISSING


@pytest.mark.parametrize("text", ["foo", "#/foo", "/~", "/~2", "/a~", "/" * 33, "/" + "x" * limits.FLOW_POINTER_CHARS_MAX])
def test_what_is_no_pointer(text: str) -> None:
    with pytest.raises(FlowError):
        parse_pointer(text)


@pytest.mark.parametrize(
    ("document", "text", "result"),
    [
        ({}, "/a", {"a": "V"}),
        ({"a": 1, "b": 2}, "/a", {"a": "V", "b": 2}),
        ({}, "/a/b/c", {"a": {"b": {"c": "V"}}}),
        ({"a": {"x": 1}}, "/a/b", {"a": {"x": 1, "b": "V"}}),
        ({"a": [1, 2]}, "/a/1", {"a": [1, "V"]}),
        ({"a": [1, 2]}, "/a/2", {"a": [1, 2, "V"]}),
        ({"a": [1, 2]}, "/a/-", {"a": [1, 2, "V"]}),
        ({"a": []}, "/a/0/b", {"a": [{"b": "V"}]}),
        ({"a": 1}, "", "V"),
    ],
)
def test_put_there_and_the_old_one_is_as_it_was(document: Any, text: str, result: Any) -> None:
    before = repr(document)
    assert placed(document, parse_pointer(text), "V") == result and repr(document) == before


@pytest.mark.parametrize(("inside", "text"), [([1], "/a/2"), ([1], "/a/x"), (1, "/a/b"), ("x", "/a/0"), (None, "/a/b")])
def test_no_place_for_it(inside: Any, text: str) -> None:
    with pytest.raises(FlowError):
        placed({"a": inside}, parse_pointer(text), "V")

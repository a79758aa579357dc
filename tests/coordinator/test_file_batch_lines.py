"""Where the lines of a file are, and what is wrong with them; however the file is cut into pieces."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from coordinator.batches.file_lines import LineFault, LineIndex, LineWrong, TooManyLines, read_line, to_line
from protocol import limits
from tests.coordinator.file_desk import CHAT, chat_line


def index_of(data: bytes, cuts: list[int] | None = None) -> LineIndex:
    index, places = LineIndex(CHAT), [0, *sorted(cuts or []), len(data)]
    for start, end in itertools.pairwise(places):
        index.feed(data[start:end])
    index.end()
    return index


def test_places_and_faults_do_not_depend_on_the_pieces() -> None:
    rng = random.Random(5)
    plain = [json.dumps(chat_line(f"id-{number}", "x" * rng.randrange(200))) for number in range(60)]
    for at, line in ((7, "no json"), (20, ""), (33, "   \t"), (40, plain[3]), (41, "[]"), (59, "{}")):
        plain[at] = line
    ends = [rng.choice(("\n", "\r\n")) for _ in plain]
    data = "".join(line + end for line, end in zip(plain, ends, strict=True)).encode().removesuffix(b"\n")
    whole = index_of(data)
    assert len(whole) == 58
    assert [(whole.number(index), fault.code) for index, fault in whole.faults.items()] == [
        (8, "invalid_json_line"),
        (41, "duplicate_custom_id"),
        (42, "invalid_json_line"),
        (60, "missing_required_parameter"),
    ]
    kept = [line for line in plain if line.strip()]
    for index in range(len(whole)):
        start, end = whole.place(index)
        assert data[start:end].decode().strip() == kept[index].strip()
    for _ in range(30):
        cut = index_of(data, [rng.randrange(len(data)) for _ in range(rng.randrange(1, 40))])
        assert [cut.place(index) for index in range(len(cut))] == [whole.place(index) for index in range(len(whole))]
        assert cut.faults == whole.faults


def test_an_endless_line_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILE_LINE_BYTES_MAX", 1000)
    index = LineIndex(CHAT)
    for _ in range(50):
        index.feed(b"x" * 400)
        assert len(index._begun) <= 1000
    index.feed(b"\n" + to_line(chat_line("a", "b")))
    index.end()
    assert [(fault.line, fault.code) for fault in index.faults.values()] == [(1, "line_too_long")] and len(index) == 2
    assert index.place(0) == (0, 20_000)


def test_too_many_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILE_LINES_MAX", 3)
    assert len(index_of(b"a\n\nb\nc\n\n")) == 3
    with pytest.raises(TooManyLines):
        index_of(b"a\nb\nc\nd")


def test_a_byte_order_mark_is_passed_over() -> None:
    assert not index_of(b"\xef\xbb\xbf" + to_line(chat_line("a", "b"))).faults


GOOD = chat_line("one", "two")


@pytest.mark.parametrize(
    ("line", "code", "param", "custom_id"),
    [
        ("nonsense", "invalid_json_line", None, ""),
        ('{"custom_id": NaN}', "invalid_json_line", None, ""),
        ("[" * 100_000, "invalid_json_line", None, ""),
        ('"text"', "invalid_json_line", None, ""),
        ({"custom_id": None}, "missing_required_parameter", "custom_id", ""),
        ({"custom_id": ""}, "missing_required_parameter", "custom_id", ""),
        ({"custom_id": 5}, "missing_required_parameter", "custom_id", ""),
        ({"custom_id": "x" * 257}, "invalid_value", "custom_id", ""),
        ({"custom_id": "\ud800"}, "invalid_value", "custom_id", ""),
        ({"method": "GET"}, "invalid_value", "method", "one"),
        ({"url": None}, "missing_required_parameter", "url", "one"),
        ({"url": "/v1/embeddings"}, "url_mismatch", "url", "one"),
        ({"url": 7}, "url_mismatch", "url", "one"),
        ({"body": None}, "missing_required_parameter", "body", "one"),
        ({"body": "secret words"}, "missing_required_parameter", "body", "one"),
    ],
)
def test_what_is_wrong_with_a_line(line: str | dict[str, Any], code: str, param: str | None, custom_id: str) -> None:
    data = line if isinstance(line, str) else json.dumps({**GOOD, **line})
    with pytest.raises(LineWrong) as caught:
        read_line(data.encode(), CHAT)
    assert caught.value.at(3) == LineFault(3, code, str(caught.value), param, custom_id)
    assert "secret" not in str(caught.value) and "nonsense" not in str(caught.value)


def test_half_a_surrogate_pair_can_be_written() -> None:
    assert json.loads(to_line({"custom_id": "\ud800"})) == {"custom_id": "\ud800"}
    assert to_line({"é": 1}) == '{"é":1}\n'.encode()

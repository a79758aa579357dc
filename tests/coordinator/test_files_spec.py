"""specs/files.md and the code say the same: codes, purposes, endpoints, states."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from coordinator.batches.file_batch import Status
from coordinator.batches.file_lines import CUSTOM_ID_CHARS_MAX, LineWrong, read_line
from coordinator.batches.file_requests import ENDPOINTS
from coordinator.http.file_routes import PURPOSES
from tests.coordinator.file_desk import CHAT, chat_line

SPECS = Path(__file__).parents[2] / "specs"
PAGE = (SPECS / "files.md").read_text()


def test_purposes_endpoints_and_states() -> None:
    files = PAGE[PAGE.index("**Files.**") : PAGE.index("**Lines.**")]
    named = files[files.index("It has `purpose`") : files.index("`batch_output`")]
    assert re.findall(r"`([a-z-]+(?:_data)?)`", named) == ["purpose", *PURPOSES]
    assert all(f"`{endpoint}`" in PAGE for endpoint in ENDPOINTS)
    batches = PAGE[PAGE.index("**Batches.**") : PAGE.index("A batch fails where")]
    assert set(re.findall(r"`([a-z_]+)`", batches)) == {*Status, "status", "errors"} - {"errors"}
    assert f"1 to {CUSTOM_ID_CHARS_MAX} characters" in PAGE


@pytest.mark.parametrize("changes", [{"custom_id": None}, {"method": "PUT"}, {"url": None}, {"url": "x"}, {"body": None}, None])
def test_codes_of_lines(changes: dict[str, object] | None) -> None:
    data = b"x" if changes is None else json.dumps({**chat_line("a", "b"), **changes}).encode()
    with pytest.raises(LineWrong) as caught:
        read_line(data, CHAT)
    row = re.search(rf"^\| `{caught.value.code}` \|([^|]*)\|", PAGE, re.MULTILINE)
    assert row is not None and (caught.value.param is None or f"`{caught.value.param}`" in row[1])


def test_codes_of_batches() -> None:
    source = (SPECS.parent / "coordinator" / "batches" / "file_batch.py").read_text()
    codes = set(re.findall(r'BatchFault\("(\w+)"', source))
    assert len(codes) >= 6
    table = PAGE[PAGE.index("A batch fails where") : PAGE.index("A batch that is cancelled")]
    assert codes == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) - {"code"}
    assert "`batch_cancelled`" in PAGE and "`batch_expired`" in PAGE

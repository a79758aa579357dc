"""The pages of specs/ and the code say the same: schemas, the state table, codes, limits, links and headers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from protocol import limits, messages
from protocol.envelope import Label
from protocol.hold import HOLD_PROTOCOL
from protocol.stage_messages import STAGE_PROTOCOL
from tests.protocol import make_specs

PAGES = sorted(make_specs.FOLDER.glob("*.md"))
EVERY_PAGE = sorted(make_specs.FOLDER.rglob("*.md"))
PROTOCOL_PAGES = [path for path in PAGES if path.name != "README.md"]
_PARAMETER = re.compile(r"^\| `([A-Z][A-Z0-9_]+)` \| ([^|]+) \|", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(#[^)]*)?\)")


def test_there_is_a_page_for_each_protocol() -> None:
    names = {path.stem for path in PROTOCOL_PAGES}
    assert names >= {"wire", "envelope", "ads", "ads-stream", "job-stream", "tickets", "receipts", "stage-stream", "hold-stream", "shards"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_generated_parts_equal_the_code(path: Path) -> None:
    page = path.read_text()
    assert make_specs.filled_in(page) == page, "run python -m tests.protocol.make_specs and look at what it changed"


def test_the_state_table_stands_on_its_page() -> None:
    page = (make_specs.FOLDER / "job-stream.md").read_text()
    assert make_specs.transitions() in page and make_specs.codes() in page


def test_every_message_has_a_schema_on_some_page() -> None:
    pages = "".join(path.read_text() for path in PAGES)
    shown = {name for names in re.findall(r"<!-- schema: ([\w ]+) -->", pages) for name in names.split()}
    said = {cls.__name__ for registry in make_specs.REGISTRIES for cls in registry.numbers().values()}
    signed = {"Ad", "Lost", "Delegation", "Ticket", "Receipt", "Envelope"}
    assert shown >= said | signed


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_parameters_have_the_values_of_the_code(path: Path) -> None:
    for name, value in _PARAMETER.findall(path.read_text()):
        assert value.strip().replace(",", "").replace(" ", "") == f"{getattr(limits, name):.16g}", name


def test_every_limit_of_the_wire_is_on_some_page() -> None:
    source = (make_specs.FOLDER.parent / "protocol" / "limits.py").read_text()
    wire = source[source.index("# Wire: frames") : source.index("# Chat")]
    named = set(re.findall(r"^([A-Z][A-Z0-9_]+) =", wire, re.MULTILINE))
    shown = {name for path in PAGES for name, _ in _PARAMETER.findall(path.read_text())}
    assert len(named) > 20
    assert named <= shown


@pytest.mark.parametrize("path", PROTOCOL_PAGES, ids=lambda path: path.name)
def test_a_page_has_its_parts(path: Path) -> None:
    page = path.read_text()
    assert re.search(
        r"^\| Lifecycle stage \| Status \| Latest revision \|\n\|[-|]+\|\n\| .+ \| .+ \| r\d+, \d{4}-\d\d-\d\d \|$",
        page,
        re.MULTILINE,
    )
    for heading in ("## Overview", "## Duties", "## Attacks and what stops them", "## Parameters"):
        assert heading in page, heading
    assert "MUST" in page


def test_protocol_ids_and_labels_stand_as_they_are() -> None:
    pages = "".join(path.read_text() for path in PAGES)
    for text in (messages.JOB_PROTOCOL, messages.ADS_PROTOCOL, STAGE_PROTOCOL, HOLD_PROTOCOL, *map(str, Label), "archipelag-envelope/1"):
        assert f"`{text}`" in pages, text


@pytest.mark.parametrize("path", EVERY_PAGE, ids=lambda path: path.relative_to(make_specs.FOLDER).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for target, _ in _LINK.findall(path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_index_names_every_page() -> None:
    index = (make_specs.FOLDER / "README.md").read_text()
    for path in EVERY_PAGE:
        name = path.relative_to(make_specs.FOLDER).as_posix()
        assert name == "README.md" or f"({name})" in index, name


def test_decisions_have_their_three_parts() -> None:
    decisions = sorted((make_specs.FOLDER / "decisions").glob("*.md"))
    assert len(decisions) >= 6
    assert [path.name[:4] for path in decisions] == [f"{n:04}" for n in range(1, len(decisions) + 1)], (
        "numbers have no gaps"
    )
    for path in decisions:
        page = path.read_text()
        for heading in ("## The question", "## What was measured", "## The choice"):
            assert heading in page, (path.name, heading)

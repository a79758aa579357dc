"""specs/http-api.md and the code say the same: routes, a job's fields, events, codes of errors."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path

from coordinator.books.accounts import IslandRecord
from coordinator.books.errors import Why
from coordinator.books.jobs import Job, JobState
from coordinator.books.queries import AccountView, IslandView, KeyRecord
from coordinator.exchange.quotes import QuoteFault
from coordinator.http import account_routes, embeddings, errors, images, job_events, job_routes
from coordinator.http.app import Api
from coordinator.http.line_answers import LineAnswer
from coordinator.job_board import JobEvent, StateChange
from coordinator.jobs import ChoiceResult, Said, Text
from coordinator.keys import GRACE_MAX_S, GRACE_S, REMEMBERED_S, KeyFault
from coordinator.upkeep import BEAT_S, DEAD_S
from protocol import limits
from protocol.cargo_io import DoneLine, ImageLine, ProgressLine, StatusLine, Usage
from protocol.errors import Code
from protocol.generation import FinishReason
from tests.coordinator.desks import opened, url_of

PAGE = (Path(__file__).parents[2] / "specs" / "http-api.md").read_text()
_ROUTE = re.compile(r"^\| `(GET|POST|PUT|DELETE) (/[^`]*)` \|", re.MULTILINE)


async def test_all_routes_stand_on_the_page_and_no_other(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path)) as running:
        application = Api(running.server._services).application()
        served = {
            (route.method, re.sub(r"\{(\w+)[^}]*\}", r"{\1}", route.resource.canonical))
            for route in application.router.routes()
            if route.resource is not None and route.method != "HEAD"
        }
    written = set(_ROUTE.findall(PAGE))
    openai = {(method, path) for method, path in written if path.startswith("/v1/")}
    assert len(openai) == 16
    assert served == written | {(method, f"/api{path}") for method, path in openai}


def test_fields_of_a_job() -> None:
    job = Job("j", "a", "echo", "job", JobState.SUBMITTED, 0, 1, "explicit", "c", 1, 1)
    listed = PAGE[PAGE.index("A job:") : PAGE.index("`state` is `submitted`")]
    assert listed.removeprefix("A job:").replace("```", "").split() == list(job_routes.job_json(job, 0, None))
    assert re.search("`state` is " + r".*?".join(f"`{state}`" for state in JobState), PAGE)


def test_events_of_a_job() -> None:
    example = PAGE[PAGE.index("event: state") : PAGE.index("Words come as they are computed")].removesuffix("```\n\n")
    said: list[JobEvent] = [
        StateChange(JobState.SUBMITTED),
        StateChange(JobState.ASSIGNED),
        StateChange(JobState.RUNNING),
        Text(0, "one two"),
        StateChange(JobState.SUCCEEDED),
    ]
    assert b"".join(map(job_events.sse, said)).decode().strip() == example.strip()
    named = re.findall(r"^\| `(\w+)` \| `(?:state|content)`", PAGE, re.MULTILINE)
    failed = job_events.sse(StateChange(JobState.FAILED, "timeout", "…"))
    assert named == ["state", "chunk", "complete", "error"] and failed.startswith(b"event: error\n")


def test_codes_of_errors() -> None:
    tables = PAGE[PAGE.index("What every route may say") : PAGE.index("### OpenAI's")]
    shown = set(re.findall(r"`(\w+)`", tables))
    refusals = {errors._STATUS[code][2] for code in Code} - {"invalid_value", "draining", "internal_error"}
    asked = {Why.NO_CREDIT, Why.REUSED, Why.RUNNING}  # what a request that runs something may hear of the books
    assert refusals | {why.value for why in asked} | {fault.value for fault in QuoteFault} <= shown
    for code in Code:
        status, _, name, _ = errors._STATUS[code]
        assert re.search(rf"^\| [0-9, ]*{status}[0-9, ]* \| .*`{name}`", tables, re.MULTILINE), (status, name)


def test_fields_of_accounts_keys_and_islands() -> None:
    account = AccountView("ann", *(0 for _ in fields(AccountView)[1:]))
    key = KeyRecord(1, "ak_1234", "", "ann", ("read",), 0, 1, None, None)
    island = IslandView(IslandRecord("12D3KooW"), 0)
    assert _braced("| read | | ") == list(account_routes.account_to_json(account))
    assert _braced("A key: ") == list(account_routes.key_to_json(key, None, 2))
    assert _braced("An Island: ") == list(account_routes.island_to_json(island))
    ended = replace(key, revoked_at_ms=1), replace(key, revoked_at_ms=9)
    states = [record.state(5) for record in (key, ended[1], ended[0])]
    assert "`state` is `{}`, `{}` or `{}`".format(*states) in PAGE and f"at others after {REMEMBERED_S:g} s" in PAGE
    assert all(f"`{fault.value}`" in PAGE for fault in KeyFault)
    assert f"`{{grace_s}}`: {GRACE_S:,.0f} unless given, at most {GRACE_MAX_S / 86_400:.0f} days" in PAGE


def test_limits_of_embeddings_and_pictures() -> None:
    written = dict(re.findall(r"^\| `(\w+)` \| ([0-9,]+) \|", PAGE, re.MULTILINE))
    named = {"TEXTS_MAX": embeddings.TEXTS_MAX, "RESULT_RETENTION_S": int(limits.RESULT_RETENTION_S)}
    for name in ("PROMPT_CHARS_MAX", "IMAGES_MAX", "SIDE_PX_MAX", "STEPS_MAX", "GUIDANCE_MAX"):
        named[name] = int(getattr(images, name))
    assert {name: int(written[name].replace(",", "")) for name in named} == named


def test_events_of_a_stream_of_pictures() -> None:
    image = ImageLine("aGVsbG8=", "png", 2, 3)
    answer = LineAnswer("m", "j", 1)
    result = ChoiceResult(0, FinishReason.STOP, ("i",), ("e",), 0, 0, 0, 0, 0, 0, done=DoneLine(Usage(1, 0)))
    told = images.ImageStream(answer).feed([Said(0, ProgressLine(1, 2)), Said(0, StatusLine("x")), Said(0, image), result]).decode()
    for name, data in re.findall(r"event: (\S+)\ndata: (.*)\n", told):
        (row,) = re.findall(rf"^\| `{re.escape(name)}` \| (.*) \|$", PAGE, re.MULTILINE)
        assert json.loads(data).pop("type") == name and set(re.findall(r"`(\w+)`", row)) | {"type"} == set(json.loads(data))


def _braced(before: str) -> list[str]:
    """The names in the first braces behind these words."""
    found = re.search(re.escape(before) + r"`\{(object, [^}]*)\}`", PAGE)
    assert found is not None, before
    return found[1].split(", ")


def test_when_the_database_counts_as_away() -> None:
    assert f"(every {BEAT_S:g} s)" in PAGE and f"for {DEAD_S:g} s" in PAGE

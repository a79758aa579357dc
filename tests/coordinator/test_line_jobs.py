"""Jobs of Cargos that give lines: submitted, streamed, continued elsewhere, held up by their reader, paid once, refused with a reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from coordinator import openings
from coordinator.books.jobs import JobState
from coordinator.http.job_input import job_order
from coordinator.http.terms import Terms
from coordinator.keys import ACCOUNT_DEFAULT
from privacy.keys import cache_salt
from protocol import limits
from protocol.cargo_jobs import CargoInput
from protocol.errors import Code
from protocol.prices import Ask
from tests.coordinator.clients import http
from tests.coordinator.desks import CREDIT, JOBS, SALT, error_of, funds, opened, row, rows, until, url_of
from tests.coordinator.fake_lines import DONE, ENGINE, FakeLines, LineScript
from tests.coordinator.fakes import FakeIsland, Running, island

ALL = 10_000 * CREDIT
ASK = Ask(per_job=100, per_1k_output=20_000)
TOKENS = tuple(b'{"type":"token","content":"word%d "}\n' % n for n in range(4))
SOME = (b'{"type":"status","message":"working"}\n', b'{"type":"progress","step":1,"total":2}\n', *TOKENS, DONE)
PICTURE = b'{"type":"image","data":"aGVsbG8=","format":"png","width":2,"height":3}\n'
BODY: dict[str, Any] = {"cargo": "counter", "input": {"text": "one"}}
Event = tuple[str, dict[str, Any]]


def counter(number: int, *scripts: LineScript, ask: Ask = ASK) -> FakeIsland:
    """An Island with the Cargo ``counter``, a wasm one."""
    one = island(number, name="counter", runtime="wasm", engine=ENGINE, ask=ask)
    one.lines = FakeLines(list(scripts))
    return one


def twins(*scripts: LineScript) -> tuple[FakeIsland, FakeIsland]:
    """Whichever has the first job follows the first script."""
    first, second = counter(1), counter(2)
    first.lines = second.lines = FakeLines(list(scripts))
    return first, second


async def post(running: Running, **changes: Any) -> httpx.Response:
    async with http(running) as client:
        return await client.post(JOBS, json={**BODY, **changes})


async def submitted(running: Running, **changes: Any) -> dict[str, Any]:
    """The job as it ended, and its output."""
    answer = await post(running, **changes)
    assert answer.status_code == 201, answer.text
    job_id = answer.json()["id"]
    async with http(running) as client:
        with trio.fail_after(10):
            while (job := (await client.get(f"{JOBS}/{job_id}")).json())["state"] not in ("succeeded", "failed", "cancelled"):
                await trio.sleep(0.01)
        return {"job": job, "output": (await client.get(f"{JOBS}/{job_id}/output")).json()["output"]}


def events_of(text: str) -> list[Event]:
    found = []
    for block in text.split("\n\n"):
        if block.startswith("event: "):
            name, _, data = block.partition("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def test_a_job_of_lines_from_its_input_to_its_output(database_url: str) -> None:
    one = counter(1, LineScript((*SOME[:-1], PICTURE, DONE)))
    async with opened(database_url, one) as running:
        ended = await submitted(running)
        assert ended["job"]["state"] == "succeeded" and ended["job"]["cargo"] == "counter"
        output = ended["output"]
        assert output["text"] == "word0 word1 word2 word3 " and output["result"] == {"answer": 42}
        assert output["images"] == [{"data": "aGVsbG8=", "format": "png", "width": 2, "height": 3}]
        assert await funds(running) == (ALL - ASK.price(4, 0), 0)
        assert one.lines is not None
        (asked,) = one.lines.requests
        assert json.loads(asked.data) == {"text": "one"} and len(asked.seed) == 16
        async with http(running) as client:
            told = events_of((await client.get(f"{JOBS}/{ended['job']['id']}/stream")).text)
        assert [name for name, _ in told] == ["status", "progress", *["chunk"] * 4, "image", "output", "complete"]
        assert told[-2][1] == {"type": "output", "result": {"answer": 42}}


async def test_a_streamed_job_tells_its_lines_as_they_come(tmp_path: Path) -> None:
    script = LineScript(SOME, hang_after=3)
    async with opened(url_of(tmp_path), counter(1, script)) as running, http(running) as client:
        async with client.stream("POST", JOBS, json={**BODY, "stream": True}) as answer:
            assert answer.status_code == 200 and answer.headers["x-archipelag-job"]
            lines = answer.aiter_lines()
            seen = [await anext(lines)]
            while "word0" not in seen[-1]:
                seen.append(await anext(lines))
            assert [job.state for job in await rows(running)] == [JobState.SUBMITTED] and (await funds(running))[1] > 0
            script.until.set()
            told = events_of("\n".join([*seen, *[line async for line in lines], ""]))
        assert [name for name, _ in told] == ["state", "state", "status", "progress", *["chunk"] * 4, "output", "complete"]
        (job,) = await rows(running)
        assert (job.state, job.price_micros, job.output) == (JobState.SUCCEEDED, ASK.price(4, 0), b"")


async def test_another_island_gives_the_rest(tmp_path: Path) -> None:
    """The first is lost after two words; the second begins anew, and the Consumer sees each line once."""
    first, second = twins(LineScript(SOME, fail_after=4), LineScript(SOME))
    async with opened(url_of(tmp_path), first, second) as running:
        answer = await post(running, stream=True)
        told = events_of(answer.text)
        assert [fields["content"] for name, fields in told if name == "chunk"] == ["word0 ", "word1 ", "word2 ", "word3 "]
        assert [name for name, _ in told].count("status") == 1 and told[-1][0] == "complete"
        assert first.lines is not None
        assert first.lines.requests == [first.lines.requests[0]] * 2, "with the same input and seed"
        (job,) = await rows(running)
        assert job.price_micros == ASK.price(4, 0), "the Island that was lost is not paid"
        assert running.server.statistics()["takeovers_mid_stream"] == 1


async def test_another_island_that_gives_other_lines_ends_the_job(tmp_path: Path) -> None:
    other = (SOME[0], SOME[1], b'{"type":"token","content":"wordX "}\n', *SOME[3:])
    first, second = twins(LineScript(SOME, fail_after=4), LineScript(other))
    async with opened(url_of(tmp_path), first, second) as running:
        told = events_of((await post(running, stream=True)).text)
        assert told[-1][0] == "error" and told[-1][1]["error"]["code"] == "cargo_failed"
        assert "wordX" not in str(told) and "other lines" in told[-1][1]["error"]["message"]
        assert await funds(running) == (ALL, 0)


@pytest.mark.parametrize(
    ("script", "status", "code", "words"),
    [
        (LineScript((b'{"type":"error","message":"no such column"}\n',)), 422, "cargo_failed", "no such column"),
        (LineScript(SOME, fail_after=0, failure=Code.CARGO_FAILED, fails=2), 422, "cargo_failed", "as the script says"),
        (LineScript(SOME, fail_after=0, failure=Code.BAD_INPUT, fails=2), 400, "invalid_value", "as the script says"),
        (LineScript((b"nonsense\n",)), 500, "internal_error", "broke the protocol"),
        (LineScript((DONE, DONE)), 500, "internal_error", "broke the protocol"),
        (LineScript(SOME[:1]), 500, "internal_error", "broke the protocol"),
        (LineScript((TOKENS[0], DONE), miscount=1), 500, "internal_error", "broke the protocol"),
    ],
)
async def test_what_goes_wrong_before_the_first_word_has_its_status(
    tmp_path: Path, script: LineScript, status: int, code: str, words: str
) -> None:
    async with opened(url_of(tmp_path), counter(1, script)) as running:
        answer = await post(running, stream=True)
        if answer.status_code == 200:  # a line had been told already
            error = events_of(answer.text)[-1][1]["error"]
            assert error["code"] == code and words in error["message"]
        else:
            assert words in error_of(answer, status, code)["message"]
        assert "nonsense" not in answer.text
        assert await funds(running) == (ALL, 0), "nothing is charged"
        failed = await submitted(running)
        assert failed["job"]["state"] == "failed" and await funds(running) == (ALL, 0)


async def test_who_does_not_read_holds_the_cargo_up(tmp_path: Path) -> None:
    """Lines of 16 KiB: what is on its way is bounded by the window of events and the socket's own buffers."""
    line = b'{"type":"image","data":"%b","format":"png","width":2,"height":3}\n' % (b"QUFB" * 4096)
    script = LineScript((*[line] * 4000, DONE))
    async with opened(url_of(tmp_path), counter(1, script)) as running, http(running) as client:
        async with client.stream("POST", JOBS, json={**BODY, "stream": True}) as answer:
            before = -1
            while script.taken != before:
                before = script.taken
                await trio.sleep(0.3)
            assert 0 < script.taken < 2000, "it would have gone on to the end"
            lines = [text async for text in answer.aiter_lines() if text.startswith("event: ")]
        assert lines.count("event: image") == 4000 and lines[-1] == "event: complete"


async def test_who_hangs_up_ends_the_job_and_pays_for_what_he_got(tmp_path: Path) -> None:
    script = LineScript(SOME, hang_after=4)
    async with opened(url_of(tmp_path), one := counter(1, script)) as running:
        async with http(running) as client, client.stream("POST", JOBS, json={**BODY, "stream": True}) as answer:
            lines = answer.aiter_lines()
            while "word1" not in await anext(lines):
                pass
        await until(lambda: one.cancelled == 1)
        await until(lambda: not running.server.desk.live)
        (job,) = await rows(running)
        assert (job.state, job.price_micros) == (JobState.CANCELLED, ASK.price(2, 0))


async def test_a_picture_without_words_is_paid_too(tmp_path: Path) -> None:
    script = LineScript((PICTURE, DONE), hang_after=1)
    async with opened(url_of(tmp_path), counter(1, script)) as running:
        async with http(running) as client, client.stream("POST", JOBS, json={**BODY, "stream": True}) as answer:
            lines = answer.aiter_lines()
            while "aGVsbG8" not in await anext(lines):
                pass
        await until(lambda: not running.server.desk.live)
        assert (await rows(running))[0].price_micros == ASK.per_job


async def test_output_that_is_too_large_to_be_kept_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEPT_LINES_BYTES_MAX", 100)
    async with opened(url_of(tmp_path), counter(1, LineScript(SOME))) as running:
        ended = await submitted(running)
        assert ended["job"]["error"]["code"] == "cargo_failed" and "stream: true" in ended["job"]["error"]["message"]
        assert await funds(running) == (ALL, 0)
        assert events_of((await post(running, stream=True)).text)[-1][0] == "complete", "what is streamed is not kept"


LARGE = {"x": "y" * (limits.JOB_INPUT_JSON_BYTES_MAX + 1)}
BAD_INPUTS: dict[str, Any] = {"none": None, "list": [], "text": "text", "large": LARGE, "half": {"x": "\ud800"}}


@pytest.mark.parametrize("given", BAD_INPUTS.values(), ids=BAD_INPUTS)
async def test_bad_inputs(tmp_path: Path, given: Any) -> None:
    async with opened(url_of(tmp_path), one := counter(1, LineScript())) as running, http(running) as client:
        answer = await client.post(JOBS, content=json.dumps({"cargo": "counter", "input": given}))
        error_of(answer, 400, answer.json()["error"]["code"], "input")
        assert one.lines is not None and not one.lines.requests and await rows(running) == []


async def test_a_stray_job_of_lines_is_run_with_its_own_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who submitted it is told that it could not be; upkeep finds it in the books."""
    monkeypatch.setattr("coordinator.upkeep.BEAT_S", 0.02)
    given = CargoInput(b'{"text":"one"}', b"seed" * 4)
    salt = cache_salt(SALT, ACCOUNT_DEFAULT)
    order = job_order("stray", "counter", given, Terms(), ACCOUNT_DEFAULT, salt, 60.0, 60.0)
    async with opened(url_of(tmp_path), one := counter(1, LineScript(SOME))) as running:
        await running.server.books.do(running.server.desk._opening(order, 100_000, "explicit", None))
        with trio.fail_after(10):
            while not (job := await row(running, "stray")).ended:
                await trio.sleep(0.01)
        assert job.state is JobState.SUCCEEDED and job.price_micros > 0
        assert one.lines is not None and one.lines.requests == [given]


async def test_only_releases_that_are_listed_are_run_under_their_name(tmp_path: Path) -> None:
    """The newest that is offered; never what somebody else offers under the name; and none once all are revoked."""
    old, new, false = (counter(number, LineScript(SOME)) for number in (1, 2, 3))
    old.offers, new.offers, false.offers = (
        (dataclasses.replace(one.offers[0], content_hash=digest),)
        for one, digest in ((old, "aa" * 32), (new, "bb" * 32), (false, "cc" * 32))
    )
    releases: dict[str, tuple[str, ...]] = {"counter": ("dd" * 32, "bb" * 32, "aa" * 32)}
    async with opened(url_of(tmp_path), old, new, false) as running:
        running.server._parts.placer.offered.releases = releases.get
        for _ in range(5):
            assert events_of((await post(running, stream=True)).text)[-1][0] == "complete"
        assert [len(one.lines.requests) for one in (old, new, false) if one.lines] == [0, 5, 0]
        releases["counter"] = ("aa" * 32,)
        assert events_of((await post(running, stream=True)).text)[-1][0] == "complete"
        assert old.lines is not None and len(old.lines.requests) == 1
        releases["counter"] = ()
        error = error_of(await post(running, stream=True), 404, "model_not_found", "model")
        assert "no release" in error["message"]
        assert await funds(running) == (ALL - 6 * ASK.price(4, 0), 0)


async def test_a_streamed_job_whose_only_word_is_its_last_is_one_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openings, "LATEST_S", 60.0)
    async with opened(url_of(tmp_path), counter(1, LineScript((DONE,)), LineScript((DONE,)), LineScript(SOME))) as running:
        await post(running, stream=True)  # so that its balance is known
        joined = running.server.desk.openings.joined
        assert events_of((await post(running, stream=True)).text)[-1][0] == "complete"
        assert running.server.desk.openings.joined == joined + 1
        assert events_of((await post(running, stream=True)).text)[-1][0] == "complete"
        assert running.server.desk.openings.joined == joined + 1, "of this one something was told before its end"
        assert await funds(running) == (ALL - 2 * ASK.price(0, 0) - ASK.price(4, 0), 0)

"""``/v1/images/generations``: by hand and by OpenAI's own client, in one piece, as addresses and as a stream."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trio
from openai.types import ImagesResponse
from openai.types.image_gen_completed_event import ImageGenCompletedEvent

from coordinator.books.jobs import JobState
from coordinator.http import images
from coordinator.http.image_address import ImageAddress, read_name
from protocol import limits
from protocol.errors import Code
from protocol.prices import Ask
from runtimes.diffusers import request as of_diffusers
from tests.coordinator.clients import http, with_openai
from tests.coordinator.desks import CREDIT, OTHER, error_of, funds, opened, rows, until, url_of
from tests.coordinator.fake_lines import ENGINE, FakeLines, LineScript
from tests.coordinator.fakes import FakeIsland, Running, coordinator, island

ALL = 10_000 * CREDIT
ASK = Ask(per_job=900)
MODEL = "painter"
PATH = "/v1/images/generations"
BODY: dict[str, Any] = {"model": MODEL, "prompt": "a red circle"}
FILES = [b"first picture", b"second picture"]
PROGRESS = b'{"type":"progress","step":1,"total":2}\n'
STATUS = b'{"type":"status","message":"the prompt was cut"}\n'
DONE = b'{"type":"done","seed":7,"seeds":[7,8],"steps":2,"guidance":1.5,"secret":true}\n'


def picture(content: bytes, image_format: str = "png") -> bytes:
    fields = {"type": "image", "data": base64.b64encode(content).decode(), "format": image_format, "width": 64, "height": 32}
    return json.dumps(fields).encode() + b"\n"


def script(count: int = 1, done: bytes = DONE, **more: Any) -> LineScript:
    return LineScript((STATUS, *[line for file in FILES[:count] for line in (PROGRESS, picture(file))], done), **more)


def painter(lines: LineScript | None = None, number: int = 1) -> FakeIsland:
    one = island(number, name=MODEL, runtime="diffusers", engine=ENGINE, ask=ASK)
    one.lines = FakeLines([lines or script()])
    return one


async def post(running: Running, headers: dict[str, str] | None = None, path: str = PATH, **changes: Any) -> httpx.Response:
    async with http(running) as client:
        return await client.post(path, json={**BODY, **changes}, headers=headers)


async def fetch(running: Running, url: str) -> httpx.Response:
    """Without a key."""
    async with http(running, "") as client:
        return await client.get(httpx.URL(url).raw_path.decode())


async def test_openais_client_gets_pictures(tmp_path: Path) -> None:
    more = {"negative_prompt": "blue", "steps": 2, "guidance": 1.5, "seed": 7}
    async with coordinator(tmp_path, one := painter(script(2))) as running:
        answer = await with_openai(
            running,
            lambda c: c.images.generate(
                model=MODEL,
                prompt="a red circle",
                n=2,
                size="64x32",
                quality="hd",
                style="vivid",
                output_format="jpeg",
                user="somebody",
                extra_body=more,
            ),
        )
    assert [base64.b64decode(image.b64_json or "") for image in answer.data or []] == FILES
    assert answer.output_format == "png" and answer.size == "64x32", "as the Cargo says"
    assert one.lines is not None
    asked = json.loads(one.lines.requests[0].data)
    assert asked == {"prompt": "a red circle", "n": 2, "size": "64x32", "format": "jpeg", **more}


async def test_an_answer_and_what_the_books_say_of_it(database_url: str) -> None:
    async with opened(database_url, one := painter()) as running:
        answer = await post(running, path="/api/v1/images/generations", size="auto", explain=True)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        ImagesResponse.model_validate(body, strict=True)
        assert body["data"] == [{"b64_json": base64.b64encode(FILES[0]).decode()}] and "usage" not in body
        (job,) = await rows(running)
        assert (job.kind, job.state, job.price_micros) == ("image", JobState.SUCCEEDED, ASK.per_job)
        assert await funds(running) == (ALL - ASK.per_job, 0)
        metadata = body["metadata"]
        assert metadata.pop("placement")["island"] == one.peer
        assert metadata.pop("price") == "0.0009"
        told = {"seeds": [7, 8], "steps": 2, "guidance": 1.5}
        assert metadata == {"job_id": job.id, "cache_hit": False, "cache_strategy": None, **told}
        assert answer.headers["x-archipelag-job"] == job.id and answer.headers["x-archipelag-island"] == one.peer
        assert one.lines is not None and json.loads(one.lines.requests[0].data) == {"prompt": "a red circle", "n": 1, "format": "png"}


async def test_a_cargo_that_counts_has_usage(tmp_path: Path) -> None:
    done = b'{"type":"done","seed":3,"usage":{"prompt_tokens":5,"completion_tokens":2}}\n'
    async with coordinator(tmp_path, painter(script(done=done))) as running:
        body = (await post(running)).json()
    ImagesResponse.model_validate(body, strict=True)
    assert body["usage"]["total_tokens"] == 7 and body["metadata"]["seeds"] == [3]


async def test_an_address_is_good_at_every_coordinator_and_without_a_key(database_url: str) -> None:
    async with opened(database_url, painter(script(2))) as running:
        answer = await post(running, n=2, response_format="url")
        assert answer.status_code == 200, answer.text
        urls = [entry["url"] for entry in answer.json()["data"]]
        assert all(url.startswith(f"{running.url}/v1/images/") and url.endswith(".png") for url in urls)
        async with opened(database_url, key=OTHER, api_key=running.key) as other:
            for one in (running, other):
                for url, content in zip(urls, FILES, strict=True):
                    shown = await fetch(one, url)
                    assert shown.status_code == 200 and shown.content == content
                    assert shown.headers["content-type"] == "image/png" and shown.headers["cache-control"] == "no-store"
                    assert shown.headers["x-content-type-options"] == "nosniff" and "sandbox" in shown.headers["content-security-policy"]
                    assert (await fetch(one, url.replace("/v1/", "/api/v1/"))).content == content
        job = answer.headers["x-archipelag-job"]
        until_ms = (await running.server._parts.board.kept_until(job)) + 1
        signed = urls[0].rsplit("-", 1)[1]
        for name in (
            urls[0].replace(f"{job}-0", f"{job}-1"),
            f"{running.url}/v1/images/{job}-0-{until_ms:x}-{signed}",
            f"{running.url}/v1/images/{job}-0-{until_ms:x}-{'0' * 64}.png",
            f"{running.url}/v1/images/{job}.png",
            f"{running.url}/v1/images/%00.png",
        ):
            error_of(await fetch(running, name), 404, "not_found")
        missing = ImageAddress(job, 2, until_ms).name(bytes(32), "png")
        error_of(await fetch(running, f"{running.url}/v1/images/{missing}"), 404, "not_found")


async def test_an_address_ends_with_what_is_kept(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), painter(), result_retention_s=0.5) as running:
        (entry,) = (await post(running, response_format="url")).json()["data"]
        assert (await fetch(running, entry["url"])).status_code == 200

        async def over() -> bool:
            return (await fetch(running, entry["url"])).status_code == 404

        await until(over)


async def test_a_longer_life_in_the_name_alone_shows_nothing(tmp_path: Path) -> None:
    """Even one that is signed: what is not kept any more is not there."""
    async with opened(url_of(tmp_path), painter(), retry_window_s=0.0) as running:
        job = (await post(running)).headers["x-archipelag-job"]
        name = ImageAddress(job, 0, 2**43).name(bytes(32), "png")
        error_of(await fetch(running, f"/v1/images/{name}"), 404, "not_found")


def test_names_of_addresses() -> None:
    address, secret = ImageAddress("ab" * 12, 3, 1_000_000), bytes(range(32))
    name = address.name(secret, "jpeg")
    assert name.endswith(".jpeg") and address.name(secret, "x-evil/html").endswith(".bin")
    assert read_name(name, secret, 999_999) == address and read_name(name, secret, 1_000_000) is None
    assert read_name(name, bytes(32), 0) is None
    for at in range(len(name) - len(".jpeg")):
        assert read_name(f"{name[:at]}{'1' if name[at] != '1' else '2'}{name[at + 1 :]}", secret, 0) is None, at


async def test_a_request_that_comes_again_has_the_same_address(database_url: str) -> None:
    key = {"Idempotency-Key": "order-1"}
    async with opened(database_url, one := painter()) as running:
        first, second = [await post(running, key, response_format="url") for _ in range(2)]
        assert first.status_code == second.status_code == 200
        assert {**first.json(), "created": 0} == {**second.json(), "created": 0}
        assert second.headers["x-archipelag-replayed"] == "true"
        assert one.lines is not None and len(one.lines.requests) == 1 and await funds(running) == (ALL - ASK.per_job, 0)


async def test_a_proxy_that_is_trusted_says_that_it_does_tls(tmp_path: Path) -> None:
    tls = {"X-Forwarded-Proto": "https", "Host": "pictures.example"}
    async with opened(url_of(tmp_path), painter(), trusted_proxies=("127.0.0.1",)) as running:
        (entry,) = (await post(running, tls, response_format="url")).json()["data"]
        assert entry["url"].startswith("https://pictures.example/v1/images/")
    async with opened(url_of(tmp_path / ".."), painter()) as running:
        (entry,) = (await post(running, tls, response_format="url")).json()["data"]
        assert entry["url"].startswith("http://pictures.example/v1/images/")


async def test_where_nothing_is_kept_nothing_has_an_address(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), painter(), result_retention_s=0.0) as running:
        error_of(await post(running, response_format="url"), 400, "invalid_value", "response_format")
        assert (await post(running)).status_code == 200


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "model"),
    "no prompt": ({"prompt": None}, "prompt"),
    "empty prompt": ({"prompt": ""}, "prompt"),
    "blank prompt": ({"prompt": " \n"}, "prompt"),
    "prompt is a list": ({"prompt": ["a"]}, "prompt"),
    "long prompt": ({"prompt": "x" * (images.PROMPT_CHARS_MAX + 1)}, "prompt"),
    "no pictures": ({"n": 0}, "n"),
    "too many pictures": ({"n": images.IMAGES_MAX + 1}, "n"),
    "half a picture": ({"n": 1.5}, "n"),
    "size in words": ({"size": "large"}, "size"),
    "size is a number": ({"size": 512}, "size"),
    "too large": ({"size": "1024x1025"}, "size"),
    "nothing": ({"size": "0x512"}, "size"),
    "three sides": ({"size": "1x2x3"}, "size"),
    "other digits": ({"size": "٥x٥"}, "size"),
    "unknown response_format": ({"response_format": "png"}, "response_format"),
    "url of a stream": ({"response_format": "url", "stream": True}, "response_format"),
    "unknown output_format": ({"output_format": "svg"}, "output_format"),
    "transparent": ({"background": "transparent"}, "background"),
    "compressed": ({"output_format": "jpeg", "output_compression": 50}, "output_compression"),
    "partial pictures": ({"stream": True, "partial_images": 2}, "partial_images"),
    "stream": ({"stream": "yes"}, "stream"),
    "steps": ({"steps": 0}, "steps"),
    "many steps": ({"steps": images.STEPS_MAX + 1}, "steps"),
    "guidance": ({"guidance": -1}, "guidance"),
    "infinite guidance": ({"guidance": 1e999}, "guidance"),
    "seed": ({"seed": -1}, "seed"),
    "large seed": ({"seed": 2**63}, "seed"),
    "negative prompt": ({"negative_prompt": 3}, "negative_prompt"),
    "bid": ({"bid_price": "much"}, "bid_price"),
}


@pytest.mark.parametrize(("changes", "param"), BAD.values(), ids=BAD)
async def test_bad_requests(tmp_path: Path, changes: dict[str, Any], param: str) -> None:
    async with opened(url_of(tmp_path), one := painter()) as running, http(running) as client:
        body = json.dumps({**BODY, **changes}).replace("Infinity", "1e999")
        answer = await client.post(PATH, content=body)
        error_of(answer, 400, answer.json()["error"]["code"], param)
        assert one.lines is not None and not one.lines.requests and await rows(running) == []


def test_bounds_are_those_of_the_runtime() -> None:
    ours = images.IMAGES_MAX, images.SIDE_PX_MAX, images.STEPS_MAX, images.GUIDANCE_MAX
    assert ours == (of_diffusers.IMAGES_MAX, of_diffusers.SIDE_PX_MAX, of_diffusers.STEPS_MAX, of_diffusers.GUIDANCE_MAX)
    assert set(images.FORMATS) <= set(of_diffusers.FORMATS)
    as_they_are = images.IMAGES_MAX * images.SIDE_PX_MAX**2 * 3 * 4 // 3
    assert as_they_are < limits.KEPT_LINES_BYTES_MAX, "all that may be asked for can be kept"


@pytest.mark.parametrize(
    ("lines", "status", "code", "words"),
    [
        (LineScript((DONE,), fail_after=0, failure=Code.BAD_INPUT, fails=9), 400, "invalid_value", "as the script says"),
        (LineScript((DONE,)), 400, "invalid_value", "makes no pictures"),
        (script(1), 422, "cargo_failed", "made 1 pictures, and 2 were asked for"),
        (LineScript((b'{"type":"error","message":"no paint"}\n',)), 422, "cargo_failed", "no paint"),
    ],
)
async def test_what_gives_no_pictures_costs_nothing(tmp_path: Path, lines: LineScript, status: int, code: str, words: str) -> None:
    async with opened(url_of(tmp_path), painter(lines)) as running:
        assert words in error_of(await post(running, n=2, response_format="url"), status, code)["message"]
        answer = await post(running, n=2, stream=True)
        told = answer.json()["error"] if answer.status_code != 200 else json.loads(answer.text.rpartition("data: ")[2])["error"]
        assert told["code"] == code and words in told["message"]
        assert [job.state for job in await rows(running)] == [JobState.FAILED] * 2 and await funds(running) == (ALL, 0)


async def test_unknown_and_lost(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), one := painter(), island_wait_s=0.01, capacity_wait_s=0.01) as running:
        error_of(await post(running, model="nobody-has-it"), 404, "model_not_found", "model")
        assert (await post(running)).status_code == 200
        running.port.lose(one)
        error_of(await post(running), 503, "no_island")
        error_of(await post(running, stream=True), 503, "no_island")


async def test_a_quote_for_pictures(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), painter()) as running, http(running) as client:
        quote = (await client.post("/api/v1/quotes", json=BODY)).json()
        assert (await post(running, quote=quote["id"])).status_code == 200
        assert (await rows(running))[0].quote_id == quote["id"]


async def test_openais_client_streams_pictures(tmp_path: Path) -> None:
    def work(client: openai.OpenAI) -> list[Any]:
        return list(client.images.generate(model=MODEL, prompt="a red circle", n=2, stream=True))

    async with coordinator(tmp_path, painter(script(2))) as running:
        events = await with_openai(running, work)
    names = [event.type.removeprefix("image_generation.") for event in events]
    assert names == ["status", "progress", "progress", "completed", "completed"]
    first, last = [event for event in events if isinstance(event, ImageGenCompletedEvent)]
    assert [base64.b64decode(event.b64_json) for event in (first, last)] == FILES
    assert (first.size, first.output_format, first.quality, first.background) == ("64x32", "png", "auto", "opaque")
    assert "metadata" not in first.to_dict() and last.to_dict()["metadata"]["seeds"] == [7, 8]  # type: ignore[index]


async def test_a_stream_tells_its_steps_before_there_is_a_picture(tmp_path: Path) -> None:
    lines = script(1, hang_after=2)
    async with opened(url_of(tmp_path), painter(lines)) as running, http(running) as client:
        async with client.stream("POST", PATH, json={**BODY, "stream": True}) as answer:
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            told = answer.aiter_lines()
            while "image_generation.progress" not in await anext(told):
                pass
            lines.until.set()
            rest = [line async for line in told if line.startswith("data: ")]
        assert json.loads(rest[-2].removeprefix("data: "))["type"] == "image_generation.completed" and rest[-1] == "data: [DONE]"
        (job,) = await rows(running)
        assert (job.kind, job.price_micros, answer.headers["x-archipelag-job"]) == ("image", ASK.per_job, job.id)


async def test_who_hangs_up_ends_the_job_and_pays_for_what_there_was(tmp_path: Path) -> None:
    lines = script(2, hang_after=4)
    async with opened(url_of(tmp_path), one := painter(lines)) as running, http(running) as client:
        async with client.stream("POST", PATH, json={**BODY, "n": 2, "stream": True}) as answer:
            told = answer.aiter_lines()
            while "image_generation.progress" not in await anext(told):
                pass
            with trio.fail_after(5):
                while lines.taken < 4:
                    await trio.sleep(0.01)
        await until(lambda: one.cancelled == 1 and not running.server.desk.live)
        (job,) = await rows(running)
        assert (job.state, job.price_micros) == (JobState.CANCELLED, ASK.per_job)

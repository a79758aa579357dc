"""What is no batch: each bad field by its name, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.http import batch_routes
from coordinator.keys import create_key
from protocol import limits
from tests.coordinator.batch_desk import BATCH, begin, inputs, lane, over, post
from tests.coordinator.clients import http
from tests.coordinator.desks import JOBS, error_of, get, opened, url_of

BODY: dict[str, Any] = {"cargo": "echo", "inputs": [{"prompt": "one"}]}
LARGE = {"prompt": "x" * limits.JOB_INPUT_JSON_BYTES_MAX}


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"inputs": inputs(limits.BATCH_INPUTS_MAX + 1)}, 400, "too_many_inputs", "inputs"),
        ({"inputs": []}, 400, "empty_array", "inputs"),
        ({"inputs": None}, 400, "missing_required_parameter", "inputs"),
        ({"inputs": {"prompt": "one"}}, 400, "missing_required_parameter", "inputs"),
        ({"inputs": [{"prompt": "one"}, "two"]}, 400, "missing_required_parameter", "inputs[1]"),
        ({"inputs": [{"prompt": "one"}, None]}, 400, "missing_required_parameter", "inputs[1]"),
        ({"inputs": [{"prompt": "one"}, LARGE]}, 400, "input_too_large", "inputs[1]"),
        ({"inputs": [{"prompt": "one"}, {"messages": []}]}, 400, "empty_array", "inputs[1].messages"),
        ({"inputs": [{"prompt": "one"}, {"prompt": "two", "max_tokens": 0}]}, 400, "invalid_value", "inputs[1].max_tokens"),
        ({"inputs": [{"prompt": "one"}, {"prompt": "two", "n": 2}]}, 400, "invalid_value", "inputs[1]"),
        ({"cargo": None}, 400, "missing_required_parameter", "cargo"),
        ({"cargo": 5}, 400, "missing_required_parameter", "cargo"),
        ({"cargo": "nobody-has-it"}, 404, "model_not_found", "cargo"),
        ({"cargo": "no\nname"}, 404, "model_not_found", "cargo"),
        ({"merge_strategy": "sum"}, 400, "invalid_value", "merge_strategy"),
        ({"merge_strategy": 1}, 400, "invalid_value", "merge_strategy"),
        ({"merge_strategy": ["concat"]}, 400, "invalid_value", "merge_strategy"),
        ({"fail_mode": "slowly"}, 400, "invalid_value", "fail_mode"),
        ({"max_parallelism": 0}, 400, "invalid_value", "max_parallelism"),
        ({"max_parallelism": True}, 400, "invalid_value", "max_parallelism"),
        ({"max_parallelism": 1.5}, 400, "invalid_value", "max_parallelism"),
        ({"max_parallelism": limits.BATCH_INPUTS_MAX + 1}, 400, "invalid_value", "max_parallelism"),
        ({"bid_price": "cheap"}, 400, "invalid_value", "bid_price"),
        ({"priority": 101}, 400, "invalid_value", "priority"),
        ({"policy": "mars"}, 400, "invalid_value", "policy"),
        ({"quote": "qt_1"}, 400, "unsupported_parameter", "quote"),
        ({"stream": True}, 400, "unsupported_parameter", "stream"),
        ({"confidential": True}, 400, "unsupported_parameter", "confidential"),
    ],
)
async def test_each_bad_field_has_its_error(changes: dict[str, Any], status: int, code: str, param: str, tmp_path: Path) -> None:
    one = lane(1)
    async with opened(url_of(tmp_path), one) as running:
        error = error_of(await post(running, {**BODY, **changes}), status, code, param)
        assert "xxxx" not in error["message"], "it does not quote the input"
        assert one.requests == [] and (await get(running, BATCH)).json()["meta"]["total"] == 0


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"inputs": [NaN]}', b"\xff\xfe"])
async def test_what_is_no_json_object(body: bytes, tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), lane(1)) as running:
        answer = await post(running, body)
        assert answer.status_code == 400 and answer.json()["error"]["code"] in ("invalid_json", "invalid_type")


async def test_a_body_of_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the megabyte of other routes it is read; over its own limit it is not, whether its length is said or not."""
    one = lane(1, slots=8)
    async with opened(url_of(tmp_path), one) as running:
        prompt = "word " * 6000  # 30 KB
        batch_id = await begin(running, inputs=[{"prompt": prompt, "max_tokens": 1}] * limits.BATCH_INPUTS_MAX)
        assert (await over(running, batch_id))["child_states"] == {"succeeded": limits.BATCH_INPUTS_MAX}
        too_long = b" " * (limits.BATCH_BODY_BYTES_MAX + 1)
        async with http(running) as client:
            # it answers before all of it has come, and the client may see that only as a connection that ends
            try:
                error_of(await client.post(BATCH, content=too_long), 413, "body_too_large")
            except httpx.TransportError as error:
                assert "write" in type(error).__name__.lower() or "read" in type(error).__name__.lower()
        monkeypatch.setattr(limits, "BATCH_BODY_BYTES_MAX", 2_000_000)

        async def pieces() -> Any:
            for _ in range(40):
                yield b" " * 100_000

        async with http(running) as client:
            try:
                error_of(await client.post(BATCH, content=pieces()), 413, "body_too_large")
            except httpx.TransportError as error:
                assert "write" in type(error).__name__.lower() or "read" in type(error).__name__.lower()
        assert (await get(running, BATCH)).json()["meta"]["total"] == 1


async def test_largest_inputs_there_may_be(tmp_path: Path) -> None:
    """A hundred of 256 KB are 26 MB: they fit."""
    body = json.dumps({"cargo": "echo", "inputs": [{"prompt": "x" * (limits.JOB_INPUT_JSON_BYTES_MAX - 13)}] * limits.BATCH_INPUTS_MAX})
    assert len(body) < limits.BATCH_BODY_BYTES_MAX
    async with opened(url_of(tmp_path), lane(1)) as running:
        answer = await post(running, body.encode())
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "inputs[0].prompt", "they were read, and are no prompts"


async def test_nobody_elses_batch(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), lane(1)) as running:
        batch_id = await begin(running, 2)
        await over(running, batch_id)
        other = create_key(running.database_url, account="ben")
        for path in ("", "/batch-status", "/output", "/stream"):
            error_of(await get(running, f"{JOBS}/{batch_id}{path}", other), 404, "unknown_job")
            error_of(await get(running, f"{JOBS}/batch_unknown{path}"), 404, "unknown_job")
        async with http(running, other) as client:
            error_of(await client.delete(f"{JOBS}/{batch_id}"), 404, "unknown_job")
        assert (await get(running, BATCH, other)).json()["data"] == []
        error_of(await get(running, f"{JOBS}/{batch_id}/batch-status", ""), 401, "invalid_api_key")
        job_id = (await get(running, f"{JOBS}/{batch_id}")).json()["children"][0]["id"]
        error_of(await get(running, f"{JOBS}/{job_id}/batch-status"), 404, "unknown_job")


async def test_a_key_that_may_only_read(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), lane(1)) as running:
        reader = create_key(running.database_url, scopes=("read",))
        answer = await post(running, BODY, key=reader)
        assert answer.status_code == 403


async def test_so_many_batches_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BATCHES_OPEN_MAX", 2)
    async with opened(url_of(tmp_path)) as running:
        running.server._parts.placer.remember_offered(("echo",))  # its Islands are away
        first = await begin(running, 2, {"Idempotency-Key": "first"})
        await begin(running, 2)
        answer = await post(running, BODY)
        error_of(answer, 429, "too_many_batches")
        assert answer.headers["retry-after"]
        assert await begin(running, 2, {"Idempotency-Key": "first"}) == first, "the same one is no further one"
        async with http(running) as client:
            await client.delete(f"{JOBS}/{first}")
        await begin(running, 2)


async def test_bad_parameters_of_the_list(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), lane(1)) as running:
        for query, param in (("limit=0", "limit"), ("limit=101", "limit"), ("offset=-1", "offset"), ("limit=x", "limit")):
            error_of(await get(running, f"{BATCH}?{query}"), 400, "invalid_value", param)


def test_ids_of_batches_and_of_their_jobs() -> None:
    assert batch_routes._is_batch("batch_1") and not batch_routes._is_batch("batch_1.0.0") and not batch_routes._is_batch("1")

"""Files and batches with OpenAI's own client, on a network of fake Islands."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.coordinator.clients import with_openai
from tests.coordinator.desks import opened, url_of
from tests.coordinator.fakes import island
from tests.coordinator.file_desk import chat_line, jsonl


@pytest.mark.parametrize("prefix", ["v1", "api/v1"])
async def test_from_the_file_to_its_answers(tmp_path: Path, prefix: str) -> None:
    data = jsonl(chat_line(f"q-{index}", f"question {index} of mine") for index in range(5))

    def work(client: openai.OpenAI) -> dict[str, Any]:
        sent = client.files.create(file=("questions.jsonl", data), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200})
        assert (sent.object, sent.purpose, sent.bytes, sent.filename) == ("file", "batch", len(data), "questions.jsonl")
        assert sent.status == "processed" and sent.expires_at == sent.created_at + 7200
        assert client.files.retrieve(sent.id) == sent
        assert client.files.content(sent.id).read() == data
        batch = client.batches.create(
            input_file_id=sent.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"for": "a test"},
            output_expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert batch.object == "batch" and batch.metadata == {"for": "a test"} and batch.expires_at == batch.created_at + 86_400
        while batch.status in ("validating", "in_progress", "finalizing"):
            time.sleep(0.01)
            batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed" and batch.errors is None and batch.error_file_id is None
        assert batch.request_counts is not None and batch.request_counts.to_dict() == {"total": 5, "completed": 5, "failed": 0}
        assert batch.usage is not None and (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.total_tokens) == (20, 20, 40)
        stamps = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
        assert list(stamps) == sorted(stamp or 0 for stamp in stamps)
        assert [each.id for each in client.batches.list(limit=10)] == [batch.id]
        assert batch.output_file_id is not None
        output = client.files.retrieve(batch.output_file_id)
        assert output.purpose == "batch_output" and output.expires_at == output.created_at + 3600
        assert {each.id for each in client.files.list()} == {sent.id, output.id}
        assert [each.id for each in client.files.list(purpose="batch_output")] == [output.id]
        text = client.files.content(output.id).text
        assert client.files.delete(sent.id).deleted and [each.id for each in client.files.list()] == [output.id]
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(sent.id)
        with pytest.raises(openai.ConflictError, match="completed already"):
            client.batches.cancel(batch.id)
        return {line["custom_id"]: line for line in map(json.loads, text.splitlines())}

    async with opened(url_of(tmp_path), island()) as running:
        lines = await with_openai(running, work, prefix=prefix)
    assert list(lines) == [f"q-{index}" for index in range(5)]
    for index, line in enumerate(lines.values()):
        assert line["response"]["status_code"] == 200 and line["error"] is None
        body = openai.types.chat.ChatCompletion.construct(**line["response"]["body"])
        assert body.choices[0].message.content == f"question {index} of mine" and body.model == "echo"
        assert line["response"]["request_id"] == line["response"]["body"]["metadata"]["job_id"]

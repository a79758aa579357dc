"""The shapes of ``/v1/chat/completions``: ``chat.completion`` and ``chat.completion.chunk``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.http.answers import Answer, string_to_json, to_json
from coordinator.http.sse import event
from coordinator.jobs import ChoiceResult
from coordinator.logprobs import TokenLogprob


class ChatShape:
    kind = "chat"

    def __init__(self) -> None:
        self._head = self._tail = b""

    def begin(self, answer: Answer) -> None:
        self._head = b'{"id":"%b","object":"chat.completion.chunk","created":%d,"model":%b,"system_fingerprint":%b,' % (
            _id(answer).encode(),
            answer.created_s,
            string_to_json(answer.api.model),
            string_to_json(answer.engine),
        )
        self._tail = b',"usage":null' if answer.api.include_usage else b""

    def opening(self, choice: int) -> bytes:
        return self._chunk(choice, b'{"role":"assistant","content":"","refusal":null}')

    def delta(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        content = b'{"content":%b}' % string_to_json(text)
        return self._chunk(choice, content, to_json(_logprobs(logprobs)) if logprobs else b"null")

    def closing(self, result: ChoiceResult, metadata: bytes) -> bytes:
        extra = b',"metadata":' + metadata if metadata else b""
        return self._chunk(result.choice, b"{}", finish=string_to_json(result.finish_reason), extra=extra)

    def usage(self, usage: bytes, metadata: bytes) -> bytes:
        return event(b'%b"choices":[],"usage":%b,"metadata":%b}' % (self._head, usage, metadata))

    def whole(self, answer: Answer, texts: Sequence[str], logprobs: Sequence[Sequence[TokenLogprob]]) -> bytes:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": _logprobs(logprobs[index]) if answer.api.logprobs else None,
                "finish_reason": answer.results[index].finish_reason,
            }
            for index, text in enumerate(texts)
        ]
        return to_json(
            {
                "id": _id(answer),
                "object": "chat.completion",
                "created": answer.created_s,
                "model": answer.api.model,
                "choices": choices,
                "usage": answer.usage(),
                "system_fingerprint": answer.engine,
                "metadata": answer.metadata(),
            }
        )

    def _chunk(
        self, choice: int, delta: bytes, logprobs: bytes = b"null", finish: bytes = b"null", extra: bytes = b""
    ) -> bytes:
        return event(
            b'%b"choices":[{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]%b%b}'
            % (self._head, choice, delta, logprobs, finish, self._tail, extra)
        )


def _id(answer: Answer) -> str:
    return f"chatcmpl-{answer.job_id}"


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [{**entry.to_json(), "top_logprobs": [top.to_json() for top in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}

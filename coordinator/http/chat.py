"""The shapes of ``/v1/chat/completions``: ``chat.completion`` and ``chat.completion.chunk``.

Of a request with tools the text has calls in it (protocol/tool_calls.py). An answer that ends with some ends with ``tool_calls``. Their ids
follow from the job's, so that an answer that is told again has the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from coordinator.http.answers import Answer, string_to_json, to_json
from coordinator.http.sse import event
from coordinator.jobs import ChoiceResult
from coordinator.logprobs import TokenLogprob
from protocol.generation import FinishReason
from protocol.tool_calls import AnswerReader, CallBegan, Part, Words, read_answer

_CALL_ID_CHARS = 24


class ChatShape:
    kind = "chat"

    def __init__(self) -> None:
        self._head = self._tail = b""
        self._job_id = ""
        self._readers: dict[int, AnswerReader] = {}

    def begin(self, answer: Answer) -> None:
        self._job_id = answer.job_id
        self._readers = {index: AnswerReader() for index, request in enumerate(answer.api.choices) if request.tools}
        self._head = b'{"id":"%b","object":"chat.completion.chunk","created":%d,"model":%b,"system_fingerprint":%b,' % (
            _id(answer).encode(),
            answer.created_s,
            string_to_json(answer.api.model),
            string_to_json(answer.engine),
        )
        self._tail = b',"usage":null' if answer.api.include_usage else b""

    def opening(self, choice: int) -> bytes:
        content = b"null" if choice in self._readers else b'""'  # whether there will be words is not known
        return self._chunk(choice, b'{"role":"assistant","content":%b,"refusal":null}' % content)

    def delta(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        shown = to_json(_logprobs(logprobs)) if logprobs else b"null"
        reader = self._readers.get(choice)
        if reader is None:
            return self._chunk(choice, b'{"content":%b}' % string_to_json(text), shown)
        deltas = [self._part(choice, part) for part in reader.feed(text)] or ([b"{}"] if logprobs else [])
        return b"".join(self._chunk(choice, delta, b"null" if at else shown) for at, delta in enumerate(deltas))

    def _part(self, choice: int, part: Part) -> bytes:
        if isinstance(part, Words):
            return b'{"content":%b}' % string_to_json(part.text)
        if isinstance(part, CallBegan):
            return to_json({"tool_calls": [{"index": part.index, **self._call(choice, part.index, part.name, "")}]})
        return b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (part.index, string_to_json(part.text))

    def _call(self, choice: int, index: int, name: str, arguments: str) -> dict[str, Any]:
        digest = hashlib.sha256(f"{self._job_id}/{choice}/{index}".encode()).hexdigest()
        function = {"name": name, "arguments": arguments}
        return {"id": f"call_{digest[:_CALL_ID_CHARS]}", "type": "function", "function": function}

    def closing(self, result: ChoiceResult, metadata: bytes) -> bytes:
        extra = b',"metadata":' + metadata if metadata else b""
        reader = self._readers.get(result.choice)
        finish = _finish(result, reader is not None and reader.calls > 0)
        return self._chunk(result.choice, b"{}", finish=string_to_json(finish), extra=extra)

    def usage(self, usage: bytes, metadata: bytes) -> bytes:
        return event(b'%b"choices":[],"usage":%b,"metadata":%b}' % (self._head, usage, metadata))

    def whole(self, answer: Answer, texts: Sequence[str], logprobs: Sequence[Sequence[TokenLogprob]]) -> bytes:
        choices = []
        for index, text in enumerate(texts):
            message = self._message(index, text)
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": _logprobs(logprobs[index]) if answer.api.logprobs else None,
                    "finish_reason": _finish(answer.results[index], "tool_calls" in message),
                }
            )
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

    def _message(self, choice: int, text: str) -> dict[str, Any]:
        words, calls = read_answer(text) if choice in self._readers else (text, [])
        message: dict[str, Any] = {"role": "assistant", "content": words or None if calls else words, "refusal": None}
        if calls:
            message["tool_calls"] = [self._call(choice, index, *call) for index, call in enumerate(calls)]
        return message

    def _chunk(
        self, choice: int, delta: bytes, logprobs: bytes = b"null", finish: bytes = b"null", extra: bytes = b""
    ) -> bytes:
        return event(
            b'%b"choices":[{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]%b%b}'
            % (self._head, choice, delta, logprobs, finish, self._tail, extra)
        )


def _id(answer: Answer) -> str:
    return f"chatcmpl-{answer.job_id}"


def _finish(result: ChoiceResult, has_calls: bool) -> str:
    return "tool_calls" if has_calls and result.finish_reason is FinishReason.STOP else result.finish_reason


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [{**entry.to_json(), "top_logprobs": [top.to_json() for top in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}

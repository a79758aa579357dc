"""Calls of tools through the engine: forced ones of a model that knows nothing, and written ones of layers that say what they are told."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from protocol.errors import Code, Refused
from protocol.generation import (
    ChatMessage,
    FinishReason,
    GenerationRequest,
    Role,
    Sampling,
    Tool,
    ToolCall,
    ToolChoice,
    pack_tokens,
)
from protocol.tool_calls import read_answer
from runtimes.base import Chunk, Finished, RunRequest
from runtimes.gguf.cargo import GgufCargo, open_gguf_cargo
from runtimes.gguf.engine import Engine
from runtimes.gguf.kv import KvBook
from runtimes.gguf.layers import Landed, Rows
from runtimes.gguf.llama import Model
from runtimes.gguf.messages import Ended
from runtimes.gguf.prepare import Preparer
from runtimes.gguf.scheduler import TimeModel
from runtimes.gguf.template import ChatTemplate
from runtimes.gguf.tool_syntax import ToolSyntax
from tests.runtimes.gguf import tool_templates as templates
from tests.runtimes.gguf.tiny_models import TINY, Tiny, write_tiny

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
}
WEATHER, NOW = Tool("weather", "The weather in a city.", json.dumps(CITY)), Tool("now")
ASK = (ChatMessage(Role.USER, "Is it warm?"),)
ONE = '{"name": "weather", "arguments": {"city": "Bern"}}'
MODEL = replace(TINY["llama"], context=4096, vocabulary=320)
HASH, LIMIT_BYTES = "5a" * 32, 400_000_000
MARKS = ("[TOOL_CALLS]", "<|python_tag|>")


def tiny(template: str) -> Tiny:
    return replace(MODEL, template=template, controls=MARKS)


def asked(**changes: Any) -> GenerationRequest:
    fields: dict[str, Any] = {"messages": ASK, "tools": (WEATHER, NOW), "max_tokens": 200, "sampling": Sampling(temperature=0.0)}
    return GenerationRequest(**{**fields, **changes})


# A real worker, and a model with random weights


@asynccontextmanager
async def opened(folder: Path, template: str) -> AsyncIterator[GgufCargo]:
    path = write_tiny(folder / "tiny.gguf", tiny(template))
    with trio.fail_after(60):
        async with open_gguf_cargo(name="tiny", path=path, content_hash=HASH, threads=1, slots=4, memory_limit_bytes=LIMIT_BYTES) as it:
            yield it


async def answer(cargo: GgufCargo, request: GenerationRequest) -> tuple[list[tuple[bytes, str]], Finished]:
    """Tokens and text of each chunk, and the end."""
    chunks = []
    async with cargo.run(RunRequest("job", request, b"salt")) as run:
        async for event in run:
            if isinstance(event, Chunk):
                chunks.append((event.tokens, event.text))
            else:
                return chunks, event
    raise AssertionError("no end")


def text_of(chunks: list[tuple[bytes, str]], end: Finished) -> str:
    return "".join(text for _, text in chunks) + end.text


@pytest.mark.parametrize("template", [templates.HERMES, templates.SMOLLM2_LIST, templates.MISTRAL, templates.LLAMA, templates.PLAIN_JSON])
async def test_a_call_that_is_asked_for_is_made(tmp_path: Path, template: str) -> None:
    async with opened(tmp_path, template) as cargo:
        for seed in range(2):
            hot = Sampling(temperature=1.5, seed=seed)
            named = asked(tool_choice=ToolChoice.NAMED, tool="weather", sampling=hot)
            chunks, end = await answer(cargo, named)
            words, ((name, arguments),) = read_answer(text_of(chunks, end))
            values = json.loads(arguments)
            assert words == "" and name == "weather" and list(values) == ["city", "days"]
            assert len(values["city"]) <= 8 and 1 <= values["days"] <= 9
            assert end.reason is FinishReason.STOP and end.completion_tokens < 200
            chunks, end = await answer(cargo, asked(tool_choice=ToolChoice.REQUIRED, sampling=hot))
            words, ((name, arguments),) = read_answer(text_of(chunks, end))
            assert words == "" and name in ("weather", "now") and (name == "weather" or json.loads(arguments) == {})


async def test_a_call_goes_on_behind_any_token(tmp_path: Path) -> None:
    """Another worker is given what was delivered, and the text is continued where it was, within marks, names and arguments."""
    request = asked(tool_choice=ToolChoice.NAMED, tool="weather", sampling=Sampling(temperature=1.0, seed=3))
    async with opened(tmp_path, templates.HERMES) as cargo:
        chunks, end = await answer(cargo, request)
        whole = text_of(chunks, end)
        tokens = b"".join(part for part, _ in chunks)
        by_token = [await answer(cargo, replace(request, resume=tokens[: 4 * cut])) for cut in range(1, len(tokens) // 4 + 1, 4)]
    lengths = [len(text_of(*resumed)) for resumed in by_token]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == len(whole) and len(set(lengths)) > 6
    for resumed, ended in by_token:
        assert whole.endswith(text_of(resumed, ended)) and ended.reason is end.reason
        assert ended.completion_tokens == end.completion_tokens


async def test_what_is_refused(tmp_path: Path) -> None:
    never = Tool("never", parameters='{"type":"object","not":{}}')
    async with opened(tmp_path, templates.HERMES) as cargo:
        with pytest.raises(Refused, match="not in the JSON schema") as caught:
            await answer(cargo, asked(tools=(never,), tool_choice=ToolChoice.REQUIRED))
        assert caught.value.code is Code.BAD_INPUT
        _, end = await answer(cargo, asked(tools=(never,), max_tokens=3))
        assert end.completion_tokens <= 3, "only who has to call it is held to its schema"


async def test_a_model_without_tools(tmp_path: Path) -> None:
    called = ChatMessage(Role.ASSISTANT, "", tool_calls=(ToolCall("1", "now", "{}"),))
    async with opened(tmp_path, "{{ messages[0].content }}") as cargo:
        assert cargo.ready.tools is ToolSyntax.NONE
        for request in (asked(), asked(tool_choice=ToolChoice.REQUIRED), asked(tools=(), messages=(*ASK, called))):
            with pytest.raises(Refused, match="no place") as caught:
                await answer(cargo, request)
            assert caught.value.code is Code.NO_TOOLS
        _, end = await answer(cargo, asked(tools=(), max_tokens=2))
        assert end.completion_tokens <= 2


# The real vocabulary of that model, and layers that say what they are told


@dataclass
class Told:
    """Layers whose answer is known. Implements runtimes.gguf.layers.Layers."""

    vocabulary: int
    prompt_tokens: int
    said: list[int]
    stages: int = 1
    launched: list[tuple[int, Rows]] = field(default_factory=list)

    def begin(self, *_: int) -> None: ...

    def cut(self, sequence: int, length: int = 0) -> None: ...

    def launch(self, step: int, rows: Rows) -> None:
        self.launched.append((step, rows))

    def collect(self) -> Landed | None:
        if not self.launched:
            return None
        step, rows = self.launched.pop()
        logits = np.zeros((int(rows.wanted.sum()), self.vocabulary), np.float32)
        if len(logits):
            logits[-1, self.said[int(rows.positions[-1]) - self.prompt_tokens + 1]] = 9.0
        return Landed(step, logits, 0.01, 0.01)


def tokens_of(model: Model, text: str) -> list[int]:
    """A token for each byte, and the marks that have one of their own."""
    parts = re.split(f"({'|'.join(map(re.escape, MARKS))})", text)
    return [token for part in parts for token in _part(model, part)]


def _part(model: Model, text: str) -> list[int]:
    if text in MARKS:
        return [model.n_vocab - len(MARKS) + MARKS.index(text)]
    return [3 + byte for byte in text.encode()]


@dataclass
class Bench:
    model: Model
    template: str

    def said(self, request: GenerationRequest, words: str) -> tuple[list[str], Ended]:
        """The texts of an answer that is these words, and its end."""
        preparer = Preparer(self.model, ChatTemplate(self.template), 4096)
        job = preparer.job(1, request, b"", "")
        tokens = [*tokens_of(self.model, words), self.model.eos()]
        layers: Any = Told(self.model.n_vocab, job.prompt_tokens, tokens)
        times, book = TimeModel(0.01, 0.0001), KvBook(4096, 2, 4)
        engine = Engine(layers, self.model, self.model.end_tokens(), book, times, batch_rows=512)
        engine.submit(job)
        texts: list[str] = []
        while True:
            events = engine.step()
            texts += [output.text for output in events.outputs]
            if events.over:
                (end,) = events.over
                assert isinstance(end, Ended)
                return texts, end


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = write_tiny(tmp_path_factory.mktemp("tools") / "tiny.gguf", tiny(templates.HERMES))
    model = Model(str(path), vocabulary_only=True)
    yield model
    model.close()


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (templates.HERMES, f"Wait.\n<tool_call>\n{ONE}\n</tool_call>"),
        (templates.MISTRAL, f"Wait.[TOOL_CALLS][{ONE}]"),
        (templates.LLAMA, "<|python_tag|>" + ONE.replace("arguments", "parameters")),
    ],
)
def test_a_call_is_read_as_it_is_written(model: Model, template: str, written: str) -> None:
    """Also where a mark is a control token, which has no text in any other answer."""
    texts, end = Bench(model, template).said(asked(), written)
    words, calls = read_answer("".join(texts) + end.text)
    assert words == ("Wait." if written.startswith("Wait") else "") and calls == [("weather", '{"city": "Bern"}')]
    assert end.reason is FinishReason.STOP and len([text for text in texts if text]) > 10, "in pieces"


def test_marks_have_no_text_where_there_are_no_tools(model: Model) -> None:
    texts, end = Bench(model, templates.MISTRAL).said(asked(tools=()), "a[TOOL_CALLS]b")
    assert "".join(texts) + end.text == "ab"


def test_one_call_ends_the_answer_where_more_are_not_wanted(model: Model) -> None:
    twice = f"<tool_call>{ONE}</tool_call><tool_call>{ONE}</tool_call>"
    bench = Bench(model, templates.HERMES)
    texts, end = bench.said(asked(parallel_calls=False), twice)
    assert len(read_answer("".join(texts) + end.text)[1]) == 1 and end.reason is FinishReason.STOP
    assert end.completion_tokens < len(tokens_of(model, twice))
    texts, end = bench.said(asked(), twice)
    assert len(read_answer("".join(texts) + end.text)[1]) == 2


def test_a_resumed_answer_that_had_its_one_call_is_over(model: Model) -> None:
    preparer = Preparer(model, ChatTemplate(templates.HERMES), 4096)
    tokens = tokens_of(model, f"<tool_call>{ONE}")
    job = preparer.job(1, asked(parallel_calls=False, resume=pack_tokens(tokens)), b"", "")
    done = preparer.finished(job)
    assert done is not None and done.reason is FinishReason.STOP and done.text == ""
    assert preparer.finished(preparer.job(1, asked(resume=pack_tokens(tokens)), b"", "")) is None


def test_stop_strings_are_looked_for_in_what_the_model_writes(model: Model) -> None:
    texts, end = Bench(model, templates.HERMES).said(asked(stop=('"Be',)), f"<tool_call>{ONE}</tool_call>")
    assert read_answer("".join(texts) + end.text) == ("", [("weather", '{"city": ')]) and end.reason is FinishReason.STOP

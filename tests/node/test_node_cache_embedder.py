"""The embedding worker beside a Coordinator: with the real model in its sandbox, and with a worker that the test plays."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import trio.testing

from node.answer_embedder import (
    ANSWER_S,
    ON,
    TEXTS_PER_CALL_MAX,
    TEXTS_WAITING_MAX,
    AnswerEmbedder,
    NoVectors,
    check_model,
    vectors_in,
)
from protocol.cargo_io import DoneLine, decode_input
from protocol.errors import Code, ConfigError, Refused, RemoteProtocolError
from runtimes.base import LineCargo, LineRequest
from runtimes.lines.cargo import LineWorkers
from runtimes.lines.engine import LoadOrder
from runtimes.onnx.engine import load
from runtimes.store import ModelStore
from runtimes.store.errors import FetchError
from tests.runtimes.onnx.onnx_models import run as run_engine

if TYPE_CHECKING:
    from coordinator.cache.service import Embedding

PATIENCE_S = 60.0
SECRET = "my card has the number 4929"


async def wait_state(embedder: AnswerEmbedder, is_good: Callable[[str], bool]) -> str:
    with trio.fail_after(PATIENCE_S):
        while not is_good(embedder.state):
            await trio.sleep(0.01)
    return embedder.state


@asynccontextmanager
async def running(embedder: AnswerEmbedder) -> AsyncIterator[AnswerEmbedder]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(embedder.run)
        yield embedder
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def real() -> AsyncIterator[AnswerEmbedder]:
    async with running(AnswerEmbedder()) as embedder:
        await wait_state(embedder, lambda state: state == ON)
        yield embedder


def likeness(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


# -- the real model


async def test_vectors_are_those_of_the_engine_and_say_what_is_alike() -> None:
    texts = ["a cat sits on the mat", "a kitten is on the rug", "the stock market fell"]
    store = ModelStore()
    names = {"model.onnx": "minilm-l6-v2", "tokenizer.json": "minilm-l6-v2-tokenizer"}
    files = {path: str(Path(store.fetch(name).path)) for path, name in names.items()}
    engine = load(LoadOrder("minilm-l6-v2", "ab" * 32, "model.onnx", files, {"task": "embeddings", "max_tokens": 256}, 1))
    async with real() as embedder:
        vectors = await embedder.embed(texts)
        packed = [base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() for vector in vectors]
        assert packed == run_engine(engine, input=texts, encoding_format="base64")["embeddings"]
        cat, kitten, market = vectors
        assert likeness(cat, cat) == pytest.approx(1.0) and likeness(cat, kitten) > likeness(cat, market) + 0.2


async def test_what_comes_together_goes_into_one_call_and_each_gets_its_own() -> None:
    """And a text that UTF-8 cannot say, or that is very long, is one like others."""
    many = [f"number {n}" for n in range(TEXTS_PER_CALL_MAX + 5)]
    odd = ["\ud800 is half a character", "long " * 10_000]
    async with real() as embedder:
        alone = {text: (await embedder.embed([text]))[0] for text in ("one", "two words")}
        found: dict[str, list[float]] = {}

        async def ask(text: str) -> None:
            (found[text],) = await embedder.embed([text])

        before = embedder.statistics()["calls"]
        async with trio.open_nursery() as nursery:
            for text in [*alone, *many[:30], *odd]:
                nursery.start_soon(ask, text)
        assert embedder.statistics()["calls"] == cast(int, before) + 1
        for text, vector in alone.items():
            assert likeness(found[text], vector) == pytest.approx(1.0, abs=1e-5), "padding changes nothing that counts"
        vectors = await embedder.embed(many)
        assert embedder.statistics()["calls"] == cast(int, before) + 3, "more than a call holds goes into two"
        again = [likeness(found[text], vector) for text, vector in zip(many[:30], vectors[:30], strict=True)]
        assert again == pytest.approx([1.0] * 30, abs=1e-5)


async def test_a_worker_that_dies_is_started_again() -> None:
    async with real() as embedder:
        (before,) = await embedder.embed(["the same text"])
        workers = embedder._cargo
        assert isinstance(workers, LineWorkers)
        (pid,) = workers.worker_pids
        os.kill(pid, signal.SIGKILL)
        assert "started again" in await wait_state(embedder, lambda state: state != ON)
        with pytest.raises(NoVectors, match="started again"):
            await embedder.embed(["the same text"])
        await wait_state(embedder, lambda state: state == ON)
        assert await embedder.embed(["the same text"]) == [before] and workers.worker_pids != (pid,)


# -- no model


async def test_what_is_not_installed_is_said_and_nothing_is_fetched() -> None:
    def no_store() -> ModelStore:
        raise AssertionError("nothing is to be fetched")

    embedder = AnswerEmbedder(store=no_store, has_module=lambda name: name != "onnxruntime")
    await embedder.run()
    assert embedder.state == "onnxruntime is not installed: pip install archipelag[onnx]"
    with pytest.raises(NoVectors, match="not installed"):
        await embedder.embed(["x"])


class FailingStore(ModelStore):
    """Has nothing and reaches nobody, the first ``failures`` times that it is made."""

    made = 0

    def __init__(self, failures: int) -> None:
        super().__init__()
        type(self).made += 1
        self._fails = type(self).made <= failures

    def fetch(self, *arguments: Any, **more: Any) -> Any:
        if self._fails:
            raise FetchError("https://secret.example/model cannot be reached from /home/ann")
        return super().fetch(*arguments, **more)


async def test_a_model_that_cannot_be_fetched_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What anybody may read of it has no addresses and no paths."""
    monkeypatch.setattr(FailingStore, "made", 0)
    embedder = AnswerEmbedder(store=lambda: FailingStore(10**6), retry_min_s=PATIENCE_S)
    assert embedder.state == "the model is being fetched"
    async with running(embedder):
        state = await wait_state(embedder, lambda state: "is being" not in state)
        assert state == "the model cannot be fetched; that is tried again within 60 s"
        with pytest.raises(NoVectors, match="cannot be fetched"):
            await embedder.embed(["x"])
    monkeypatch.setattr(FailingStore, "made", 0)
    async with running(AnswerEmbedder(store=lambda: FailingStore(2), retry_min_s=0.01)) as embedder:
        await wait_state(embedder, lambda state: state == ON)
        assert FailingStore.made == 3 and len((await embedder.embed(["x"]))[0]) == 384


@pytest.mark.parametrize("name", ["uuid", "open-nsfw", "no-such", "off", "", "../x"])
def test_a_cargo_that_makes_no_vectors(name: str) -> None:
    with pytest.raises(ConfigError, match="those are minilm-l6-v2"):
        check_model(name)
    with pytest.raises(ConfigError):
        AnswerEmbedder(name)


# -- a worker that the test plays


class PlayedCargo:
    """Answers with each text's length as its vector, once ``go`` is set; or with ``result``, or ``error``."""

    def __init__(self) -> None:
        self.alive = True
        self.asked: list[int] = []  # texts of each call
        self.go = trio.Event()
        self.result = ""
        self.error: Exception | None = None

    @asynccontextmanager
    async def run_lines(self, request: LineRequest) -> AsyncIterator[AsyncIterator[DoneLine]]:
        texts = decode_input(request.input)["input"]
        assert isinstance(texts, list)
        self.asked.append(len(texts))
        yield self._lines(texts)

    async def _lines(self, texts: list[str]) -> AsyncIterator[DoneLine]:
        await self.go.wait()
        if self.error is not None:
            raise self.error
        rows = [base64.b64encode(struct.pack("<2f", len(text), 1.0)).decode() for text in texts]
        yield DoneLine(None, None, self.result or json.dumps({"embeddings": rows}))


@asynccontextmanager
async def played() -> AsyncIterator[tuple[AnswerEmbedder, PlayedCargo]]:
    embedder, cargo = AnswerEmbedder(), PlayedCargo()
    embedder._cargo = cast(LineCargo, cargo)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(embedder._serve, cast(LineCargo, cargo))
        yield embedder, cargo
        nursery.cancel_scope.cancel()


async def test_what_comes_during_a_call_waits_for_the_next(autojump_clock: trio.testing.MockClock) -> None:
    found: dict[int, list[list[float]]] = {}
    async with played() as (embedder, cargo):

        async def ask(count: int) -> None:
            found[count] = await embedder.embed(["x" * count] * count)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 1)
            await trio.testing.wait_all_tasks_blocked()
            for count in (40, 20, 30):
                nursery.start_soon(ask, count)
                await trio.testing.wait_all_tasks_blocked()
            assert cargo.asked == [1]
            cargo.go.set()
        assert cargo.asked == [1, 60, 30], "whole requests, in their order, at most 64 texts"
        assert found == {count: [[count, 1.0]] * count for count in (1, 40, 20, 30)}


async def test_who_is_gone_is_not_asked_for(autojump_clock: trio.testing.MockClock) -> None:
    async with played() as (embedder, cargo):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(embedder.embed, ["first"])
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(1):
                await embedder.embed(["impatient"] * 7)
            cargo.go.set()
        await embedder.embed(["last"])
        assert cargo.asked == [1, 1]


async def test_no_one_waits_without_end(autojump_clock: trio.testing.MockClock) -> None:
    async with played() as (embedder, cargo):
        began_s = trio.current_time()
        with pytest.raises(NoVectors):
            await embedder.embed(["x"])
        assert trio.current_time() - began_s <= ANSWER_S
        cargo.go.set()
        assert await embedder.embed(["x"]) == [[1.0, 1.0]], "the next call is a new one"


async def test_not_too_many_wait(autojump_clock: trio.testing.MockClock) -> None:
    async with played() as (embedder, cargo), trio.open_nursery() as nursery:
        nursery.start_soon(embedder.embed, ["x"])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(embedder.embed, ["x"] * TEXTS_WAITING_MAX)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(NoVectors, match="wait for vectors already"):
            await embedder.embed(["x"])
        cargo.go.set()


@pytest.mark.parametrize(
    ("result", "error"),
    [("{}", None), ("", Refused(Code.WORKER_DIED, SECRET)), ("", RemoteProtocolError(SECRET)), ("", Refused(Code.BAD_INPUT, SECRET))],
)
async def test_a_call_that_fails_fails_alone_and_tells_no_text(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, result: str, error: Exception | None
) -> None:
    caplog.set_level(logging.DEBUG)
    async with played() as (embedder, cargo):
        cargo.go.set()
        cargo.result, cargo.error = result, error
        with pytest.raises(NoVectors) as caught:
            await embedder.embed([SECRET])
        assert caplog.text and SECRET not in caplog.text + str(caught.value) + embedder.state + repr(embedder)
        cargo.result, cargo.error = "", None
        assert await embedder.embed(["x"]) == [[1.0, 1.0]]


async def test_what_waits_when_the_worker_dies_is_told(autojump_clock: trio.testing.MockClock) -> None:
    async with played() as (embedder, cargo):

        async def ask() -> None:
            with pytest.raises(NoVectors, match="started again"):
                await embedder.embed(["second"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(embedder.embed, ["first"])
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            cargo.alive = False
            cargo.go.set()
        assert cargo.asked == [1]


@pytest.mark.parametrize("texts", [[""], ["  \n"], ["fine", ""]])
async def test_an_empty_text_has_no_vector(texts: list[str]) -> None:
    async with played() as (embedder, cargo):
        with pytest.raises(NoVectors, match="empty"):
            await embedder.embed(texts)
        assert cargo.asked == []


@pytest.mark.parametrize(
    "rows",
    [None, 5, [], ["AAAAAA=="], ["AAAA"], [""], ["AAAAAA==", "AAAAAAAAAAA="], ["AACAPw==", 5], ["AACAPw==", "not base64!"]],
)
def test_answers_that_hold_no_vectors(rows: object) -> None:
    assert vectors_in(json.dumps({"embeddings": ["AACAPw==", "AAAAAA=="]}), 2) == [[1.0], [0.0]]
    with pytest.raises(RemoteProtocolError):
        vectors_in(json.dumps({"embeddings": rows}), 2)
    with pytest.raises(RemoteProtocolError):
        vectors_in(str(rows), 2)


def test_it_is_what_the_cache_asks() -> None:
    """mypy reads this."""
    asked: Embedding = AnswerEmbedder()
    assert asked.state != ON

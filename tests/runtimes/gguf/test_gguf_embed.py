"""Embeddings: what llama.cpp's own interface gives, from a chat model and from a model for embeddings, beside chats and within memory."""

from __future__ import annotations

import base64
import json
import os
import signal
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from protocol.cargo_io import DoneLine
from protocol.errors import Code, ConfigError, Refused
from protocol.generation import ChatMessage, GenerationRequest, Role, Sampling
from runtimes.base import LineRequest, RunRequest
from runtimes.gguf import budget
from runtimes.gguf.cargo import GgufCargo, open_gguf_cargo
from runtimes.gguf.embed import Embedder
from runtimes.gguf.embed_input import Vector, normalized, read_input, written
from runtimes.gguf.embed_model import DecoderVectors, Pooling, Text, piece, pooling_of
from runtimes.gguf.engine import Engine
from runtimes.gguf.llama import ContextSize, LlamaError, Model
from runtimes.gguf.load import load
from runtimes.gguf.messages import Embed, Embedded, Load, Rejected
from tests.runtimes.gguf.tiny_models import TINY, WIDTH, TinyEncoder, write_tiny, write_tiny_encoder

HASH = "5a" * 32
LIMIT_BYTES = 800_000_000
CLOSE = 1e-4  # to what llama.cpp gives, in each number of a vector of length 1
TEXTS = [
    "An island in the sea.",
    "The capital of France is Paris.",
    "x",
    "Ships and lighthouses, " * 14,  # more tokens than one call computes
    "Grüße, 世界 🏝",
]


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[GgufCargo]:
    given: dict[str, Any] = {"name": "model", "content_hash": HASH, "memory_limit_bytes": LIMIT_BYTES, "threads": 1, "slots": 4}
    with trio.fail_after(60):
        async with open_gguf_cargo(path=path, **(given | options)) as cargo:
            yield cargo


async def embed(cargo: GgufCargo, given: Any, **more: Any) -> tuple[dict[str, Any], int]:
    """The result and the count of prompt tokens."""
    data = json.dumps({"input": given, **more}).encode()
    async with cargo.run_lines(LineRequest("job", data, bytes(16))) as run:
        lines = [line async for line in run]
    (done,) = lines
    assert isinstance(done, DoneLine) and done.usage is not None and done.usage.completion_tokens == 0
    return json.loads(done.result), done.usage.prompt_tokens


def by_llama_cpp(path: Path, texts: Sequence[str], pooling: int, context: int = 512) -> tuple[Vector, int]:
    """Vectors of length 1, and the count of tokens, by llama-cpp-python's own interface: of each text alone, since its vectors of the real
    model's long texts move by 8e-4 with what stands beside them in a call."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(path), embedding=True, pooling_type=pooling, n_ctx=context, n_batch=context, n_ubatch=context, n_threads=1, verbose=False
    )
    found = [model.embed(text, normalize=True, return_count=True) for text in texts]
    model.close()
    return np.asarray([vector for vector, _ in found], np.float32), sum(tokens for _, tokens in found)


# The real model, and the smallest ones


async def test_the_real_model_gives_what_llama_cpp_gives(smollm2_path: Path) -> None:
    expected, tokens = by_llama_cpp(smollm2_path, TEXTS, Pooling.MEAN)
    async with opened(smollm2_path) as cargo:
        result, counted = await embed(cargo, TEXTS)
        alone, _ = await embed(cargo, TEXTS[0])
    assert np.abs(np.asarray(result["embeddings"], np.float32) - expected).max() < CLOSE
    assert (result["dimensions"], result["task"], counted) == (576, "embeddings", tokens)
    assert alone["embedding"] == alone["embeddings"][0] and np.abs(np.asarray(alone["embedding"]) - expected[0]).max() < CLOSE


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.CLS, Pooling.LAST])
async def test_a_chat_model_pools_as_its_file_says(tmp_path: Path, pooling: Pooling) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", replace(TINY["qwen3"], more=(("qwen3.pooling_type", int(pooling)),)))
    expected, _ = by_llama_cpp(path, TEXTS[:3], -1)
    async with opened(path) as cargo:
        result, _ = await embed(cargo, TEXTS[:3])
    assert np.abs(np.asarray(result["embeddings"], np.float32) - expected).max() < CLOSE


@pytest.mark.parametrize(("said", "pooling"), [(Pooling.MEAN, -1), (Pooling.CLS, -1), (-1, Pooling.MEAN)])
async def test_a_model_for_embeddings(tmp_path: Path, said: int, pooling: int) -> None:
    path = write_tiny_encoder(tmp_path / "bert.gguf", TinyEncoder(pooling=int(said)))
    texts = ["an island", "the sea and the sky", "x", "ab cd " * 30]
    expected, tokens = by_llama_cpp(path, texts, pooling, context=256)
    async with opened(path) as cargo:
        assert cargo.ready.embedding_tokens == 256 and cargo.facts().kv_tokens_total == 256
        result, counted = await embed(cargo, texts)
        raw, _ = await embed(cargo, texts, encoding_format="base64")
        with pytest.raises(Refused, match="at most 256") as caught:
            await embed(cargo, "ab cd " * 100)
        assert caught.value.code is Code.CONTEXT_LENGTH
        with pytest.raises(Refused, match="writes no text") as caught:
            async with cargo.run(RunRequest("job", GenerationRequest(prompt="x"), b"")):
                raise AssertionError
        assert caught.value.code is Code.BAD_INPUT
    assert np.abs(np.asarray(result["embeddings"], np.float32) - expected).max() < CLOSE and counted == tokens
    decoded = np.stack([np.frombuffer(base64.b64decode(each), "<f4") for each in raw["embeddings"]])
    assert np.array_equal(decoded, np.asarray(result["embeddings"], np.float32)), "nine digits name a float exactly"


async def test_a_reranker_is_not_loaded(tmp_path: Path) -> None:
    path = write_tiny_encoder(tmp_path / "rank.gguf", TinyEncoder(pooling=int(Pooling.RANK)))
    with pytest.raises(ConfigError, match="has no vectors"):
        async with opened(path):
            raise AssertionError


async def test_chats_go_on_beside_embeddings(smollm2_path: Path) -> None:
    """Many texts do not hold a chat up until they are done, nor does it keep them waiting; each is as it is alone."""
    chat = GenerationRequest(messages=(ChatMessage(Role.USER, "Name birds."),), max_tokens=12, sampling=Sampling(temperature=0.0))
    ended: list[str] = []
    async with opened(smollm2_path) as cargo:

        async def talk(name: str, answers: list[str]) -> None:
            async with cargo.run(RunRequest(name, chat, b"")) as run:
                answers.append("".join([event.text async for event in run]))
            ended.append(name)

        async def vectors(name: str, texts: list[str], results: list[Any]) -> None:
            results.append((await embed(cargo, texts))[0]["embeddings"])
            ended.append(name)

        alone: list[str] = []
        small: list[Any] = []
        await talk("alone", alone)
        await vectors("small alone", TEXTS[:2], small)
        large: list[Any] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vectors, "large", [TEXTS[3]] * 4, large)
            nursery.start_soon(talk, "chat", alone)
            nursery.start_soon(vectors, "small", TEXTS[:2], small)
    assert alone[0] == alone[1] and small[0] == small[1]
    assert ended.index("small") < ended.index("large") and ended.index("chat") < ended.index("large")
    assert len(large[0]) == 4 and all(vector == large[0][0] for vector in large[0])


async def test_who_leaves_frees_the_room(smollm2_path: Path) -> None:
    async with opened(smollm2_path) as cargo:
        data = json.dumps({"input": [TEXTS[3]] * 400}).encode()
        async with cargo.run_lines(LineRequest("long", data, bytes(16))):
            await trio.sleep(0.2)
        with trio.fail_after(10):
            result, _ = await embed(cargo, TEXTS[:2])
        assert len(result["embeddings"]) == 2


async def test_a_worker_that_dies(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", TINY["llama"])
    async with opened(path) as cargo:
        data = json.dumps({"input": ["word " * 80] * 2000, "encoding_format": "base64"}).encode()
        with pytest.raises(Refused, match="worker ended") as caught:
            async with cargo.run_lines(LineRequest("job", data, bytes(16))) as run:
                os.kill(cargo.worker_pid, signal.SIGKILL)
                [line async for line in run]
        assert caught.value.code is Code.WORKER_DIED


async def test_too_little_memory(smollm2_path: Path) -> None:
    async with opened(smollm2_path, memory_limit_bytes=450_000_000) as cargo:
        assert not cargo.ready.embedding_tokens
        with pytest.raises(Refused, match="too little memory") as caught:
            await embed(cargo, "x")
        assert caught.value.code is Code.UNKNOWN_CARGO and caught.value.retryable


def test_the_second_context_takes_what_was_set_aside_for_it(tmp_path: Path) -> None:
    """Weights, buffers, cells, prefixes and embeddings together stay within the limit."""
    path = write_tiny(tmp_path / "tiny.gguf", replace(TINY["llama"], vocabulary=30_000, context=4096))
    loaded = load(Load("tiny", str(path), HASH, 400_000_000, 1, 0, 0, 4, plain=True), lambda _: None)
    embedder, ready = loaded.embedder, loaded.ready
    assert embedder is not None and isinstance(loaded.engine, Engine)
    made = embedder._make()
    assert isinstance(made, DecoderVectors) and made.tokens_max == ready.embedding_tokens == budget.EMBEDDING_CELLS_MAX
    second_bytes = made.context.kv_bytes + made.context.compute_bytes
    cells_bytes = ready.kv_tokens * ready.kv_bytes_per_token
    shelf_bytes = loaded.engine.shelf.bytes_max
    assert second_bytes > 2048 * ready.kv_bytes_per_token and shelf_bytes > 0
    assert ready.weights_bytes + ready.compute_bytes + budget.PROCESS_BYTES + cells_bytes + shelf_bytes + second_bytes <= 400_000_000
    for it in (made, loaded.stage, loaded.model):
        it.close()


# What is decided without a model


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (b"[]", "not a JSON object"),
        (b"{}", "must be a text"),
        (b'{"input": []}', "0 texts"),
        (b'{"input": [1, 2]}', "must be a text"),
        (b'{"input": ["x", " "]}', "nothing in it"),
        (b'{"input": "\\ud800"}', "surrogate"),
        (json.dumps({"input": ["x"] * 2049}).encode(), "2049 texts"),
        (b'{"input": "x", "encoding_format": "hex"}', "float or base64"),
        (b'{"input": "x", "encoding_format": ["float"]}', "float or base64"),
        (b'{"input": "x", "text": "y"}', "say the same"),
        (b'{"input": "x", "dimensions": 7}', "are 8"),
        (b'{"input": "x", "inputs": "y"}', "'inputs' is not known"),
    ],
)
def test_bad_input(given: bytes, match: str) -> None:
    with pytest.raises(Refused, match=match) as caught:
        read_input(given, 8)
    assert caught.value.code is Code.BAD_INPUT


def test_good_input() -> None:
    one = read_input(b'{"text": "x", "model": "m", "user": "u", "dimensions": 8, "encoding_format": null}', 8)
    assert one.texts == ("x",) and one.is_one and not one.is_base64
    assert read_input(b'{"input": ["x", "y"], "encoding_format": "base64"}', 8).is_base64


def test_more_than_an_answer_holds() -> None:
    many = {"input": ["x"] * 1000}
    with pytest.raises(Refused, match="ask for encoding_format base64"):
        read_input(json.dumps(many).encode(), 1024)
    assert len(read_input(json.dumps(many | {"encoding_format": "base64"}).encode(), 1024).texts) == 1000
    worst = np.full(1024, -1.23456789e-05, np.float32)
    assert len(written(worst, False)) <= 16 * 1024 + 1 and len(written(worst, True)) <= 5.4 * 1024


def test_a_vector_is_written_exactly() -> None:
    chance = np.random.default_rng(2)
    vector = normalized(chance.standard_normal(64).astype(np.float32))
    assert np.array_equal(np.asarray(json.loads(written(vector, False)), np.float32), vector)
    assert struct.unpack("<64f", base64.b64decode(json.loads(written(vector, True)))) == tuple(vector)
    assert np.array_equal(normalized(np.zeros(3, np.float32)), np.zeros(3)) and abs(np.linalg.norm(vector) - 1) < 1e-6


@pytest.mark.parametrize(
    ("room_bytes", "expected"),
    [(0, 0), (2 * 256_000 + 1999, 0), (2 * (1000 + 256 * 1000), 256), (2 * (1000 + 1000 * 1000), 768), (2**40, 2048)],
)
def test_embedding_cells(room_bytes: int, expected: int) -> None:
    assert budget.embedding_cells(room_bytes, 1000, 1000, 8192) == expected
    assert budget.embedding_cells(room_bytes, 1000, 1000, 300) == min(expected, 256)


@pytest.mark.parametrize(("left", "rows", "count"), [(86, 60, 60), (61, 60, 59), (9, 8, 7), (1, 8, 1), (8, 8, 8), (3, 2, 2)])
def test_no_row_is_left_alone(left: int, rows: int, count: int) -> None:
    assert piece(left, rows) == count


# Turns and faults, with the vocabulary of a tiny model


class Slow:
    """Vectors that say what was asked of them. Implements runtimes.gguf.embed_model.Vectors."""

    dimensions, tokens_max, texts_max = 4, 40, 8

    def __init__(self, fails_at: int = 10**9, value: float = 1.0) -> None:
        self.calls: list[int] = []
        self.forgotten = 0
        self._fails_at, self._value = fails_at, value

    def compute(self, texts: Sequence[Text], rows: int) -> int:
        if len(self.calls) == self._fails_at:
            raise LlamaError("no cells")
        assert sum(len(text.tokens) for text in texts) <= self.tokens_max
        count = min(max(1, rows), texts[0].left)
        texts[0].done += count
        if not texts[0].left:
            texts[0].vector = np.full(4, self._value, np.float32)
        self.calls.append(count)
        return count

    def forget(self, text: Text) -> None:
        self.forgotten += 1

    def close(self) -> None: ...


class Words:
    """A vocabulary of letters."""

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        assert add_special and not parse_special
        return [ord(letter) for letter in text.strip("_")]


def embedder(vectors: Slow) -> Embedder:
    ticks = iter(range(10**6))
    words: Any = Words()
    return Embedder(words, 4, 40, lambda: vectors, row_s=0.01, clock=lambda: next(ticks) * 0.01)


def order(number: int, *texts: str) -> Embed:
    return Embed(number, json.dumps({"input": list(texts)}).encode())


def test_small_jobs_do_not_wait_for_large_ones() -> None:
    it = embedder(Slow())
    it.submit(it.prepare(order(1, *["a" * 20] * 6)))
    it.submit(it.prepare(order(2, "b" * 20)))
    over = []
    while not it.is_idle:
        over += it.step(0.05)
    assert [message.job for message in over] == [2, 1]
    assert all(isinstance(message, Embedded) for message in over) and it.step(1.0) == []
    first = over[0]
    assert isinstance(first, Embedded) and first.prompt_tokens == 20 and json.loads(bytes(first.result))["embeddings"] == [[0.5] * 4]


def test_a_step_takes_about_what_it_may() -> None:
    vectors = Slow()
    it = embedder(vectors)
    it.submit(it.prepare(order(1, "a" * 40)))
    it.step(0.2)
    it.step(0.0001)
    assert vectors.calls == [20, 1]


def test_a_cancelled_job_gives_its_room_back() -> None:
    vectors = Slow()
    it = embedder(vectors)
    it.submit(it.prepare(order(1, "a" * 20, "b" * 20, "c" * 20)))
    it.step(0.01)
    it.cancel(7)
    assert not it.is_idle
    it.cancel(1)
    assert it.is_idle and vectors.forgotten == 2 and it.step(1.0) == []


def test_faults_end_their_jobs() -> None:
    it = embedder(Slow(fails_at=1))
    it.submit(it.prepare(order(1, "a" * 20)))
    assert it.step(0.05) == []
    (lost,) = it.step(0.05)
    assert isinstance(lost, Rejected) and lost.code is Code.INTERNAL and it.is_idle
    it = embedder(Slow(value=float("nan")))
    it.submit(it.prepare(order(1, "a", "b")))
    (bad,) = it.step(1.0)
    assert isinstance(bad, Rejected) and bad.code is Code.CARGO_FAILED and it.is_idle


def test_what_cannot_be_prepared() -> None:
    it = embedder(Slow())
    for text, code in (("_", Code.BAD_INPUT), ("a" * 41, Code.CONTEXT_LENGTH)):
        with pytest.raises(Refused, match="text 1 of the input") as caught:
            it.prepare(order(1, "fine", text))
        assert caught.value.code is code
    for number in range(64):
        it.submit(it.prepare(order(number, "a")))
    with pytest.raises(Refused) as caught:
        it.submit(it.prepare(order(99, "a")))
    assert caught.value.code is Code.NO_CAPACITY


def test_a_text_gives_the_same_vector_in_company_and_in_pieces(tmp_path: Path) -> None:
    model = Model(str(write_tiny(tmp_path / "tiny.gguf", TINY["llama"])))
    vectors = DecoderVectors(model, ContextSize(512, 8, batch=60, micro_batch=60, outputs=60, threads=1), pooling_of(model))
    tokens = [np.arange(3, 3 + count, dtype=np.int32) for count in (1, 7, 50, 130)]

    def run(chosen: list[Text], rows: int) -> list[Vector]:
        while left := [text for text in chosen if text.vector is None]:
            assert 1 <= vectors.compute(left, rows) <= 60
            for text in left:
                if text.vector is not None:
                    vectors.forget(text)
        return [text.vector for text in chosen if text.vector is not None]

    alone = [run([Text(each)], 60)[0] for each in tokens]
    for rows in (1, 9, 1000):
        for one, other in zip(run([Text(each) for each in tokens], rows), alone, strict=True):
            assert one.shape == (WIDTH,) and np.abs(normalized(one) - normalized(other)).max() < CLOSE
    vectors.close()
    model.close()

"""Chat with a real model: the whole path beside the bare engine, and beside ``llama_cpp.server``, in one run on the same cores.

Bare engine: llama.cpp's batch API driven by the tightest loop that Python can write: one process, no worker, no scheduler, no stop
strings, no text; greedy by argmax. Whole path: an OpenAI client over HTTP to the Coordinator, libp2p to the Island, its worker and back.
All get the same prompts and produce the same number of tokens; each figure is a median over rounds that alternate between the systems.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from bench.bars import at_least, at_most
from node.localnet import LocalNetwork
from runtimes.store import ModelStore

MODEL = "smollm2-135m"
TOKENS = 128
STREAMS = (1, 8)
_SERVER = Path(".venv-bench/bin/python")
_SERVER_START_S = 60.0
_SYSTEM = "You are a helpful AI assistant."


def question(number: int) -> str:
    """A prompt of its own for each request, different from its first words on, so that no prefix cache helps anybody."""
    return f"{number} is my lucky number. Write a very long story about a lighthouse keeper who counts to {number}."


def chat_prompt(number: int) -> str:
    """What the model's template makes of system message and question."""
    return f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{question(number)}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class Round:
    """Of one round of ``streams`` answers at once: tokens a second in all, and seconds to the first token of each."""

    tokens_per_s: float
    first_token_s: list[float]
    tokens: int


# -- the bare engine


class Bare:
    """The batch API and nothing else; holds one context for all rounds, cleared between them."""

    def __init__(self, path: str, threads: int, streams: int, plain: bool) -> None:
        import llama_cpp.llama_cpp as c

        self._c = c
        quiet = c.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet  # must outlive the library's use of it
        c.llama_log_set(quiet, ctypes.c_void_p())
        c.llama_backend_init()
        weights = c.llama_model_default_params()
        weights.use_extra_bufts = not plain
        self._model = c.llama_model_load_from_file(path.encode(), weights)
        parameters = c.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 512 * streams, 512, 512
        parameters.n_seq_max, parameters.kv_unified = streams, True
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = c.llama_init_from_model(self._model, parameters)
        self._vocab = c.llama_model_get_vocab(self._model)
        self._size = c.llama_vocab_n_tokens(self._vocab)
        self._batch = c.llama_batch_init(512, 0, 1)

    def _tokens(self, text: str) -> list[int]:
        raw = text.encode()
        room = (self._c.llama_token * 512)()
        count = self._c.llama_tokenize(self._vocab, raw, len(raw), room, 512, True, True)
        return list(room[:count])

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of token, position, sequence, wants logits."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wants) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
                token,
                position,
                1,
                sequence,
                wants,
            )
        if self._c.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _best(self, row: int) -> int:
        logits = self._c.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._size,)).argmax())

    def round(self, numbers: list[int], tokens: int) -> Round:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        started = time.perf_counter()
        heads, firsts = [], []
        for sequence, number in enumerate(numbers):
            prompt = self._tokens(chat_prompt(number))
            self._decode([(token, i, sequence, i == len(prompt) - 1) for i, token in enumerate(prompt)])
            heads.append((self._best(-1), len(prompt)))
            firsts.append(time.perf_counter() - started)
        for step in range(tokens - 1):
            self._decode([(token, length + step, sequence, True) for sequence, (token, length) in enumerate(heads)])
            heads = [(self._best(i), length) for i, (_, length) in enumerate(heads)]
        seconds = time.perf_counter() - started
        return Round(tokens * len(numbers) / seconds, firsts, tokens * len(numbers))


def _serve_bare(path: str, threads: int, streams: int, plain: bool, pipe: Any) -> None:
    """A process of its own, so that its threads rest while others are measured."""
    bare = Bare(path, threads, streams, plain)
    while (order := pipe.recv()) is not None:
        pipe.send(bare.round(*order))


@contextlib.contextmanager
def bare_engine(path: str, threads: int, streams: int, plain: bool) -> Iterator[Any]:
    """A function from (numbers, tokens) to a Round."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_bare, args=(path, threads, streams, plain, theirs), daemon=True)
    process.start()
    theirs.close()

    def measure(numbers: list[int], tokens: int) -> Round:
        ours.send((numbers, tokens))
        answer: Round = ours.recv()
        return answer

    try:
        yield measure
    finally:
        ours.send(None)
        process.join(10)


def needs_plain_weights(path: str) -> bool:
    """Whether llama.cpp's repacked weights crash on this machine, as they do when GCC 12 builds it for a CPU with AMX. The worker
    finds that out by itself; the others are then measured with plain weights too."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_try_repacked, args=(path,))
    process.start()
    process.join()
    return process.exitcode != 0


def _try_repacked(path: str) -> None:
    Bare(path, 1, 2, plain=False).round([1, 2], 2)


# -- servers that speak OpenAI's API


async def _one(
    session: aiohttp.ClientSession, url: str, key: str, model: str, number: int, tokens: int
) -> tuple[float, int]:
    """Seconds to the first text, and the count of tokens of the answer."""
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question(number)}]
    body = {"model": model, "messages": messages, "stream": True, "max_tokens": tokens, "temperature": 0}
    body["stream_options"] = {"include_usage": True}
    started, first, counted, chunks = time.perf_counter(), 0.0, 0, 0
    async with session.post(
        url + "/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}
    ) as answer:
        answer.raise_for_status()
        async for raw in answer.content:
            if not raw.startswith(b"data: {"):
                continue
            event = json.loads(raw[6:])
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    first = first or time.perf_counter() - started
                    chunks += 1
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
    return first, counted or chunks


async def _round(url: str, key: str, model: str, numbers: list[int], tokens: int) -> Round:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter()
        answers = await asyncio.gather(*(_one(session, url, key, model, number, tokens) for number in numbers))
        seconds = time.perf_counter() - started
    total = sum(count for _, count in answers)
    return Round(total / seconds, [first for first, _ in answers], total)


def http_round(url: str, key: str, model: str, numbers: list[int], tokens: int) -> Round:
    return asyncio.run(_round(url, key, model, numbers, tokens))


@contextlib.contextmanager
def whole_path(threads: int | None) -> Iterator[Any]:
    """A Coordinator and one Island; ``threads`` None is the Island's own default."""
    with tempfile.TemporaryDirectory(prefix="archipelag-bench-") as folder, LocalNetwork(Path(folder)) as network:
        network.start_coordinator()
        more = ("--threads", str(threads)) if threads else ()
        network.start_island("island", "--cargo", MODEL, *more).wait_ready()
        key = network.make_key()
        yield lambda numbers, tokens: http_round(network.url, key, MODEL, numbers, tokens)


_PLAIN_SERVER = """
import runpy, sys
import llama_cpp.llama_cpp as low
default = low.llama_model_default_params
def plain():
    params = default()
    params.use_extra_bufts = False
    return params
low.llama_model_default_params = plain
sys.argv[0] = "llama_cpp.server"
runpy.run_module("llama_cpp.server", run_name="__main__")
"""


@contextlib.contextmanager
def llama_cpp_server(path: str, threads: int, plain: bool) -> Iterator[Any]:
    """``llama_cpp.server`` with the same model and threads; without interrupt_requests False it cuts running answers off."""
    port = 18_431
    command = [
        str(_SERVER),
        "-m",
        "llama_cpp.server",
        "--model",
        path,
        "--n_threads",
        str(threads),
        "--n_threads_batch",
        str(threads),
    ]
    command += ["--n_ctx", "2048", "--port", str(port), "--interrupt_requests", "False", "--verbose", "False"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            asyncio.run(_wait_port(port, process))
            yield lambda numbers, tokens: http_round(f"http://127.0.0.1:{port}", "none", "any", numbers, tokens)
        finally:
            process.terminate()
            process.wait(20)


async def _wait_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _SERVER_START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.2)
    raise RuntimeError("llama_cpp.server did not start")


# -- the comparison


def _measure(systems: dict[str, Any], streams: int, rounds: int) -> dict[str, Any]:
    """Rounds alternate between the systems, so that a slow minute of the machine hits all."""
    found: dict[str, list[Round]] = {name: [] for name in systems}
    for index in range(rounds + 1):
        for name, measure in systems.items():
            numbers = [1000 * (index + 1) + 10 * i + streams for i in range(streams)]
            result = measure(numbers, TOKENS)
            if index:  # the first warms up
                found[name].append(result)
    return {name: _summary(several) for name, several in found.items()}


def _summary(several: list[Round]) -> dict[str, Any]:
    firsts = [first for one in several for first in one.first_token_s]
    return {
        "tokens_per_s": round(statistics.median(one.tokens_per_s for one in several), 1),
        "first_token_p50_ms": round(statistics.median(firsts) * 1000, 1),
        "tokens": several[-1].tokens,
    }


def _threads_case(path: str, threads: int, rounds: int, plain: bool, with_server: bool) -> dict[str, Any]:
    case: dict[str, Any] = {}
    for streams in STREAMS:
        with contextlib.ExitStack() as stack:
            systems = {
                "bare engine": stack.enter_context(bare_engine(path, threads, streams, plain)),
                "whole path": stack.enter_context(whole_path(threads)),
            }
            if with_server:
                systems["llama_cpp.server"] = stack.enter_context(llama_cpp_server(path, threads, plain))
            case[str(streams)] = _measure(systems, streams, rounds)
            print(
                f"  {threads} threads, {streams} streams: {json.dumps(case[str(streams)])}", file=sys.stderr, flush=True
            )
    return case


def first_token_case(path: str, rounds: int, plain: bool) -> dict[str, float]:
    """Answers of one token, one engine thread, one after the other, alternating between the systems: milliseconds, p50."""
    with bare_engine(path, 1, 1, plain) as bare, whole_path(1) as whole:
        found: dict[str, list[float]] = {"bare engine": [], "whole path": []}
        for index in range(rounds + 2):
            for name, measure in (("bare engine", bare), ("whole path", whole)):
                first_s = measure([7000 + 10 * index], 1).first_token_s[0]
                if index > 1:
                    found[name].append(first_s * 1000)
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def run(quick: bool = False) -> dict[str, Any]:
    """All figures; a dict fit for JSON."""
    path = str(ModelStore().fetch(MODEL).path)
    cores = len(os.sched_getaffinity(0))
    rounds = 2 if quick else 7
    with_server = _SERVER.exists()
    plain = needs_plain_weights(path)
    first_token = first_token_case(path, 8 if quick else 30, plain)
    cases = {
        str(threads): _threads_case(path, threads, rounds, plain, with_server and threads == cores)
        for threads in sorted({1, cores})
    }
    result = {
        "bench": "chat",
        "model": MODEL,
        "tokens": TOKENS,
        "cores": cores,
        "plain_weights": plain,
        "threads": cases,
        "first_token_p50_ms": first_token,
    }
    return result | {"bars": _bars(cases, first_token, cores, with_server)}


def _bars(cases: dict[str, Any], first_token: dict[str, float], cores: int, with_server: bool) -> list[dict[str, Any]]:
    bars = []
    for threads, least in ((1, 0.95), (cores, 0.80)):
        for streams in STREAMS:
            of = cases[str(threads)][str(streams)]
            ratio = of["whole path"]["tokens_per_s"] / of["bare engine"]["tokens_per_s"]
            name = f"whole path / bare engine, tokens/s, {threads} engine threads, {streams} streams"
            bars.append(at_least(name, ratio, least))
    added = first_token["whole path"] - first_token["bare engine"]
    bars.append(at_most("time to first token added to the bare engine's, ms p50", added, 10.0))
    if with_server:
        for streams, least in ((1, 1.3), (8, 2.0)):
            of = cases[str(cores)][str(streams)]
            ratio = of["whole path"]["tokens_per_s"] / of["llama_cpp.server"]["tokens_per_s"]
            bars.append(at_least(f"whole path / llama_cpp.server, tokens/s, {streams} clients", ratio, least))
        of = cases[str(cores)]["8"]
        ratio = of["whole path"]["first_token_p50_ms"] / of["llama_cpp.server"]["first_token_p50_ms"]
        bars.append(at_most("whole path / llama_cpp.server, time to first token, 8 clients", ratio, 0.1))
    return bars


def table(result: dict[str, Any]) -> str:
    lines = [f"{'chat, ' + result['model']:<30}{'threads':>8}{'streams':>8}{'tokens/s':>10}{'first token p50':>18}"]
    for threads, by_streams in result["threads"].items():
        for streams, systems in by_streams.items():
            for name, of in systems.items():
                lines.append(
                    f"{name:<30}{threads:>8}{streams:>8}{of['tokens_per_s']:>10.1f}{of['first_token_p50_ms']:>15.1f} ms"
                )
    first = result["first_token_p50_ms"]
    lines.append(f"one token: bare engine {first['bare engine']:.1f} ms, whole path {first['whole path']:.1f} ms")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    measured = run(parser.parse_args().quick)
    print(table(measured))
    print(json.dumps(measured["bars"], indent=1))

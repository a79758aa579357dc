"""Cargos: a small WASM module end to end through a local Island, and texts to vectors beside bare onnxruntime.

The first part asks an Island directly, from ticket to receipt (island_lines.py); then it runs a Coordinator and one Island in processes of
their own and sends jobs over HTTP with keep-alive connections, each answered with the module's lines. The second computes the same texts
with the same model in turns: bare onnxruntime and tokenizers in a process of its own, our worker without walls, and our worker inside its
sandbox. Medians of all rounds.

    python -m bench.cargos [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio

from bench import island_lines
from bench.bars import at_least, at_most
from bench.echo_http import Target, drive_at
from node.cargo_runtimes import Grants, find_runtimes, open_cargo
from node.local_cargos import LocalCargo, bring_files, find_local
from node.localnet import LocalNetwork
from node.shipped import PUBLISHER, shipped
from protocol.cargo_io import encode_input
from runtimes.base import LineCargo, LineRequest
from runtimes.lines.cargo import LineKind, LineLimits, open_line_cargo
from runtimes.lines.engine import LoadOrder
from runtimes.lines.process import starts
from runtimes.store import ModelStore

WASM_P50_MS_MAX = 3.0  # the bars
WASM_JOBS_S_MIN = 200.0
SANDBOX_ADDS_MAX = 0.15
BATCH_RATIO_MIN = 0.9
CLIENTS = 16
MODULE, MODEL = "text-stats", "minilm-l6-v2"
TEXTS = [f"sentence {n}: the quick brown fox jumps over the lazy dog and " + "over more of them " * (n % 7) for n in range(64)]

# Bare onnxruntime: texts of like length together, as ours does it, since one padded batch of 64 takes three times as long.
_BARE = """
import base64, json, sys, time
import numpy as np, onnxruntime as ort
from tokenizers import Tokenizer
model, words, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = Tokenizer.from_file(words)
tokenizer.no_padding()
tokenizer.enable_truncation(256)
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
names = [each.name for each in session.get_inputs()]
def embed(texts):
    ids = [each.ids for each in tokenizer.encode_batch(texts)]
    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    out = np.empty((len(ids), 384), np.float32)
    while order:
        group = [order.pop(0)]
        while order and (len(group) + 1) * len(ids[order[0]]) <= 256:
            group.append(order.pop(0))
        width = max(len(ids[at]) for at in group)
        tokens, mask = np.zeros((2, len(group), width), np.int64)
        for row, at in enumerate(group):
            tokens[row, : len(ids[at])], mask[row, : len(ids[at])] = ids[at], 1
        feeds = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(tokens)}
        states = session.run(None, {name: feeds[name] for name in names})[0]
        pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
        out[group] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return [base64.b64encode(row).decode() for row in out]
for line in sys.stdin:
    texts = json.loads(line)
    embed(texts)
    times = []
    for _ in range(rounds):
        since = time.perf_counter()
        embed(texts)
        times.append(time.perf_counter() - since)
    print(json.dumps(times), flush=True)
"""


def through_island(count: int) -> dict[str, Any]:
    """Jobs of a warm module by HTTP: time of one at one client, jobs a second at 16."""
    found = shipped(MODULE)
    assert found is not None and found.example is not None
    body = json.dumps({"cargo": MODULE, "stream": True, "input": found.example.input}).encode()
    with tempfile.TemporaryDirectory() as folder, LocalNetwork(Path(folder)) as network:
        network.start_coordinator()
        network.start_island("island", "--cargo", MODULE).wait_ready()
        target = Target("whole path", urlsplit(network.url).port or 0, network.make_key())
        drive_at(target, 1, count // 4, "/api/v1/jobs", body)
        alone = [drive_at(target, 1, count, "/api/v1/jobs", body) for _ in range(3)]
        together = [drive_at(target, CLIENTS, 4 * count, "/api/v1/jobs", body) for _ in range(3)]
    return {
        "p50_ms": statistics.median(each["p50_ms"] for each in alone),
        "jobs_per_s": statistics.median(each["requests_per_s"] for each in together),
        "p99_ms_at_16": statistics.median(each["p99_ms"] for each in together),
    }


class _Bare:
    """Bare onnxruntime in a process of its own."""

    def __init__(self, files: Mapping[str, Path], rounds: int) -> None:
        model, words = (str(files[name]) for name in ("model.onnx", "tokenizer.json"))
        command = [sys.executable, "-c", _BARE, model, words, str(rounds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def times_s(self, texts: list[str]) -> list[float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(texts) + "\n")
        self._process.stdin.flush()
        times: list[float] = json.loads(self._process.stdout.readline())
        return times

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


async def _times_s(cargo: LineCargo, texts: list[str], rounds: int) -> list[float]:
    data = encode_input({"input": texts, "encoding_format": "base64"})
    times = []
    for number in range(rounds + 1):
        since_s = time.perf_counter()
        async with cargo.run_lines(LineRequest(str(number), data, bytes(16))) as run:
            async for _ in run:
                pass
        times.append(time.perf_counter() - since_s)
    return times[1:]


async def _embed(cargo: LocalCargo, rounds: int, turns: int) -> dict[str, dict[str, float]]:
    """Median seconds of one text and of 64, by way."""
    found: dict[str, dict[str, list[float]]] = {way: {"one": [], "batch": []} for way in ("bare", "worker", "sandbox")}
    with ExitStack() as held:
        files = await bring_files(cargo, ModelStore(), held)
        bare = _Bare(files, rounds)
        held.callback(bare.end)
        async with AsyncExitStack() as stack:
            order = LoadOrder(
                cargo.manifest.name,
                cargo.address,
                cargo.manifest.entry,
                {path: str(place) for path, place in files.items()},
                json.loads(cargo.manifest.options),
            )
            kind = LineKind("onnx", starts("runtimes.onnx.worker", None))
            plain = await stack.enter_async_context(open_line_cargo(kind, order, most=LineLimits(60.0)))
            runtimes = await find_runtimes("bench", with_containers=False)
            walled = await stack.enter_async_context(
                open_cargo(cargo.manifest, cargo.address, files, runtimes, Grants())
            )
            assert isinstance(walled, LineCargo)
            for _ in range(turns):
                for size, texts in (("one", TEXTS[:1]), ("batch", TEXTS)):
                    found["bare"][size] += await trio.to_thread.run_sync(bare.times_s, texts)
                    found["worker"][size] += await _times_s(plain, texts, rounds)
                    found["sandbox"][size] += await _times_s(walled, texts, rounds)
    return {way: {size: statistics.median(times) for size, times in sizes.items()} for way, sizes in found.items()}


def run(quick: bool = False) -> dict[str, Any]:
    island = island_lines.measure(MODULE, 100 if quick else 500)
    wasm = through_island(100 if quick else 500)
    cargo = find_local(MODEL, PUBLISHER)
    assert cargo is not None
    texts = trio.run(_embed, cargo, 5 if quick else 15, 2 if quick else 6)
    bare, worker, walled = texts["bare"], texts["worker"], texts["sandbox"]
    return {
        "bench": "cargos",
        "load_average_1min": round(os.getloadavg()[0], 2),
        "island": island,
        "wasm": wasm,
        "embeddings_s": texts,
        "bars": [
            at_most("WASM, warm module through a local Island, ticket to receipt, ms p50", island["p50_ms"], WASM_P50_MS_MAX),
            at_least("the same, jobs/s", island["jobs_per_s"], WASM_JOBS_S_MIN),
            at_most("WASM, by HTTP through a Coordinator with its books, ms p50", wasm["p50_ms"], WASM_P50_MS_MAX),
            at_least("the same, jobs/s", wasm["jobs_per_s"], WASM_JOBS_S_MIN),
            at_most("sandbox adds to ONNX embeddings of one text, share", walled["one"] / bare["one"] - 1, SANDBOX_ADDS_MAX),
            at_most("sandbox adds to ONNX embeddings of 64 texts, share", walled["batch"] / bare["batch"] - 1, SANDBOX_ADDS_MAX),
            at_least("ONNX, 64 texts, rate / bare onnxruntime", bare["batch"] / walled["batch"], BATCH_RATIO_MIN),
            at_most("walls alone, one text, share", walled["one"] / worker["one"] - 1, SANDBOX_ADDS_MAX),
        ],
    }


def table(result: dict[str, Any]) -> str:
    wasm, island = result["wasm"], result["island"]
    lines = [
        f"WASM module {MODULE}, ticket to receipt: {island['p50_ms']:.2f} ms p50, {island['jobs_per_s']:.0f} jobs/s at 16",
        f"WASM module {MODULE}, whole path: {wasm['p50_ms']:.2f} ms p50 at one client",
        f"  {CLIENTS} clients: {wasm['jobs_per_s']:.0f} jobs/s, p99 {wasm['p99_ms_at_16']:.1f} ms",
        f"{'MiniLM':<12}{'one text, ms':>14}{'64 texts, texts/s':>20}",
    ]
    for way, times in result["embeddings_s"].items():
        lines.append(f"{way:<12}{1000 * times['one']:>14.2f}{64 / times['batch']:>20.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    result = run(parser.parse_args().quick)
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

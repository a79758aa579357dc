"""How often an answer changes when another Island takes it over: undisturbed against resumed at a random token, greedy, same model file.

Where a model's kernels give the same logits whatever the batch, a resumed answer is the same token for token. Where they do not, replaying
a prompt and its answer in one batch can tip a close decision; this counts how often. Seeded.
"""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from bench.bars import at_most
from protocol.generation import GenerationRequest, Sampling, pack_tokens, unpack_tokens
from runtimes.base import Chunk, LoadedCargo, RunRequest
from runtimes.gguf.cargo import open_gguf_cargo
from runtimes.store import ModelStore

MODELS = ("smollm2-135m", "gemma3-270m")
TOKENS = 48
_SUBJECTS = (
    "a lighthouse",
    "the sea",
    "bread",
    "an old clock",
    "winter",
    "a small town",
    "the number seven",
    "a violin",
    "rain",
    "maps",
)
_OPENINGS = (
    "The history of {} begins",
    "Once upon a time, {} was",
    "Here is what I know about {}:",
    "A short poem about {}\n\n",
    "Why do people like {}?",
)


def prompts(count: int) -> list[str]:
    every = [opening.format(subject) for subject in _SUBJECTS for opening in _OPENINGS]
    return [every[i % len(every)] + " " * (i // len(every)) for i in range(count)]


@asynccontextmanager
async def _loaded(name: str) -> AsyncIterator[LoadedCargo]:
    model = ModelStore().fetch(name)
    async with open_gguf_cargo(
        name=name,
        path=model.path,
        content_hash=model.sha256,
        memory_limit_bytes=None,
        threads=1,
        gpu_layers=None,
        context_tokens=1024,
    ) as cargo:
        yield cargo


async def _tokens(cargo: LoadedCargo, prompt: str, resume: list[int]) -> list[int]:
    """All tokens of the answer, the resumed ones included. Each call has a salt of its own, so that no prefix is reused."""
    request = GenerationRequest(
        prompt=prompt, max_tokens=TOKENS, sampling=Sampling(temperature=0.0), resume=pack_tokens(resume)
    )
    found = list(resume)
    async with cargo.run(RunRequest("splice", request, random.randbytes(32))) as run:
        async for event in run:
            if isinstance(event, Chunk):
                found += unpack_tokens(event.tokens)
    return found


async def _changed(name: str, count: int) -> dict[str, Any]:
    rng = random.Random(f"splice {name}")
    changed = spliced = 0
    async with _loaded(name) as cargo:
        for prompt in prompts(count):
            whole = await _tokens(cargo, prompt, [])
            if len(whole) < 2:
                continue
            spliced += 1
            changed += await _tokens(cargo, prompt, whole[: rng.randrange(1, len(whole))]) != whole
        engine = cargo.facts().engine
    return {"engine": engine, "spliced": spliced, "changed": changed}


def run(quick: bool = False) -> dict[str, Any]:
    count = 20 if quick else 100
    models = {name: trio.run(_changed, name, count) for name in MODELS}
    exact = models["smollm2-135m"]
    bars = [at_most("answers changed by a take-over, SmolLM2 Q4_1, of " + str(exact["spliced"]), exact["changed"], 0)]
    return {"bench": "splice", "tokens": TOKENS, "models": models, "bars": bars}


def table(result: dict[str, Any]) -> str:
    lines = [f"{'taken over at a random token':<30}{'answers':>9}{'changed':>9}"]
    lines += [f"{name:<30}{of['spliced']:>9}{of['changed']:>9}" for name, of in result["models"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run("--quick" in sys.argv)))

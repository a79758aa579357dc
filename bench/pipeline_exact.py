"""How often a greedy answer over a pipeline differs from the whole model's: one job at a time, and several at once.

Where a quantisation's kernels do not depend on the batch (SmolLM2 Q4_1), never. Where they do (Gemma 3 Q4_K_M), a step that holds other
rows beside a job's own rounds otherwise, in a pipeline as in a whole model: so the whole model under the same batches is the reference,
to which the difference is 0.0 (`cargo shard` checks that), and what is counted here is how often that tips an answer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench import bars
from protocol.generation import GenerationRequest, Sampling
from runtimes.store import ModelStore
from tests.runtimes.gguf.ring import TOPICS, Cuts, Ring

MODELS = {"smollm2-135m": (7, 20), "gemma3-270m": (5, 11)}
TOKENS = 32


def _requests(count: int) -> list[GenerationRequest]:
    texts = [f"{number}. A true story about {TOPICS[number % len(TOPICS)]}, told to child number {number}:" for number in range(count)]
    return [GenerationRequest(prompt=text, max_tokens=TOKENS, sampling=Sampling(temperature=0.0)) for text in texts]


def _answers(ring: Ring, requests: list[GenerationRequest], at_once: int) -> list[list[int]]:
    for number, request in enumerate(requests, 1):
        ring.start(request)
        if number % at_once == 0:
            ring.run()
    ring.run()
    return [answer.tokens for answer in ring.answers.values()]


def run(quick: bool) -> dict[str, Any]:
    count = 24 if quick else 100
    result: dict[str, Any] = {"count": count, "changed": {}}
    for name, edges in MODELS.items():
        model = ModelStore().fetch(name)
        with tempfile.TemporaryDirectory() as folder:
            cuts = Cuts(model.path, Path(folder))
            requests = _requests(count)
            alone = _answers(Ring(cuts.chain()), requests, 1)
            for at_once in (1, 8):
                staged = _answers(Ring(cuts.chain(*edges), seed=1), requests, at_once)
                whole = _answers(Ring(cuts.chain()), requests, at_once)
                result["changed"][f"{name}, {at_once} at once"] = {
                    "pipeline": sum(a != b for a, b in zip(alone, staged, strict=True)),
                    "whole": sum(a != b for a, b in zip(alone, whole, strict=True)),
                }
            for stage in cuts.loaded.values():
                stage.close()
                stage.context.model.close()
    worst = max(entry["pipeline"] for key, entry in result["changed"].items() if key.startswith("smollm2"))
    result["bars"] = [bars.at_most("greedy answers of SmolLM2 Q4_1 over three stages that differ from the whole model's", worst, 0)]
    return result


def table(result: dict[str, Any]) -> str:
    lines = [
        f"of {result['count']} greedy answers of {TOKENS} tokens, other than those of the whole model, one at a time:",
        "| model | over three stages | by the whole model |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {key} | {entry['pipeline']} | {entry['whole']} |" for key, entry in result["changed"].items())])


__all__ = ["run", "table"]

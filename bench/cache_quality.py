"""What the cache of answers finds, and what it gets wrong: look-alike pairs, paraphrases, and a support chat's log with 35 % repeats.

The log is replayed through what the Coordinator decides with: the table and the key of normal.py, then the index of words, the guards
and MiniLM's cosine (``Meaning``). What a question cost the first time is saved when it is answered from the cache; an answer is wrong
where the question that it was given to means something else. Beside it stand exact keys alone, the same cosine without guards, and
plain word overlap at 85 %.

    python -m bench.cache_quality [--quick]
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import trio

from bench.bars import at_least, at_most
from coordinator.cache.asking import CacheAsk
from coordinator.cache.budget import ErrorBudget
from coordinator.cache.meaning import Meaning
from coordinator.cache.normal import core, normalise
from coordinator.cache.policy import PUBLIC
from coordinator.cache.table import AnswerTable, Entry
from coordinator.cache.versions import Cargos, Versions
from protocol.cargos import CachePolicy
from tests.coordinator.cache import cache_pairs, cache_paraphrases
from tests.coordinator.cache.cache_deciding import COSINE_MIN, OVERLAP_MIN, dice, jaccard, refusal, words_of
from tests.coordinator.cache.cache_minilm import MiniLm
from tests.coordinator.cache.support_log import Line, support_log

FALSE_HITS_MAX = 0.005  # the bars
PARAPHRASES_MIN = 0.60
SAVED_MIN = 0.30
LINES, PAIRS, PARAPHRASES = 2500, 2400, 800
SEED = 7
_CARGO, _CONTEXT = "chat", bytes(32)
_FOREVER_S = 1e12

# A kept line for a question, and whether its key was equal.
Found = tuple[Line, bool] | None
Decide = Callable[[Line], Found]


def run(quick: bool = False) -> dict[str, Any]:
    """All figures; about two minutes, or half of one when quick."""
    part = 4 if quick else 1
    model = MiniLm()
    halves = {name: _sets(name, part, model) for name in ("tuned", "held_out")}
    log = support_log(LINES // part, SEED)
    replays = {"ours": trio.run(_replayed_ours, log, model)} | {
        name: _scored(log, _replay(log, decide(log, model))) for name, decide in _OTHERS.items()
    }
    ours = replays["ours"]
    bars = [
        *(
            at_most(f"false hits on look-alike pairs, {name}, %", 100 * half["pairs"]["ours"], 100 * FALSE_HITS_MAX)
            for name, half in halves.items()
        ),
        *(
            at_least(f"hits on paraphrases, {name}, %", 100 * half["paraphrases"]["ours"], 100 * PARAPHRASES_MIN)
            for name, half in halves.items()
        ),
        at_least("cost saved on a support log with 35 % repeats, %", 100 * ours["saved"], 100 * SAVED_MIN),
    ]
    return {"bench": "cache_quality", "halves": halves, "lines": len(log), "log": replays, "bars": bars}


# -- pairs and paraphrases


def _sets(name: str, part: int, model: MiniLm) -> dict[str, Any]:
    pairs = cache_pairs.pairs(getattr(cache_pairs, name.upper()), PAIRS // part, SEED)
    same = cache_paraphrases.paraphrases(getattr(cache_paraphrases, name.upper()), PARAPHRASES // part, SEED)
    return {
        "pairs": _shares([(pair.asked, pair.kept) for pair in pairs], model),
        "paraphrases": _shares([(each.asked, each.kept) for each in same], model),
    }


def _shares(pairs: Sequence[tuple[str, str]], model: MiniLm) -> dict[str, Any]:
    """Shares of pairs for which the kept answer is given, and by what ours refuses the others."""
    ours = Counter(refusal(model, *pair) for pair in pairs)
    asked, kept = (model.vectors([core(text) for text in texts]) for texts in zip(*pairs, strict=True))
    hits = ours.pop("", 0)
    return {
        "count": len(pairs),
        "ours": hits / len(pairs),
        "cosine": float(np.mean((asked * kept).sum(1) >= COSINE_MIN)),
        "jaccard": sum(jaccard(*pair) >= OVERLAP_MIN for pair in pairs) / len(pairs),
        "dice": sum(dice(*pair) >= OVERLAP_MIN for pair in pairs) / len(pairs),
        "refused": {reason: count / len(pairs) for reason, count in ours.most_common()},
    }


# -- the log


def _replay(log: Sequence[Line], decide: Decide) -> list[Found]:
    return [decide(line) for line in log]


def _scored(log: Sequence[Line], found: Sequence[Found]) -> dict[str, Any]:
    """Shares of all cost, numbers of answers. A wrong answer saves nothing."""
    wrong = [line for line, hit in zip(log, found, strict=True) if hit and hit[0].meaning != line.meaning]
    right = [(line, hit[1]) for line, hit in zip(log, found, strict=True) if hit and hit[0].meaning == line.meaning]
    manners = Counter(line.manner for line in log)
    found_by = Counter(line.manner for line, _ in right)
    return {
        "saved": sum(line.cost for line, _ in right) / sum(line.cost for line in log),
        "could_save": sum(line.cost for line in log if line.manner != "new") / sum(line.cost for line in log),
        "exact": sum(is_exact for _, is_exact in right),
        "semantic": sum(not is_exact for _, is_exact in right),
        "wrong": len(wrong),
        "found_by_manner": {manner: found_by[manner] / count for manner, count in manners.items() if manner != "new"},
    }


@dataclass
class _Kept:
    """The table of a Coordinator, with the line that each entry answers."""

    table: AnswerTable
    lines: dict[bytes, Line]

    def ask(self, line: Line) -> CacheAsk:
        key = hashlib.sha256(normalise(line.question).encode()).digest()
        return CacheAsk(_CARGO, "one", key, _CONTEXT, line.question)

    def keep(self, ask: CacheAsk, line: Line) -> Entry:
        facts = PUBLIC, ask.key, ask.account, ask.cargo, "00", "job", b"answer", 0.0, _FOREVER_S, ask.context, ask.question
        entry = Entry(*facts)
        self.table.put(entry, 0.0)
        self.lines[ask.key] = line
        return entry


async def _replayed_ours(log: Sequence[Line], model: MiniLm) -> dict[str, Any]:
    versions = Versions(Cargos(lambda name: None, lambda name: None, lambda name: ()), lambda: 0.0)
    kept = _Kept(AnswerTable(10_000, 2**30), {})
    meaning = Meaning(model, kept.table, ErrorBudget(0.05, 0.95), versions, lambda: 0.0)
    policy = CachePolicy(public=True)
    model.vectors([core(line.question) for line in log])  # in batches, once
    found: list[Found] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(meaning.run)
        for line in log:
            ask = kept.ask(line)
            if kept.table.get((PUBLIC, ask.key), 0.0) is not None:
                found.append((kept.lines[ask.key], True))
                continue
            entry = await meaning.find(ask, policy)
            found.append((kept.lines[entry.key], False) if entry is not None else None)
            if entry is None:
                meaning.learn(kept.keep(ask, line))
                while meaning.learning:
                    await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    return _scored(log, found) | {"vetoed": meaning.vetoed, "failures": meaning.failures}


def _exact_only(log: Sequence[Line], model: MiniLm) -> Decide:
    first: dict[str, Line] = {}

    def decide(line: Line) -> Found:
        earlier = first.setdefault(normalise(line.question), line)
        return (earlier, True) if earlier is not line else None

    return decide


def _without_guards(log: Sequence[Line], model: MiniLm) -> Decide:
    """The nearest earlier question, if its cosine is high enough."""
    vectors = model.vectors([core(line.question) for line in log])
    kept: list[int] = []
    place_of = {id(line): place for place, line in enumerate(log)}

    def decide(line: Line) -> Found:
        place = place_of[id(line)]
        scores = vectors[kept] @ vectors[place] if kept else np.zeros(0)
        if len(scores) and scores.max() >= COSINE_MIN:
            earlier = log[kept[int(scores.argmax())]]
            return earlier, normalise(earlier.question) == normalise(line.question)
        kept.append(place)
        return None

    return decide


def _overlap(log: Sequence[Line], model: MiniLm) -> Decide:
    """The earlier question that shares most words (Dice), if it shares enough."""
    kept: list[tuple[frozenset[str], Line]] = []

    def decide(line: Line) -> Found:
        words = words_of(line.question)
        best, score = None, 0.0
        for other, earlier in kept:
            share = 2 * len(words & other) / (len(words) + len(other))
            if share > score:
                best, score = earlier, share
        if best is not None and score >= OVERLAP_MIN:
            return best, normalise(best.question) == normalise(line.question)
        kept.append((words, line))
        return None

    return decide


_OTHERS: dict[str, Callable[[Sequence[Line], MiniLm], Decide]] = {
    "exact keys only": _exact_only,
    "cosine without guards": _without_guards,
    "85 % word overlap": _overlap,
}


def table(result: dict[str, Any]) -> str:
    lines = [f"{'share that is answered from the cache, %':<46}{'ours':>8}{'cosine':>8}{'Jaccard':>9}{'Dice':>7}"]
    for name, half in result["halves"].items():
        for kind, shares in half.items():
            label = f"  {shares['count']:,} {'look-alike pairs' if kind == 'pairs' else kind}, {name.replace('_', ' ')}"
            values = (100 * shares[way] for way in ("ours", "cosine", "jaccard", "dice"))
            lines.append("{:<46}{:>8.2f}{:>8.1f}{:>9.1f}{:>7.1f}".format(label, *values))
    for name, half in result["halves"].items():
        refused = ", ".join(f"{reason} {100 * share:.1f}" for reason, share in half["paraphrases"]["refused"].items())
        lines.append(f"  paraphrases refused, {name.replace('_', ' ')}, %: {refused}")
    could = 100 * result["log"]["ours"]["could_save"]
    log = f"a log of {result['lines']:,} lines, {could:.1f} % of cost repeated"
    lines.append(f"{log:<46}{'saved %':>8}{'exact':>8}{'semantic':>9}{'wrong':>7}")
    for name, scored in result["log"].items():
        row = (f"  {name}", 100 * scored["saved"], scored["exact"], scored["semantic"], scored["wrong"])
        lines.append("{:<46}{:>8.1f}{:>8}{:>9}{:>7}".format(*row))
    manners = ", ".join(f"{manner} {100 * share:.0f} %" for manner, share in result["log"]["ours"]["found_by_manner"].items())
    return "\n".join([*lines, f"  repeats that ours found: {manners}"])


if __name__ == "__main__":
    print(table(run("--quick" in sys.argv)))

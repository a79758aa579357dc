"""Choosing a token from logits. The order is protocol.generation.Sampling's: bias, penalties, grammar, temperature, top-k, top-p, min-p.

Chance is a function of (seed, position in the answer), not of a generator's history: an answer that is resumed on another Island draws
the same numbers. A grammar is asked about the drawn token first; only if it forbids it are all tokens filtered and drawn again with a
second number, which gives the same distribution as filtering first: p + P(forbidden) · p / P(allowed) = p / P(allowed).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from protocol.generation import Sampling

Floats = npt.NDArray[np.float32]
_LABEL = b"archipelag sample 1"
_U64 = struct.Struct("<Q")
_FIRST_CANDIDATES = 256  # holds 0.99 of the mass nearly always; sorting all 49,152 costs 3 ms, these 0.3 ms
_NEVER = np.float32(-np.inf)


class Grammar(Protocol):
    """What may come next."""

    def allows(self, token: int) -> bool: ...

    def filter(self, logits: Floats) -> Floats:
        """A copy with -inf for every token that may not come next."""
        ...

    def best(self, logits: Floats) -> int:
        """The likeliest token that may come next."""
        ...

    def accept(self, token: int) -> None: ...


def uniform(seed: int, position: int, draw: int = 0) -> float:
    """A number in [0, 1) for one draw at one position of an answer."""
    digest = hashlib.blake2b(_U64.pack(seed) + _U64.pack(position) + bytes([draw]), digest_size=8, key=_LABEL).digest()
    return float((_U64.unpack(digest)[0] >> 11) * 2.0**-53)


class Sampler:
    """One answer's state: which tokens it and its prompt hold so far."""

    def __init__(self, sampling: Sampling, prompt: list[int], grammar: Grammar | None = None) -> None:
        self._sampling, self._grammar = sampling, grammar
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt) if sampling.repetition_penalty != 1.0 else set()
        self._position = 0
        self.is_plain = not self._changes_logits() and grammar is None and sampling.temperature == 0.0

    def __repr__(self) -> str:
        return f"<Sampler at {self._position}{', greedy' if self.is_plain else ''}>"

    def accept(self, token: int) -> None:
        """The answer goes on with this token. The grammar must have allowed it."""
        self._position += 1
        if not self.is_plain:
            self._counts[token] += 1
            if self._sampling.repetition_penalty != 1.0:
                self._seen.add(token)
            if self._grammar is not None:
                self._grammar.accept(token)

    def choose(self, logits: Floats) -> int:
        """A token for these logits (vocabulary,), which are overwritten. A plain sampler's caller may take the argmax itself."""
        if self._changes_logits():
            self._change(logits)
        s, grammar = self._sampling, self._grammar
        greedy = s.temperature == 0.0 or s.top_k == 1
        token = int(logits.argmax()) if greedy else sample(logits, s, uniform(s.seed, self._position))
        if grammar is None or grammar.allows(token):
            return token
        return grammar.best(logits) if greedy else sample(grammar.filter(logits), s, uniform(s.seed, self._position, draw=1))

    def _changes_logits(self) -> bool:
        s = self._sampling
        return bool(s.logit_bias or s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)

    def _change(self, logits: Floats) -> None:
        s = self._sampling
        for token, bias in s.logit_bias:
            if token < len(logits):
                logits[token] += np.float32(bias)
        if s.repetition_penalty != 1.0 and (self._seen or self._counts):
            ids = np.fromiter(self._seen, np.int64)
            values = logits[ids]
            factor = np.float32(s.repetition_penalty)
            logits[ids] = np.where(values > 0, values / factor, values * factor)
        if (s.presence_penalty or s.frequency_penalty) and self._counts:
            ids = np.fromiter(self._counts.keys(), np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            logits[ids] -= np.float32(s.frequency_penalty) * counts + np.float32(s.presence_penalty)


def sample(logits: Floats, sampling: Sampling, chance: float) -> int:
    """The token at ``chance`` of the distribution that temperature, top-k, top-p and min-p leave."""
    scaled = (logits - logits.max()) / np.float32(max(sampling.temperature, 1e-4))
    weights = np.exp(scaled, dtype=np.float32)
    if not (sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0):
        return _pick(weights, chance)
    order = _candidates(weights, sampling)
    kept = weights[order]
    return int(order[_pick(kept, chance)])


def _candidates(weights: Floats, sampling: Sampling) -> npt.NDArray[np.int64]:
    """Indices that stay, heaviest first."""
    size = len(weights)
    limit = min(sampling.top_k or size, size)
    order = _heaviest(weights, limit, sampling)
    kept = weights[order].astype(np.float64)
    if sampling.top_p < 1.0:
        mass = kept.sum() if sampling.top_k else float(weights.sum(dtype=np.float64))
        before = np.cumsum(kept) - kept
        order = order[: max(1, int(np.count_nonzero(before < sampling.top_p * mass)))]
    if sampling.min_p > 0.0:
        order = order[: max(1, int(np.count_nonzero(weights[order] >= sampling.min_p * weights[order[0]])))]
    return order


def _heaviest(weights: Floats, limit: int, sampling: Sampling) -> npt.NDArray[np.int64]:
    """The ``limit`` heaviest in order; fewer where top-p or min-p certainly cut earlier."""
    count = min(limit, _FIRST_CANDIDATES)
    if count < limit:
        order = _sorted_top(weights, count)
        kept = weights[order].astype(np.float64)
        enough_p = sampling.top_p < 1.0 and not sampling.top_k and kept.sum() >= sampling.top_p * weights.sum(dtype=np.float64)
        enough_m = sampling.min_p > 0.0 and kept[-1] < sampling.min_p * kept[0]
        if enough_p or (enough_m and sampling.top_p >= 1.0):
            return order
    return _sorted_top(weights, limit)


def _sorted_top(weights: Floats, count: int) -> npt.NDArray[np.int64]:
    """Heaviest first; equal weights in order of their ids, so that the choice is the same everywhere."""
    if count >= len(weights):
        return np.argsort(-weights, kind="stable")
    edge = np.partition(weights, len(weights) - count)[len(weights) - count]
    above = np.flatnonzero(weights > edge)
    level = np.flatnonzero(weights == edge)[: count - len(above)]
    order = np.concatenate((above, level))
    return order[np.argsort(-weights[order], kind="stable")]


def _pick(weights: Floats, chance: float) -> int:
    """Index at which the running sum passes ``chance`` of the whole."""
    sums = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(sums, chance * sums[-1], side="right"))
    return min(index, len(weights) - 1)


def logprob_entry(logits: Floats, token: int, top: int, piece: Callable[[int], bytes]) -> bytes:
    """One entry of OpenAI's ``content`` list as JSON: the model's own distribution, before bias, penalties and temperature."""
    peak = logits.max()
    total = peak + np.log(np.exp(logits - peak, dtype=np.float32).sum(dtype=np.float64))
    best = _sorted_top(logits, top) if top > 0 else ()
    entry = _entry(token, float(logits[token] - total), piece(token))
    entry["top_logprobs"] = [_entry(int(t), float(logits[t] - total), piece(int(t))) for t in best]
    return json.dumps(entry, separators=(",", ":"), ensure_ascii=False).encode()


def _entry(token: int, logprob: float, data: bytes) -> dict[str, object]:
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}

"""A JSON schema as a rule for tokens: llama.cpp's grammar sampler over our candidates.

Its traps are kept out here:

- accepting a token that the grammar forbids aborts the process, so ``accept`` asks first;
- a large grammar can crash its parser, so only what a throw-away process has compiled (grammar_check.py) comes here;
- it reads a control token as the text of its name, which a string could hold, while an answer gets no text from it at all;
- it takes bytes that are no UTF-8 for characters: what it counts as one would be several in the answer.
"""

from __future__ import annotations

import codecs
import ctypes
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from protocol.errors import Code, LocalProtocolError, Refused
from runtimes.gguf.llama import Floats, Model, library

_FIRST_TRIES = 64  # likeliest tokens that are asked before all of the vocabulary is
_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class TokenGrammar:
    """One answer's place in a grammar."""

    def __init__(self, model: Model, gbnf: str, end_tokens: frozenset[int]) -> None:
        self._c = library()
        self._model, self._end_tokens = model, sorted(end_tokens)
        self._sampler = self._c.llama_sampler_init_grammar(model.vocab, gbnf.encode(), b"root")
        if not self._sampler or not gbnf:  # llama.cpp takes an empty grammar for none, which forbids nothing
            raise Refused(Code.BAD_INPUT, "the JSON schema gives no usable grammar")
        self._never = _never(model, end_tokens)
        self._partial = b""  # of a character that goes on in the next token
        self._last = ""
        self._one = _Candidates(self._c, 1)

    def __repr__(self) -> str:
        return "<TokenGrammar>"

    def __del__(self) -> None:
        sampler, self._sampler = getattr(self, "_sampler", None), None
        if sampler:
            self._c.llama_sampler_free(sampler)

    def allows(self, token: int) -> bool:
        """Whether the token may come next."""
        one = self._one
        one.data["id"], one.data["logit"] = token, 0.0
        return bool(one.apply(self._sampler)[0] == 0.0) and not self._unfit(np.array([token]))[0]

    def filter(self, logits: Floats) -> Floats:
        """A copy with -inf for every token that may not come next. At least one may: the end, if nothing else."""
        return self._filter(np.arange(len(logits)), logits)

    def best(self, logits: Floats) -> int:
        """The likeliest token that may come next: the likeliest few are asked first, since asking all costs milliseconds."""
        few = min(_FIRST_TRIES, len(logits))
        likeliest = np.sort(np.argpartition(logits, -few)[-few:])  # of equal ones the lowest id, as argmax over all would say
        allowed = self._filter(likeliest, logits[likeliest])
        best = int(allowed.argmax())
        if allowed[best] > logits[likeliest].min():  # no token outside is as likely
            return int(likeliest[best])
        return int(self.filter(logits).argmax())

    def _filter(self, tokens: npt.NDArray[np.int64], logits: Floats) -> Floats:
        some = _Candidates(self._c, len(tokens))
        some.data["id"], some.data["logit"] = tokens, logits
        allowed = some.apply(self._sampler).copy()
        left = np.flatnonzero(np.isfinite(allowed))
        allowed[left[self._unfit(tokens[left])]] = -np.inf
        return allowed

    def _unfit(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of the tokens that the grammar allows are no text here, or none that is UTF-8."""
        if not self._partial:
            return self._never[tokens]
        return np.fromiter((_rest(self._partial + self._model.piece(int(token))) is None for token in tokens), np.bool_, len(tokens))

    def accept(self, token: int) -> None:
        """Goes on with a token. Raises LocalProtocolError for one that is forbidden: llama.cpp would abort."""
        if not self.allows(token):
            raise LocalProtocolError(f"token {token} was chosen against the grammar")
        self._c.llama_sampler_accept(self._sampler, token)
        piece = self._model.piece(token)
        self._partial = _rest(self._partial + piece) or b""
        self._last = piece.decode("utf-8", "replace")[-1:] or self._last

    def is_complete(self) -> bool:
        """Whether the answer is a whole JSON value that cannot grow: an end is allowed, and it is no number that may get digits.

        Without this a greedy model goes on with white space after the last brace for as long as the grammar lets it.
        """
        return not self._last.isdigit() and any(self.allows(token) for token in self._end_tokens[:1])


def _rest(data: bytes) -> bytes | None:
    """What of these bytes is the beginning of a character; None when they are no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return None
    rest = bytes(decoder.getstate()[0])
    return None if b"\xed\xa0" <= rest[:2] <= b"\xed\xbf" else rest  # half a surrogate pair, which Python would see a byte later


def _never(model: Model, end_tokens: frozenset[int]) -> npt.NDArray[np.bool_]:
    """Which tokens begin no text: control tokens, except those that end an answer, and bytes from the middle of a character."""
    if model not in _NEVER:
        pieces = (model.piece(token) for token in range(model.n_vocab))
        _NEVER[model] = np.fromiter((not piece or _rest(piece) is None for piece in pieces), np.bool_, model.n_vocab)
        _NEVER[model][sorted(end_tokens)] = False
    return _NEVER[model]


_NEVER: WeakKeyDictionary[Model, npt.NDArray[np.bool_]] = WeakKeyDictionary()  # 50 ms of work


class _Candidates:
    """Memory of a ``llama_token_data_array``."""

    def __init__(self, c: Any, size: int) -> None:
        self._c = c
        self.data = np.zeros(size, _TOKEN_DATA)
        self._array = c.llama_token_data_array()
        self._array.data = ctypes.cast(self.data.ctypes.data, c.llama_token_data_p)

    def apply(self, sampler: Any) -> Floats:
        """Logits after the grammar. The grammar sampler changes logits in place and keeps the order."""
        self._array.size, self._array.selected, self._array.sorted = len(self.data), -1, False
        self._c.llama_sampler_apply(sampler, ctypes.byref(self._array))
        return self.data["logit"]

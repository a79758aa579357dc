"""The embedding worker beside a Coordinator: by its vectors the answer cache finds questions that mean the same.

    embedder = AnswerEmbedder("minilm-l6-v2")
    nursery.start_soon(embedder.run)
    ...
    vectors = await embedder.embed(["How do I reset my password?"])

It is a Cargo that ships, opened as an Island opens it: in a worker process of its own, in the sandbox, on one thread. Fetching its files
and loading it happen beside the Coordinator, which serves meanwhile; ``state`` says how far that is. Requests that come while a call is
under way go into the next one together. Nothing of the texts is ever logged.

Implements ``coordinator.cache.service.Embedding``.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec

import trio

from node.cargo_runtimes import Grants, find_runtimes, open_cargo
from node.local_cargos import LocalCargo, bring_files
from node.settings import CACHE_MODEL_DEFAULT
from node.shipped import shipped, shipped_names
from protocol.cargo_io import DoneLine, encode_input
from protocol.cargos import Runtime
from protocol.errors import ArchipelagError, ConfigError, RemoteProtocolError
from runtimes.base import LineCargo, LineRequest
from runtimes.store import ModelStore

log = logging.getLogger(__name__)

ON = "on"
TEXTS_PER_CALL_MAX = 64  # 590 ms on one thread with texts of 6 to 62 tokens (runtimes/onnx/texts.py)
TEXTS_WAITING_MAX = 512
ANSWER_S = 5.0  # a call of TEXTS_PER_CALL_MAX long texts takes about two; whoever waits longer has an Island's answer sooner
TEXT_CHARS_USED_MAX = 8_192  # a model takes some hundred tokens; what comes behind this is cut anyway
_RETRY_MIN_S, _RETRY_MAX_S = 5.0, 600.0
_FLOAT_BYTES = 4
_NEEDED_MODULES = ("onnxruntime", "tokenizers")
_FETCHING, _LOADING = "the model is being fetched", "the model is being loaded"
_RESTARTING = "the worker has ended and is started again"


class NoVectors(ArchipelagError):
    """There are no vectors now; the text says why and nothing of what was asked."""


def _has_module(name: str) -> bool:
    return find_spec(name) is not None


def missing_modules(has_module: Callable[[str], bool] = _has_module) -> list[str]:
    """What has to be installed before there can be vectors."""
    return [name for name in _NEEDED_MODULES if not has_module(name)]


@dataclass(eq=False, slots=True)
class _Request:
    texts: Sequence[str]
    answered: trio.Event = field(default_factory=trio.Event)
    vectors: list[list[float]] | None = None
    why_not: str = ""

    def answer(self, vectors: list[list[float]] | None, why_not: str = "") -> None:
        self.vectors, self.why_not = vectors, why_not
        self.answered.set()


class AnswerEmbedder:
    """``run`` is a task of the Coordinator's. ``embed`` and ``state`` can be used at any time."""

    def __init__(
        self,
        model: str = CACHE_MODEL_DEFAULT,
        store: Callable[[], ModelStore] = ModelStore,
        has_module: Callable[[str], bool] = _has_module,
        retry_min_s: float = _RETRY_MIN_S,
    ) -> None:
        """``store`` makes the store of the model's files; it is called in a thread's place. Raises ConfigError for a model that makes
        no vectors."""
        check_model(model)
        self._model, self._store, self._has_module, self._retry_min_s = model, store, has_module, retry_min_s
        self._why = _FETCHING
        self._cargo: LineCargo | None = None
        self._waiting: deque[_Request] = deque()
        self._bell = trio.Event()
        self._calls = self._texts = 0

    def __repr__(self) -> str:
        return f"<AnswerEmbedder {self._model}: {self.state}; {self._texts} texts in {self._calls} calls>"

    @property
    def state(self) -> str:
        """``on``, or a sentence why there are no vectors. Anybody may read it: no paths, no addresses."""
        if self._cargo is None:
            return self._why
        return ON if self._cargo.alive else _RESTARTING

    def statistics(self) -> dict[str, object]:
        return {"model": self._model, "state": self.state, "texts": self._texts, "calls": self._calls}

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """A vector for each text. Raises NoVectors, within ANSWER_S."""
        if not all(text.strip() for text in texts):
            raise NoVectors("an empty text has no vector")
        if (state := self.state) != ON:
            raise NoVectors(state)
        if sum(len(request.texts) for request in self._waiting) + len(texts) > TEXTS_WAITING_MAX:
            raise NoVectors(f"{TEXTS_WAITING_MAX} texts wait for vectors already")
        cleaned = [text[:TEXT_CHARS_USED_MAX].encode(errors="replace").decode() for text in texts]
        parts = [cleaned[at : at + TEXTS_PER_CALL_MAX] for at in range(0, len(cleaned), TEXTS_PER_CALL_MAX)]
        return await self._wait_answers([_Request(part) for part in parts])

    async def _wait_answers(self, requests: Sequence[_Request]) -> list[list[float]]:
        self._waiting.extend(requests)
        self._bell.set()
        vectors: list[list[float]] = []
        try:
            with trio.fail_after(ANSWER_S):
                for request in requests:
                    await request.answered.wait()
                    if request.vectors is None:
                        raise NoVectors(request.why_not)
                    vectors += request.vectors
        except trio.TooSlowError:
            raise NoVectors(f"there were no vectors within {ANSWER_S:g} s") from None
        finally:
            for request in requests:
                if request in self._waiting:  # nobody waits for it any more
                    self._waiting.remove(request)
        return vectors

    async def run(self) -> None:
        """Keeps the worker there until cancelled; returns at once where there can never be one."""
        if missing := missing_modules(self._has_module):
            self._why = f"{missing[0]} is not installed: pip install archipelag[onnx]"
            log.info("answers are cached for equal questions only: %s", self._why)
            return
        pause_s = self._retry_min_s
        while True:
            try:
                await self._live()
            except (ArchipelagError, OSError) as error:
                self._why = f"{_cannot(self._why)}; that is tried again within {pause_s:.0f} s"
                log.warning("answers are cached for equal questions only, %s: %s", self._why, error)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_MAX_S)

    async def _live(self) -> None:
        """Fetches, loads and serves. Raises ConfigError and other errors of fetching and loading."""
        self._why = _FETCHING
        found = await trio.to_thread.run_sync(shipped, self._model)
        assert found is not None, "check_model has seen it"
        local = LocalCargo(found.manifest, found.address, None, found.files)
        with ExitStack() as held:
            files = await bring_files(local, self._store(), held, LogProgress())
            self._why = _LOADING
            began_s = trio.current_time()
            runtimes = await find_runtimes("", with_containers=False)
            async with open_cargo(local.manifest, local.address, files, runtimes, Grants()) as cargo:
                assert isinstance(cargo, LineCargo)
                await _vectors_of(cargo, ["ready"])  # the first call is slow, and a worker that makes no vectors shows here
                log.info("answers are cached for alike questions too: %s was loaded in %.1f s", self._model, trio.current_time() - began_s)
                self._cargo = cargo
                try:
                    await self._serve(cargo)
                finally:
                    self._cargo = None

    async def _serve(self, cargo: LineCargo) -> None:
        """Call after call, until cancelled."""
        while True:
            while not self._waiting:
                self._bell = trio.Event()
                await self._bell.wait()
            requests = self._next_call()
            if not cargo.alive:
                for request in requests:
                    request.answer(None, _RESTARTING)
                continue
            await self._answer(cargo, requests)

    def _next_call(self) -> list[_Request]:
        """As many of the requests that wait as fit into a call; at least one, for each fits alone."""
        requests, texts = [], 0
        while self._waiting and texts + len(self._waiting[0].texts) <= TEXTS_PER_CALL_MAX:
            request = self._waiting.popleft()
            requests.append(request)
            texts += len(request.texts)
        return requests

    async def _answer(self, cargo: LineCargo, requests: Sequence[_Request]) -> None:
        texts = [text for request in requests for text in request.texts]
        try:
            with trio.fail_after(ANSWER_S):
                vectors = await _vectors_of(cargo, texts)
        except (ArchipelagError, trio.TooSlowError) as error:
            log.warning("no vectors for %d texts: %s", len(texts), type(error).__name__)
            for request in requests:
                request.answer(None, "the worker gave no vectors")
            return
        self._calls, self._texts = self._calls + 1, self._texts + len(texts)
        at = 0
        for request in requests:
            request.answer(vectors[at : at + len(request.texts)])
            at += len(request.texts)


def check_model(name: str) -> None:
    """Raises ConfigError for what is no Cargo that ships and makes vectors of texts."""
    if not _makes_vectors(name):
        known = ", ".join(filter(_makes_vectors, shipped_names()))
        raise ConfigError(f"{name[:80]} is no Cargo that ships and makes vectors of texts; those are {known}")


def _makes_vectors(name: str) -> bool:
    found = shipped(name)
    return found is not None and found.manifest.runtime is Runtime.ONNX and json.loads(found.manifest.options).get("task") == "embeddings"


def _cannot(doing: str) -> str:
    """"the model is being fetched" → "the model cannot be fetched"."""
    return doing.replace("is being", "cannot be")


async def _vectors_of(cargo: LineCargo, texts: Sequence[str]) -> list[list[float]]:
    """Raises Refused, RemoteProtocolError."""
    data = encode_input({"input": list(texts), "encoding_format": "base64"})
    async with cargo.run_lines(LineRequest("embed", data, bytes(16))) as run:
        results = [line.result async for line in run if isinstance(line, DoneLine)]
    if len(results) != 1:
        raise RemoteProtocolError("the worker ended without an answer")
    return vectors_in(results[0], len(texts))


def vectors_in(result: str, count: int) -> list[list[float]]:
    """The embeddings of a result, little-endian float32 in base64, of one length. Raises RemoteProtocolError."""
    try:
        rows = json.loads(result)["embeddings"]
        data = [base64.b64decode(row, validate=True) for row in rows]
        sizes = {len(row) for row in data}
        if len(data) != count or len(sizes) > 1 or any(not size or size % _FLOAT_BYTES for size in sizes):
            raise ValueError("another number or size of vectors")
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise RemoteProtocolError("the worker's answer holds no vectors") from error
    return [list(struct.unpack(f"<{len(row) // _FLOAT_BYTES}f", row)) for row in data]


class LogProgress:
    """A ``Progress`` of downloads for the log: a line about every tenth."""

    def __init__(self) -> None:
        self._stage, self._tenth = "", -1

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        tenth = done * 10 // total if total else 0
        if (stage, tenth) == (self._stage, self._tenth):
            return
        self._stage, self._tenth = stage, tenth
        log.info("%s: %s", stage, f"{10 * tenth} % of {total / 1e6:,.1f} MB" if total else "begun")


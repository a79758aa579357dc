"""A schema's grammar, made and tried in a throw-away process first: ``python -m runtimes.gguf.grammar_check MODEL``, schema on stdin.

llama.cpp's grammar parser crashes on some inputs and takes for ever on others, and the schema is a stranger's. So a process with little
memory and time converts it, compiles it and walks some steps through it; only a grammar that survives that is handed to the worker.
Results are remembered by the schema's hash, refusals too, so a schema costs once.
"""

from __future__ import annotations

import hashlib
import math
import random
import resource
import sys
import time
from collections import OrderedDict

import numpy as np
import trio

from protocol import limits
from protocol.errors import ArchipelagError, Code, Refused
from runtimes.gguf import gbnf as grammars
from runtimes.gguf import schema as schemas
from runtimes.gguf.grammar import TokenGrammar
from runtimes.gguf.llama import Model

_STEPS = 32
_SEED = 20  # the walk is the same each time
_REFUSED = 3  # exit code: the sentence on stderr is for the schema's author
_AT_ONCE = 2
_CPU_S = int(limits.GRAMMAR_COMPILE_TIMEOUT_S / 2)  # well within the timeout: what ends by that is the machine's fault, not the schema's


class GrammarShop:
    """Gives the GBNF of a schema, for the vocabulary of one model."""

    def __init__(self, model_path: str, environment: dict[str, str]) -> None:
        self._command = [sys.executable, "-P", "-m", "runtimes.gguf.grammar_check", model_path]
        self._environment = environment
        self._known: OrderedDict[bytes, str | Refused] = OrderedDict()
        self._under_way: dict[bytes, trio.Event] = {}
        self._limiter = trio.CapacityLimiter(_AT_ONCE)

    def __repr__(self) -> str:
        return f"<GrammarShop, {len(self._known)} schemas known>"

    async def gbnf(self, schema: str) -> str:
        """The grammar; ``schema`` empty means any JSON object. Raises Refused(bad_input, timeout, internal)."""
        text = schema or schemas.ANY_OBJECT
        try:
            schemas.parse(text)
        except schemas.NoSchema as error:
            raise Refused(Code.BAD_INPUT, str(error)) from None
        known = await self._find(hashlib.sha256(text.encode()).digest(), text)
        if isinstance(known, Refused):
            raise Refused(known.code, known.message)
        return known

    async def _find(self, key: bytes, text: str) -> str | Refused:
        """What is known of a schema, or the work of finding out, which is done once however many ask."""
        while key not in self._known:
            if key in self._under_way:
                await self._under_way[key].wait()
                continue
            done = self._under_way[key] = trio.Event()
            try:
                async with self._limiter:
                    self._known[key] = await self._compile(text)
            finally:
                del self._under_way[key]
                done.set()
        self._known.move_to_end(key)
        while len(self._known) > limits.GRAMMARS_REMEMBERED_MAX:
            self._known.popitem(last=False)
        return self._known[key]

    async def _compile(self, text: str) -> str | Refused:
        """Raises Refused(timeout, internal) where the schema is not to blame; that is not remembered."""
        with trio.move_on_after(limits.GRAMMAR_COMPILE_TIMEOUT_S):
            done = await trio.run_process(
                self._command,
                stdin=text.encode(),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=self._environment,
                cwd="/",
            )
            if done.returncode == 0:
                return done.stdout.decode()
            if done.returncode == _REFUSED:
                return Refused(Code.BAD_INPUT, done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2][:300])
            if done.returncode > 0:  # the library or the model could not be loaded
                raise Refused(Code.INTERNAL, "this engine cannot look at JSON schemas; ask without one or elsewhere")
            return Refused(Code.BAD_INPUT, "the JSON schema is too complex for this engine; make it smaller or less repetitive")
        raise Refused(Code.TIMEOUT, "this engine was too busy to look at the JSON schema; try again")


class _TooSlow(ArchipelagError):
    pass


def convert(text: str) -> str:
    """GBNF of a schema. Raises schemas.NoSchema."""
    gbnf = grammars.gbnf(schemas.parse(text))
    if len(gbnf.encode()) > limits.GBNF_BYTES_MAX:
        raise schemas.NoSchema(f"the JSON schema makes a grammar of {len(gbnf.encode())} bytes; the limit is {limits.GBNF_BYTES_MAX}")
    return gbnf


def walk(model: Model, gbnf: str) -> None:
    """Compiles the grammar and goes some steps through it. Raises when a step takes too long to be borne beside other answers."""
    ends = model.end_tokens()
    grammar = TokenGrammar(model, gbnf, ends)
    generator, level = random.Random(_SEED), np.zeros(model.n_vocab, np.float32)
    for _ in range(_STEPS):
        started = time.process_time()
        allowed = np.flatnonzero(np.isfinite(grammar.filter(level)))
        token = int(generator.choice(allowed))
        if token in ends:
            return
        grammar.accept(token)
        if time.process_time() - started > limits.GRAMMAR_STEP_S_MAX:
            raise _TooSlow


def confine() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (limits.GRAMMAR_MEMORY_BYTES_MAX,) * 2)


def limit_time() -> None:
    """From now on: a large vocabulary on a slow machine takes its time, and that is not the schema's."""
    seconds = math.ceil(time.process_time()) + _CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def main() -> int:
    """Exit code 0 and the grammar on stdout, or _REFUSED and a sentence on stderr. A signal means that the schema was too much."""
    confine()
    model = Model(sys.argv[1], vocabulary_only=True)
    limit_time()
    text = sys.stdin.buffer.read(limits.SCHEMA_BYTES_MAX + 1).decode()
    try:
        gbnf = convert(text)
        walk(model, gbnf)
    except (schemas.NoSchema, Refused) as error:
        print(error, file=sys.stderr)
        return _REFUSED
    except _TooSlow:
        print("the JSON schema leaves too many ways open at once; make it smaller", file=sys.stderr)
        return _REFUSED
    except Exception as error:  # the library is foreign code and this process exists to contain it
        print(f"the JSON schema cannot be turned into a grammar ({type(error).__name__})", file=sys.stderr)
        return _REFUSED
    sys.stdout.buffer.write(gbnf.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

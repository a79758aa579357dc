"""Grammars: made by a process that may die, asked token by token, and followed by whole answers of the real model."""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from protocol import limits
from protocol.errors import Code, LocalProtocolError, Refused
from protocol.generation import ChatMessage, FinishReason, GenerationRequest, OutputFormat, Role, Sampling, pack_tokens
from runtimes.gguf import grammar_check
from runtimes.gguf.cargo import worker_environment
from runtimes.gguf.engine import Engine, Events
from runtimes.gguf.grammar import TokenGrammar
from runtimes.gguf.grammar_check import GrammarShop, convert
from runtimes.gguf.kv import KvBook
from runtimes.gguf.layers import Stage
from runtimes.gguf.llama import ContextSize, Model
from runtimes.gguf.messages import Ended
from runtimes.gguf.prepare import Preparer
from runtimes.gguf.scheduler import TimeModel
from runtimes.gguf.schema import ANY_OBJECT
from runtimes.gguf.template import ChatTemplate

CELLS, SLOTS, SEQUENCES = 8192, 32, 64
MAX_TOKENS = 250  # what is bounded has ended by then, see test_answers_fit_their_schemas
NAME = {"type": "string", "maxLength": 12}
PERSON = {
    "type": "object",
    "properties": {"name": NAME, "age": {"type": "integer", "minimum": 0, "maximum": 130}, "nick": {"type": "string", "maxLength": 8}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "a person": PERSON,
    "optional properties": {
        "type": "object",
        "properties": {k: {"type": "boolean"} for k in ("sunny", "warm", "wet")},
        "required": ["warm"],
    },
    "one of some values": {"enum": ["red", 'dark "red"', "back\\slash", "é", 7, None, {"a": [True]}]},
    "a list": {"type": "array", "items": {"enum": ["egg", "milk", "bread"]}, "minItems": 2, "maxItems": 4},
    "a list of people": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2},
    "a tuple": {"type": "array", "prefixItems": [{"type": "string", "maxLength": 9}, {"type": "number", "minimum": -1, "maximum": 1}]},
    "numbers": {
        "type": "object",
        "properties": {"i": {"type": "integer"}, "n": {"type": "number"}, "p": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}},
        "required": ["i", "n", "p"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "place": {"type": "object", "properties": {"city": NAME, "at": {"type": "array", "items": {"type": "number"}, "maxItems": 2}}}
        },
        "required": ["place"],
    },
    "patterns": {
        "type": "object",
        "properties": {
            "plate": {"type": "string", "pattern": "^[A-Z]{1,3}-\\d{2,4}$"},
            "word": {"type": "string", "pattern": '^[^aeiou]{2,8}["\\\\]?$'},
            "any": {"type": "string", "pattern": "^.{3,9}$"},
        },
        "required": ["plate", "word", "any"],
    },
    "this or that": {"anyOf": [PERSON, {"type": "array", "items": {"type": "integer"}, "maxItems": 3}, {"type": "null"}]},
    "a tree": {
        "$ref": "#/$defs/tree_node",
        "$defs": {
            "tree_node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "maximum": 99},
                    "left": {"$ref": "#/$defs/leaf"},
                    "right": {"$ref": "#/$defs/leaf"},
                },
                "required": ["value", "left", "right"],
            },
            "leaf": {"anyOf": [{"type": "object", "properties": {"value": {"const": 1}}}, {"type": "null"}]},
        },
    },
    "a map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 3},
    "a name and a map": {
        "type": "object",
        "properties": {"id": {"const": "x"}},
        "required": ["id"],
        "additionalProperties": {"type": "null"},
    }
    | {"maxProperties": 3},
    "two kinds": {"type": ["object", "null"], "properties": {"a": {"type": ["string", "integer"], "maxLength": 5}}, "required": ["a"]},
    "all of": {"allOf": [PERSON, {"properties": {"age": {"minimum": 30}}, "required": ["nick"]}]},
    "dates": {
        "type": "object",
        "properties": {"day": {"type": "string", "format": "date"}, "at": {"type": "string", "format": "date-time"}},
        "required": ["day", "at"],
    },
    "only a number": {"type": "integer"},
    "only a text": {"type": "string", "minLength": 1, "maxLength": 20},
}
UNBOUNDED = {"a map", "a name and a map"}  # a name may be as long as the model likes
DATES = {"date": r"\d{4}-\d\d-\d\d", "date-time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"}
KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def is_kind(value: object, kind: str) -> bool:
    return isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def same(one: object, other: object) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def fits(value: Any, schema: Any, root: Any) -> bool:
    """A validator for what SCHEMAS use, written from the specification and not from our grammar."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        target = root
        for step in schema["$ref"][2:].split("/"):
            target = target[step]
        if not fits(value, target, root):
            return False
    kinds = schema.get("type", [])
    if kinds and not any(is_kind(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if "enum" in schema and not any(same(value, known) for known in schema["enum"]):
        return False
    if "const" in schema and not same(value, schema["const"]):
        return False
    if "anyOf" in schema and not any(fits(value, part, root) for part in schema["anyOf"]):
        return False
    if not all(fits(value, part, root) for part in schema.get("allOf", ())):
        return False
    if isinstance(value, dict):
        return fits_object(value, schema, root)
    if isinstance(value, list):
        return fits_array(value, schema, root)
    return fits_scalar(value, schema)


def fits_object(value: dict[str, Any], schema: Any, root: Any) -> bool:
    known = schema.get("properties", {})
    return (
        set(schema.get("required", ())) <= value.keys()
        and schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", 10**9)
        and all(fits(item, known.get(name, schema.get("additionalProperties", True)), root) for name, item in value.items())
    )


def fits_array(value: list[Any], schema: Any, root: Any) -> bool:
    first = schema.get("prefixItems", [])
    return (
        schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9)
        and all(fits(item, part, root) for item, part in zip(value, first, strict=False))
        and all(fits(item, schema.get("items", True), root) for item in value[len(first) :])
    )


def fits_scalar(value: Any, schema: Any) -> bool:
    if isinstance(value, str):
        return (
            schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)
            and re.search(schema.get("pattern", ""), value) is not None
            and re.fullmatch(DATES.get(schema.get("format", ""), ".*"), value, re.DOTALL) is not None
        )
    if is_kind(value, "number"):
        above = value >= schema.get("minimum", -math.inf) and value > schema.get("exclusiveMinimum", -math.inf)
        return bool(above and value <= schema.get("maximum", math.inf) and value < schema.get("exclusiveMaximum", math.inf))
    return True


def test_the_validator_can_say_no() -> None:
    person = {"name": "Ann", "age": 3}
    assert fits(person, PERSON, PERSON) and fits([person], SCHEMAS["a list of people"], None)
    wrongs: list[Any] = [
        {"name": "Ann"},
        {"name": 1, "age": 3},
        {"name": "Ann", "age": 131},
        {"name": "Ann", "age": True},
        person | {"x": 1},
        [],
    ]
    for wrong in wrongs:
        assert not fits(wrong, PERSON, PERSON)
    assert not fits("AB-1", SCHEMAS["patterns"]["properties"]["plate"], None)
    assert not fits(0, SCHEMAS["numbers"]["properties"]["p"], None) and fits(0.5, SCHEMAS["numbers"]["properties"]["p"], None)
    assert not fits({"value": 1, "left": {"value": 2}, "right": None}, SCHEMAS["a tree"], SCHEMAS["a tree"])
    assert not fits("2024-1-1", {"format": "date"}, None) and not fits(1.0, {"type": "integer"}, None)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    end: Ended | None = None


class Bench:
    """An engine over the real model, driven by hand."""

    def __init__(self, model: Model, stage: Stage) -> None:
        stage.context.clear()
        self.engine = Engine(stage, model, model.end_tokens(), KvBook(CELLS, SLOTS, SEQUENCES), TimeModel(0.02, 0.002), batch_rows=256)
        template = ChatTemplate(model.chat_template(100_000), model.special_text(model.bos()), model.special_text(model.eos()))
        self.preparer = Preparer(model, template, context_tokens=2048)
        self.answers: list[Answer] = []

    def start(self, request: GenerationRequest, gbnf: str) -> Answer:
        job = self.preparer.job(len(self.answers), request, b"", gbnf)
        answer = Answer(end=self.preparer.finished(job))
        self.answers.append(answer)
        if answer.end is None:
            self.engine.submit(job)
        return answer

    def drain(self) -> None:
        while not self.engine.is_idle:
            self._keep(self.engine.step())

    def _keep(self, events: Events) -> None:
        at = 0
        for output in events.outputs:
            self.answers[output.job].tokens += events.tokens[at : at + output.count]
            self.answers[output.job].text += output.text
            at += output.count
        for over in events.over:
            assert isinstance(over, Ended)
            self.answers[over.job].end = over
            self.answers[over.job].text += over.text

    def answer(self, request: GenerationRequest, gbnf: str) -> Answer:
        answer = self.start(request, gbnf)
        self.drain()
        return answer


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[Model]:
    model = Model(str(smollm2_path), plain=True)
    yield model
    model.close()


@pytest.fixture(scope="module")
def stage(model: Model) -> Iterator[Stage]:
    stage = Stage(model, ContextSize(CELLS, SEQUENCES, batch=256, micro_batch=128, outputs=256, threads=1))
    yield stage
    stage.close()


@pytest.fixture
def bench(model: Model, stage: Stage) -> Bench:
    return Bench(model, stage)


@pytest.fixture
def shop(smollm2_path: Path) -> GrammarShop:
    return GrammarShop(str(smollm2_path), worker_environment())


def ask(text: str, max_tokens: int = MAX_TOKENS, schema: str = "", **sampling: float) -> GenerationRequest:
    messages = (ChatMessage(Role.SYSTEM, "You are a helpful AI assistant."), ChatMessage(Role.USER, text))
    form = OutputFormat.JSON_SCHEMA if schema else OutputFormat.JSON_OBJECT
    settings = Sampling(**({"temperature": 0.0} | sampling))  # type: ignore[arg-type]
    return GenerationRequest(messages=messages, max_tokens=max_tokens, sampling=settings, output_format=form, schema=schema)


# The shop


class Spy:
    """Counts the processes that are started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = 0
        self._run = trio.run_process
        monkeypatch.setattr(trio, "run_process", self._start)

    async def _start(self, *args: Any, **kwargs: Any) -> Any:
        self.started += 1
        return await self._run(*args, **kwargs)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def with_program(shop: GrammarShop, program: str, *arguments: str) -> GrammarShop:
    """The shop runs this instead of the compiler. -S: no site packages, which take a tenth of a second."""
    shop._command = [sys.executable, "-S", "-c", program, *arguments]
    return shop


async def refusal(shop: GrammarShop, schema: object) -> Refused:
    with pytest.raises(Refused) as caught:
        await shop.gbnf(json.dumps(schema))
    return caught.value


async def test_a_good_schema_gives_a_grammar_once(shop: GrammarShop, model: Model, spy: Spy) -> None:
    gbnf = await shop.gbnf(json.dumps(PERSON))
    assert TokenGrammar(model, gbnf, model.end_tokens()).allows(model.tokenize("{", False, False)[0])
    assert gbnf == convert(json.dumps(PERSON))
    assert spy.started == 1
    assert await shop.gbnf(json.dumps(PERSON)) == gbnf
    assert spy.started == 1 and repr(shop) == "<GrammarShop, 1 schemas known>"


async def test_no_schema_means_any_object(shop: GrammarShop, spy: Spy) -> None:
    assert await shop.gbnf("") == await shop.gbnf(ANY_OBJECT) == convert(ANY_OBJECT)
    assert spy.started == 1


async def test_a_bad_schema_is_refused_without_a_process(shop: GrammarShop, spy: Spy) -> None:
    error = await refusal(shop, {"type": "string", "maxLength": 20_000})
    assert error.code is Code.BAD_INPUT
    assert error.message == "maxLength in the JSON schema may be at most 1000"
    assert spy.started == 0


async def test_what_the_process_finds_comes_back_as_a_sentence_and_is_remembered(shop: GrammarShop, spy: Spy) -> None:
    schema = {"type": "object", "properties": {}, "required": ["é"], "additionalProperties": False}
    for _ in range(2):
        error = await refusal(shop, schema)
        assert error.code is Code.BAD_INPUT
        assert error.message == "the JSON schema requires 'é', which is none of the properties"
    assert spy.started == 1


async def test_a_schema_with_too_many_ways_is_refused(shop: GrammarShop) -> None:
    error = await refusal(shop, {"type": "string", "pattern": "^(a?){1000}$"})
    assert error.message == "the JSON schema leaves too many ways open at once; make it smaller"


async def test_a_schema_without_a_usable_grammar_is_refused(shop: GrammarShop) -> None:
    """llama.cpp finds rules that begin with themselves, and complains on stderr before we do."""
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}}
    assert (await refusal(shop, schema)).message == "the JSON schema gives no usable grammar"


async def test_a_grammar_that_crashes_the_parser_ends_a_throw_away_process_only(shop: GrammarShop, smollm2_path: Path, spy: Spy) -> None:
    """Its parser calls itself for each bracket, until the stack ends: the same as with ``maxLength: 20000`` written out."""
    program = (
        "import sys; sys.path[:] = sys.argv.pop().split(':')\n"
        "from runtimes.gguf import gbnf, grammar_check\n"
        "gbnf.gbnf = lambda _: 'root ::= ' + '(' * 90_000 + '\"a\"' + ')' * 90_000\n"
        "sys.exit(grammar_check.main())"
    )
    with_program(shop, program, str(smollm2_path), ":".join(sys.path))
    done = await trio.run_process(shop._command, stdin=b"{}", check=False, capture_stdout=True, capture_stderr=True, cwd="/")
    assert done.returncode < 0, done.stderr  # the crash is real
    for _ in range(2):
        error = await refusal(shop, {})
        assert error.code is Code.BAD_INPUT
        assert error.message == "the JSON schema is too complex for this engine; make it smaller or less repetitive"
    assert spy.started == 2


async def test_a_schema_that_takes_for_ever_is_ended_by_its_processor_time(shop: GrammarShop, smollm2_path: Path) -> None:
    """One that llama.cpp does not finish. The process has one second here, and the sentence blames the schema."""
    program = (
        "import sys; sys.path[:] = sys.argv.pop().split(':')\n"
        "from runtimes.gguf import grammar_check\n"
        "grammar_check._CPU_S = 1\n"
        "sys.exit(grammar_check.main())"
    )
    with_program(shop, program, str(smollm2_path), ":".join(sys.path))
    error = await refusal(shop, {"type": "string", "pattern": "^((a?){1000}){1000}$"})
    assert error.code is Code.BAD_INPUT and "too complex" in error.message


async def test_what_the_library_writes_before_the_sentence_is_left_out(shop: GrammarShop) -> None:
    """It may hold the schema, line for line."""
    with_program(shop, "import sys; sys.exit(sys.stderr.write('parse: error\\nroot ::= secret\\nthe sentence\\n') and 3)")
    assert (await refusal(shop, {})).message == "the sentence"


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os.abort()"])
async def test_a_process_that_is_killed_is_a_refusal(shop: GrammarShop, end: str, spy: Spy) -> None:
    with_program(shop, f"import os, signal, sys; sys.stdin.read(); {end}")
    assert (await refusal(shop, {})).code is Code.BAD_INPUT
    assert "too complex" in (await refusal(shop, {})).message
    assert spy.started == 1


async def test_a_process_that_waits_is_ended_and_blames_nobody(
    shop: GrammarShop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Processor time ends what computes for ever. What is slow without computing waits for a busy machine, so it may be tried again."""
    monkeypatch.setattr(limits, "GRAMMAR_COMPILE_TIMEOUT_S", 1.0)
    pid = tmp_path / "pid"
    with_program(shop, "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(1000)", str(pid))
    error = await refusal(shop, {})
    assert error.code is Code.TIMEOUT and error.retryable and "too busy" in error.message
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert await with_program(shop, "print('root ::= \"a\"', end='')").gbnf("{}") == 'root ::= "a"'


async def test_an_engine_that_cannot_look_at_schemas_does_not_blame_them(shop: GrammarShop, spy: Spy) -> None:
    shop._command[-1] = "/no/such/model"
    for _ in range(2):
        error = await refusal(shop, {})
        assert error.code is Code.INTERNAL and "/no/such/model" not in error.message
    assert spy.started == 2


async def test_many_who_ask_at_once_cost_one_process(shop: GrammarShop, spy: Spy) -> None:
    with_program(shop, "import sys; print(sys.stdin.read(), end='')")
    found: list[str] = []

    async def one(schema: str) -> None:
        found.append(await shop.gbnf(schema))

    async with trio.open_nursery() as nursery:
        for n in range(12):
            nursery.start_soon(one, json.dumps({"const": n % 3}))
    assert sorted(found) == sorted(json.dumps({"const": n % 3}) for n in range(12))
    assert spy.started == 3


async def test_one_who_gives_up_leaves_the_work_to_the_others(shop: GrammarShop, spy: Spy, tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    with_program(shop, "import sys; print(open(sys.argv[1]).read(), end='')", str(go))
    found: list[str] = []

    async def other() -> None:
        found.append(await shop.gbnf("{}"))

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(other)
            nursery.start_soon(trio.lowlevel.checkpoint)
            scope.cancel()
            await shop.gbnf("{}")
        assert scope.cancelled_caught
        async with await trio.open_file(go, "w") as file:
            await file.write("root")
    assert found == ["root"] and shop._under_way == {}


async def test_the_oldest_is_forgotten(shop: GrammarShop, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GRAMMARS_REMEMBERED_MAX", 2)
    with_program(shop, "import sys; print(sys.stdin.read(), end='')")
    for number in (1, 2, 1, 3, 1):
        await shop.gbnf(json.dumps({"const": number}))
    assert spy.started == 3
    await shop.gbnf(json.dumps({"const": 2}))
    assert spy.started == 4


async def test_the_process_sees_no_secret_of_the_node(shop: GrammarShop, monkeypatch: pytest.MonkeyPatch, smollm2_path: Path) -> None:
    monkeypatch.setenv("ARCHIPELAG_SECRET", "x")
    shop = with_program(GrammarShop(str(smollm2_path), worker_environment()), "import os; print(sorted(os.environ), os.getcwd())")
    seen = await shop.gbnf("{}")
    assert "SECRET" not in seen and "PYTHONPATH" in seen and seen.strip().endswith(" /")


def test_a_grammar_may_not_be_larger_than_a_frame_holds() -> None:
    with pytest.raises(ValueError, match=r"makes a grammar of \d+ bytes; the limit is 196608"):
        convert(json.dumps({"properties": {f"p{n}": True for n in range(2500)}}))


def test_every_step_of_the_walk_is_timed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gbnf = convert(ANY_OBJECT)
    grammar_check.walk(model, gbnf)
    monkeypatch.setattr(limits, "GRAMMAR_STEP_S_MAX", 0.0)
    with pytest.raises(grammar_check._TooSlow):
        grammar_check.walk(model, gbnf)


# Tokens


def grammar_of(model: Model, schema: dict[str, Any]) -> TokenGrammar:
    return TokenGrammar(model, convert(json.dumps(schema)), model.end_tokens())


def accept_text(model: Model, grammar: TokenGrammar, text: str) -> None:
    for token in model.tokenize(text, add_special=False, parse_special=False):
        grammar.accept(token)


@pytest.mark.parametrize("name", ["a person", "a list", "patterns", "a map", "this or that", "only a number"])
def test_all_questions_have_the_same_answer(model: Model, name: str) -> None:
    """allows, filter and best are asked at every step of an answer; what they allow is accepted."""
    chance = np.random.default_rng(len(name))
    grammar = grammar_of(model, SCHEMAS[name])
    for _ in range(25):
        logits = chance.standard_normal(model.n_vocab).astype(np.float32).round(1)  # rounded: many are equal
        before = logits.copy()
        filtered = grammar.filter(logits)
        allowed = np.isfinite(filtered)
        assert (filtered[allowed] == before[allowed]).all() and (filtered[~allowed] == -np.inf).all()
        some = [*chance.choice(np.flatnonzero(allowed), 20), *chance.integers(0, model.n_vocab, 100)]
        assert [grammar.allows(int(token)) for token in some] == [bool(allowed[token]) for token in some]
        assert grammar.best(logits) == int(filtered.argmax())
        assert (logits == before).all()
        token = int(chance.choice(np.flatnonzero(allowed)))
        if token in model.end_tokens():
            break
        grammar.accept(token)


def test_best_is_right_however_unlikely_the_allowed_ones_are(model: Model) -> None:
    grammar = grammar_of(model, {"const": 7})
    seven = model.tokenize("7", False, False)[0]
    logits = np.arange(model.n_vocab, dtype=np.float32)
    logits[seven] = -100.0
    assert grammar.best(logits) == seven
    assert grammar.best(np.zeros(model.n_vocab, np.float32)) == int(grammar.filter(np.zeros(model.n_vocab, np.float32)).argmax())


def test_of_equally_likely_tokens_best_takes_the_lowest_id(model: Model) -> None:
    """As argmax does over all of them; otherwise an answer that is resumed elsewhere could go another way."""
    grammar = grammar_of(model, {"type": "integer"})
    digits = [model.tokenize(digit, False, False)[0] for digit in "123456789"]
    logits = np.zeros(model.n_vocab, np.float32)
    logits[digits] = 5.0
    assert grammar.best(logits) == min(digits)
    logits[:] = 5.0
    assert grammar.best(logits) == int(grammar.filter(logits).argmax())


def test_a_forbidden_token_is_our_bug_and_ends_no_process(model: Model) -> None:
    grammar = grammar_of(model, {"type": "object"})
    forbidden = [model.tokenize("x", False, False)[0], min(model.end_tokens()), model.bos()]
    for token in forbidden:
        with pytest.raises(LocalProtocolError, match="chosen against the grammar"):
            grammar.accept(token)
    accept_text(model, grammar, "{}")
    assert grammar.is_complete()
    with pytest.raises(LocalProtocolError):
        grammar.accept(model.tokenize(" ", False, False)[0])
    for token in model.end_tokens():
        grammar.accept(token)


def test_the_two_views_of_a_token_that_ends_are_one(model: Model) -> None:
    grammar = grammar_of(model, {"const": 1})
    logits = np.zeros(model.n_vocab, np.float32)
    assert not any(grammar.allows(token) for token in model.end_tokens())
    accept_text(model, grammar, "1")
    assert set(np.flatnonzero(np.isfinite(grammar.filter(logits)))) == model.end_tokens()


def test_control_tokens_are_no_text(model: Model) -> None:
    """llama.cpp takes them for their names, which would be a good text; the answer would lack it."""
    controls = [token for token in range(model.n_vocab) if not model.piece(token) and token not in model.end_tokens()]
    assert model.tokenize("<repo_name>", False, parse_special=True)[0] in controls
    grammar = grammar_of(model, {"type": "string"})
    accept_text(model, grammar, '"')
    allowed = np.isfinite(grammar.filter(np.zeros(model.n_vocab, np.float32)))
    assert not allowed[controls].any() and not any(grammar.allows(token) for token in controls)
    logits = np.zeros(model.n_vocab, np.float32)
    logits[controls] = 9.0
    assert grammar.best(logits) not in controls


def test_no_string_holds_a_control_character(model: Model) -> None:
    """JSON forbids them (RFC 8259, section 7): "All Unicode characters may be placed within the quotation marks, except …" ."""
    grammar = grammar_of(model, {"type": "string"})
    accept_text(model, grammar, '"a')
    for token in np.flatnonzero(np.isfinite(grammar.filter(np.zeros(model.n_vocab, np.float32)))):
        assert not any(byte < 0x20 or byte == 0x7F for byte in model.piece(int(token)))


@pytest.mark.parametrize(
    ("good", "wrong"),
    [
        (b"\xc3\xa9", b"\x80"),  # the middle of a character
        (b"\xe0\xa0\x80", b"\xe0\x9f"),  # a character that has a shorter form
        (b"\xed\x9f\xbf", b"\xed\xa0"),  # half of a surrogate pair
        (b"\xf0\x90\x80\x80", b"\xf0\x8f"),  # a shorter form again
        (b"\xf4\x8f\xbf\xbf", b"\xf4\x90"),  # beyond the last character
    ],
)
def test_a_character_is_one_of_utf_8(model: Model, good: bytes, wrong: bytes) -> None:
    """llama.cpp counts bytes that are no UTF-8 as one character, whatever the answer shows for them."""
    byte = {model.piece(token): token for token in range(model.n_vocab) if len(model.piece(token)) == 1}
    grammar = grammar_of(model, {"type": "string", "maxLength": 1})
    accept_text(model, grammar, '"')
    for at in range(len(good)):
        if good[:at] == wrong[:-1]:
            token = byte[wrong[-1:]]
            assert not grammar.allows(token) and grammar.filter(np.zeros(model.n_vocab, np.float32))[token] == -np.inf
        grammar.accept(byte[good[at : at + 1]])
    accept_text(model, grammar, '"')


def test_an_answer_is_complete_when_it_cannot_grow(model: Model) -> None:
    steps: list[tuple[dict[str, Any], str, bool]] = [
        ({"type": "object"}, "{}", True),
        ({"type": "object"}, "{", False),
        ({"type": "array"}, "[1]", True),
        ({"type": "integer"}, "12", False),
        ({"enum": [1, 12]}, "1", False),
        ({"type": "boolean"}, "true", True),
        ({"const": "1"}, '"1', False),
        ({}, '"a"', True),
    ]
    for schema, text, is_complete in steps:
        grammar = grammar_of(model, schema)
        accept_text(model, grammar, text)
        assert grammar.is_complete() == is_complete, text


def test_a_grammar_that_is_none_is_refused(model: Model) -> None:
    for gbnf in ("", "root", "root ::= undefined", 'other ::= "a"', "root ::= root", 'root ::= "a', "root ::= [a", 'root ::= ("a"'):
        with pytest.raises(Refused) as caught:
            TokenGrammar(model, gbnf, model.end_tokens())
        assert caught.value.code is Code.BAD_INPUT


def walk(model: Model, gbnf: str, seed: int, steps: int = 150) -> str | None:
    """A text chosen by lot; the longer it gets, the more what closes something is preferred. None: it came to no end."""
    chance, ends = random.Random(seed), model.end_tokens()
    grammar, text = TokenGrammar(model, gbnf, ends), b""
    letters = [token for token in range(model.n_vocab) if len(model.piece(token)) == 1]
    closing = [token for token in letters if model.piece(token) in b'"}]0']
    for step in range(steps):
        tokens = [*letters, *chance.choices(range(model.n_vocab), k=400)]
        chance.shuffle(tokens)
        first = closing if chance.random() < step / 50 else []
        token = next((token for token in (*first, *tokens, *ends) if grammar.allows(token)), None)
        if token is None:
            return None
        if token not in ends:
            grammar.accept(token)
            text += model.piece(token)
        if token in ends or grammar.is_complete():
            return text.decode("utf-8", "replace")
    return None


def test_every_walk_through_a_grammar_ends_in_a_valid_text(model: Model) -> None:
    """Choices by lot and not by the model, which would never take the odd ones: quotes, escapes, empty names, half characters."""
    unbounded: dict[str, dict[str, Any]] = {"any value": {}, "any object": {"type": "object"}, "any text": {"type": "string"}}
    finished = 0
    for name, schema in (SCHEMAS | unbounded).items():
        gbnf = convert(json.dumps(schema))
        for seed in range(6):
            text = walk(model, gbnf, seed)
            if text is not None:
                finished += 1
                assert fits(json.loads(text), schema, schema), (name, seed, text)
    assert finished > 100


# Whole answers


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answers_fit_their_schemas(bench: Bench, temperature: float) -> None:
    chance = random.Random(11)
    asked = []
    for name, schema in SCHEMAS.items():
        request = ask(f"Invent {name} in JSON.", schema=json.dumps(schema), temperature=temperature, seed=chance.randrange(2**31))
        asked.append((name, schema, bench.start(request, convert(request.schema))))
    bench.drain()
    for name, schema, answer in asked:
        assert answer.end is not None
        if name in UNBOUNDED and answer.end.reason is FinishReason.LENGTH:
            continue
        assert answer.end.reason is FinishReason.STOP, (name, answer.text)
        assert fits(json.loads(answer.text), schema, schema), (name, answer.text)
        # tabs between values are JSON's own white space (RFC 8259); inside a text json.loads refuses them
        assert answer.text == answer.text.strip() and not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", answer.text)


def test_a_greedy_answer_stops_behind_its_last_bracket(bench: Bench) -> None:
    """A model that sees no reason to end would go on with white space for as long as it may."""
    gbnf = convert(json.dumps(PERSON)) + 'late ::= "unused"\n'
    loose = gbnf.replace("root ::= ", "root ::= whole [ \\n]*\nwhole ::= ", 1)
    for grammar in (gbnf, loose):
        answer = bench.answer(ask("Invent a person in JSON."), grammar)
        assert answer.text.endswith("}") and answer.end is not None
        assert answer.end.reason is FinishReason.STOP and answer.end.completion_tokens == len(answer.tokens) < MAX_TOKENS


def test_any_object_is_an_object(bench: Bench) -> None:
    requests = [ask("Name a city in JSON.", 80, temperature=temperature, seed=3) for temperature in (0.0, 0.7, 1.2)]
    answers = [bench.start(request, convert(ANY_OBJECT)) for request in requests]
    bench.drain()
    whole = [answer for answer in answers if answer.end is not None and answer.end.reason is FinishReason.STOP]
    assert all(isinstance(json.loads(answer.text), dict) for answer in whole) and whole
    assert all(answer.text.startswith("{") for answer in answers)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_resumed_answer_equals_the_undisturbed_one(model: Model, stage: Stage, temperature: float) -> None:
    request = ask("Invent a person in JSON.", schema=json.dumps(PERSON), temperature=temperature, seed=5)
    gbnf = convert(request.schema)
    whole = Bench(model, stage).answer(request, gbnf)
    assert whole.end is not None and whole.end.reason is FinishReason.STOP
    for cut in (1, len(whole.tokens) // 2, len(whole.tokens) - 1):
        resumed = Bench(model, stage).answer(replace(request, resume=pack_tokens(whole.tokens[:cut])), gbnf)
        assert whole.tokens[:cut] + resumed.tokens == whole.tokens
        assert resumed.text and whole.text.endswith(resumed.text)
        assert resumed.end is not None and resumed.end.reason is FinishReason.STOP
    done = Bench(model, stage).answer(replace(request, resume=pack_tokens(whole.tokens)), gbnf)
    assert done.tokens == [] and done.end is not None and done.end.reason is FinishReason.STOP


def test_an_answer_that_breaks_its_schema_cannot_be_resumed(bench: Bench, model: Model) -> None:
    request = ask("Invent a person.", schema=json.dumps(PERSON))
    with pytest.raises(Refused, match="does not fit the JSON schema") as caught:
        bench.start(replace(request, resume=pack_tokens(model.tokenize("Hello", False, False))), convert(request.schema))
    assert caught.value.code is Code.BAD_INPUT


def test_a_grammar_holds_against_a_bias(bench: Bench, model: Model) -> None:
    """A caller who wants other tokens as much as he may gets none that the schema forbids."""
    sure = model.tokenize("Sure", False, False)[0]
    for temperature in (0.0, 1.0):
        request = ask("Invent a person.", schema=json.dumps(PERSON), temperature=temperature)
        request = replace(request, sampling=replace(request.sampling, logit_bias=((sure, 100.0),)))
        answer = bench.answer(request, convert(request.schema))
        assert fits(json.loads(answer.text), PERSON, PERSON)

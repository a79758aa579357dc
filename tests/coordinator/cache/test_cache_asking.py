"""Keys: everything that can change an answer changes them, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from coordinator.cache.asking import CacheAsk, CacheUse, ask_of, cache_use, question_of, with_question
from coordinator.cache.candidates import CANDIDATES_MAX, WORDS_MAX, WORK_MAX, Candidates
from coordinator.cache.policy import CacheConfig, policy_of, scopes_of, versions_of
from coordinator.http import schema
from protocol.cargo_jobs import CargoInput
from protocol.cargos import CachePolicy
from protocol.errors import ConfigError
from protocol.generation import GenerationRequest
from tests.protocol.cargo_samples import cargo as signed

USUAL = CacheUse()
CHAT: dict[str, Any] = {
    "model": "echo",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is  Paris?"}],
    "temperature": 0.5,
}


def chat(
    drawn: int = 1, cargo: str = "echo", policy: str = "", account: str = "ann", use: CacheUse = USUAL, **changes: Any
) -> CacheAsk | None:
    body = {**CHAT, **changes}
    (request,) = schema.parse_chat(body, drawn).choices
    return ask_of(cargo, request, body, account, policy, use)


def known(ask: CacheAsk | None) -> CacheAsk:
    assert ask is not None
    return ask


def asked(text: str, **changes: Any) -> CacheAsk:
    return known(chat(messages=[CHAT["messages"][0], {"role": "user", "content": text}], **changes))


def test_what_changes_nothing() -> None:
    plain = known(chat())
    assert len(plain.key) == len(plain.context) == 32 and plain.question == "Where is  Paris?"
    assert known(chat(drawn=2)).key == plain.key  # a seed that we drew
    assert asked("where is Paris?").key == plain.key
    assert known(chat(account="bob")).key == plain.key  # accounts are kept apart by the scope
    assert known(chat(stream=True, user="somebody", explain=True)).key == plain.key


@pytest.mark.parametrize(
    "changes",
    [
        {"cargo": "other"},
        {"policy": "eu"},
        {"temperature": 0.4},
        {"top_p": 0.5},
        {"max_tokens": 7},
        {"stop": ["x"]},
        {"seed": 0},
        {"seed": 1},
        {"presence_penalty": 1},
        {"frequency_penalty": 1},
        {"logit_bias": {"5": 1}},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 2},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
        {"messages": CHAT["messages"][1:]},
        {"messages": [{"role": "system", "content": "Be brief"}, CHAT["messages"][1]]},
        {"messages": [{"role": "system", "content": "be brief."}, CHAT["messages"][1]]},
        {"messages": [CHAT["messages"][0], {"role": "user", "content": "Where is  Paris?", "name": "ann"}]},
        {"messages": [*CHAT["messages"], {"role": "assistant", "content": "In France."}, CHAT["messages"][1]]},
    ],
    ids=str,
)
def test_what_changes_key_and_context(changes: dict[str, Any]) -> None:
    plain, other = known(chat()), known(chat(**changes))
    assert other.key != plain.key and other.context != plain.context


def test_the_question_changes_the_key_alone() -> None:
    plain, other = known(chat()), asked("Where is Rome?")
    assert other.key != plain.key and other.context == plain.context
    prompt = schema.parse_completion({"model": "echo", "prompt": "Where is  Paris?", "temperature": 0.5}, 1).choices[0]
    assert known(ask_of("echo", prompt, {}, "ann", "", USUAL)).context != plain.context


def test_every_field_of_a_request_is_in_the_key() -> None:
    """A field that is new some day has to be looked at here: the key is made of the whole request, but for what this test names."""
    names = {field.name for field in dataclasses.fields(GenerationRequest)}
    assert names == {
        *("messages", "prompt", "max_tokens", "sampling", "stop", "top_logprobs", "output_format", "schema", "echo", "resume"),
        *("tools", "tool_choice", "tool", "parallel_calls"),
    }


def test_the_words_of_a_key_do_not_run_together() -> None:
    assert known(chat(cargo="a", policy="b")).key != known(chat(cargo="ab", policy="")).key


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.71},
        {"temperature": 2},
        {"tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]},
    ],
    ids=["warm", "hot", "tools"],
)
def test_what_is_not_kept(changes: dict[str, Any]) -> None:
    assert chat(**changes) is None
    if "temperature" in changes:
        assert chat(**changes, seed=5) is not None


def test_the_usual_temperature_is_kept() -> None:
    assert chat(temperature=None) is not None


def test_a_question_that_is_none() -> None:
    ask = known(chat(messages=[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]))
    assert ask.context == b"" and ask.question == ""
    assert asked("x" * 401).context == b"" and asked("x" * 400).context != b""
    assert asked("x " * 1000).key == asked("X  " + "x " * 998 + "x").key
    assert asked("x " * 1001).key != asked("X " + "x " * 1000).key


def test_another_question_in_its_place() -> None:
    (request,) = schema.parse_chat(CHAT, 1).choices
    other = with_question(request, "Who?")
    assert question_of(other) == "Who?" and other.messages[0] == request.messages[0] and other.sampling == request.sampling
    (prompt,) = schema.parse_completion({"model": "echo", "prompt": "Where?"}, 1).choices
    assert question_of(prompt) == "" and with_question(prompt, "Who?") == prompt  # it is no question


def test_a_prompt_counts_as_it_is_written() -> None:
    def keyed(prompt: str) -> CacheAsk:
        body = {"model": "echo", "prompt": prompt, "temperature": 0}
        return known(ask_of("echo", schema.parse_completion(body, 1).choices[0], body, "ann", "", USUAL))

    texts = ("Where is Paris?", "where is paris?", "Where is  Paris?", "Where is Paris? ", "Where is Paris?\n", "")
    asks = [keyed(text) for text in texts]
    assert len({ask.key for ask in asks}) == len(texts) and {(ask.question, ask.context) for ask in asks} == {("", b"")}
    assert keyed(texts[0]).key == asks[0].key


def test_no_other_wording_stands_in_where_letters_count() -> None:
    assert asked("How many spaces are in a  b").context == asked("Sort these names:\nMary Ann\nBob").context == b""
    assert asked("Where is Rome?").context != b""


def lines(given: dict[str, Any], seed: bytes = bytes(16)) -> CacheAsk:
    return known(ask_of("stats", CargoInput(json.dumps(given).encode(), seed), given, "ann", "", USUAL))


def test_lines_are_exact_only() -> None:
    plain = lines({"text": "One", "n": 1})
    assert plain.context == b"" and plain.question == "" and not plain.by_default
    assert lines({"n": 1, "text": "One"}, b"\1" * 16).key == plain.key
    for other in ({"text": "one", "n": 1}, {"text": "One ", "n": 1}, {"text": "One", "n": 2}, {"text": "One"}, {"text": "One", "n": 1.0}):
        assert lines(other).key != plain.key


@pytest.mark.parametrize(
    ("headers", "use"),
    [
        ((), CacheUse()),
        (("max-age=0",), CacheUse()),
        (("no-cache",), CacheUse(reads=False)),
        (("No-Cache, private",), CacheUse(reads=False, is_private=True)),
        (("no-store",), CacheUse(False, False)),
        (("private", "no-store"), CacheUse(False, False, True)),
        (("no-cache=x , foo",), CacheUse(reads=False)),
    ],
)
def test_what_a_client_says(headers: tuple[str, ...], use: CacheUse) -> None:
    assert cache_use(headers) == use
    ask = known(chat(use=use))
    assert (ask.reads, ask.writes, ask.is_private) == (use.reads, use.writes, use.is_private)


def test_whose_policy_holds() -> None:
    config, said = CacheConfig(ttl_s=5, similarity_milli=900), CachePolicy(False)
    manifest = signed(cache=CachePolicy(True, 7, 990, True)).manifest
    assert policy_of(config, None, None, True) == CachePolicy(True, 5, 900)
    assert not policy_of(config, None, None, False).enabled
    assert policy_of(config, manifest, None, False) == manifest.cache
    assert policy_of(config, manifest, said, True) == said
    assert not policy_of(CacheConfig(enabled=False), manifest, CachePolicy(True), True).enabled


def test_whose_answers() -> None:
    assert scopes_of(CachePolicy(), "ann", False) == ("ann",)
    assert scopes_of(CachePolicy(public=True), "ann", False) == ("", "ann")
    assert scopes_of(CachePolicy(public=True), "ann", True) == ("ann",)


def test_which_releases_count() -> None:
    assert versions_of(None, ()) is None
    assert versions_of(None, ("x",)) == frozenset({"x"})
    assert versions_of((), ("x",)) == frozenset()  # suspended
    assert versions_of(("new", "old"), ("old", "new")) == frozenset({"new"})
    assert versions_of(("new", "old"), ("old",)) == frozenset({"old"})  # as jobs are placed
    assert versions_of(("new", "old"), ()) == frozenset({"new", "old"})


@pytest.mark.parametrize("wrong", [{"ttl_s": 0}, {"entries_max": 0}, {"bytes_max": 0}, {"similarity_milli": 1001}, {"error_budget": 0.0}])
def test_settings_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CacheConfig(**wrong)


def test_the_index_ranks_by_rare_words_and_looks_at_few() -> None:
    index, where = Candidates(), ("ann", b"c")
    for number in range(3 * WORK_MAX):
        index.put(where, ("ann", number.to_bytes(4, "big")), ("how", f"word{number}", "reset" if number < 20 else "other"))
    assert index.find(where, ("how", "word7"))[0] == ("ann", (7).to_bytes(4, "big"))
    found = index.find(where, ("reset", "how"))
    assert len(found) == CANDIDATES_MAX and all(int.from_bytes(slot[1], "big") < 20 for slot in found)
    assert index.find(where, ("nothing", "known")) == [] and index.find(("bob", b"c"), ("how",)) == []
    assert index.find(where, ["how", *(f"unknown{number}" for number in range(WORDS_MAX))]) == []  # it shares too little
    for number in range(3 * WORK_MAX):
        index.take(where, ("ann", number.to_bytes(4, "big")), ("how", f"word{number}", "reset" if number < 20 else "other"))
    assert index._rooms == {}

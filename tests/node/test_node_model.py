"""The API over a real model, from the OpenAI client to the engine in its worker and back, as processes on loopback."""

from __future__ import annotations

import http.client
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import psutil
import pytest
import trio
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from node.cargo_store import CargoStore, FileWanted, of_catalogue, open_cargo_store
from node.commands.status import _lines
from node.control import ask_node
from node.jobs_served import island_hello
from node.localnet import LocalNetwork, LocalNode
from node.net.host import Host, open_host
from protocol.messages import Hello
from runtimes.catalogue import CATALOGUE
from runtimes.sandbox.probe import Level, probe
from runtimes.store import FetchError
from tests.protocol import samples

MODEL = "smollm2-135m"
SYSTEM: ChatCompletionMessageParam = {"role": "system", "content": "You are a helpful AI assistant."}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer"},
        "colour": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}


class Running:
    """A Coordinator, one Island with the model, and a client."""

    def __init__(self, network: LocalNetwork) -> None:
        network.start_coordinator()
        self.island: LocalNode = network.start_island("one", "--cargo", MODEL, "--threads", "1")
        self.peer_id = self.island.wait_ready()["peer_id"]
        self.url, self.key, self.other_key = network.url, network.make_key(), network.make_key(account="other")
        self.client = openai.OpenAI(base_url=network.url + "/v1", api_key=self.key, max_retries=0)

    def chat(self, text: str, **more: Any) -> ChatCompletion:
        fields: dict[str, Any] = {"temperature": 0, "max_tokens": 24} | more
        messages = [SYSTEM, {"role": "user", "content": text}]
        answer: ChatCompletion = self.client.chat.completions.create(model=MODEL, messages=messages, **fields)  # type: ignore[arg-type]
        return answer

    def cargo(self) -> dict[str, Any]:
        """What the Island says of the model now."""
        (facts,) = ask_node(str(self.island.data_dir), "status")["cargos"]
        return dict(facts)

    def wait_idle(self, within_s: float = 5.0) -> float:
        """Seconds until every slot and every KV cell is free again."""
        started_s = time.monotonic()
        while True:
            facts = self.cargo()
            if facts["slots_free"] == facts["slots_total"] and facts["kv_tokens_free"] == facts["kv_tokens_total"]:
                return time.monotonic() - started_s
            assert time.monotonic() - started_s < within_s, facts
            time.sleep(0.01)  # a fact of another process: there is no event to wait for


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with LocalNetwork(tmp_path_factory.mktemp("model")) as network:
        yield Running(network)


def test_the_capital_of_france(running: Running) -> None:
    raw = running.client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[SYSTEM, {"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=64,
    )
    answer = raw.parse()
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert raw.headers["x-archipelag-island"] == raw.headers["x-archipelag-route"] == running.peer_id
    assert answer.usage is not None and answer.usage.completion_tokens < 64


def test_streamed_and_whole_answers_are_the_same(running: Running) -> None:
    whole = running.chat("Name three birds.").choices[0].message.content
    stream = running.client.chat.completions.create(
        model=MODEL,
        messages=[SYSTEM, {"role": "user", "content": "Name three birds."}],
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 24


def test_a_json_schema_holds(running: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(3):
        answer = running.chat(
            "Invent a person.", response_format=form, temperature=0.8, seed=seed, max_tokens=200
        ).choices[0]
        assert answer.finish_reason == "stop"
        person = json.loads(answer.message.content or "")
        assert list(person) == ["name", "age", "colour"] and len(person["name"]) <= 20
        assert isinstance(person["age"], int) and person["colour"] in ("red", "green", "blue")


def test_json_object_gives_an_object(running: Running) -> None:
    answer = running.chat(
        'Answer in JSON with one key "ok".', response_format={"type": "json_object"}, max_tokens=200, logit_bias={}
    ).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content or ""), dict)
    else:  # cut off by its length: still the beginning of an object
        assert (answer.message.content or "").lstrip().startswith("{")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"type": "string", "maxLength": 20_000},
        {"$ref": "https://example.com/schema.json"},
        {"type": "object", "properties": 7},
    ],
)
def test_a_schema_that_is_none_is_refused_and_nothing_breaks(running: Running, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        running.chat("x", response_format=form)
    assert isinstance(caught.value.body, dict) and set(caught.value.body) == {"message", "type", "param", "code"}
    assert running.chat("Hello", max_tokens=2).usage is not None, "the Island and its worker live"


def test_logprobs_are_those_of_the_model(running: Running) -> None:
    answer = running.chat("Name a colour.", logprobs=True, top_logprobs=4, max_tokens=8).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    assert "".join(entry.token for entry in answer.logprobs.content) == answer.message.content
    for entry in answer.logprobs.content:
        assert len(entry.top_logprobs) == 4
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the likeliest"
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0 + 1e-6


def test_choices_differ_and_can_be_had_again(running: Running) -> None:
    first, again = (running.chat("Tell me a story.", n=3, seed=5, temperature=1.2) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]


def test_stop_strings_and_bias(running: Running) -> None:
    plain = running.chat("Count from one to nine.").choices[0].message.content or ""
    stop = plain[10:14]
    stopped = running.chat("Count from one to nine.", stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.message.content == plain[: plain.index(stop)]
    entry = running.chat("Say yes.", logprobs=True, max_tokens=1, temperature=0).choices[0]
    forced = running.chat("Say yes.", logit_bias={"28": 100}, max_tokens=4).choices[0].message.content
    assert forced != entry.message.content and len(set(forced or "")) == 1, "the same token four times"


def test_the_next_turn_finds_its_prefix_but_another_account_does_not(running: Running) -> None:
    opening = "Here is a long introduction to a conversation about lighthouses. " * 6
    told = running.chat(opening)
    turns: list[ChatCompletionMessageParam] = [
        SYSTEM,
        {"role": "user", "content": opening},
        {"role": "assistant", "content": told.choices[0].message.content or ""},
        {"role": "user", "content": "Go on."},
    ]

    def cached(key: str) -> int:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key=key, max_retries=0)
        usage = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=2, temperature=0).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert cached(running.other_key) == 0
    assert told.usage is not None
    assert cached(running.key) >= told.usage.prompt_tokens


def test_too_long_is_said_with_figures(running: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        running.chat("word " * 6500 + "word", max_tokens=4096)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length" in str(caught.value)


def test_many_at_once_get_what_each_would_get_alone(running: Running) -> None:
    questions = [f"What is {n} plus {n}?" for n in range(8)]
    alone = [running.chat(question).choices[0].message.content for question in questions]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda question: running.chat(question).choices[0].message.content, questions))
    assert together == alone
    running.wait_idle()


def test_who_hangs_up_frees_slot_and_cells_within_a_second(running: Running) -> None:
    running.wait_idle()
    connection = http.client.HTTPConnection(urlsplit(running.url).netloc, timeout=60)
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Tell me a very long story."}],
        "stream": True,
        "max_tokens": 2000,
        "logit_bias": {"0": -100, "2": -100},  # without an end
    }
    headers = {"Authorization": f"Bearer {running.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    for _ in range(20):
        answer.readline()
    facts = running.cargo()
    assert facts["slots_free"] == facts["slots_total"] - 1
    answer.close()
    connection.close()
    assert running.wait_idle() < 1.0


# The model as a file


async def test_the_model_is_given_to_islands_of_the_network_and_to_nobody_else(running: Running, tmp_path: Path) -> None:
    status = ask_node(str(running.island.data_dir), "status")
    entry = CATALOGUE[MODEL]
    offer = samples.offer(content_hash=entry.sha256)
    ad = replace(samples.ad(offers=(offer,)), peer=running.peer_id)

    def store(host: Host, network: str) -> CargoStore:
        def hello() -> Hello:
            return island_hello(network, "test")

        return open_cargo_store(host, hello, lambda: [ad], lambda peer: status["addresses"], tmp_path / network, 2**30)

    async with open_host(b"b" * 32, ["/ip4/127.0.0.1/tcp/0"]) as host:
        with trio.fail_after(60):
            with pytest.raises(FetchError):
                await store(host, "n-of-somebody-else").bring(replace(of_catalogue(entry), sources=()))
            kin = store(host, status["network"])
            await kin.bring(replace(of_catalogue(entry), sources=()))
            assert kin.store.model(entry.sha256) is not None and kin.counts.bytes_from_peers == entry.size_bytes
            with pytest.raises(FetchError, match="unknown_blob"):
                await kin.bring(FileWanted("other", "ab" * 32, 5))
    files = ask_node(str(running.island.data_dir), "status")["files"]
    assert files["bytes_served"] == entry.size_bytes
    assert f"bytes_served {entry.size_bytes}" in "\n".join(_lines(ask_node(str(running.island.data_dir), "status")))


def test_what_an_island_brings_is_shown(running: Running) -> None:
    status = ask_node(str(running.island.data_dir), "status")
    status["loading"] = [
        {"name": "a", "address": "ab" * 32, "done_bytes": 5_000_000, "total_bytes": 20_000_000},
        {"name": "b", "address": "cd" * 32, "done_bytes": 5_000_000, "total_bytes": 0},
    ]
    status["files"]["bad_peers"] = {"12D3Liar": "sent a chunk 3 that is not the blob's"}
    told = _lines(status)
    assert "loading    a: 5 of 20 MB (25 %)" in told and "loading    b: 5 MB" in told
    assert "  refused  12D3Liar: sent a chunk 3 that is not the blob's" in told


def test_the_engine_works_behind_walls(running: Running) -> None:
    """Of its Island's processes one computes, and it sees neither the network nor other processes; the Island says so."""
    sandbox = probe()
    assert str(sandbox) in str(ask_node(str(running.island.data_dir), "status")["sandbox"])
    workers = [
        process
        for process in psutil.Process(running.island.process.pid).children(recursive=True)
        if "runtimes.gguf.worker" in process.cmdline() and "launch.py" not in str(process.cmdline())
    ]
    assert workers
    if sandbox.level is Level.NAMESPACES:
        inner = workers[-1].pid
        for kind in ("net", "pid", "mnt", "user"):
            assert os.readlink(f"/proc/{inner}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
        assert "Seccomp:\t2" in Path(f"/proc/{inner}/status").read_text()

"""A model over several Islands, all of it real: processes, libp2p, the engine, SIGKILL; through the OpenAI API.

Each Island offers too little memory for the whole model. What an undisturbed whole model answers is the reference.
"""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from node.control import ask_node
from node.localnet import LocalNetwork
from runtimes.store import ModelStore
from tests.node.pipeline_net import MODEL, STORY, Net

TWO_STAGES, THREE_STAGES = "170M", "145M"  # too little for the whole, and for half of it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Answers of the whole model on one Island."""
    with LocalNetwork(tmp_path_factory.mktemp("whole")) as network:
        net = Net(network, 0, "0")
        network.start_island("whole", "--cargo", MODEL, "--threads", "1").wait_ready()
        known: dict[str, str] = {}

        def ask(text: str = STORY, tokens: int = 60, **more: Any) -> str:
            key = json.dumps([text, tokens, more], sort_keys=True)
            if key not in known:
                known[key] = net.ask(text, tokens, **more).text
            return known[key]

        yield ask


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    with LocalNetwork(tmp_path_factory.mktemp("two")) as network:
        yield Net(network, 2, TWO_STAGES)


def test_the_api_does_not_change(two: Net, whole: Callable[..., str]) -> None:
    assert [model.id for model in two.client.models.list() if model.id == MODEL] == [MODEL]
    answer = two.ask()
    assert answer.text == whole() and len(answer.route) == 2
    stages = answer.metadata["route"]
    assert [stage["island"] for stage in stages] == list(answer.route)
    edges = [tuple(map(int, stage["layers"].split("-"))) for stage in stages]
    assert (edges[0][0], edges[1][1]) == (0, 29) and edges[0][1] + 1 == edges[1][0]
    assert all(0 < stage["compute_ms"] <= stage["held_ms"] for stage in stages)
    assert answer.metadata["price"] == "0.002" and answer.metadata["stages_replaced"] == 0
    assert answer.metadata["wire_ms"] > 0


def test_rows_go_straight_from_stage_to_stage(two: Net) -> None:
    answer = two.ask("What is the capital of France?", 12)
    first, driver = answer.route
    before = two.counts(first), two.counts(driver)
    answer = two.ask("Name three birds.", 20)
    after = two.counts(first), two.counts(driver)
    made = answer.usage["completion_tokens"]
    rows = answer.usage["prompt_tokens"] - answer.usage["prompt_tokens_details"]["cached_tokens"] + made
    assert after[0]["rows_computed"] - before[0]["rows_computed"] in (rows, rows - 1), "the last token of an answer is not computed"
    assert after[1]["steps_arrived"] - before[1]["steps_arrived"] == after[0]["frames_forwarded"] - before[0]["frames_forwarded"]
    assert after[0]["rows_asked"] == after[0]["rows_repeated"] == after[1]["steps_again"] == 0
    coordinator = two.network.coordinator
    assert coordinator is not None
    (pipeline,) = ask_node(str(coordinator.data_dir), "status")["pipelines"]
    assert [stage["island"] for stage in pipeline["stages"]] == list(answer.route) and pipeline["reasons"]


def test_many_at_once_share_batches_and_change_no_answer(two: Net, whole: Callable[..., str]) -> None:
    questions = [f"Write about {topic}." for topic in ("the sea", "bread", "a lighthouse", "rain", "three birds", "numbers")]
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda text: two.ask(text, 40), questions))
    assert [answer.text for answer in answers] == [whole(text, 40) for text in questions]
    driver = answers[0].route[-1]
    counts = two.counts(driver)
    assert counts["rows_sent"] > counts["steps_sent"], "steps carry rows of several jobs"


def test_what_people_set_works_over_stages_too(two: Net, whole: Callable[..., str]) -> None:
    seeded: dict[str, Any] = {"temperature": 0.8, "seed": 7, "stop": ["."]}
    assert two.ask("Write a poem about rain.", 30, **seeded).text == whole("Write a poem about rain.", 30, **seeded)
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"], "additionalProperties": False}
    answer = two.ask("A colour?", 30, response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}})
    assert json.loads(answer.text)["colour"] in ("red", "green")


def test_a_stream_that_is_left_frees_the_cells_of_all_stages(two: Net) -> None:
    with pytest.raises(RuntimeError, match="enough"):
        two.ask(STORY, 400, _leave)
    answer = two.ask("What is the capital of France?", 8)
    first = two.shard(answer.route[0])["stage"]
    assert "Paris" in answer.text and first["kept_bytes"] < 500 * 576 * 4, "what the left answer held is gone"


def _leave(pieces: int) -> None:
    if pieces == 5:
        raise RuntimeError("enough")


def test_too_long_is_refused_with_the_figures(two: Net) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        two.ask("word " * 3000, 100)
    assert caught.value.status_code == 400 and "context" in str(caught.value)


def test_an_island_that_stops_in_order_finishes_what_runs_over_it(whole: Callable[..., str], tmp_path: Path) -> None:
    with LocalNetwork(tmp_path) as network:
        net = Net(network, 3, TWO_STAGES)
        route = net.ask(tokens=8).route
        codes: list[int] = []
        threads: list[threading.Thread] = []

        def stop(pieces: int) -> None:
            if pieces == 10:
                threads.append(threading.Thread(target=lambda: codes.append(net.node(route[0]).stop())))
                threads[0].start()

        answer = net.ask(watch=stop)
        threads[0].join()
        assert answer.text == whole() and codes == [0] and answer.metadata["stages_replaced"] == 0
        assert net.ask().text == whole(), "and another Island has its place"


def test_a_shard_of_its_own_on_each_island_is_enough(whole: Callable[..., str], tmp_path: Path) -> None:
    """A model that no catalogue knows: neither Island has the whole file, nor a source to fetch it from."""
    model = ModelStore().fetch(MODEL).path
    options: tuple[str, ...] = ("--shards", "2", "--name", "mine", "--out", str(tmp_path / "out"))
    command = [sys.executable, "-m", "node", "cargo", "shard", str(model), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with LocalNetwork(tmp_path) as network:
        net = Net(network, 0, "0", "--manifest", str(tmp_path / "out" / "mine.shards.json"))
        for number, shard in enumerate(sorted((tmp_path / "out").glob("*.gguf"))):
            folder = tmp_path / f"own-{number}"
            folder.mkdir()
            shard.rename(folder / shard.name)
            options = ("--memory-limit", "190M", "--threads", "1", "--shard-dir", str(folder), "--cache-dir", str(folder / "cache"))
            node = network.start_island(f"own-{number}-island", *options)
            net.by_peer[str(node.wait_ready()["peer_id"])] = node
        answer = net.ask(model="mine")
        assert answer.text == whole() and len(answer.route) == 2


def test_a_coordinator_that_restarts_uses_what_is_held(whole: Callable[..., str], tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    with LocalNetwork(tmp_path) as network:
        net = Net(network, 2, TWO_STAGES, http=f"127.0.0.1:{ports[0]}", listen=f"/ip4/127.0.0.1/tcp/{ports[1]}")
        route = net.ask(tokens=8).route
        pids = {net.shard(peer)["pid"] for peer in route}
        coordinator = network.coordinator
        assert coordinator is not None
        coordinator.kill()
        coordinator.restart()
        answer = net.ask()
        assert answer.text == whole() and {net.shard(peer)["pid"] for peer in answer.route} == pids, "nothing was loaded again"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_smaller_activations_are_the_operators_choice(tmp_path: Path) -> None:
    with LocalNetwork(tmp_path) as network:
        net = Net(network, 2, TWO_STAGES, "--activations", "int8")
        assert "Paris" in net.ask("What is the capital of France?", 12).text


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_answer_outlives_each_of_its_stages(stage: int, whole: Callable[..., str], tmp_path: Path) -> None:
    with LocalNetwork(tmp_path) as network:
        net = Net(network, 4, THREE_STAGES)
        route = net.ask(tokens=8).route
        assert len(route) == 3
        survivors = [peer for peer in route if peer != route[stage]]
        before = {peer: net.counts(peer).get("rows_computed", 0) for peer in survivors}

        def kill(pieces: int) -> None:
            if pieces == 20:
                net.node(route[stage]).kill()

        answer = net.ask(watch=kill)
        assert answer.text == whole()
        replacement = next(entry["island"] for entry in answer.metadata["route"] if entry["island"] not in route)
        rows = answer.usage["prompt_tokens"] + answer.usage["completion_tokens"] - 1
        for peer in survivors:
            if "stage" in net.shard(peer):
                computed = net.counts(peer)["rows_computed"] - before[peer]
                assert rows - 32 <= computed <= rows, "a survivor computes every position at most once; some were cached"
        if stage < 2:
            counts = net.counts(replacement)
            assert counts["rows_filled"] == counts["rows_asked"] > 20, "it computed exactly what it asked for"
            assert counts["rows_computed"] == rows, "all positions, each once"
            assert answer.metadata["stages_replaced"] == 1
        again = net.ask()
        assert again.text == answer.text and replacement in again.route


def test_nobody_left_is_another_error_than_no_room(tmp_path: Path) -> None:
    with LocalNetwork(tmp_path) as network:
        net = Net(network, 1, TWO_STAGES)
        with pytest.raises(openai.APIStatusError) as caught:
            net.ask(tokens=8)
        assert caught.value.status_code == 503 and "no capacity" in str(caught.value)
    folder = tmp_path / "empty"
    folder.mkdir()
    with LocalNetwork(folder) as network:
        net = Net(network, 0, "0")
        with pytest.raises(openai.APIStatusError) as caught:
            net.ask(tokens=8)
        assert caught.value.status_code == 503 and "nobody offers memory" in str(caught.value)


def test_the_demo_ends_with_the_same_answer() -> None:
    command = [sys.executable, "-m", "node", "demo", "--pipeline", "--kill-stage", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "is dead" in done.stdout and "letter for letter" in done.stdout


@pytest.mark.soak
def test_200_kills_lose_no_request(tmp_path: Path, whole: Callable[..., str]) -> None:
    """A stage of each answer is killed at a place drawn by chance; every answer is the undisturbed one."""
    rng = random.Random(1)
    questions = [f"Write about {topic}." for topic in ("the sea", "bread", "a lighthouse", "rain", "birds", "numbers", "war", "tea")]
    with LocalNetwork(tmp_path) as network:
        net = Net(network, 4, TWO_STAGES)
        killed: dict[int, int] = {0: 0, 1: 0}
        for number in range(200):
            text = rng.choice(questions)
            route = net.ask("Hi.", 2).route
            stage, at = rng.randrange(len(route)), rng.randrange(2, 30)

            def kill(pieces: int, route: tuple[str, ...] = route, stage: int = stage, at: int = at) -> None:
                if pieces == at:
                    net.node(route[stage]).kill()

            answer = net.ask(text, 40, kill)
            assert answer.text == whole(text, 40), f"kill {number} of stage {stage} at {at}"
            killed[stage] += 1
            node = net.node(route[stage])
            facts = node.restart() if not node.running else {}
            assert not facts or facts["peer_id"] == route[stage]
        assert sum(killed.values()) == 200

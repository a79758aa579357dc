"""A batch on real processes: killed in its middle, it goes on and repeats nothing that was done."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.batches.progress import parts_of
from coordinator.books.database import Database
from coordinator.books.run_queries import children_of
from coordinator.keys import database_url_of
from node.localnet import LocalNetwork
from tests.node.test_node_processes import status, wait_for

INPUTS = 16
PARALLEL = 3
ECHO = ("--cargo", "echo", "--echo-delay", "0.05", "--ask", "echo=0.001")


@pytest.fixture
def network(tmp_path: Path) -> Iterator[LocalNetwork]:
    with LocalNetwork(tmp_path) as running:
        yield running


def call(network: LocalNetwork, key: str, path: str, body: object = None) -> dict[str, Any]:
    data = json.dumps(body).encode() if body is not None else None
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{network.url}/api/v1/jobs/{path}", data, headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found


def test_a_batch_goes_on_after_its_coordinator_was_killed(network: LocalNetwork) -> None:
    network.start_coordinator()
    coordinator = network.coordinator
    assert coordinator is not None
    islands = [network.start_island(name, *ECHO) for name in ("one", "two")]
    for island in islands:
        island.wait_ready()
    key = network.make_key()
    wait_for("both Islands", lambda: json.loads(urllib.request.urlopen(f"{network.url}/health").read())["islands"] == 2)
    inputs = [{"prompt": f"input {number} has five words"} for number in range(INPUTS)]
    batch_id = call(network, key, "batch", {"cargo": "echo", "inputs": inputs, "max_parallelism": PARALLEL})["id"]

    def look() -> dict[str, Any] | None:
        try:
            return call(network, key, f"{batch_id}/batch-status")
        except (urllib.error.URLError, ConnectionError):
            return None

    wait_for("some are done", lambda: (found := look()) and found["child_states"].get("succeeded", 0) >= 3)
    coordinator.kill()
    database = Database(database_url_of(coordinator.data_dir))
    done_then = succeeded(database, batch_id)
    assert 3 <= len(done_then) < INPUTS
    coordinator.restart()
    ended = wait_for("the end", lambda: (found := look()) and found["parent_state"] != "running" and found, 30.0)
    assert (ended["parent_state"], ended["child_states"]) == ("succeeded", {"succeeded": INPUTS})
    output = call(network, key, f"{batch_id}/output")
    assert [each["text"] for each in output["outputs"]] == [each["prompt"] for each in inputs]
    assert output["price"] == "0.016"
    done = succeeded(database, batch_id)
    assert set(done.values()) == {1}, "each input was done once"
    with database.reading() as connection:
        again = [parts for job in children_of(connection, batch_id) if (parts := parts_of(batch_id, job.id)) and parts[1] > 0]
    database.close()
    assert not {index for index, _ in again} & done_then.keys(), "and none of those again that had been done"
    assert len(again) <= 2 * PARALLEL, "at most what ran, or was being paid"
    answered = sum(status(island)["jobs"]["done"] for island in islands)
    assert INPUTS <= answered <= INPUTS + 2 * PARALLEL


def succeeded(database: Database, batch_id: str) -> Counter[int]:
    """How many jobs of each input have succeeded."""
    found: Counter[int] = Counter()
    with database.reading() as connection:
        for job in children_of(connection, batch_id):
            parts = parts_of(batch_id, job.id)
            if parts is not None and job.state.value == "succeeded":
                found[parts[0]] += 1
    return found

"""A Cargo's life with real processes: packed, signed, served by its publisher, published, fetched from a peer by another Island, run over
HTTP, and revoked while it runs."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from node.cli import main
from node.control import ask_node
from node.localnet import LocalNetwork, LocalNode, NodeFailed
from runtimes.wasm import modules
from tests.node.coordinators_net import wait_for
from tests.runtimes.wasm import hostile

KILL_S_MAX = 10.0  # mission: 15; it takes about one
TOML = """
name = "{name}"
release = "1.0.0"
runtime = "wasm"
entry = "module.wasm"
licence = "Apache-2.0"
ask = "0.002"

[files."module.wasm"]

[needs]
memory_mb = 256
time_s = 60
"""


def packed(folder: Path, name: str, module: bytes) -> Path:
    """The .cargo file of a new Cargo, beside its module."""
    home = folder / name
    home.mkdir()
    (home / "cargo.toml").write_text(TOML.format(name=name))
    (home / "module.wasm").write_bytes(module)
    for action in ("build", "sign"):
        assert main(["cargo", action, str(home), "--data-dir", str(folder / "publisher")]) == 0
    return home / f"{name}-1.0.0.cargo"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNetwork]:
    with LocalNetwork(tmp_path_factory.mktemp("life")) as network:
        network.start_coordinator()
        yield network


def publish(network: LocalNetwork, file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    key = network.make_key("read", "write", account="pub")
    assert main(["cargo", "publish", str(file), "--coordinator", network.url, "--api-key", key]) == 0, capsys.readouterr()
    return key


def status(island: LocalNode) -> dict[str, Any]:
    return dict(ask_node(str(island.data_dir), "status"))


def offers(island: LocalNode, name: str) -> bool:
    return any(one["name"] == name for one in status(island)["cargos"])


def run(client: httpx.Client, name: str, given: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    answer = client.post("/api/v1/jobs", json={"cargo": name, "input": given, "stream": True})
    assert answer.status_code == 200, answer.text
    blocks = [block.partition("\n") for block in answer.text.split("\n\n") if block]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, _, data in blocks]


def test_from_a_folder_to_another_island_and_off_the_network(
    network: LocalNetwork, client: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = modules.load("sha256")
    file = packed(tmp_path, "my-hash", module.wasm)
    keeper = network.start_island("keeper", "--cargo", str(file), "--cache-dir", str(tmp_path / "keeper"))
    keeper.wait_ready()
    publish(network, file, capsys)
    taker = network.start_island("taker", "--cargo", "my-hash", "--cache-dir", str(tmp_path / "taker"))
    facts = taker.wait_ready()
    assert facts["cargos"] == ["my-hash"]
    files = status(taker)["files"]
    assert files["bytes_from_peers"] == len(module.wasm) and files["bytes_from_sources"] == 0, "the publisher named no source"
    (offer,) = status(taker)["cargos"]
    assert offer["content_hash"] == status(keeper)["cargos"][0]["content_hash"] and offer["runtime"] == "wasm"
    keeper.stop()
    told = run(client, "my-hash", module.example_input)
    assert told[-2][1]["result"] == {name: value for name, value in module.example_output[-1].items() if name != "type"}
    assert told[-1] == ("complete", {"type": "complete", "state": "succeeded"})
    job = client.get("/api/v1/jobs").json()["data"][0]
    assert job["island"] == facts["peer_id"] and job["price"] == "0.002", "what the publisher suggests, where the owner says nothing"

    args = ["cargo", "revoke", "my-hash@1.0.0", "--as-operator", "--reason", "a test", "--data-dir"]
    assert main([*args, str(network.node("coordinator").data_dir)]) == 0, capsys.readouterr()
    started_s = time.monotonic()
    wait_for("the Island takes it down", lambda: not offers(taker, "my-hash"), KILL_S_MAX)
    assert time.monotonic() - started_s < KILL_S_MAX
    answer = client.post("/api/v1/jobs", json={"cargo": "my-hash", "input": {}, "stream": True})
    assert answer.status_code == 404 and "no release" in answer.json()["error"]["message"]
    taker.stop()


def test_what_runs_of_a_revoked_cargo_is_ended(
    network: LocalNetwork, client: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = packed(tmp_path, "endless", hostile.LOOP)
    island = network.start_island("endless", "--cargo", str(file), "--cache-dir", str(tmp_path / "cache"))
    island.wait_ready()
    publish(network, file, capsys)
    wait_for("it is listed", lambda: client.get("/api/v1/cargos/endless").status_code == 200)
    before = client.get("/api/v1/account").json()["credits"]
    job_id = client.post("/api/v1/jobs", json={"cargo": "endless", "input": {}}).json()["id"]
    wait_for("it runs", lambda: status(island)["jobs"]["running"] == 1)
    args = ["cargo", "revoke", "endless@1.0.0", "--as-operator", "--reason", "it never ends", "--data-dir"]
    assert main([*args, str(network.node("coordinator").data_dir)]) == 0, capsys.readouterr()
    started_s = time.monotonic()

    def job() -> dict[str, Any]:
        return dict(client.get(f"/api/v1/jobs/{job_id}").json())

    wait_for("the job is ended", lambda: job()["state"] == "failed", KILL_S_MAX)
    assert time.monotonic() - started_s < KILL_S_MAX
    assert job()["error"] == {"code": "cargo_failed", "message": "the Cargo endless was revoked"}
    assert client.get("/api/v1/account").json()["credits"] == before, "nothing is charged"
    assert status(island)["jobs"]["running"] == 0 and status(island)["cargos"] == []
    island.stop()
    again = network.start_island("again", "--cargo", str(file), "--cache-dir", str(tmp_path / "cache"))
    again.wait_ready()
    wait_for("a new Island takes it down when it hears", lambda: not offers(again, "endless"), KILL_S_MAX)
    again.stop()


def test_a_name_that_nobody_lists_ends_the_start(network: LocalNetwork, tmp_path: Path) -> None:
    with pytest.raises(NodeFailed, match="'never-listed' is no model, no file and no Cargo that ships, and this network lists none"):
        network.start_island("mistyped", "--cargo", "never-listed").wait_ready()


def test_a_publishers_word_reaches_an_island_that_comes_later(
    network: LocalNetwork, client: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a file that the network does not list any more."""
    file = packed(tmp_path, "taken-back", modules.load("slug").wasm)
    at = ["--coordinator", network.url, "--api-key", publish(network, file, capsys)]
    wait_for("it is listed", lambda: client.get("/api/v1/cargos/taken-back").status_code == 200)
    args = ["cargo", "revoke", "taken-back@1.0.0", "--reason", "mine", "--data-dir", str(tmp_path / "publisher"), *at]
    assert main(args) == 0, capsys.readouterr()
    island = network.start_island("later", "--cargo", str(file), "--cache-dir", str(tmp_path / "cache"))
    island.wait_ready()
    wait_for("it takes it down", lambda: not offers(island, "taken-back"), KILL_S_MAX)
    island.stop()


def test_signals_to_the_whole_group_let_jobs_finish(network: LocalNetwork, client: httpx.Client) -> None:
    """As Ctrl-C at a terminal sends them: workers go on until their jobs are done."""
    island = network.start_island("group", "--cargo", "shapes")
    island.wait_ready()
    body = {"cargo": "shapes", "stream": True, "input": {"prompt": "a red circle on a white ground", "n": 4}}
    with client.stream("POST", "/api/v1/jobs", json=body) as answer:
        lines = answer.iter_lines()
        while "progress" not in next(lines):
            pass
        os.killpg(island.process.pid, signal.SIGTERM)
        rest = [line for line in lines if line.startswith("event: ")]
    assert rest[-1] == "event: complete" and rest.count("event: image") == 4
    assert island.process.wait(30) == 0

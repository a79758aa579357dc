"""`archipelag-node workflow …` against a real Coordinator and Island, each a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from node.cli import EXIT_CONFIG, main
from node.commands.workflow import read_file
from node.datadir import DataDir
from node.localnet import LocalNetwork
from protocol.errors import ConfigError

Run = Callable[..., str]
TALK: dict[str, Any] = {
    "name": "talk",
    "steps": [
        {"key": "first", "cargo": "echo", "input": {"prompt": "{{ input.text }}"}},
        {"key": "each", "cargo": "echo", "for_each": "{{ input.words }}", "input": {"prompt": "{{ item }}: {{ first.output.text }}"}},
        {"key": "last", "cargo": "echo", "input_mapping": {"prompt": "{{ each.outputs[1].text }}"}},
    ],
    "output": {"said": "{{ last.output.text }}"},
}
TOML = """
name = "from-toml"
fail_mode = "best_effort"
[[steps]]
key = "one"
cargo = "echo"
input = { prompt = "{{ input }}" }
[[steps]]
key = "bad"
cargo = "echo"
input = { prompt = "{{ one.output.nothing }}" }
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNetwork]:
    with LocalNetwork(tmp_path_factory.mktemp("workflow")) as network:
        network.start_coordinator()
        network.start_island("one", "--cargo", "echo").wait_ready()
        yield network


@pytest.fixture
def run(network: LocalNetwork, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``workflow …``, which has to end with this status; what it said."""
    monkeypatch.setenv("ARCHIPELAG_COORDINATOR", network.url)
    monkeypatch.setenv("ARCHIPELAG_API_KEY", network.make_key())

    def call(*arguments: str, status: int = 0) -> str:
        assert main(["workflow", *arguments]) == status, capsys.readouterr()
        said = capsys.readouterr()
        return said.out + said.err

    return call


@pytest.fixture
def talk(tmp_path: Path) -> str:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(TALK))
    return str(file)


GIVEN = json.dumps({"text": "hello there", "words": ["a", "b"]})


def test_run_watch_show_and_rerun(run: Run, talk: str, tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    given.write_text(GIVEN)
    said = run("run", talk, "--input", f"@{given}", "--watch")
    first, *steps = said.splitlines()
    run_id = first.split()[1]
    assert first == f"run {run_id} of talk: 3 steps"
    done = [line.split()[0] for line in steps if " done " in line]
    assert done == ["first", "each", "last"] and "0.002 credits" in said and '"said": "b: hello there"' in said
    shown = run("show", run_id)
    assert "each" in shown and shown.splitlines()[-1] == "}" and "b: hello there" in shown
    whole = json.loads(run("show", run_id, "--json"))
    assert whole["state"] == "succeeded" and len(whole["steps"]) == 3
    timeline = run("show", run_id, "--timeline").splitlines()
    assert "run_begun" in timeline[0] and "run_succeeded" in timeline[-1] and any("each[1]" in line for line in timeline)
    again = run("rerun", run_id, "--from", "last", "--watch")
    assert "b: hello there" in again
    assert json.loads(run("show", again.split()[1], "--json"))["origin"] == run_id
    listed = run("list", "--limit", "2").splitlines()
    assert [line.split()[0] for line in listed] == [again.split()[1], run_id]
    assert "had ended before" in run("cancel", run_id)


def test_a_run_that_fails_says_what_to_do(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "from.toml"
    file.write_text(TOML)
    said = run("run", str(file), "--input", '"x"', "--watch", status=1)
    assert "bad_value" in said and "one.output.nothing" in said and "--from bad" in said
    run_id = said.split()[1]
    assert "workflow rerun" in run("show", run_id)
    assert "has no such step; it has one, bad" in run("rerun", run_id, "--from", "nothing", status=EXIT_CONFIG)
    assert "--from STEP" in run("rerun", run_id, status=EXIT_CONFIG)


def test_without_watching_it_says_where_to_look(run: Run, talk: str) -> None:
    said = run("run", talk, "--input", GIVEN)
    assert said.splitlines()[1] == f"Next: archipelag-node workflow show {said.split()[1]}"


def test_prices(run: Run, talk: str) -> None:
    said = run("quote", talk, "--input", GIVEN)
    assert "100 x 0.00105 = 0.105 credits" in said and said.splitlines()[-1] == "at most 0.1071 credits for 102 jobs"
    assert "over_max_price" in run("run", talk, "--input", GIVEN, "--max-price", "0.1", status=EXIT_CONFIG)


def test_saved_and_published(run: Run, talk: str, tmp_path: Path, network: LocalNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("save", talk)
    assert said.startswith("local/talk@1\n") and "as before" in run("save", talk)
    changed = tmp_path / "talk2.json"
    changed.write_text(json.dumps({**TALK, "output": {"other": "{{ last.output.text }}"}}))
    assert run("save", str(changed), "--name", "talk").startswith("local/talk@2\n")
    assert '"said"' in run("run", "talk@1", "--input", GIVEN, "--watch")
    folder = tmp_path / "publisher"
    published = run("publish", str(changed), "--name", "talk", "--data-dir", str(folder))
    assert f"local/talk@2 is published, signed by {DataDir.open(folder).key('publisher').peer_id}" in published
    monkeypatch.setenv("ARCHIPELAG_API_KEY", network.make_key(account="stranger"))
    assert '"other"' in run("run", "local/talk@2", "--input", GIVEN, "--watch")
    assert "unknown_workflow" in run("run", "local/talk@1", status=EXIT_CONFIG)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "Expecting"),
        ("[]", "no object"),
        ('{"steps": {}}', "list of steps"),
        ('{"name": 7, "steps": []}', "name"),
    ],
)
def test_files_that_are_none(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_file(file)
    assert words in str(error.value) and str(file) in str(error.value)


def test_what_is_missing_is_named(run: Run, talk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot read" in run("run", str(tmp_path / "none.json"), status=EXIT_CONFIG)
    assert "--input is no JSON" in run("run", talk, "--input", "{", status=EXIT_CONFIG)
    circle = tmp_path / "circle.json"
    circle.write_text('{"steps": [{"key": "a", "cargo": "echo", "depends_on": ["a"]}]}')
    assert "depends on itself" in run("save", str(circle), status=EXIT_CONFIG)
    assert "depends on itself" in run("run", str(circle), status=EXIT_CONFIG)
    assert "unknown_job" in run("show", "wf_nothing", status=EXIT_CONFIG)
    dated = tmp_path / "dated.toml"
    dated.write_text('steps = []\nat = 2026-01-01\n')
    assert "date" in run("run", str(dated), status=EXIT_CONFIG)
    monkeypatch.setenv("ARCHIPELAG_API_KEY", "ak_" + "0" * 64)
    assert "--api-key" in run("list", status=EXIT_CONFIG)
    monkeypatch.delenv("ARCHIPELAG_API_KEY")
    assert "keys create" in run("list", status=EXIT_CONFIG)
    monkeypatch.delenv("ARCHIPELAG_COORDINATOR")
    assert "--coordinator" in run("list", status=EXIT_CONFIG)
    assert "cannot be reached" in run("list", "--coordinator", "http://127.0.0.1:1", "--api-key", "x", status=EXIT_CONFIG)

"""`archipelag-node batch`: files of inputs become batches, against a real Coordinator and Island; what is wrong says what to do."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from node import batch_client
from node.batch_client import BatchClient, Unreachable
from node.batch_input import CHAT, COMPLETIONS, EMBEDDINGS, JOBS, Form, parse_field, plan, requests
from node.cli import EXIT_CONFIG, EXIT_INTERRUPTED, main
from node.commands import batch
from node.localnet import LocalNetwork
from protocol import limits
from protocol.errors import ConfigError

Said = tuple[str, str]  # stdout and stderr


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL and key of a Coordinator with an Island that echoes."""
    with LocalNetwork(tmp_path_factory.mktemp("batch")) as network:
        network.start_coordinator()
        network.start_island("one", "--cargo", "echo")
        network.node("one").wait_ready()
        yield network.url, network.make_key("read", "write")


@pytest.fixture
def run(
    network: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """``batch …`` with URL and key in the environment, which has to end with this status."""
    monkeypatch.setenv("ARCHIPELAG_COORDINATOR", network[0])
    monkeypatch.setenv("ARCHIPELAG_API_KEY", network[1])
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch, "_LOOK_S", 0.02)

    def call(*arguments: str, status: int = 0) -> Said:
        found = main(["batch", *arguments])
        said = capsys.readouterr()
        assert found == status, said
        return said.out, said.err

    return call


def answers(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def texts(file: Path) -> list[str]:
    return [line["response"]["body"]["choices"][0]["message"]["content"] for line in answers(file)]


def test_a_file_of_prompts(run: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one two three\n\nGrüße aus Köln\n{no json}\n")
    out, err = run("run", "prompts.txt", "--cargo", "echo", "--set", "max_tokens=2", "--max-parallelism", "2")
    assert out == "" and "100 % of 3 lines" in err and "completed: 3 of 3 lines, 0.003 credits" in err
    assert "answers in prompts.answers.jsonl" in err and not (tmp_path / "prompts.errors.jsonl").exists()
    assert [text.strip() for text in texts(tmp_path / "prompts.answers.jsonl")] == ["one two", "Grüße aus", "{no json}"]
    assert [line["custom_id"] for line in answers(tmp_path / "prompts.answers.jsonl")] == ["line-1", "line-3", "line-4"]
    assert "exists already" in run("run", "prompts.txt", "--cargo", "echo", status=EXIT_CONFIG)[1]


def test_openais_own_lines_and_a_bad_one_among_them(run: Callable[..., Said], tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "one"}]}
    good = [{"custom_id": name, "method": "POST", "url": CHAT, "body": {**body, "model": "echo"}} for name in "abc"]
    lines = [json.dumps(good[0]), "not JSON", json.dumps(good[1]), json.dumps({**good[2], "body": body})]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    _, err = run("run", "in.jsonl", "--cargo", "echo", "--output", "out.jsonl", status=1)
    assert "completed: 3 of 4 lines" in err and "errors in out.errors.jsonl" in err
    assert "  line 2: this line could not be read as JSON" in err
    assert [line["custom_id"] for line in answers(tmp_path / "out.jsonl")] == ["a", "b", "c"]
    assert answers(tmp_path / "out.errors.jsonl")[0]["error"]["line"] == 2


def test_objects_for_any_cargo_go_to_stdout(run: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "one two"}\n{"prompt": "three"}\n')
    out, _ = run("run", "in.jsonl", "--cargo", "echo", "--endpoint", "jobs", "--output", "-")
    found = [json.loads(line) for line in out.splitlines()]
    assert [line["response"]["body"]["output"]["text"] for line in found] == ["one two", "three"]


def test_begun_now_and_fetched_later(run: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("begun\nlater\n")
    batch_id = run("run", "in.txt", "--cargo", "echo", "--no-wait")[0].strip()
    assert "completed: 2 of 2" in run("wait", batch_id, "--output", "waited.jsonl")[1]
    assert texts(tmp_path / "waited.jsonl") == ["begun", "later"]
    run("output", batch_id)
    assert texts(tmp_path / f"{batch_id}.answers.jsonl") == ["begun", "later"]
    listed = run("list", "--limit", "5")[0]
    assert any(line.startswith(batch_id) and "completed" in line and "2/2" in line for line in listed.splitlines())
    shown = run("show", batch_id)[0]
    assert shown.startswith("completed: 2 of 2 lines, 0 with an error\n0.002 credits") and f"batch output {batch_id}" in shown
    assert json.loads(run("show", batch_id, "--json")[0])["id"] == batch_id
    assert "completed already" in run("cancel", batch_id, status=EXIT_CONFIG)[1]


def test_ctrl_c_leaves_it_running_and_says_how_to_come_back(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.txt").write_text("one\n")

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", interrupt)
        _, err = run("run", "in.txt", "--cargo", "echo", "--output", "out.jsonl", status=EXIT_INTERRUPTED)
    command = next(line for line in err.splitlines() if line.startswith("  archipelag-node batch wait"))
    assert "goes on without you" in err and "archipelag-node batch cancel batch_" in err and command.endswith("--output out.jsonl")
    run(*command.split()[2:])
    assert texts(tmp_path / "out.jsonl") == ["one"]


def test_a_bar_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with batch._Progress() as progress:
        for done in (0, 1, 3):
            counts = {"total": 4, "completed": done, "failed": done // 3}
            progress.show({"status": "in_progress", "request_counts": counts})
        progress.show({"status": "finalizing", "request_counts": {"total": 4, "completed": 3, "failed": 1}})
    assert "finalizing: 100%" in terminal.getvalue() and "4/4" in terminal.getvalue() and "errors=1" in terminal.getvalue()


def test_a_coordinator_that_is_away_for_a_while(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ended = {"id": "batch_1", "status": "completed", "request_counts": {"total": 1, "completed": 1, "failed": 0}}
    seen: list[Any] = [{**ended, "status": "in_progress"}, Unreachable("away"), Unreachable("away"), ended]

    class Client(BatchClient):
        def __init__(self) -> None:
            pass

        def show(self, batch_id: str) -> dict[str, Any]:
            found = seen.pop(0)
            if isinstance(found, Exception):
                raise found
            return dict(found)

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert batch._watched(Client(), {**ended, "status": "validating"}, batch._Progress()) == ended
    monkeypatch.setattr(batch, "_LOST_S", -1.0)
    seen[:] = [Unreachable("away")]
    with pytest.raises(Unreachable):
        batch._watched(Client(), {**ended, "status": "validating"}, batch._Progress())
    assert capsys.readouterr().err.splitlines() == ["100 % of 1 lines"] * 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("run", "none.txt", "--cargo", "echo"), "cannot read none.txt"),
        (("run", "empty.txt", "--cargo", "echo"), "has no lines"),
        (("run", "blank.txt", "--cargo", "echo"), "has no lines"),
        (("run", "in.txt"), "--cargo NAME"),
        (("run", "text.jsonl", "--cargo", "echo"), "called .txt"),
        (("run", "latin.txt", "--cargo", "echo"), "iconv"),
        (("run", "in.txt", "--cargo", "echo", "--output", "nowhere/out.jsonl"), "no folder nowhere"),
        (("wait", "../etc"), "no id of a batch"),
        (("show", "batch_none"), "batch list"),
        (("run", "in.txt", "--cargo", "echo", "--api-key", "ak_wrong"), "--api-key"),
        (("list", "--url", "ftp://x"), "such as http://127.0.0.1:8080"),
        (("list", "--url", "http://127.0.0.1:1"), "is the Coordinator running?"),
    ],
)
def test_errors_say_what_to_do(run: Callable[..., Said], tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    (tmp_path / "text.jsonl").write_text("one\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("é\n".encode("latin-1"))
    assert text in run(*arguments, status=EXIT_CONFIG)[1]


def test_url_and_key_may_stand_in_the_data_folder(
    network: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("COORDINATOR", "API_KEY"):
        monkeypatch.delenv(f"ARCHIPELAG_{name}", raising=False)
    assert main(["batch", "list", "--data-dir", str(tmp_path)]) == EXIT_CONFIG and "--coordinator URL" in capsys.readouterr().err
    (tmp_path / "config.toml").write_text(f'coordinator = "{network[0]}"\n')
    assert main(["batch", "list", "--data-dir", str(tmp_path)]) == EXIT_CONFIG and "keys create" in capsys.readouterr().err
    (tmp_path / "config.toml").write_text(f'coordinator = "{network[0]}"\napi_key = "{network[1]}"\n')
    assert main(["batch", "list", "--data-dir", str(tmp_path), "--limit", "1"]) == 0


@pytest.mark.parametrize(
    ("name", "first", "endpoint", "form", "path"),
    [
        ("a.txt", '{"prompt": "x"}', "", Form.TEXTS, CHAT),
        ("a", "plain words", "", Form.TEXTS, CHAT),
        ("a", "plain words", EMBEDDINGS, Form.TEXTS, EMBEDDINGS),
        ("a.jsonl", '{"messages": []}', "", Form.OBJECTS, CHAT),
        ("a.jsonl", '{"prompt": "x"}', "", Form.OBJECTS, COMPLETIONS),
        ("a.jsonl", '{"image": "x"}', "", Form.OBJECTS, JOBS),
        ("a.jsonl", '{"custom_id": "1", "url": "/v1/embeddings", "body": {}}', "", Form.REQUESTS, EMBEDDINGS),
    ],
)
def test_what_a_file_is(name: str, first: str, endpoint: str, form: Form, path: str) -> None:
    found = plan(name, first, "echo", endpoint, {})
    assert (found.form, found.endpoint) == (form, path)


def test_lines_become_requests() -> None:
    objects = plan("a.jsonl", '{"prompt": 1}', "c", "", {"n": 2})
    made = [json.loads(line) for line in requests(['{"prompt": "x", "custom_id": "mine"}\n'], objects)]
    assert made == [{"custom_id": "mine", "method": "POST", "url": COMPLETIONS, "body": {"model": "c", "prompt": "x", "n": 2}}]
    made = [json.loads(line) for line in requests(["two words"], plan("a.txt", "x", "c", JOBS, {"priority": 3}))]
    assert made[0]["body"] == {"cargo": "c", "input": {"prompt": "two words"}, "priority": 3}
    assert list(requests(["no json\r\n", "", "[1]"], objects)) == [b"no json\n", b"\n", b"[1]\n"]


def test_fields_of_every_request() -> None:
    assert [parse_field(text) for text in ("n=2", "stop=END", 'stop=["a"]', "user=", "a=b=c")] == [
        ("n", 2),
        ("stop", "END"),
        ("stop", ["a"]),
        ("user", ""),
        ("a", "b=c"),
    ]
    for text in ("n", "=2", ""):
        with pytest.raises(ValueError, match="NAME=VALUE"):
            parse_field(text)


def test_too_many_lines_are_not_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    file.write_text("x\n" * 4)
    monkeypatch.setattr(limits, "FILE_LINES_MAX", 3)
    with open(tmp_path / "out", "w+b") as to, pytest.raises(ConfigError, match="split -l 3"):
        batch._write(file, "echo", "", {}, to)


def test_a_file_that_cannot_be_written_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = BatchClient("http://127.0.0.1:1", "ak_x")
    monkeypatch.setattr(batch_client.BatchClient, "fetch", lambda self, file_id, write: write(b"half"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="--output"):
        client.save("file-1", tmp_path / "taken")
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]
    client.close()

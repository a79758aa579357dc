"""`archipelag-node ab …` against a Coordinator whose answers were written down before; what is wrong says what to do."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.abtests.plan import AbState, ArmCounts
from node import ab_table
from node.ab_client import AbClient
from node.cli import EXIT_CONFIG, EXIT_INTERRUPTED, main
from node.commands import ab
from node.http_client import Unreachable
from protocol.errors import ConfigError
from tests.node.ab_fake import (
    FEW,
    ID,
    MANY,
    PLAN,
    FakeCoordinator,
    ab_test,
    arm,
    fake_coordinator,
    refusal,
    results,
    told,
)

Run = Callable[..., str]
TESTS = "/api/v1/ab-tests"
OPTIONS = "--name faster --base answers --variant old=answers@1.0.0:50 --variant new=answers@2.0.0:50".split()
VARIANTS = [
    {"name": "old", "cargo": "answers@1.0.0", "traffic_percent": 50},
    {"name": "new", "cargo": "answers@2.0.0", "traffic_percent": 50},
]
TOML = """
name = "from-file"
base_cargo = "answers"
minimum_samples = 500
[[variants]]
name = "old"
cargo = "answers@1.0.0"
traffic_percent = 50
[[variants]]
name = "new"
cargo = "answers@2.0.0"
traffic_percent = 50
"""


@pytest.fixture(scope="module")
def server() -> Iterator[FakeCoordinator]:
    with fake_coordinator() as server:
        yield server


@pytest.fixture
def fake(server: FakeCoordinator) -> FakeCoordinator:
    server.answers.clear()
    server.asked.clear()
    server.keys.clear()
    server.missing_bytes = 0
    return server


@pytest.fixture
def run(fake: FakeCoordinator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``ab …``, which has to end with this status; what it said."""
    monkeypatch.setenv("ARCHIPELAG_COORDINATOR", fake.url)
    monkeypatch.setenv("ARCHIPELAG_API_KEY", "ak_test")

    def call(*arguments: str, status: int = 0) -> str:
        assert main(["ab", *arguments]) == status, capsys.readouterr()
        said = capsys.readouterr()
        return said.out + said.err

    return call


def wrong(run: Run, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What argparse says of options that it does not take."""
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == EXIT_CONFIG
    return capsys.readouterr().err


def lines_of(made: dict[str, Any], width: int = ab_table.WIDTH) -> list[str]:
    return ab_table.results_lines(made, width)


# -- create


def test_create_by_options(run: Run, fake: FakeCoordinator) -> None:
    fake.answers[f"POST {TESTS}"] = [(201, told(AbState.DRAFT))]
    more = "--metric latency --minimum-samples 1000 --minimum-hours 24 --guardrail success:5 --guardrail cost:2.5% --alpha 0.05 --unit user"
    said = run("create", *OPTIONS, *more.split(), "--ramp", "5%:1h", "--ramp", "25:30m", "--no-auto-promote")
    (asked,) = fake.asked
    assert asked == (
        "POST",
        TESTS,
        {
            "name": "faster",
            "base_cargo": "answers",
            "variants": VARIANTS,
            "primary_metric": "latency",
            "minimum_samples": 1000,
            "minimum_hours": 24.0,
            "guardrails": [{"metric": "success", "max_regression_percent": 5.0}, {"metric": "cost", "max_regression_percent": 2.5}],
            "alpha": 0.05,
            "unit": "user",
            "ramp": [{"percent": 5.0, "hours": 1.0}, {"percent": 25.0, "hours": 0.5}],
            "auto_promote": False,
        },
    )
    assert fake.keys == ["Bearer ak_test"]
    assert "variant    new: answers@2.0.0 (bbbbbbbbbbbbbbbb), 50 % of the users" in said
    assert said.splitlines()[-1] == f"Next: archipelag-node ab activate {ID}"


def test_create_from_a_file_and_options_win(run: Run, fake: FakeCoordinator, tmp_path: Path) -> None:
    fake.answers[f"POST {TESTS}"] = [(201, told(AbState.DRAFT))]
    file = tmp_path / "test.toml"
    file.write_text(TOML)
    run("create", str(file), "--minimum-samples", "700", "--metric", "cost")
    body = {"name": "from-file", "base_cargo": "answers", "variants": VARIANTS, "minimum_samples": 700, "primary_metric": "cost"}
    assert fake.asked == [("POST", TESTS, body)]
    as_json = tmp_path / "test.json"
    as_json.write_text(json.dumps(body))
    run("create", str(as_json))
    assert fake.asked[1] == ("POST", TESTS, body)


def test_create_activate_and_watch(run: Run, fake: FakeCoordinator) -> None:
    fake.answers[f"POST {TESTS}"] = [(201, told(AbState.DRAFT))]
    fake.say("POST /activate", (200, told()))
    assert run("create", *OPTIONS, "--activate").splitlines() == [
        f"created {ID}",
        "faster is active: requests for answers go to its variants",
        f"Next: archipelag-node ab watch {ID}",
    ]
    fake.say("GET /results", (200, results(ab_test(AbState.PROMOTED, winner="new"), *MANY)))
    said = run("create", *OPTIONS, "--activate", "--watch")
    assert said.splitlines()[-1] == "promoted: answers stands for answers@2.0.0 now, the variant new"


def test_a_draft_that_cannot_start_is_kept_and_named(run: Run, fake: FakeCoordinator) -> None:
    fake.answers[f"POST {TESTS}"] = [(201, told(AbState.DRAFT))]
    fake.say("POST /activate", (409, refusal("another test is active on answers already", "cargo_has_active_test", "base_cargo")))
    said = run("create", *OPTIONS, "--activate", status=EXIT_CONFIG)
    assert f"archipelag-node ab activate {ID}" in said
    assert "refuses: another test is active on answers already (cargo_has_active_test, base_cargo)" in said


@pytest.mark.parametrize(
    "options, words",
    [
        (["--variant", "new"], "such as new=answers@2.0.0:50, not 'new'"),
        (["--variant", "new=answers"], "NAME=CARGO:PERCENT"),
        (["--variant", "=answers:50"], "NAME=CARGO:PERCENT"),
        (["--variant", "new=answers:many"], "'many' is no number"),
        (["--variant", "new=answers:101"], "over 100 percent"),
        (["--variant", "new=answers:nan"], "'nan' is no number"),
        (["--variant", "new=answers:-5"], "'-5' is no number of at least 0"),
        (["--metric", "speed"], "latency, time_to_first_token, success"),
        (["--unit", "team"], "user, account, job"),
        (["--guardrail", "success"], "METRIC:PERCENT"),
        (["--guardrail", "speed:5"], "a metric is one of"),
        (["--guardrail", "success:inf"], "'inf' is no number"),
        (["--ramp", "5%"], "such as 5%:1h"),
        (["--ramp", "5%:1w"], "such as 5%:1h"),
        (["--ramp", "5%:xh"], "'x' is no number"),
        (["--minimum-samples", "1e3"], "no whole number"),
        (["--minimum-hours", "nan"], "no number"),
        (["--alpha", "small"], "no number"),
        (["--interval", "0"], "more than 0"),
    ],
)
def test_bad_options_say_how_it_is_written(
    options: list[str], words: str, run: Run, fake: FakeCoordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in wrong(run, capsys, "create", *options)
    assert not fake.asked


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "Expecting"),
        ("[]", "no object"),
        ('{"alpha": NaN}', "a number that is none"),
        ('{"alpha": 0.05}', "a test needs --name, --base, --variant"),
        ("[" * 100_000, "test.json"),
        (b"\xff", "utf-8"),
        (b" " * 1_000_001, "over 1,000,000 bytes"),
    ],
)
def test_files_that_are_none(content: str | bytes, words: str, run: Run, fake: FakeCoordinator, tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in run("create", str(file), status=EXIT_CONFIG)
    assert not fake.asked


def test_what_is_missing_is_named(run: Run, fake: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot read" in run("create", str(tmp_path / "none.toml"), status=EXIT_CONFIG)
    dated = tmp_path / "dated.toml"
    dated.write_text("name = 2026-01-01\n")
    assert "date" in run("create", str(dated), status=EXIT_CONFIG)
    assert "a test needs --variant" in run("create", *OPTIONS[:4], status=EXIT_CONFIG)
    assert "give --activate too" in run("create", *OPTIONS, "--watch", status=EXIT_CONFIG)
    assert not fake.asked
    monkeypatch.delenv("ARCHIPELAG_API_KEY")
    assert "keys create" in run("list", status=EXIT_CONFIG)
    monkeypatch.delenv("ARCHIPELAG_COORDINATOR")
    assert "--coordinator" in run("list", status=EXIT_CONFIG)
    assert "cannot be reached" in run("list", "--coordinator", "http://127.0.0.1:1", "--api-key", "x", status=EXIT_CONFIG)
    assert "--ca-file" in run("list", "--coordinator", "https://x", "--api-key", "x", "--ca-file", str(tmp_path / "no"), status=EXIT_CONFIG)


def test_the_environment_of_other_commands_makes_no_test(run: Run, fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NAME", "BASE", "UNIT", "METRIC", "FORCE", "VARIANT", "JSON", "LIMIT"):
        monkeypatch.setenv(f"ARCHIPELAG_{name}", "1")
    fake.say("POST /promote", (200, told(AbState.PROMOTED, winner="new")))
    run("promote", ID)
    assert fake.asked[0] == ("POST", f"{TESTS}/{ID}/promote", {})


# -- looking


def test_list_and_show(run: Run, fake: FakeCoordinator) -> None:
    fake.answers[f"GET {TESTS}?limit=20"] = [(200, {"data": []})]
    assert "archipelag-node ab create" in run("list")
    fake.answers[f"GET {TESTS}?limit=2"] = [(200, {"data": [told(AbState.ROLLED_BACK), told()]})]
    head, first, second = run("list", "--limit", "2").splitlines()
    assert head.split() == ["id", "created", "state", "base", "variants", "name"]
    assert first.startswith(f"{ID}  2026-03-01T09:59:00.000Z  rolled back  answers  old, new  faster") and "active" in second
    fake.say("GET", (200, told(AbState.PAUSED, note="no Island offers it")))
    detail = {"variant": "new", "is_conclusive": True, "waiting": ["minimum_hours", "too_few_units"], "blocked": []}
    events = [
        {"at": "2026-03-01T10:00:00.000Z", "kind": "created", "account": "ann", "detail": {}},
        {"at": "2026-03-01T10:01:00.000Z", "kind": "rolled_back", "account": None, "detail": detail},
    ]
    fake.say("GET /events", (200, {"data": events}))
    shown = run("show", ID)
    assert "decides    latency, alpha 0.05, after 1,000 samples in each variant and 24 h at least" in shown
    assert "ramp       5 % of all units for 1 h" in shown and "guardrail  success at most 5 % worse" in shown
    assert "variant    old: answers@1.0.0 (aaaaaaaaaaaaaaaa), 50 % of the users, the control" in shown
    assert "note       no Island offers it" in shown
    assert shown.splitlines()[-2:] == [
        "2026-03-01T10:00:00.000Z  created       by ann",
        "2026-03-01T10:01:00.000Z  rolled back   by the test itself  "
        "variant: new; is conclusive: yes; waiting: minimum_hours, too_few_units",
    ]
    assert json.loads(run("show", ID, "--json"))["events"] == events


def test_results(run: Run, fake: FakeCoordinator) -> None:
    fake.say("GET /results", (200, results()))
    said = run("results", ID).splitlines()
    assert said[0] == f"faster ({ID}), active for 3.2 h, exposure 100 % of all units"
    rows = [line.split("  ") for line in said[2:5]]
    assert [cell.strip() for cell in rows[0] if cell] == (
        "variant,version,share,units,jobs,cached,success %,abandoned %,latency ms,TTFT ms,tokens/s,cost credits,thumbs %".split(",")
    )
    assert [cell.strip() for cell in rows[1] if cell] == (
        "old (control),answers@1.0.0,50 %,433,433,40,99.3,0.0,412.3,-,41.25,0.001200,-".split(",")
    )
    assert [cell.strip() for cell in rows[2] if cell] == "new,answers@2.0.0,50 %,412,412,38,99.5,1.4,389.2,-,41.25,0.001200,87.5".split(",")
    assert said[6:] == [
        "new against old: latency -23.13 ms [-46.21 to -0.05 at 95 %], lift -5.6 %, sequential p 0.0493; conclusive: better",
        "progress: 410 of 1,000 samples in each variant, 3.2 of 24 h",
        "guardrail for new: success at most 5 % worse, now -0.2 %: holds",
        "sample ratio: p 0.4700, sound",
        "waiting: 3.2 of 24 h have passed; new has 410 of 1,000 samples",
    ]
    assert json.loads(run("results", ID, "--json")) == results()


ACTIVATE = f"archipelag-node ab activate {ID}"
LATE = ab_test(hours=30)
BY_HAND = ab_test(hours=30, plan=replace(PLAN, auto_promote=False))


def test_a_variant_that_is_given_up_on_is_said_to_be() -> None:
    said = " ".join(" ".join(lines_of(results(LATE, arm(2000, 400), arm(2000, 350, abandoned=300)))).split())
    assert "blocked: Consumers give up on a variant more often than on the control" in said and said.endswith(f"ab rollback {ID}")


@pytest.mark.parametrize(
    "made, words",
    [
        (results(ab_test(AbState.DRAFT), ArmCounts(), ArmCounts()), f"not begun. Next: {ACTIVATE}"),
        (results(LATE, arm(2000, 400), arm(2000, 399)), "waiting: no variant is shown to be better"),
        (results(LATE, *MANY), "new has won; it is promoted within seconds"),
        (results(BY_HAND, *MANY), f"new has won. Next: archipelag-node ab promote {ID}"),
        (results(LATE, arm(2000, 400), arm(2000, 450)), f"old is better than every other variant. Next: archipelag-node ab rollback {ID}"),
        (results(LATE, arm(4600, 400), arm(5400, 400)), "blocked: units did not go to the variants in the shares of the plan"),
        (results(LATE, arm(2000, 400), arm(2000, 400, failed=400)), "more than a guardrail allows (success of new)"),
        (results(held="no Island offers answers 2.0.0"), "stands still: no Island offers answers 2.0.0; it goes on by itself"),
        (results(ab_test(AbState.PAUSED)), f"paused: everybody gets the base, and nothing is counted. Next: {ACTIVATE}"),
        (results(ab_test(AbState.PAUSED, note="by night")), "paused: by night. Next:"),
        (results(ab_test(AbState.PROMOTED, winner="new"), *MANY), "promoted: answers stands for answers@2.0.0 now, the variant new"),
        (results(ab_test(AbState.ROLLED_BACK, winner="new")), "rolled back: answers stands again for what it was before the test"),
        (results(ab_test(AbState.ROLLED_BACK, note="late")), "the test has ended; answers goes on to stand for what it stands for: late"),
    ],
)
def test_the_last_line_says_what_it_comes_to(made: dict[str, Any], words: str) -> None:
    assert words in lines_of(made)[-1]


ROLLBACK = f"archipelag-node ab rollback {ID}"


@pytest.mark.parametrize(
    "reason, words",
    [
        ("base_changed", f"paused: it says why. Next: {ROLLBACK}"),
        ("harmful", f"paused: it says why. Next: {ROLLBACK}"),
        ("promotion_refused", f"paused: it says why. Next: {ROLLBACK}"),
        ("variant_not_runnable", f"paused: it says why. Once it may run again: {ACTIVATE}; or {ROLLBACK}"),
        ("", f"paused: it says why. Next: {ACTIVATE}"),
        (None, f"paused: it says why. Next: {ACTIVATE}"),
        (["odd"], f"paused: it says why. Next: {ACTIVATE}"),
    ],
)
def test_a_pause_names_only_what_is_not_refused(reason: object, words: str) -> None:
    made = results(ab_test(AbState.PAUSED, note="it says why"))
    made["test"].pop("reason", None)
    if reason is not None:
        made["test"]["reason"] = reason
    assert lines_of(made, 1000)[-1] == words


def test_requests_that_name_no_user_are_said_to_be_one_unit() -> None:
    def counted(jobs: int, unit: str = "user", hours: float = 30) -> bool:
        made = results(ab_test(hours=hours), arm(3, 400), arm(2, 400))
        made["variants"][1]["job_count"], made["test"]["unit"] = jobs, unit
        return lines_of(made)[-2].startswith("requests that name no user are one unit, their account: send x-archipelag-unit or user")

    assert counted(21) and not counted(20) and not counted(21, "account") and not counted(21, "job")
    enough = results(LATE, arm(2000, 400), arm(2000, 399))
    enough["variants"][0]["job_count"] = 100_000
    assert "name no user" not in "".join(lines_of(enough))


def test_what_is_wrong_stands_out() -> None:
    astray = "\n".join(lines_of(results(LATE, arm(4600, 400), arm(5400, 400))))
    assert "sample ratio: p below 0.0001, WRONG" in astray and "not conclusive: no difference lies within" in astray
    worse = "\n".join(lines_of(results(LATE, arm(2000, 400), arm(2000, 450, failed=400))))
    assert "success at most 5 % worse, now +20.0 %: VIOLATED" in worse and "conclusive: worse" in worse
    empty = "\n".join(lines_of(results(ab_test(), ArmCounts(), ArmCounts())))
    assert "latency not known yet; not conclusive: too few values" in empty and "sample ratio: too few units to say" in empty
    assert "None" not in empty and "nan" not in empty


def test_a_narrow_terminal_gets_a_column_for_each_variant() -> None:
    lines = lines_of(results(), 80)
    assert max(map(len, lines)) <= 80
    assert "variant       old (control)            new" in lines and "units                   433            412" in lines
    assert all(len(line) <= 30 for line in lines_of(results(), 30))


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), True, "x", [], {}])
def test_what_is_no_number_is_a_dash(value: object) -> None:
    assert ab_table.number(value) == "-"
    assert ab_table.number("0.0012", 4) == "0.0012" and ab_table.number(1234.5, 1) == "1,234.5"


def test_a_hostile_coordinator_writes_nothing_but_text(run: Run, fake: FakeCoordinator) -> None:
    evil = "\x1b[2J\u202e\r\nx"
    made = results(ab_test(AbState.PAUSED, note=evil))
    made["test"]["name"] = made["variants"][0]["name"] = made["comparisons"][0]["metric"] = made["held_because"] = evil
    made["decision"]["blocked"], made["decision"]["reasons"] = [evil, "b"], {"b": evil}
    made["guardrails"][0]["state"] = made["guardrails"][0]["metric"] = evil
    test = {**told(AbState.PAUSED, note=evil), "name": evil, "id": evil, "base_cargo": evil, "unit": evil, "created_at": evil}
    fake.say("GET /results", (200, made))
    fake.say("GET", (200, test))
    fake.say("GET /events", (200, {"data": [{"at": evil, "kind": evil, "account": evil, "detail": {evil: [evil]}}]}))
    fake.say("POST /pause", (409, refusal(evil, evil, evil)))
    fake.answers[f"GET {TESTS}?limit=20"] = [(200, {"data": [test]})]
    fake.say("POST /activate", (200, test))
    said = [run("results", ID), run("show", ID), run("list"), run("activate", ID), run("pause", ID, status=EXIT_CONFIG)]
    said += [run("results", ID, "--json"), run("show", ID, "--json")]
    for text in said:
        assert all(character.isprintable() for character in text.replace("\n", "")), text


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"test": {}}', b'{"test": [], "variants": []}'])
def test_what_no_coordinator_answers(body: bytes, run: Run, fake: FakeCoordinator) -> None:
    fake.say("GET /results", (200, body))
    assert "does not answer like a Coordinator" in run("results", ID, status=EXIT_CONFIG)


def test_an_answer_that_breaks_off(fake: FakeCoordinator) -> None:
    fake.say("GET /results", (200, results()))
    fake.missing_bytes = 1
    with pytest.raises(Unreachable, match="broke the connection off"):
        AbClient(fake.url, "ak_test").results(ID)


def test_fields_that_are_missing_or_odd_break_nothing() -> None:
    assert lines_of({"test": {}, "variants": []})
    odd = results()
    odd |= {"comparisons": [7, {"interval": 3}], "guardrails": "x", "sample_ratio": None, "decision": [], "running_hours": "x"}
    odd["variants"] = [{}, None, {"units": "many", "samples": "x"}]
    assert lines_of(odd)


def test_refusals_say_what_to_do(run: Run, fake: FakeCoordinator) -> None:
    assert "there is no such A/B test; see GET /api/v1/ab-tests (unknown_ab_test)" in run("results", ID, status=EXIT_CONFIG)
    fake.say("GET /results", (401, refusal("no such key", "invalid_api_key")))
    assert "ARCHIPELAG_API_KEY" in run("results", ID, status=EXIT_CONFIG)
    fake.say("POST /pause", (403, b""))
    assert "status 403; the key needs the scope write" in run("pause", ID, status=EXIT_CONFIG)
    fake.say("POST /pause", (500, b'{"error": "no object"}'))
    assert "status 500" in run("pause", ID, status=EXIT_CONFIG)
    run("results", "../keys?x", status=EXIT_CONFIG)
    assert fake.asked[-1][1] == f"{TESTS}/..%2Fkeys%3Fx/results"


# -- watching


class Script:
    """Plays looks at a test: results, or errors that are raised. ``pauses``: how often it was waited."""

    def __init__(self, *looks: dict[str, Any] | BaseException) -> None:
        self._looks = list(looks)
        self.pauses = 0

    def results(self, test_id: str) -> dict[str, Any]:
        assert test_id == ID
        look = self._looks.pop(0)
        if isinstance(look, BaseException):
            raise look
        return look

    def pause(self) -> None:
        self.pauses += 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(script: Script, out: io.StringIO) -> int:
    return ab.watch(script, ID, ab.Screen(out), script.pause)


def test_watch_writes_a_block_for_each_change() -> None:
    later = replace(ab_test(), active_ms=ab_test().active_ms + 600_000)
    end = results(ab_test(AbState.PROMOTED, winner="new"), *MANY)
    script = Script(results(), results(later), results(later, arm(440, 412.0), FEW[1]), end)
    out = io.StringIO()
    assert watched(script, out) == 0
    blocks = out.getvalue().split(f"faster ({ID})")
    assert [block.split(",")[1].strip() for block in blocks[1:]] == ["active for 3.2 h", "active for 3.4 h", "promoted"]
    assert script.pauses == 3 and "\x1b" not in out.getvalue()
    assert out.getvalue().endswith("\npromoted: answers stands for answers@2.0.0 now, the variant new\n")


def test_watch_of_a_draft_says_once_what_it_waits_for() -> None:
    draft, end = results(ab_test(AbState.DRAFT)), results(ab_test(AbState.ROLLED_BACK))
    out = io.StringIO()
    watched(Script(draft, draft, draft, results(), end), out)
    assert out.getvalue().count(f"waiting for the test to be activated: {ACTIVATE}; Ctrl-C ends this\n") == 1
    assert "not begun" not in out.getvalue()


def test_watch_draws_over_itself_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LINES", "50")
    out = Terminal()
    assert watched(Script(results(), results(), results(ab_test(AbState.ROLLED_BACK))), out) == 1
    first, second, third = out.getvalue().split("\x1b[J")
    shown = first.removesuffix("\x1b[11A\r")
    assert shown.count("\n") == 11 and shown + "\x1b[11A\r" == first
    assert second == first and third.endswith("answers goes on to stand for what it stands for\n")


def test_a_low_terminal_is_not_left_at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LINES", "6")
    out = Terminal()
    watched(Script(results(), results(ab_test(AbState.ROLLED_BACK))), out)
    assert "\x1b[5A\r\x1b[J" in out.getvalue()


def test_watch_outlives_a_coordinator_that_is_away_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    away, end = Unreachable("http://x cannot be reached"), results(ab_test(AbState.PROMOTED, winner="new"), *MANY)
    out = Terminal()
    assert watched(Script(results(), away, away, end), out) == 0
    assert "http://x cannot be reached; trying again" in out.getvalue()
    with pytest.raises(Unreachable):
        watched(Script(away), io.StringIO())
    monkeypatch.setattr(ab, "_LOST_MAX", 2)
    script = Script(results(), away, away, results(), away, away, away)
    with pytest.raises(Unreachable):
        watched(script, io.StringIO())
    assert script.pauses == 6
    with pytest.raises(ConfigError, match=r"^refused$"):
        watched(Script(results(), ConfigError("refused")), io.StringIO())


def test_watch_by_its_command(run: Run, fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("node.commands.ab.time", SimpleNamespace(sleep=slept.append))
    ended = results(ab_test(AbState.ROLLED_BACK))
    fake.say("GET /results", (200, results()), (503, refusal("the books are away", "books_unavailable")), (200, ended))
    assert "rolled back" in run("watch", ID, "--interval", "0.5", status=1)
    assert slept == [0.5, 0.5] and len(fake.asked) == 3


def test_ctrl_c_leaves_the_test_running(run: Run, fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("node.commands.ab.time", SimpleNamespace(sleep=interrupted))
    fake.say("GET /results", (200, results()))
    said = run("watch", ID, status=EXIT_INTERRUPTED)
    assert said.endswith(f"the test goes on without you; come back with\n  archipelag-node ab watch {ID}\n")
    assert len(fake.asked) == 1 and "Traceback" not in said


# -- changing


def test_activate_pause_promote_and_rollback(run: Run, fake: FakeCoordinator) -> None:
    fake.say("POST /activate", (200, told()))
    fake.say("POST /pause", (200, told(AbState.PAUSED)))
    fake.say("POST /promote", (200, told(AbState.PROMOTED, winner="new")))
    fake.say("POST /rollback", (200, told(AbState.ROLLED_BACK)))
    assert "faster is active" in run("activate", ID)
    assert f"Next: archipelag-node ab activate {ID}" in run("pause", ID)
    said = run("promote", ID)
    assert "promoted: answers stands for answers@2.0.0 now, the variant new" in said and f"ab rollback {ID}" in said
    run("promote", ID, "--variant", "new", "--force")
    assert "rolled back: the test has ended; answers goes on" in run("rollback", ID)
    bodies = [(path.rpartition("/")[2], body) for method, path, body in fake.asked if method == "POST"]
    assert bodies == [("activate", {}), ("pause", {}), ("promote", {}), ("promote", {"variant": "new", "force": True}), ("rollback", {})]


def test_a_promotion_of_what_is_not_shown_to_be_better_says_so(run: Run, fake: FakeCoordinator) -> None:
    def event(kind: str, is_conclusive: bool) -> dict[str, Any]:
        detail = {"is_conclusive": is_conclusive, "waiting": ["minimum_samples", "not_conclusive"]}
        return {"at": "2026-03-01T10:00:00.000Z", "kind": kind, "account": "ann", "detail": detail}

    fake.say("POST /promote", (200, told(AbState.PROMOTED, winner="new")))
    promoted = "promoted: answers stands for answers@2.0.0 now, the variant new"
    fake.say("GET /events", (200, {"data": [event("promoted", False), event("other", True)]}))
    assert run("promote", ID).startswith(f"{promoted} (not shown to be better: minimum samples, not conclusive)\n")
    fake.say("GET /events", (200, {"data": [event("promoted", True), event("other", False)]}))
    assert run("promote", ID).startswith(f"{promoted}\n")
    fake.say("GET /events", (503, refusal("the books are away", "books_unavailable")))
    assert run("promote", ID).startswith(f"{promoted}\n")


def test_rate(run: Run, fake: FakeCoordinator, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["POST /api/v1/jobs/chatcmpl-7/feedback"] = [(200, {"object": "feedback", "job_id": "7", "rating": "up", "metadata": {}})]
    assert run("rate", "chatcmpl-7", "up") == "job chatcmpl-7 has a thumb up from you\n"
    assert "no thumb from you any more" in run("rate", "chatcmpl-7", "none")
    assert [body for _, _, body in fake.asked] == [{"rating": "up"}, {"rating": None}]
    assert "'down', 'none'" in wrong(run, capsys, "rate", "7", "great")


def test_the_client_gives_no_key_away(fake: FakeCoordinator) -> None:
    assert repr(AbClient(fake.url + "/", "ak_secret")) == f"<AbClient {fake.url}>"


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ab", "--help"])
    said = capsys.readouterr().out
    assert "ab create FILE" in said and "--variant new=answers@2.0.0:50" in said and "[[variants]]" in said
    with pytest.raises(SystemExit):
        main(["ab", "create", "--help"])
    assert "5%:1h" in capsys.readouterr().out

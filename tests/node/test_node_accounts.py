"""The commands `keys` and `accounts`: beside a running Coordinator or alone, on both databases, with errors that say what to do."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sql

from coordinator.books.database import Database
from coordinator.books.jobs import Earned, Job, JobState, OpenJob, Outcome, SettleJob
from coordinator.books.queries import key_of, keys_of
from coordinator.books.stored import apply_together
from coordinator.keys import GRACE_S, KeyStore
from node.cli import build_parser, main
from node.commands.accounts import parse_share
from node.commands.common import parse_count
from node.database import database_url as url_of
from privacy.keys import NodeKey, api_key_hash

PEER, OTHER = (NodeKey(bytes([number]) * 32).peer_id for number in (1, 2))
NOW_MS = 1_790_000_000_000

Run = Callable[..., "Said"]


@dataclass
class Said:
    status: int
    out: str
    err: str


@pytest.fixture
def run(database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command on a database that has been used before."""
    monkeypatch.setenv("ARCHIPELAG_DATABASE_URL", database_url)
    monkeypatch.setenv("ARCHIPELAG_DATA_DIR", str(tmp_path))
    Database(database_url).close()
    return runner(capsys)


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: str) -> Said:
        try:
            status = main(arguments)
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        said = capsys.readouterr()
        return Said(status, said.out, said.err)

    return command


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with closing(Database(database_url)) as opened:
        yield opened


def good(said: Said) -> str:
    assert said.status == 0, said.err
    return said.out


def refused(said: Said, *words: str) -> None:
    """Status 2, one line that says what is wrong and what to do, and nothing on stdout."""
    assert (said.status, said.out) == (2, ""), said
    assert all(word in said.err for word in words), said.err


def run_job(database: Database, id: str, account: str, amount: int, compute_ms: int = 1000) -> None:
    job = Job(id, account, "echo", "chat", JobState.SUBMITTED, 0, 10**6, "explicit", "c", 1, NOW_MS)
    settle = SettleJob(id, account, "echo", "c", 1, Outcome(JobState.SUCCEEDED), (Earned(PEER, amount, compute_ms),))
    for operation in (OpenJob(job, NOW_MS + 1000), settle):
        with database.writing() as connection:
            apply_together(connection, [operation], NOW_MS)


def test_a_key_is_printed_alone_and_works(run: Run, database: Database) -> None:
    good(run("accounts", "create", "ann"))
    said = run("keys", "create", "--account", "ann", "--name", "laptop", "--scopes", "read", "--rate-limit", "7")
    assert good(said).count("\n") == 1 and said.err == ""
    found = KeyStore(database).find(api_key_hash(said.out.strip()))
    assert found is not None
    assert (found.account, found.scopes, found.rate_limit_per_minute) == ("ann", frozenset({"read"}), 7)


def test_a_slip_of_the_pen_makes_no_account(run: Run) -> None:
    good(run("accounts", "create", "ann"))
    refused(run("keys", "create", "--account", "anne"), "no account anne", "accounts create anne", "accounts list")
    assert "anne" not in good(run("accounts", "list")) and "no keys" in good(run("keys", "list"))
    good(run("keys", "create", "--account", "ann"))
    good(run("keys", "create"))
    assert "local" in good(run("accounts", "list")), "the default account is made"


def test_keys_of_an_account_in_a_folder_without_books(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "typo"
    refused(runner(capsys)("keys", "create", "--account", "ann", "--data-dir", str(folder)), "--data-dir", "--database-url")
    assert not folder.exists()


def test_keys_of_a_fresh_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a Coordinator has ever run."""
    command, folder = runner(capsys), tmp_path / "new"
    key = good(command("keys", "create", "--data-dir", str(folder))).strip()
    with closing(Database(url_of(str(folder), None))) as database:
        found = KeyStore(database).find(api_key_hash(key))
    assert found is not None and (found.account, found.rate_limit_per_minute) == ("local", 0)
    assert "local" in good(command("accounts", "list", "--data-dir", str(folder)))


def test_a_wrong_folder_is_not_filled_with_a_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, folder = runner(capsys), tmp_path / "typo"
    for arguments in (("keys", "list"), ("accounts", "list"), ("accounts", "audit"), ("accounts", "grant", "ann", "5")):
        refused(command(*arguments, "--data-dir", str(folder)), "--data-dir", "--database-url")
    assert not folder.exists()


def test_the_nodes_own_settings_are_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Coordinator's config.toml names its database, and much that these commands do not know."""
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    (tmp_path / "config.toml").write_text(f'http = "127.0.0.1:0"\ndatabase_url = "{url}"\n')
    command = runner(capsys)
    good(command("keys", "create", "--data-dir", str(tmp_path)))
    assert "local" in good(command("accounts", "list", "--data-dir", str(tmp_path)))
    assert (tmp_path / "elsewhere.db").exists() and not (tmp_path / "coordinator.db").exists()


def test_keys_are_listed_rotated_and_revoked(run: Run, database: Database) -> None:
    assert "keys create" in good(run("keys", "list"))
    for name in ("ann", "bob"):
        good(run("accounts", "create", name))
    first = good(run("keys", "create", "--account", "ann", "--name", "laptop")).strip()
    good(run("keys", "create", "--account", "bob"))
    listed = good(run("keys", "list"))
    assert "laptop" in listed and first not in listed and first[:7] in listed and "never" in listed
    assert "bob" not in good(run("keys", "list", "--account", "ann"))
    rotated = run("keys", "rotate", "1")
    second = good(rotated).strip()
    assert "key 1" in rotated.err and "24 hours" in rotated.err
    store = KeyStore(database)
    assert store.find(api_key_hash(first)) and store.find(api_key_hash(second))
    with database.reading() as connection:
        old, new = key_of(connection, 1), key_of(connection, 3)
    assert old is not None and new is not None and old.revoked_at_ms == new.created_at_ms + GRACE_S * 1000
    assert "ending" in good(run("keys", "list"))
    assert "revoked" in good(run("keys", "revoke", "1"))
    assert store.find(api_key_hash(first)) is None and store.find(api_key_hash(second))
    third = good(run("keys", "rotate", "3", "--grace", "0")).strip()
    assert store.find(api_key_hash(second)) is None and store.find(api_key_hash(third))


def test_unknown_keys(run: Run) -> None:
    for id in ("0", "99", "999999999"):
        refused(run("keys", "revoke", id), f"no key {id}", "keys list")
        refused(run("keys", "rotate", id), f"no key {id}", "keys list")


def test_no_number_of_a_key(run: Run) -> None:
    for id in ("x", "٣", "²", "-1", "1e3", "2147483648", "9" * 400, "1; DROP TABLE api_keys", "ak_" + "A" * 43):
        for action in ("revoke", "rotate"):
            said = run("keys", action, "--", id)
            refused(said, "keys list")
            assert "AAAA" not in said.err


BAD_KEYS = [
    ("--scopes", "root"),
    ("--scopes", ""),
    ("--scopes", "read,'; DROP TABLE api_keys"),
    ("--rate-limit", "0"),
    ("--rate-limit", "-1"),
    ("--rate-limit", "1e3"),
    ("--rate-limit", "٣"),
    ("--rate-limit", "99999999999999999999"),
    ("--rate-limit", "999999999"),
    ("--account", "a b"),
    ("--account", "'; DROP TABLE accounts; --"),
    ("--account", "a" * 129),
    ("--account", "\udcff"),
    ("--name", "two\nlines"),
    ("--name", "x" * 129),
]


def test_bad_wishes_for_keys(run: Run, database: Database) -> None:
    for option, value in BAD_KEYS:
        refused(run("keys", "create", f"{option}={value}"))
    for grace in ("-1", "nan", "inf", "721", "x"):
        refused(run("keys", "rotate", "1", f"--grace={grace}"), "--grace")
    with database.reading() as connection:
        assert keys_of(connection) == []


def test_an_account_from_its_beginning(run: Run) -> None:
    assert "accounts create" in good(run("accounts", "list"))
    assert "10000 credits" in good(run("accounts", "create", "ann", "--rate-limit", "60"))
    refused(run("accounts", "create", "ann"), "accounts show ann")
    assert "10250.5" in good(run("accounts", "grant", "ann", "250.5"))
    shown = good(run("accounts", "show", "ann"))
    assert "10250.5 posted" in shown and "60 a minute" in shown
    assert "no limit" in good(run("accounts", "limit", "ann", "0"))
    listed = good(run("accounts", "list")).splitlines()
    assert len(listed) == 2 and listed[1].split()[:2] == ["ann", "10250.5"]


def test_a_grant_with_an_id_is_given_once(run: Run) -> None:
    good(run("accounts", "create", "ann"))
    for _ in range(2):
        assert "10001" in good(run("accounts", "grant", "ann", "1", "--id", "prize"))
    refused(run("accounts", "grant", "ann", "2", "--id", "prize"), "choose another")
    assert "10002" in good(run("accounts", "grant", "ann", "1"))


BAD_AMOUNTS = ["-5", "0", "+5", "1e9", "1e-3", "NaN", "inf", "1_000", "٣", "1.2345678", "9999999999", "9" * 5000, "", "5 ", "0x10", "1;"]


def test_bad_grants(run: Run) -> None:
    good(run("accounts", "create", "ann"))
    for amount in BAD_AMOUNTS:
        refused(run("accounts", "grant", "ann", "--", amount))
    assert "balance: 10000 credits" in good(run("accounts", "statement", "ann"))


def test_unknown_accounts(run: Run) -> None:
    for arguments in (
        ("show", "zed"),
        ("statement", "zed"),
        ("grant", "zed", "5"),
        ("limit", "zed", "5"),
        ("pair", PEER, "zed"),
        ("publisher", "echo", "zed", "5%"),
    ):
        refused(run("accounts", *arguments), "zed", "accounts list")
    assert "issued     0 credits" in good(run("accounts", "audit")) and "no accounts" in good(run("accounts", "list"))


HOSTILE = ["'; DROP TABLE accounts; --", '"', "ann' OR '1'='1", "a b", "", "é", "a" * 129, "\udcff", "-ann"]


def test_names_that_are_none(run: Run, database: Database) -> None:
    good(run("accounts", "create", "ann"))
    for text in HOSTILE:
        for action, *arguments in (
            ("create", text),
            ("show", text),
            ("statement", text),
            ("limit", text, "5"),
            ("grant", text, "5"),
            ("pair", PEER, text),
            ("pair", text, "ann"),
            ("unpair", text),
            ("approve", text),
            ("publisher", text, "ann", "5%"),
            ("refund", text),
        ):
            refused(run("accounts", action, "--", *arguments))
    with database.reading() as connection:
        assert connection.execute(sql.text("SELECT COUNT(*) FROM accounts")).scalar_one() == 1


def test_islands_are_paired_approved_and_unpaired(run: Run, database: Database) -> None:
    good(run("accounts", "create", "ann"))
    good(run("accounts", "create", "bob"))
    assert "escrow" in good(run("accounts", "pair", PEER, "ann"))
    refused(run("accounts", "pair", PEER, "bob"), "accounts unpair")
    run_job(database, "job", "bob", 1500)
    shown = good(run("accounts", "show", "ann"))
    assert f"{PEER}: karma 0, 1 jobs done" in shown and "0.0015 in escrow" in shown
    assert "may get jobs" in good(run("accounts", "approve", PEER))
    assert "may not get jobs" in good(run("accounts", "disapprove", PEER))
    good(run("accounts", "unpair", PEER))
    refused(run("accounts", "unpair", PEER), "no account")
    refused(run("accounts", "unpair", OTHER), "no account")
    good(run("accounts", "pair", PEER, "bob"))
    assert "everything adds up" in good(run("accounts", "audit"))


def test_a_publisher_gets_his_share(run: Run, database: Database) -> None:
    for name in ("ann", "bob", "carl"):
        good(run("accounts", "create", name))
    assert "12.5 %" in good(run("accounts", "publisher", "echo", "bob", "12.5%"))
    assert "echo for 12.5 %" in good(run("accounts", "show", "bob"))
    run_job(database, "job", "ann", 1000)
    assert "10000.000125" in good(run("accounts", "show", "bob"))
    for share in ("-1", "101%", "1e1", "NaN", "12.34567", "٣", "%", "", "10%%", "0x1"):
        refused(run("accounts", "publisher", "--", "echo", "bob", share), "per cent")
    assert [parse_share(text) for text in ("0", "100%", "12.5 %", "0.0001")] == [0, 1_000_000, 125_000, 1]


def test_a_statement(run: Run, database: Database) -> None:
    good(run("accounts", "create", "ann"))
    good(run("accounts", "create", "bob"))
    good(run("accounts", "grant", "ann", "0.5"))
    table = good(run("accounts", "statement", "ann")).splitlines()
    assert len(table) == 4 and table[-1] == "balance: 10000.5 credits"
    rows = list(csv.DictReader(io.StringIO(good(run("accounts", "statement", "ann", "--csv")))))
    assert [(row["kind"], row["amount"], row["balance"]) for row in rows] == [("grant", "10000", "10000"), ("grant", "0.5", "10000.5")]
    body = json.loads(good(run("accounts", "statement", "ann", "--json")))
    assert [line["amount"] for line in body["data"]] == ["10000", "0.5"] and body["closing_balance"] == "10000.5"
    assert json.loads(good(run("accounts", "statement", "ann", "--json", "--since", "9000-01-01")))["data"] == []
    for since in ("yesterday", "' OR 1=1 --", "٢٠٢٤-١٠-٠٥", "", "9" * 500):
        refused(run("accounts", "statement", "ann", f"--since={since}"), "--since")
    refused(run("accounts", "statement", "ann", "--csv", "--json"), "--csv")


def test_a_job_is_refunded_once(run: Run, database: Database) -> None:
    for name in ("ann", "bob"):
        good(run("accounts", "create", name))
    run_job(database, "job-1", "ann", 1500)
    assert "9999.9985" in good(run("accounts", "list"))
    assert "0.0015 credits given back to ann" in good(run("accounts", "refund", "job-1"))
    assert "refunded before" in good(run("accounts", "refund", "job-1"))
    assert "9999.9985" not in good(run("accounts", "list")) and "everything adds up" in good(run("accounts", "audit"))
    for job in ("job-2", "x", "9" * 100):
        refused(run("accounts", "refund", job), "accounts statement")


def test_the_audit_says_what_is_off_and_ends_with_1(run: Run, database: Database) -> None:
    good(run("accounts", "create", "ann"))
    said = run("accounts", "audit")
    assert said.status == 0 and "everything adds up" in said.out and "10000 credits" in said.out
    with database.writing() as connection:
        connection.execute(sql.text("UPDATE balances SET posted = posted + 1 WHERE account = 'user:ann'"))
    said = run("accounts", "audit")
    assert said.status == 1 and "user:ann" in said.out and "restore a backup" in said.out


def test_a_database_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = runner(capsys)
    for url in ("nonsense", "sqlite:////no/such/folder/x.db", "postgresql://nobody@/none?host=/no/such/folder"):
        refused(command("accounts", "list", "--data-dir", str(tmp_path), "--database-url", url), "--database-url")


def test_a_locked_database_is_no_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 1, and the words with which it can be said again safely."""
    monkeypatch.setattr("coordinator.books.database.BUSY_TIMEOUT_S", 0.1)
    command, url = runner(capsys), f"sqlite:///{tmp_path / 'coordinator.db'}"
    good(command("accounts", "create", "ann", "--data-dir", str(tmp_path)))
    command_line = ("accounts", "grant", "ann", "5", "--id", "prize", "--data-dir", str(tmp_path))
    with closing(Database(url)) as database, database.writing():
        monkeypatch.setattr("node.database.Database", lambda _: _Open(database))
        said = command(*command_line)
        monkeypatch.undo()
    assert said.status == 1 and "--id prize" in said.err, said
    assert "10005" in good(command(*command_line)) and "10005" in good(command(*command_line))


class _Open:
    """A database that is open already, since opening it would want the lock, too."""

    def __init__(self, database: Database) -> None:
        self._database, self.is_sqlite = database, True
        self.reading, self.writing = database.reading, database.writing

    def close(self) -> None:
        pass


def test_every_action_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    actions = {
        "keys": ["create", "list", "revoke", "rotate"],
        "accounts": "create list show limit grant statement pair unpair approve disapprove publisher refund audit".split(),
    }
    for command, names in actions.items():
        with pytest.raises(SystemExit):
            build_parser().parse_args([command, "--help"])
        overview = capsys.readouterr().out
        assert "examples:" in overview and all(f"{command} {name}" in overview for name in names)
        for name in names:
            with pytest.raises(SystemExit) as stop:
                build_parser().parse_args([command, name, "--help"])
            assert stop.value.code == 0 and "--database-url" in capsys.readouterr().out


def test_counts() -> None:
    assert [parse_count(text) for text in ("0", "007", "999999999")] == [0, 7, 999_999_999]
    for text in ("", "-1", "+1", "1.0", "1e3", "٣", "²", "1_0", " 1", "1234567890"):
        with pytest.raises(ValueError, match="whole number"):
            parse_count(text)

"""`archipelag-node cache`, and the flags of the cache: on both databases, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import node.coordinator_role as role_module
from coordinator.books import cache_rows
from coordinator.books.accounts import CreateAccount
from coordinator.books.cargos import publish, set_state
from coordinator.books.database import Database
from coordinator.books.stored import apply_together
from coordinator.cache.policy import CacheConfig
from coordinator.cargo_rules import CargoState
from node.cli import main
from node.commands.cache import policy_text
from node.coordinator_role import CoordinatorRole
from node.settings import parse_similarity, parse_switch
from protocol import limits
from protocol.cargos import CachePolicy
from tests.protocol.cargo_samples import cargo
from tests.protocol.samples import NOW_MS

Run = Callable[..., "Said"]


@dataclass
class Said:
    status: int
    out: str
    err: str


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("ARCHIPELAG_DATA_DIR", str(tmp_path))

    def run(*arguments: str) -> Said:
        try:
            status = main(arguments)
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        said = capsys.readouterr()
        return Said(status, said.out, said.err)

    return run


@pytest.fixture
def run(database_url: str, command: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """On a database that has been used before."""
    monkeypatch.setenv("ARCHIPELAG_DATABASE_URL", database_url)
    Database(database_url).close()
    return command


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with closing(Database(database_url)) as opened:
        yield opened


def good(said: Said) -> str:
    assert said.status == 0, said.err
    return said.out


def refused(said: Said, *words: str) -> None:
    assert (said.status, said.out) == (2, ""), said
    assert all(word in said.err for word in words), said.err


def policies(database: Database) -> dict[str, CachePolicy]:
    with database.reading() as connection:
        return cache_rows.policies(connection)


def purges(database: Database, after: int = 0) -> list[tuple[str, str, str]]:
    with database.reading() as connection:
        return [(purge.account, purge.cargo, purge.key) for purge in cache_rows.purges_after(connection, after)]


# -- policy


def test_what_is_not_said_stays_as_it_was(run: Run, database: Database) -> None:
    assert "nothing is said" in good(run("cache", "policy"))
    good(run("cache", "policy", "smollm2-135m", "--similarity", "0.9", "--ttl", "60"))
    assert policies(database) == {"smollm2-135m": CachePolicy(True, 60, 900)}
    good(run("cache", "policy", "smollm2-135m", "--public"))
    good(run("cache", "policy", "smollm2-135m", "--enabled", "no"))
    assert policies(database) == {"smollm2-135m": CachePolicy(False, 60, 900, True)}
    told = good(run("cache", "policy", "smollm2-135m", "--enabled", "yes", "--private"))
    assert policies(database) == {"smollm2-135m": CachePolicy(True, 60, 900)}
    for text in (told, good(run("cache", "policy")), good(run("cache", "policy", "smollm2-135m"))):
        assert "smollm2-135m" in text and policy_text(CachePolicy(True, 60, 900)) in text


def test_a_manifest_holds_until_the_operator_says_more(run: Run, database: Database) -> None:
    assert policy_text(CachePolicy()) in good(run("cache", "policy", "word-count"))
    assert "no answers are kept, as its manifest says" in good(run("cache", "policy", "uuid")), "equal UUIDs are no UUIDs"
    good(run("cache", "policy", "uuid", "--ttl", "5"))
    assert policies(database)["uuid"] == CachePolicy(False, 5), "the rest is the manifest's"
    assert "as its manifest says" in good(run("cache", "policy", "uuid", "--reset")) and policies(database) == {}
    assert "nothing about it" in good(run("cache", "policy", "uuid", "--reset"))


def test_of_a_published_cargo_the_newest_release_counts(run: Run, database: Database) -> None:
    old, new = CachePolicy(ttl_s=100), CachePolicy(ttl_s=200, public=True)
    with database.writing() as connection:
        apply_together(connection, [CreateAccount("ann", 0)], NOW_MS)
        releases = (cargo(cache=old), cargo(release="1.1.0", cache=new))
        for one in releases:
            publish(connection, one, "ann", True, (), NOW_MS)
    name = releases[0].manifest.name
    assert policy_text(new) in good(run("cache", "policy", name))
    with database.writing() as connection:
        set_state(connection, releases[1].address, CargoState.SUSPENDED, NOW_MS)
    assert policy_text(old) in good(run("cache", "policy", name))
    good(run("cache", "policy", name, "--similarity", "1"))
    assert policies(database) == {name: replace(old, similarity_milli=1000)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ttl", "5"], ["NAME"]),
        (["--reset"], ["NAME"]),
        (["x", "--reset", "--ttl", "5"], ["alone"]),
        (["x", "--ttl", "0"], ["--ttl", str(limits.CARGO_CACHE_TTL_S_MAX), "--enabled no"]),
        (["x", "--ttl", str(limits.CARGO_CACHE_TTL_S_MAX + 1)], ["--ttl"]),
        (["x", "--ttl", "soon"], ["whole number"]),
        (["x", "--similarity", "1.01"], ["above 0 and at most 1"]),
        (["x", "--similarity", "85%"], ["such as 0.85"]),
        (["x", "--enabled", "maybe"], ["neither on nor off"]),
        (["x", "--public", "--private"], ["not allowed with"]),
        (["a b", "--public"], ["NAME"]),
        (["x" * 200, "--public"], ["NAME"]),
    ],
)
def test_a_policy_that_is_none(command: Run, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    Database(f"sqlite:///{tmp_path / 'coordinator.db'}").close()
    refused(command("cache", "policy", *arguments), *words)


def test_settings_of_the_coordinator_are_no_policy(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIPELAG_TTL", "5")
    monkeypatch.setenv("ARCHIPELAG_CARGO", "echo")
    (tmp_path / "config.toml").write_text('cache = "on"\nenabled = "no"\nall = true\n')
    assert "the account that asked" in good(run("cache", "policy", "word-count"))
    refused(run("cache", "clear"), "say what")


# -- clear


def test_what_is_to_be_forgotten(run: Run, database: Database) -> None:
    good(run("accounts", "create", "ann"))
    key = "ab" * 32
    assert "account ann, Cargo echo" in good(run("cache", "clear", "--account", "ann", "--cargo", "echo"))
    good(run("cache", "clear", "--key", key.upper()))
    assert "everybody" in good(run("cache", "clear", "--all"))
    assert purges(database) == [("ann", "echo", ""), ("", "", key), ("", "", "")]
    with database.reading() as connection:
        assert cache_rows.last_purge(connection) == 3 and purges(database, 2) == [("", "", "")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--account", "--all"]),
        (["--all", "--cargo", "x"], ["say what"]),
        (["--account", "ann"], ["no account ann", "accounts list"]),
        (["--key", "abc"], ["64 hexadecimal digits"]),
        (["--cargo", "a b"], ["--cargo"]),
    ],
)
def test_nothing_is_forgotten_by_mistake(run: Run, database: Database, arguments: list[str], words: list[str]) -> None:
    refused(run("cache", "clear", *arguments), *words)
    assert purges(database) == []


def test_where_no_coordinator_is(command: Run, tmp_path: Path) -> None:
    for arguments in (("policy",), ("clear", "--all"), ("stats",)):
        refused(command("cache", *arguments, "--data-dir", str(tmp_path / "typo")), "--data-dir")


def test_no_number_of_a_purge_is_given_twice(database: Database) -> None:
    with database.writing() as connection:
        assert [cache_rows.purge(connection, at, cargo=f"c{at}") for at in (10, 20, 30)] == [1, 2, 3]
        assert cache_rows.forget_purges(connection, 25) == 2 and cache_rows.forget_purges(connection, 99) == 0
        assert cache_rows.purge(connection, 40) == 4
        assert [purge.at_ms for purge in cache_rows.purges_after(connection, 0)] == [30, 40]


# -- flags of the Coordinator


@pytest.fixture
def started(command: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CoordinatorRole]:
    """What a Coordinator is started with."""
    roles: list[CoordinatorRole] = []

    async def note(role: CoordinatorRole) -> None:
        roles.append(role)

    monkeypatch.setattr(role_module, "run_coordinator", note)
    monkeypatch.delenv("ARCHIPELAG_CACHE_MODEL", raising=False)

    def start(*arguments: str) -> CoordinatorRole:
        good(command("coordinator", *arguments))
        return roles.pop()

    return start


def test_the_cache_is_on_unless_it_is_said(started: Callable[..., CoordinatorRole]) -> None:
    role = started()
    assert role.http.cache == CacheConfig() and role.http.cache.enabled and role.cache_model == "minilm-l6-v2"
    assert (role.http.cache.ttl_s, role.http.cache.entries_max, role.http.cache.similarity_milli) == (3600, 10_000, 850), "mission.md"
    role = started("--cache", "off")
    assert not role.http.cache.enabled and role.cache_model == ""
    assert started("--cache-model", "off").cache_model == ""


def test_flags_win_over_the_environment_and_that_over_the_file(
    started: Callable[..., CoordinatorRole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text('cache-ttl = 7\ncache_entries = 8\ncache_similarity = "0.7"\ncache = true\n')
    monkeypatch.setenv("ARCHIPELAG_CACHE_ENTRIES", "9")
    monkeypatch.setenv("ARCHIPELAG_CACHE_SIMILARITY", "0.95")
    cache = started("--cache-similarity", "1").http.cache
    assert (cache.enabled, cache.ttl_s, cache.entries_max, cache.similarity_milli) == (True, 7, 9, 1000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cache", "perhaps"], ["neither on nor off"]),
        (["--cache-ttl", "0"], ["--cache-ttl", "--cache off"]),
        (["--cache-ttl", "1h"], ["whole number"]),
        (["--cache-entries", "0"], ["--cache-entries", "--cache off"]),
        (["--cache-similarity", "0"], ["above 0"]),
        (["--cache-model", "uuid"], ["uuid is no Cargo that ships and makes vectors", "minilm-l6-v2"]),
    ],
)
def test_bad_flags(command: Run, arguments: list[str], words: list[str]) -> None:
    refused(command("coordinator", *arguments), *words)


def test_similarities_are_in_thousandths() -> None:
    assert [parse_similarity(text) for text in ("0.85", "1", "1.000", "0.001", "0.9")] == [850, 1000, 1000, 1, 900]
    for bad in ("", "0", "0.000", "1.001", ".5", "0.8501", "-0.5", "0,5", "2", "nan", "1e-1", "0.85\n", "٠.٥"):
        with pytest.raises(ValueError, match="with at most three decimals"):
            parse_similarity(bad)
    assert [parse_switch(text) for text in ("on", "off", "Yes", "no", "True")] == [True, False, True, False, True]

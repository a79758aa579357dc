"""The cache of answers: how well it does, what the operator wants of it, and what is to be forgotten; beside a running Coordinator.

An answer is kept for whoever asks the same again, which is free and touches no Island. What a Cargo's manifest says about that holds until
the operator says something else; every Coordinator of the database keeps to it within seconds.

  cache stats                        hits, misses and size of the Coordinator on this data folder
  cache policy                       what the operator has said
  cache policy NAME                  what holds for a Cargo
  cache policy NAME --ttl 600 …      say something else for it
  cache policy NAME --reset          what its manifest says holds again
  cache clear --account A            forget answers: of an account, of a Cargo, under a key, or of several of these at once

examples:
  archipelag-node cache policy smollm2-135m --similarity 1          only equal questions are given an answer that was kept
  archipelag-node cache policy word-count --public                  one account may be given what another one's job has answered
  archipelag-node cache policy smollm2-135m --enabled no
  archipelag-node cache clear --account ann --cargo smollm2-135m
  archipelag-node cache clear --all
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from node.commands.common import add_books, add_data_dir, checked, parse_count, settled
from node.settings import parse_similarity, parse_switch
from protocol import checks, limits
from protocol.cargos import CachePolicy
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from coordinator.books.database import Database

HELP = "the cache of answers: figures, policies of Cargos, what is to be forgotten"
_KEY_BYTES = 32
_CHANGES = ("policy_enabled", "policy_ttl", "policy_similarity", "policy_public")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, perform: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        made.set_defaults(parser=made, perform=perform)
        return made

    stats = add("stats", _stats, "show how well the cache of a running Coordinator does")
    stats.add_argument("--json", dest="stats_json", action="store_true", default=None, help="print JSON")
    add_data_dir(stats, "coordinator")
    _add_policy_arguments(add("policy", _policy, "show or change what holds for a Cargo's answers"))
    _add_clear_arguments(add("clear", _clear, "forget answers, in every Coordinator of the database"))


def _add_policy_arguments(policy: argparse.ArgumentParser) -> None:
    """Names of their own, for ARCHIPELAG_TTL or ``ttl`` in the Coordinator's config.toml say nothing about a Cargo."""
    policy.add_argument("name", nargs="?", metavar="NAME", help="the Cargo's name, as /v1/models lists it (default: show all)")
    switch = checked(parse_switch)
    policy.add_argument("--enabled", dest="policy_enabled", type=switch, metavar="yes|no", help="whether its answers are kept")
    policy.add_argument("--ttl", dest="policy_ttl", type=checked(parse_count), metavar="SECONDS", help="how long")
    policy.add_argument(
        "--similarity",
        dest="policy_similarity",
        type=checked(parse_similarity),
        metavar="S",
        help="how alike two questions have to be, such as 0.9; 1: only equal ones",
    )
    whose = policy.add_mutually_exclusive_group()
    whose.add_argument(
        "--public", dest="policy_public", action="store_const", const=True, help="an account may be given what another's job has answered"
    )
    whose.add_argument("--private", dest="policy_public", action="store_const", const=False, help="each account is given its own only")
    policy.add_argument("--reset", dest="policy_reset", action="store_true", default=None, help="what its manifest says holds again")
    add_books(policy)


def _add_clear_arguments(clear: argparse.ArgumentParser) -> None:
    clear.add_argument("--account", dest="clear_account", metavar="A", help="answers that this account has asked for")
    clear.add_argument("--cargo", dest="clear_cargo", metavar="C", help="answers of this Cargo")
    clear.add_argument("--key", dest="clear_key", metavar="K", help="the answer under this key, 64 hexadecimal digits")
    clear.add_argument("--all", dest="clear_all", action="store_true", default=None, help="all answers")
    add_books(clear)


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.perform(arguments))


# -- stats


def _stats(arguments: argparse.Namespace) -> int:
    from node.control import ask_node

    settings = settled(arguments, "coordinator", strict=False)
    told = ask_node(settings.data_dir, "cache")
    print(json.dumps(told, indent=1) if settings.stats_json else "\n".join(_stats_lines(told)))
    return 0


def _stats_lines(told: Mapping[str, Any]) -> list[str]:
    """A line for each figure, those of each Cargo below its name."""
    lines = []
    for name, value in told.items():
        if isinstance(value, Mapping):
            lines += [f"{name.replace('_', ' ')}"] if value else []
            lines += [f"  {line}" for line in _stats_lines(value)]
        else:
            lines.append(f"{name.replace('_', ' '):<20} {_plain(value)}")
    return lines


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


# -- policy


def _policy(arguments: argparse.Namespace) -> int:
    settings = settled(arguments, "coordinator", strict=False)
    changes = any(getattr(settings, name) is not None for name in _CHANGES)
    if settings.name is None and (changes or settings.policy_reset):
        raise ConfigError("say of which Cargo: archipelag-node cache policy NAME …")
    if changes and settings.policy_reset:
        raise ConfigError("--reset lets the manifest's word hold again; give it alone")
    if settings.name is not None:
        _check_name("NAME", settings.name)
    from node.database import open_books

    with open_books(settings.data_dir, settings.database_url) as database:
        if settings.name is None:
            return _list(database)
        if settings.policy_reset:
            return _reset(settings.name, database)
        return _change(settings, database) if changes else _show(settings.name, database)


def _check_name(option: str, name: str) -> None:
    try:
        checks.label(option, name, limits.NAME_CHARS_MAX)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _list(database: Database) -> int:
    from coordinator.books.cache_rows import policies

    with database.reading() as connection:
        found = policies(connection)
    if not found:
        print("nothing is said about any Cargo: what manifests say holds. Say something with archipelag-node cache policy NAME …")
    for name, policy in found.items():
        print(f"{name:<32} {policy_text(policy)}")
    return 0


def _show(name: str, database: Database) -> int:
    policy, said_by = _holding(name, database)
    print(f"{name}: {policy_text(policy)}, as {said_by}")
    return 0


def _holding(name: str, database: Database) -> tuple[CachePolicy, str]:
    """What holds for a Cargo, and who says so."""
    from coordinator.books.cache_rows import policies, published_policy
    from node.shipped import shipped

    with database.reading() as connection:
        said = policies(connection).get(name)
        published = published_policy(connection, name)
    if said is not None:
        return said, "the operator says"
    if published is not None:
        return published, "its manifest says"
    if (ships := shipped(name)) is not None:
        return ships.manifest.cache, "its manifest says"
    return CachePolicy(), "holds for Cargos without a manifest, where the Coordinator is started with no --cache-… options"


def _change(settings: argparse.Namespace, database: Database) -> int:
    """What is not said stays as it holds now."""
    from coordinator.books.cache_rows import set_policy
    from coordinator.books.database import database_now_ms

    policy, _ = _holding(settings.name, database)
    given = {"enabled": settings.policy_enabled, "ttl_s": settings.policy_ttl, "similarity_milli": settings.policy_similarity}
    given["public"] = settings.policy_public
    if settings.policy_ttl is not None and not 1 <= settings.policy_ttl <= limits.CARGO_CACHE_TTL_S_MAX:
        raise ConfigError(f"--ttl takes 1 to {limits.CARGO_CACHE_TTL_S_MAX} seconds; --enabled no keeps no answers")
    policy = replace(policy, **{name: value for name, value in given.items() if value is not None})
    with database.writing() as connection:
        set_policy(connection, settings.name, policy, database_now_ms(connection, database.is_sqlite))
    print(f"{settings.name}: {policy_text(policy)}; running Coordinators notice within seconds")
    return 0


def _reset(name: str, database: Database) -> int:
    from coordinator.books.cache_rows import set_policy

    with database.writing() as connection:
        had = set_policy(connection, name, None, 0)
    policy, said_by = _holding(name, database)
    print(f"{name}: {policy_text(policy)}, as {said_by}" + ("" if had else "; the operator had said nothing about it"))
    return 0


def policy_text(policy: CachePolicy) -> str:
    """``answers for 3600 s, for questions alike from 0.85 on, for the account that asked``."""
    if not policy.enabled:
        return "no answers are kept"
    alike = "equal questions only" if policy.similarity_milli == 1000 else f"questions alike from {policy.similarity_milli / 1000:g} on"
    return f"answers are kept for {policy.ttl_s} s, for {alike}, for {'everybody' if policy.public else 'the account that asked only'}"


# -- clear


def _clear(arguments: argparse.Namespace) -> int:
    settings = settled(arguments, "coordinator", strict=False)
    account, cargo, key = settings.clear_account or "", settings.clear_cargo or "", (settings.clear_key or "").lower()
    if bool(account or cargo or key) == bool(settings.clear_all):
        raise ConfigError("say what is to be forgotten: --account, --cargo and --key, or --all")
    for option, name in (("--account", account), ("--cargo", cargo)):
        if name:
            _check_name(option, name)
    if key:
        _check_key(key)
    from coordinator.books.database import database_now_ms
    from coordinator.books.queries import account_view
    from coordinator.cache.purge import order_purge
    from node.database import open_books

    with open_books(settings.data_dir, settings.database_url) as database, database.writing() as connection:
        if account and account_view(connection, account) is None:
            raise ConfigError(f"there is no account {account}; see archipelag-node accounts list")
        order_purge(connection, database_now_ms(connection, database.is_sqlite), account, cargo, key)
    named = [f"{what} {name}" for what, name in (("account", account), ("Cargo", cargo), ("key", key)) if name]
    print(f"kept answers of {', '.join(named) or 'everybody'} are forgotten; running Coordinators do so within seconds")
    return 0


def _check_key(key: str) -> None:
    try:
        checks.content_hash("--key", key)
    except ValueError:
        raise ConfigError(f"--key takes {2 * _KEY_BYTES} hexadecimal digits, not {key[:80]!r}") from None

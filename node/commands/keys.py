"""Make, list, revoke and rotate the API keys of a Coordinator. It works beside a running Coordinator, which accepts a new key at once.

A key is printed once, alone on stdout, and stored only as a hash: whoever loses it makes another. Lists show its first characters and its
number, by which it is revoked and rotated.

  keys create          make a key and print it; for another account than "local" that has to be made first (accounts create NAME)
  keys list            all keys, or those of one account: what they may do, when they were last used
  keys revoke ID       it counts no more within seconds
  keys rotate ID       make a key that takes its place, and print it; the old one stays valid for a day

examples:
  archipelag-node keys create --account ann --name laptop --scopes read,write
  archipelag-node keys rotate 3 --grace 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from node.commands.common import add_books, checked, parse_count, settled
from node.settings import defaults
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from coordinator.books.database import Database
    from coordinator.books.queries import KeyRecord

HELP = "make, list, revoke and rotate API keys"
_ACCOUNT_DEFAULT = "local"
_SCOPES = ("read", "write")
_GRACE_HOURS = 24.0
_GRACE_HOURS_MAX = 720.0
_ID_DIGITS_MAX = 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = _add(actions, "create", _create, "make a key and print it, alone on stdout")
    create.add_argument("--account", metavar="NAME", help="account that the key belongs to (default: local, made where there is none)")
    create.add_argument("--name", metavar="TEXT", help="what to call the key in lists")
    create.add_argument("--scopes", metavar="LIST", help="what it may do: read, write, or both (default: read,write)")
    create.add_argument("--rate-limit", type=checked(parse_count), metavar="N", help="requests a minute (default: no limit)")
    listing = _add(actions, "list", _list, "list keys: number, first characters, account, scopes, last use")
    listing.add_argument("--account", metavar="NAME", help="only the keys of this account")
    revoke = _add(actions, "revoke", _revoke, "make a key useless; running Coordinators notice within seconds")
    rotate = _add(actions, "rotate", _rotate, "make a key that takes another's place and print it, alone on stdout")
    rotate.add_argument(
        "--grace",
        type=float,
        metavar="HOURS",
        help=f"how long the old key stays valid, 0 to {_GRACE_HOURS_MAX:.0f} (default: {_GRACE_HOURS:.0f})",
    )
    for changed in (revoke, rotate):
        changed.add_argument("id", metavar="ID", help="the key's number in `archipelag-node keys list`")


def _add(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    perform: Callable[[argparse.Namespace, Database], None],
    text: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=f"Keys of the API: {text}.")
    add_books(parser)
    parser.set_defaults(parser=parser, perform=perform)
    return parser


def run(arguments: argparse.Namespace) -> int:
    settings = settled(arguments, "coordinator", strict=False)
    _check(settings)
    from coordinator.keys import KeyRefused
    from node.database import open_books

    makes = settings.action == "create" and settings.account == _ACCOUNT_DEFAULT
    with open_books(settings.data_dir, settings.database_url, make=makes) as database:
        try:
            settings.perform(settings, database)
        except KeyRefused as refused:
            raise ConfigError(f"{refused}; see archipelag-node keys list") from refused
    return 0


def _check(settings: argparse.Namespace) -> None:
    """Before a database is opened, or made. Raises ConfigError."""
    if settings.action == "create":
        defaults(settings, account=_ACCOUNT_DEFAULT, scopes="read,write", name="")
        scopes = _scopes(settings.scopes)
        if not scopes or not set(scopes) <= set(_SCOPES):
            raise ConfigError(f"--scopes takes {' and '.join(_SCOPES)}, separated by a comma, not {settings.scopes!r}")
        if settings.rate_limit is not None and settings.rate_limit < 1:
            raise ConfigError("--rate-limit must be at least 1 request a minute")
    if settings.action == "rotate":
        defaults(settings, grace=_GRACE_HOURS)
        if not 0 <= settings.grace <= _GRACE_HOURS_MAX:
            raise ConfigError(f"--grace takes 0 to {_GRACE_HOURS_MAX:.0f} hours")


def _scopes(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _id(settings: argparse.Namespace) -> int:
    """Raises ConfigError, without showing what was given: it may be the key itself."""
    text = settings.id
    if not (text.isascii() and text.isdigit() and len(text) <= _ID_DIGITS_MAX):
        raise ConfigError("ID is the key's number in archipelag-node keys list, never the key itself")
    return int(text)


def _create(settings: argparse.Namespace, database: Database) -> None:
    from coordinator.keys import ApiKey, KeyStore, check_key_name

    try:
        wanted = ApiKey(0, settings.account, frozenset(_scopes(settings.scopes)), settings.rate_limit or 0)
        check_key_name(settings.name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if wanted.account != _ACCOUNT_DEFAULT:
        _need_account(database, wanted.account)
    print(KeyStore(database).create(wanted, settings.name).key)


def _need_account(database: Database, name: str) -> None:
    """A slip of the pen must not make an account with its 10,000 credits. Raises ConfigError."""
    from coordinator.books.queries import account_view

    with database.reading() as connection:
        if account_view(connection, name) is not None:
            return
    raise ConfigError(f"there is no account {name}; make it with archipelag-node accounts create {name}, or see accounts list")


def _list(settings: argparse.Namespace, database: Database) -> None:
    from coordinator.books.queries import keys_of

    with database.reading() as connection:
        records = keys_of(connection, settings.account)
    if not records:
        print("no keys; make one with archipelag-node keys create")
        return
    lines = [_line("id", "key", "account", "name", "scopes", "limit", "last used", "state"), *map(_row, records)]
    print("\n".join(line.rstrip() for line in lines))


def _line(id: str, key: str, account: str, name: str, scopes: str, limit: str, used: str, state: str) -> str:
    return f"{id:>5}  {key:<8}  {account:<16}  {name:<16}  {scopes:<10}  {limit:>8}  {used:<20}  {state}"


def _row(record: KeyRecord) -> str:
    import time

    from coordinator.statement import time_text

    state = record.state(time.time_ns() // 1_000_000)
    until = f" {time_text(record.revoked_at_ms)}" if record.revoked_at_ms is not None else ""
    return _line(
        str(record.id),
        record.hint + "…",
        record.account,
        record.name,
        ",".join(record.scopes),
        f"{record.rate_limit_per_minute}/min" if record.rate_limit_per_minute else "none",
        time_text(record.last_used_at_ms // 1000 * 1000).replace(".000", "") if record.last_used_at_ms else "never",
        state + until,
    )


def _revoke(settings: argparse.Namespace, database: Database) -> None:
    from coordinator.keys import KeyStore

    record = KeyStore(database).revoke(_id(settings))
    print(f"key {record.id} of {record.account} ({record.hint}…) is revoked")


def _rotate(settings: argparse.Namespace, database: Database) -> None:
    from coordinator.keys import KeyStore

    key_id = _id(settings)
    made = KeyStore(database).rotate(key_id, grace_s=settings.grace * 3600)
    print(made.key)
    print(f"key {made.record.id} takes the place of key {key_id}, which ends in {settings.grace:g} hours", file=sys.stderr)

"""Accounts of a Coordinator's network: credits, Islands, publishers, and whether the books add up. It works beside a running Coordinator.

An account begins with 10,000 credits and is topped up to that once a day while the network is in beta. What an Island earns goes to the
account that it is paired with, once its karma has reached 10; until then it waits in escrow.

accounts:
  accounts create NAME [--rate-limit N]     make one; keys come from archipelag-node keys create --account NAME
  accounts list                             all of them, with credits, escrow, Islands, keys
  accounts show NAME                        one, with its Islands
  accounts limit NAME N                     requests a minute of all its keys together, 0 for no limit
  accounts grant NAME CREDITS               give it new credits
  accounts statement NAME                   every transfer: when, what for, how much, the balance after it

Islands and Cargos:
  accounts pair PEER NAME                   the account earns what the Island earns
  accounts unpair PEER                      nobody does; it waits in escrow again
  accounts approve PEER                     the Island may get jobs, where the Coordinator requires approval
  accounts disapprove PEER                  it may not
  accounts publisher CARGO NAME SHARE       the account gets a share of what the Cargo's jobs cost, such as 10%

books:
  accounts refund JOB_ID                    give back what a job was charged
  accounts audit                            check that everything adds up; exit status 1 and what is off if not

examples:
  archipelag-node accounts create ann --rate-limit 600
  archipelag-node accounts statement ann --csv --since 2026-01-01 > ann.csv
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from node.commands.common import add_books, checked, parse_count, settled
from protocol import checks, limits
from protocol.errors import ConfigError
from protocol.prices import format_credits, parse_credits

if TYPE_CHECKING:
    from coordinator.books.database import Database
    from coordinator.books.queries import AccountView, IslandView, Line
    from coordinator.books.rows import Operation
    from coordinator.statement import Rendering, StatementReader

HELP = "accounts: credits, Islands, publishers, statements, audit"
EXIT_OFF = 1
_PPM_OF_PERCENT = 10_000

Perform = Callable[[argparse.Namespace, "Database"], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_account_actions(actions)
    _add_island_actions(actions)
    job = _add(actions, "refund", _refund, "give back what a job was charged, once", "job")
    job.epilog = "What those who earned it no longer have, the network bears."
    _add(actions, "audit", _audit, "check that balances, holds, charges and jobs add up; exit status 1 if not")


def _add_account_actions(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    create = _add(actions, "create", _create, "make an account with 10,000 credits", "name")
    create.add_argument(
        "--rate-limit", type=checked(parse_count), metavar="N", help="requests a minute of all its keys (default: no limit)"
    )
    _add(actions, "list", _list, "list all accounts: credits, escrow, karma, Islands, keys")
    _add(actions, "show", _show, "show one account and its Islands", "name")
    limit = _add(actions, "limit", _limit, "limit the requests a minute of all keys of an account", "name")
    limit.add_argument("requests", type=checked(parse_count), metavar="N", help="requests a minute; 0 is no limit")
    grant = _add(actions, "grant", _grant, "give an account new credits", "name")
    grant.add_argument("credits", metavar="CREDITS", help="how many, such as 250 or 0.5")
    grant.add_argument("--id", metavar="ID", help="what has the same id is granted once, however often it is said")
    statement = _add(actions, "statement", _statement, "print every transfer of an account, oldest first", "name")
    form = statement.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", default=None, help="as CSV, for spreadsheets")
    form.add_argument("--json", action="store_true", default=None, help="as one JSON object")
    statement.add_argument("--since", metavar="DATE", help="from this day or moment on, such as 2026-01-31 (UTC)")


def _add_island_actions(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _add(actions, "pair", _pair, "let an account earn what an Island earns", "peer", "name")
    _add(actions, "unpair", _unpair, "take an Island from its account", "peer")
    _add(actions, "approve", _approve, "let an Island get jobs, where the Coordinator requires approval", "peer")
    _add(actions, "disapprove", _approve, "let an Island get no more jobs, where the Coordinator requires approval", "peer")
    publisher = _add(actions, "publisher", _publisher, "give an account a share of what a Cargo's jobs cost", "cargo", "name")
    publisher.add_argument("share", metavar="SHARE", help="per cent of each charge, such as 10%% or 2.5%%")


_POSITIONAL = {
    "name": ("NAME", "the account"),
    "peer": ("PEER", "the Island's peer id, as archipelag-node status shows it"),
    "cargo": ("CARGO", "the Cargo's name, as /v1/models lists it"),
    "job": ("JOB_ID", "the job's id, as answers and statements name it"),
}


def _add(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], action: str, perform: Perform, text: str, *positional: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(action, help=text, description=f"Accounts: {text}.")
    for name in positional:
        metavar, meaning = _POSITIONAL[name]
        parser.add_argument(name, metavar=metavar, help=meaning)
    add_books(parser)
    parser.set_defaults(parser=parser, perform=perform)
    return parser


def run(arguments: argparse.Namespace) -> int:
    settings = settled(arguments, "coordinator", strict=False)
    _check(settings)
    from node.database import open_books

    with open_books(settings.data_dir, settings.database_url, make=settings.action == "create") as database:
        return int(settings.perform(settings, database))


def _check(settings: argparse.Namespace) -> None:
    """Before a database is opened, or made. Raises ConfigError."""
    try:
        if (name := getattr(settings, "name", None)) is not None:
            checks.label("NAME", name, limits.NAME_CHARS_MAX)
        if (cargo := getattr(settings, "cargo", None)) is not None:
            checks.label("CARGO", cargo, limits.NAME_CHARS_MAX)
        if (peer := getattr(settings, "peer", None)) is not None:
            checks.peer_id("PEER", peer)
        if (job := getattr(settings, "job", None)) is not None:
            checks.label("JOB_ID", job, limits.NAME_CHARS_MAX)
        if getattr(settings, "id", None) is not None:
            checks.label("--id", settings.id, limits.NAME_CHARS_MAX)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for name in ("rate_limit", "requests"):
        _check_limit(getattr(settings, name, None))


def _check_limit(requests: int | None) -> None:
    from coordinator.keys import RATE_LIMIT_MAX

    if requests is not None and requests > RATE_LIMIT_MAX:
        raise ConfigError(f"a limit is at most {RATE_LIMIT_MAX} requests a minute; 0 is none")


def _write(database: Database, operation: Operation[Any]) -> Any:
    """One change of the books, on disk when this returns. Raises BooksRefused, BooksUnavailable."""
    from coordinator.books.database import database_now_ms
    from coordinator.books.stored import apply_together

    with database.writing() as connection:
        return apply_together(connection, [operation], database_now_ms(connection, database.is_sqlite))[0]


def _view(database: Database, name: str) -> AccountView:
    from coordinator.books.errors import BooksRefused, Why
    from coordinator.books.queries import account_view

    with database.reading() as connection:
        view = account_view(connection, name)
    if view is None:
        raise BooksRefused(Why.NO_ACCOUNT, f"there is no account {name}")
    return view


def _create(settings: argparse.Namespace, database: Database) -> int:
    from coordinator.books.accounts import CreateAccount
    from coordinator.books.queries import account_view

    with database.reading() as connection:
        known = account_view(connection, settings.name) is not None
    if known:
        raise ConfigError(f"there is an account {settings.name}; see archipelag-node accounts show {settings.name}")
    _write(database, CreateAccount(settings.name, settings.rate_limit or 0))
    print(
        f"account {settings.name} has {format_credits(_view(database, settings.name).credits)} credits; "
        f"make a key for it with archipelag-node keys create --account {settings.name}"
    )
    return 0


def _list(settings: argparse.Namespace, database: Database) -> int:
    from coordinator.books.queries import account_views

    with database.reading() as connection:
        views = account_views(connection)
    if not views:
        print("no accounts; make one with archipelag-node accounts create NAME")
        return 0
    print(f"{'name':<24} {'credits':>18} {'held':>14} {'in escrow':>14} {'karma':>10} {'islands':>7} {'keys':>5}  requests")
    for view in views:
        amounts = f"{format_credits(view.credits):>18} {format_credits(view.held):>14} {format_credits(view.escrow):>14}"
        print(f"{view.name:<24} {amounts} {view.karma_milli / 1000:>10g} {view.islands:>7} {view.keys:>5}  {_limit_text(view)}")
    return 0


def _limit_text(view: AccountView) -> str:
    return f"{view.rate_limit_per_minute} a minute" if view.rate_limit_per_minute else "no limit"


def _show(settings: argparse.Namespace, database: Database) -> int:
    from coordinator.books.queries import islands_of, publishers_of
    from coordinator.statement import time_text

    view = _view(database, settings.name)
    with database.reading() as connection:
        islands = islands_of(connection, view.name)
        published = [publisher for publisher in publishers_of(connection) if publisher.account == view.name]
    print(f"account    {view.name}, since {time_text(view.created_at_ms)[:10]}")
    print(f"credits    {format_credits(view.credits)} ({format_credits(view.posted)} posted, {format_credits(view.held)} held for jobs)")
    print(f"escrow     {format_credits(view.escrow)} wait until Islands have the karma to earn")
    print(f"karma      {view.karma_milli / 1000:g} of {view.islands} Islands, {view.earning} of them earning")
    print(f"requests   {_limit_text(view)}, with {view.keys} keys")
    for island in islands:
        print(_island_line(island))
    for publisher in published:
        print(f"publishes  {publisher.cargo} for {publisher.share_ppm / _PPM_OF_PERCENT:g} % of its charges")
    return 0


def _island_line(view: IslandView) -> str:
    record = view.record
    state = "earning" if record.earns else f"{format_credits(view.escrow)} in escrow"
    return (
        f"island     {record.peer}: karma {record.karma_milli / 1000:g}, {record.jobs_done} jobs done, {record.jobs_failed} failed, "
        f"{record.compute_ms / 3_600_000:.1f} h computed, {format_credits(record.earned_micros)} earned, {state}"
    )


def _limit(settings: argparse.Namespace, database: Database) -> int:
    from coordinator.books.accounts import LimitAccount

    _write(database, LimitAccount(settings.name, settings.requests))
    print(f"account {settings.name}: {_limit_text(_view(database, settings.name))}")
    return 0


def _grant(settings: argparse.Namespace, database: Database) -> int:
    from coordinator.books.accounts import GrantCredits
    from coordinator.books.errors import BooksUnavailable

    id = settings.id or secrets.token_hex(8)
    try:
        amount = parse_credits(settings.credits)
        _write(database, GrantCredits(settings.name, amount, f"grant:{settings.name}:{id}"))
    except ValueError as error:
        raise ConfigError(f"CREDITS: {error}") from None
    except BooksUnavailable as error:
        raise BooksUnavailable(f"{error}; say it again with --id {id}, which grants it once") from error
    print(f"{format_credits(amount)} credits granted; {settings.name} has {format_credits(_view(database, settings.name).credits)}")
    return 0


def _statement(settings: argparse.Namespace, database: Database) -> int:
    from coordinator.statement import RENDERINGS, StatementReader, parse_time, until_now

    try:
        since_ms = parse_time(settings.since) if settings.since is not None else 0
    except ValueError as error:
        raise ConfigError(f"--since: {error}") from None
    view = _view(database, settings.name)
    reader = StatementReader(view.name, since_ms, until_now(time.time_ns() // 1_000_000))
    form = "csv" if settings.csv else "json" if settings.json else ""
    rendering: Rendering = RENDERINGS[form]() if form else _Table()
    with database.reading() as connection:
        reader.open(connection)
    sys.stdout.write(rendering.begin(reader))
    while True:
        with database.reading() as connection:
            page = reader.next_page(connection)
        if not page:
            break
        sys.stdout.write(rendering.lines(page))
    sys.stdout.write(rendering.end(reader))
    return 0


class _Table:
    """A statement for people."""

    content_type = "text/plain"

    def begin(self, reader: StatementReader) -> str:
        return self._row("time", "kind", "amount", "balance", "job")

    def lines(self, lines: Sequence[Line]) -> str:
        from coordinator.statement import time_text

        return "".join(
            self._row(time_text(line.at_ms), line.kind, format_credits(line.amount), format_credits(line.balance), line.job)
            for line in lines
        )

    @staticmethod
    def _row(time: str, kind: str, amount: str, balance: str, job: str) -> str:
        return f"{time:<24}  {kind:<8}  {amount:>18}  {balance:>18}  {job}".rstrip() + "\n"

    def end(self, reader: StatementReader) -> str:
        return f"balance: {format_credits(reader.balance)} credits\n"


def _pair(settings: argparse.Namespace, database: Database) -> int:
    from coordinator.books.accounts import EARNING_KARMA_MILLI, PairIsland

    island = _write(database, PairIsland(settings.peer, settings.name))
    print(f"Island {island.peer} earns for {settings.name} from now on")
    if not island.earns:
        needed = EARNING_KARMA_MILLI / 1000
        print(f"its earnings wait in escrow until its karma is {needed:g}; it is {island.karma_milli / 1000:g}")
    return 0


def _unpair(settings: argparse.Namespace, database: Database) -> int:
    from coordinator.books.accounts import Unpair
    from coordinator.books.queries import island_view

    with database.reading() as connection:
        view = island_view(connection, settings.peer)
    if view is None or not view.record.account:
        raise ConfigError(f"Island {settings.peer} is paired with no account")
    _write(database, Unpair(settings.peer, view.record.account))
    print(f"Island {settings.peer} earns for nobody; what it earns waits in escrow")
    return 0


def _approve(settings: argparse.Namespace, database: Database) -> int:
    from coordinator.books.accounts import Approve

    approved = settings.action == "approve"
    _write(database, Approve(settings.peer, approved))
    print(f"Island {settings.peer} may {'' if approved else 'not '}get jobs where the Coordinator requires approval")
    return 0


def parse_share(text: str) -> int:
    """``12.5%`` or ``12.5`` in millionths: 125000. Raises ValueError."""
    percent = text.removesuffix("%").rstrip(" ")
    try:
        millionths, rest = divmod(parse_credits(percent) * _PPM_OF_PERCENT, limits.CREDIT_MICROS)
    except ValueError:
        millionths = rest = -1
    if rest or not 0 <= millionths <= 1_000_000:
        raise ValueError(f"a share is 0 to 100 per cent with at most 4 decimals, such as 12.5%, not {text[:40]!r}")
    return millionths


def _publisher(settings: argparse.Namespace, database: Database) -> int:
    from coordinator.books.accounts import SetPublisher

    try:
        share = parse_share(settings.share)
    except ValueError as error:
        raise ConfigError(f"SHARE: {error}") from None
    _write(database, SetPublisher(settings.cargo, settings.name, share))
    print(f"{settings.name} gets {share / _PPM_OF_PERCENT:g} % of what jobs of {settings.cargo} cost from now on")
    return 0


def _refund(settings: argparse.Namespace, database: Database) -> int:
    from coordinator.books.job_queries import charges_of
    from coordinator.books.ledger import Refund

    with database.reading() as connection:
        charges = charges_of(connection, settings.job)
    if not charges:
        raise ConfigError(f"nothing was charged for a job {settings.job}; see archipelag-node accounts statement NAME")
    given = _write(database, Refund(tuple(charges)))
    if given:
        print(f"{format_credits(given)} credits given back to {charges[0].debit.removeprefix('user:')} for job {settings.job}")
    else:
        print(f"job {settings.job} was refunded before; nothing has changed")
    return 0


def _audit(settings: argparse.Namespace, database: Database) -> int:
    from coordinator.books.audit import audit
    from coordinator.books.queries import totals

    with database.snapshot() as connection:
        complaints, sums = audit(connection), totals(connection)
    print(f"accounts   {sums.accounts}, with {format_credits(sums.users)} credits, {format_credits(sums.held)} of them held for jobs")
    print(f"escrow     {format_credits(sums.escrow)} credits")
    print(f"issued     {format_credits(sums.issued)} credits, and {format_credits(sums.losses)} to bear refunds")
    for complaint in complaints:
        print(f"off        {complaint}")
    print(f"{len(complaints)} sums are off: stop the Coordinator and restore a backup" if complaints else "everything adds up")
    return EXIT_OFF if complaints else 0

"""The tables as this version has them. What made them so, step by step, is in migrations/.

Money is in BIGINT micro-credits, time in Unix milliseconds. CHECK constraints say again, in the database's own words, what the ledger
promises: no user's balance below zero, no hold posted for more than it is.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql

from coordinator.books.ab_units import AB_UNITS
from coordinator.books.accounts import ACCOUNTS, ISLANDS, KARMA_EVENTS, PUBLISHERS
from coordinator.books.direct import TICKETS
from coordinator.books.jobs import JOBS, RECEIPTS, REQUESTS
from coordinator.books.ledger import BALANCES, HOLDS, TRANSFERS
from coordinator.books.rows import Kind
from coordinator.books.runs import RUNS
from protocol import limits

NAME = sql.String(limits.NAME_CHARS_MAX)
LEDGER_NAME = sql.String(limits.NAME_CHARS_MAX + 16)
KEYED = sql.String(2 * limits.NAME_CHARS_MAX + 64)

metadata = sql.MetaData()
# Small rows lie in the index of their key itself, so a change dirties one page less (SQLite's WITHOUT ROWID).
CLUSTERED: dict[str, Any] = {"sqlite_with_rowid": False}


def _text(name: str, kind: sql.String = NAME, **more: object) -> sql.Column[str]:
    return sql.Column(name, kind, nullable=False, **more)  # type: ignore[arg-type]


def _int(name: str) -> sql.Column[int]:
    return sql.Column(name, sql.BigInteger, nullable=False)


def _flag(name: str) -> sql.Column[bool]:
    return sql.Column(name, sql.Boolean, nullable=False)


accounts = sql.Table(
    "accounts",
    metadata,
    _text("name", primary_key=True),
    _int("created_at_ms"),
    _int("rate_limit_per_minute"),
    _int("refilled_day"),
    **CLUSTERED,
)

api_keys = sql.Table(
    "api_keys",
    metadata,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("hash", sql.String(64), nullable=False, unique=True),
    sql.Column("hint", sql.String(12), nullable=False),  # the key's first characters, to tell keys apart in a list
    _text("account"),
    sql.Column("scopes", sql.String(64), nullable=False),
    sql.Column("rate_limit_per_minute", sql.Integer, nullable=False),  # 0: none
    _int("created_at_ms"),
    sql.Column("revoked_at_ms", sql.BigInteger, nullable=True),  # may lie ahead: a key that was rotated out
    sql.Column("name", NAME, nullable=False, server_default=""),
    sql.Column("last_used_at_ms", sql.BigInteger, nullable=True),
)

balances = sql.Table(
    "balances",
    metadata,
    _text("account", LEDGER_NAME, primary_key=True),
    _int("posted"),
    _int("held"),
    _flag("overdraft"),
    sql.CheckConstraint("held >= 0 AND (overdraft OR posted >= held)", name="no_balance_below_zero"),
    **CLUSTERED,
)

transfers = sql.Table(
    "transfers",
    metadata,
    _text("id", KEYED, primary_key=True),
    _text("debit", LEDGER_NAME),
    _text("credit", LEDGER_NAME),
    _int("amount"),
    _text("kind", sql.String(16)),
    _text("reference", KEYED),
    _int("at_ms"),
    sql.CheckConstraint("amount > 0 AND debit <> credit", name="a_transfer_moves_something"),
    **CLUSTERED,
)
sql.Index("transfers_of_debit", transfers.c.debit, transfers.c.at_ms)
sql.Index("transfers_of_credit", transfers.c.credit, transfers.c.at_ms)

holds = sql.Table(
    "holds",
    metadata,
    _text("id", KEYED, primary_key=True),
    _text("account", LEDGER_NAME),
    _int("amount"),
    _int("posted"),
    _text("state", sql.String(16)),
    _int("created_at_ms"),
    _int("expires_at_ms"),
    sql.CheckConstraint("posted >= 0 AND posted <= amount", name="posted_at_most_what_is_held"),
    **CLUSTERED,
)

islands = sql.Table(
    "islands",
    metadata,
    _text("peer", primary_key=True),
    _text("account"),
    _flag("approved"),
    _int("karma_milli"),
    _int("pending_ms"),
    _int("compute_ms"),
    _int("jobs_done"),
    _int("jobs_failed"),
    _int("first_seen_ms"),
    _int("earned_micros"),
    **CLUSTERED,
)
sql.Index("islands_of_account", islands.c.account)

karma_events = sql.Table(
    "karma_events",
    metadata,
    _text("id", KEYED, primary_key=True),
    _text("peer"),
    _text("kind", sql.String(16)),
    _int("delta_milli"),
    _int("balance_milli"),
    _text("job_id", KEYED),
    _int("at_ms"),
    **CLUSTERED,
)
sql.Index("karma_events_of_peer", karma_events.c.peer, karma_events.c.at_ms)

publishers = sql.Table(
    "publishers", metadata, _text("cargo", primary_key=True), _text("account"), _int("share_ppm"), **CLUSTERED
)

jobs = sql.Table(
    "jobs",
    metadata,
    _text("id", KEYED, primary_key=True),
    _text("account"),
    _text("cargo"),
    _text("kind", sql.String(16)),
    _text("state", sql.String(16)),
    _int("priority"),
    _int("bid_micros"),
    _text("bid_source", sql.String(16)),
    _text("owner"),
    _int("owner_boot"),
    _int("created_at_ms"),
    _text("policy", sql.String(limits.TEXT_CHARS_MAX)),
    _text("quote_id"),
    _text("holder"),
    _text("fingerprint", sql.String(64)),
    _flag("can_rerun"),
    _flag("cancel_wanted"),
    _int("tries"),
    _int("price_micros"),
    _text("island"),
    _text("region"),
    _int("ask_per_job"),
    _int("ask_per_1k_output"),
    _int("ask_per_second"),
    _int("started_at_ms"),
    _int("finished_at_ms"),
    _int("prompt_tokens"),
    _int("completion_tokens"),
    _int("compute_ms"),
    _text("error_code", sql.String(64)),
    _text("error_message", sql.String(limits.TEXT_CHARS_MAX)),
    _text("placement", sql.Text()),
    sql.Column("input", sql.LargeBinary, nullable=False),
    sql.Column("output", sql.LargeBinary, nullable=False),
    _int("result_expires_at_ms"),
    sql.Column("parent", NAME, nullable=False, server_default=""),
    sql.Column("ab_test", sql.String(32), nullable=False, server_default=""),
    sql.Column("ab_arm", sql.String(64), nullable=False, server_default=""),
    sql.Column("ab_unit", sql.String(32), nullable=False, server_default=""),
    sql.Column("latency_us", sql.BigInteger, nullable=False, server_default="0"),
    sql.Column("first_word_us", sql.BigInteger, nullable=False, server_default="0"),
    sql.Column("rating", sql.SmallInteger, nullable=False, server_default="0"),
)
sql.Index("jobs_of_account", jobs.c.account, jobs.c.created_at_ms)
# Partial: an ended job costs these nothing.
_OPEN = jobs.c.state.in_(("submitted", "assigned", "running"))
sql.Index("jobs_open", jobs.c.owner, jobs.c.owner_boot, sqlite_where=_OPEN, postgresql_where=_OPEN)
_KEPT = jobs.c.result_expires_at_ms > 0
sql.Index("jobs_kept", jobs.c.result_expires_at_ms, sqlite_where=_KEPT, postgresql_where=_KEPT)
sql.Index("jobs_cleared", jobs.c.finished_at_ms)
_CHILD = jobs.c.parent != ""
sql.Index("jobs_of_parent", jobs.c.parent, sqlite_where=_CHILD, postgresql_where=_CHILD)
_TRIED = jobs.c.ab_test != ""
sql.Index("jobs_of_ab_test", jobs.c.ab_test, sqlite_where=_TRIED, postgresql_where=_TRIED)

requests = sql.Table(
    "requests",
    metadata,
    _text("id", KEYED, primary_key=True),
    _text("fingerprint", sql.String(64)),
    _text("job_id", KEYED),
    _int("expires_at_ms"),
    **CLUSTERED,
)

receipts = sql.Table(
    "receipts",
    metadata,
    _text("id", KEYED, primary_key=True),
    _text("job_id", KEYED),
    _text("island"),
    sql.Column("envelope", sql.LargeBinary, nullable=False),
    _int("paid_micros"),
    _int("at_ms"),
    **CLUSTERED,
)

tickets = sql.Table(
    "tickets",
    metadata,
    _text("id", KEYED, primary_key=True),
    _text("job_id", KEYED),
    _text("account"),
    _text("cargo"),
    _text("island"),
    _int("ask_per_job"),
    _int("ask_per_1k_output"),
    _int("ask_per_second"),
    _int("limit_micros"),
    _text("state", sql.String(16)),
    _int("paid_micros"),
    _int("paid_tokens"),
    _int("issued_at_ms"),
    **CLUSTERED,
)
sql.Index("tickets_of_job", tickets.c.job_id)
_STANDING = tickets.c.state == "open"
sql.Index("tickets_open", tickets.c.issued_at_ms, sqlite_where=_STANDING, postgresql_where=_STANDING)

bids = sql.Table(
    "bids",
    metadata,
    _text("account", primary_key=True),
    _text("cargo", primary_key=True),
    _int("micros"),
    _int("set_at_ms"),
    **CLUSTERED,
)

quotes = sql.Table(
    "quotes",
    metadata,
    _text("id", primary_key=True),
    _text("account"),
    _text("body", sql.Text()),
    _int("expires_at_ms"),
)

market_snapshots = sql.Table(
    "market_snapshots",
    metadata,
    _text("cargo", primary_key=True),
    sql.Column("at_ms", sql.BigInteger, primary_key=True),
    _text("body", sql.Text()),
    **CLUSTERED,
)

coordinators = sql.Table(
    "coordinators",
    metadata,
    _text("peer", primary_key=True),
    _int("boot"),
    _int("seen_at_ms"),
    _text("url", sql.String(limits.TEXT_CHARS_MAX)),
    **CLUSTERED,
)

# The registry of Cargos (coordinator/registry.py). ``seq`` counts the changes of all of it, so that each Coordinator finds what is new.
cargos = sql.Table(
    "cargos",
    metadata,
    _text("address", sql.String(64), primary_key=True),
    _text("name", sql.String(limits.CARGO_NAME_CHARS_MAX)),
    _text("release", sql.String(32)),
    _text("runtime", sql.String(16)),
    _text("publisher"),
    _text("account"),
    _text("state", sql.String(16)),
    _int("submitted_at_ms"),
    _int("decided_at_ms"),
    _int("expires_at_ms"),
    _int("revoked_at_ms"),  # 0: it is not
    sql.Column("moves_name", sql.Boolean, nullable=False, server_default=sql.false()),  # its name stands for it once it is approved
    sql.Column("envelope", sql.LargeBinary, nullable=False),
    sql.Column("seq", sql.BigInteger, nullable=False, unique=True),
)
sql.Index("cargos_of_name", cargos.c.name)
sql.Index("cargos_of_account", cargos.c.account)
sql.Index("cargos_of_publisher", cargos.c.publisher)

cargo_names = sql.Table(
    "cargo_names",
    metadata,
    _text("name", sql.String(limits.CARGO_NAME_CHARS_MAX), primary_key=True),
    _text("publisher"),
    _text("account"),
    _int("at_ms"),
    **CLUSTERED,
)

publisher_keys = sql.Table(
    "publisher_keys", metadata, _text("publisher", primary_key=True), _text("account"), _int("at_ms"), **CLUSTERED
)

publisher_levels = sql.Table(
    "publisher_levels", metadata, _text("account", primary_key=True), _text("level", sql.String(16)), **CLUSTERED
)

# The newest promotion of each name (protocol/cargo_promotions.py).
cargo_promotions = sql.Table(
    "cargo_promotions",
    metadata,
    _text("name", sql.String(limits.CARGO_NAME_CHARS_MAX), primary_key=True),
    _int("serial"),
    _text("cargo", sql.String(64)),
    _text("release", sql.String(32)),  # the name's own releases above it are candidates
    _text("origin"),
    _int("at_ms"),
    sql.Column("envelope", sql.LargeBinary, nullable=False),
    sql.Column("delegation", sql.LargeBinary, nullable=False),
    sql.Column("seq", sql.BigInteger, nullable=False, unique=True),
)

cargo_revocations = sql.Table(
    "cargo_revocations",
    metadata,
    _text("id", sql.String(64), primary_key=True),  # the revocation's key (protocol/cargo_news.py)
    _text("cargo", sql.String(64)),  # empty: all of the publisher's
    _text("publisher"),
    _text("network"),  # empty: the publisher's own word
    sql.Column("envelope", sql.LargeBinary, nullable=False),
    sql.Column("delegation", sql.LargeBinary, nullable=False),
    _int("at_ms"),
    sql.Column("seq", sql.BigInteger, nullable=False, unique=True),
)

# Work of several jobs: batches and workflows (runs.py). ``spec`` and ``result`` are sealed.
runs = sql.Table(
    "runs",
    metadata,
    _text("id", primary_key=True),
    _text("account"),
    _text("kind", sql.String(16)),
    _text("name"),
    _text("state", sql.String(16)),
    _text("owner"),
    _int("owner_boot"),
    _int("created_at_ms"),
    _int("finished_at_ms"),
    _flag("cancel_wanted"),
    _int("tries"),
    _int("total"),
    _text("fingerprint", sql.String(64)),
    _text("origin"),
    _text("error_code", sql.String(64)),
    _text("error_message", sql.String(limits.TEXT_CHARS_MAX)),
    sql.Column("spec", sql.LargeBinary, nullable=False),
    sql.Column("result", sql.LargeBinary, nullable=False),
    _int("expires_at_ms"),
)
sql.Index("runs_of_account", runs.c.account, runs.c.created_at_ms)
_RUNNING = runs.c.state == "running"
sql.Index("runs_open", runs.c.owner, runs.c.owner_boot, sqlite_where=_RUNNING, postgresql_where=_RUNNING)

# Files that accounts have sent, or that batches have written, in sealed pieces.
files = sql.Table(
    "files",
    metadata,
    _text("id", primary_key=True),
    _text("account"),
    _text("purpose", sql.String(32)),
    _text("filename", sql.String(limits.TEXT_CHARS_MAX)),
    _int("bytes"),
    _flag("is_whole"),
    _int("created_at_ms"),
    _int("expires_at_ms"),
    **CLUSTERED,
)
sql.Index("files_of_account", files.c.account, files.c.created_at_ms)

file_pieces = sql.Table(
    "file_pieces",
    metadata,
    _text("file_id", primary_key=True),
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("data", sql.LargeBinary, nullable=False),
)

# Workflows that accounts have saved; a published one is anybody's to run. ``body`` is sealed unless it is published.
workflow_definitions = sql.Table(
    "workflow_definitions",
    metadata,
    _text("id", KEYED, primary_key=True),  # ACCOUNT/NAME@VERSION
    _text("account"),
    _text("name"),
    sql.Column("version", sql.Integer, nullable=False),
    _text("address", sql.String(64)),
    _flag("is_published"),
    _int("at_ms"),
    sql.Column("body", sql.LargeBinary, nullable=False),
)
sql.Index("workflow_definitions_of_account", workflow_definitions.c.account, workflow_definitions.c.name)

# How answers of a Cargo are cached where the operator says so, before what its manifest says.
cache_policies = sql.Table(
    "cache_policies",
    metadata,
    _text("cargo", primary_key=True),
    _flag("enabled"),
    _int("ttl_s"),
    _int("similarity_milli"),
    _flag("is_public"),
    _int("at_ms"),
    **CLUSTERED,
)

# What all Coordinators are to delete of their caches; empty columns mean any.
cache_purges = sql.Table(
    "cache_purges",
    metadata,
    sql.Column("seq", sql.Integer, primary_key=True, autoincrement=True),
    _text("account"),
    _text("cargo"),
    _text("key", sql.String(64)),
    _int("at_ms"),
)

# A/B tests. ``plan`` is JSON, fixed when the test is created; ``seq`` counts the changes of all of them, as in cargos.
ab_tests = sql.Table(
    "ab_tests",
    metadata,
    _text("id", sql.String(32), primary_key=True),
    _text("account"),
    _text("base_cargo"),
    _text("state", sql.String(16)),
    _text("plan", sql.Text()),
    _int("revision"),
    _int("created_at_ms"),
    _int("started_at_ms"),
    _int("ended_at_ms"),
    _int("active_ms"),  # how long it has run
    _int("seen_at_ms"),  # until when that was counted
    _text("base_address", sql.String(64)),  # what the base stood for when the test was started
    _text("winner", sql.String(64)),
    _text("note", sql.String(limits.TEXT_CHARS_MAX)),  # why it stands still
    _text("reason", sql.String(32)),  # the same in one word
    sql.Column("seq", sql.BigInteger, nullable=False, unique=True),
)
sql.Index("ab_tests_of_account", ab_tests.c.account, ab_tests.c.created_at_ms)
_ACTIVE = ab_tests.c.state == "active"
sql.Index("ab_tests_active", ab_tests.c.base_cargo, unique=True, sqlite_where=_ACTIVE, postgresql_where=_ACTIVE)

ab_units = sql.Table(
    "ab_units",
    metadata,
    _text("id", sql.String(160), primary_key=True),
    _text("test", sql.String(32)),
    _text("arm", sql.String(64)),
    _text("unit", sql.String(32)),
    _int("jobs"),
    _int("succeeded"),
    _int("abandoned"),
    _int("cached"),
    _int("tokens"),
    _int("latency_us"),
    _int("first_word_us"),
    _int("first_words"),
    _int("speed_milli"),
    _int("speeds"),
    _int("cost_micros"),
    _int("ups"),
    _int("rated"),
    **CLUSTERED,
)
sql.Index("ab_units_of_test", ab_units.c.test)

# What was done with a test, by whom (empty: by itself), and why.
ab_events = sql.Table(
    "ab_events",
    metadata,
    sql.Column("id", sql.Integer, primary_key=True, autoincrement=True),
    _text("test", sql.String(32)),
    _int("at_ms"),
    _text("kind", sql.String(32)),
    _text("account"),
    _text("detail", sql.Text()),
)
sql.Index("ab_events_of_test", ab_events.c.test)

# One row: whose rows in memory are still those of the database (PostgreSQL; see database.Turns).
writer_turns = sql.Table("writer_turns", metadata, _text("name", sql.String(16), primary_key=True), _text("owner", sql.String(64)))

# One row: whose books these are (presence.py).
networks = sql.Table("networks", metadata, _text("id", primary_key=True), _text("salt_print", sql.String(64)))

KINDS: tuple[Kind[Any], ...] = (
    ACCOUNTS,
    BALANCES,
    TRANSFERS,
    HOLDS,
    ISLANDS,
    KARMA_EVENTS,
    PUBLISHERS,
    JOBS,
    REQUESTS,
    RECEIPTS,
    TICKETS,
    RUNS,
    AB_UNITS,
)
TABLES: dict[str, sql.Table] = {kind.name: metadata.tables[kind.name] for kind in KINDS}

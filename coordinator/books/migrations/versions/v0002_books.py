"""The books: accounts, ledger, jobs, receipts, Islands, market. Accounts of keys that exist get their credits of sign-up."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sql
from alembic import op

revision, down_revision = "0002", "0001"
branch_labels = depends_on = None

_OPEN = sql.text("state IN ('submitted', 'assigned', 'running')")
_STANDING = sql.text("state = 'open'")
_KEPT = sql.text("result_expires_at_ms > 0")
_SIGN_UP_MICROS = 10_000_000_000
_CLUSTERED: dict[str, Any] = {"sqlite_with_rowid": False}


def upgrade() -> None:
    op.add_column("api_keys", sql.Column("name", sql.String(128), nullable=False, server_default=""))
    op.add_column("api_keys", sql.Column("last_used_at_ms", sql.BigInteger, nullable=True))
    _create_ledger()
    _create_islands()
    _create_jobs()
    _create_tickets()
    _create_market()
    _open_accounts()


def _create_ledger() -> None:
    op.create_table(
        "accounts",
        sql.Column("name", sql.String(128), primary_key=True),
        sql.Column("created_at_ms", sql.BigInteger, nullable=False),
        sql.Column("rate_limit_per_minute", sql.BigInteger, nullable=False),
        sql.Column("refilled_day", sql.BigInteger, nullable=False),
        **_CLUSTERED,
    )
    op.create_table(
        "balances",
        sql.Column("account", sql.String(144), primary_key=True),
        sql.Column("posted", sql.BigInteger, nullable=False),
        sql.Column("held", sql.BigInteger, nullable=False),
        sql.Column("overdraft", sql.Boolean, nullable=False),
        sql.CheckConstraint("held >= 0 AND (overdraft OR posted >= held)", name="no_balance_below_zero"),
        **_CLUSTERED,
    )
    op.create_table(
        "transfers",
        sql.Column("id", sql.String(320), primary_key=True),
        sql.Column("debit", sql.String(144), nullable=False),
        sql.Column("credit", sql.String(144), nullable=False),
        sql.Column("amount", sql.BigInteger, nullable=False),
        sql.Column("kind", sql.String(16), nullable=False),
        sql.Column("reference", sql.String(320), nullable=False),
        sql.Column("at_ms", sql.BigInteger, nullable=False),
        sql.CheckConstraint("amount > 0 AND debit <> credit", name="a_transfer_moves_something"),
        **_CLUSTERED,
    )
    op.create_index("transfers_of_credit", "transfers", ["credit", "at_ms"])
    op.create_index("transfers_of_debit", "transfers", ["debit", "at_ms"])
    op.create_table(
        "holds",
        sql.Column("id", sql.String(320), primary_key=True),
        sql.Column("account", sql.String(144), nullable=False),
        sql.Column("amount", sql.BigInteger, nullable=False),
        sql.Column("posted", sql.BigInteger, nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("created_at_ms", sql.BigInteger, nullable=False),
        sql.Column("expires_at_ms", sql.BigInteger, nullable=False),
        sql.CheckConstraint("posted >= 0 AND posted <= amount", name="posted_at_most_what_is_held"),
        **_CLUSTERED,
    )


def _create_islands() -> None:
    op.create_table(
        "islands",
        sql.Column("peer", sql.String(128), primary_key=True),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("approved", sql.Boolean, nullable=False),
        sql.Column("karma_milli", sql.BigInteger, nullable=False),
        sql.Column("pending_ms", sql.BigInteger, nullable=False),
        sql.Column("compute_ms", sql.BigInteger, nullable=False),
        sql.Column("jobs_done", sql.BigInteger, nullable=False),
        sql.Column("jobs_failed", sql.BigInteger, nullable=False),
        sql.Column("first_seen_ms", sql.BigInteger, nullable=False),
        sql.Column("earned_micros", sql.BigInteger, nullable=False),
        **_CLUSTERED,
    )
    op.create_index("islands_of_account", "islands", ["account"])
    op.create_table(
        "karma_events",
        sql.Column("id", sql.String(320), primary_key=True),
        sql.Column("peer", sql.String(128), nullable=False),
        sql.Column("kind", sql.String(16), nullable=False),
        sql.Column("delta_milli", sql.BigInteger, nullable=False),
        sql.Column("balance_milli", sql.BigInteger, nullable=False),
        sql.Column("job_id", sql.String(320), nullable=False),
        sql.Column("at_ms", sql.BigInteger, nullable=False),
        **_CLUSTERED,
    )
    op.create_index("karma_events_of_peer", "karma_events", ["peer", "at_ms"])
    op.create_table(
        "publishers",
        sql.Column("cargo", sql.String(128), primary_key=True),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("share_ppm", sql.BigInteger, nullable=False),
        **_CLUSTERED,
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sql.Column("id", sql.String(320), primary_key=True),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("cargo", sql.String(128), nullable=False),
        sql.Column("kind", sql.String(16), nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("priority", sql.BigInteger, nullable=False),
        sql.Column("bid_micros", sql.BigInteger, nullable=False),
        sql.Column("bid_source", sql.String(16), nullable=False),
        sql.Column("owner", sql.String(128), nullable=False),
        sql.Column("owner_boot", sql.BigInteger, nullable=False),
        sql.Column("created_at_ms", sql.BigInteger, nullable=False),
        sql.Column("policy", sql.String(1024), nullable=False),
        sql.Column("quote_id", sql.String(128), nullable=False),
        sql.Column("holder", sql.String(128), nullable=False),
        sql.Column("fingerprint", sql.String(64), nullable=False),
        sql.Column("can_rerun", sql.Boolean, nullable=False),
        sql.Column("cancel_wanted", sql.Boolean, nullable=False),
        sql.Column("tries", sql.BigInteger, nullable=False),
        sql.Column("price_micros", sql.BigInteger, nullable=False),
        sql.Column("island", sql.String(128), nullable=False),
        sql.Column("region", sql.String(128), nullable=False),
        sql.Column("ask_per_job", sql.BigInteger, nullable=False),
        sql.Column("ask_per_1k_output", sql.BigInteger, nullable=False),
        sql.Column("ask_per_second", sql.BigInteger, nullable=False),
        sql.Column("started_at_ms", sql.BigInteger, nullable=False),
        sql.Column("finished_at_ms", sql.BigInteger, nullable=False),
        sql.Column("prompt_tokens", sql.BigInteger, nullable=False),
        sql.Column("completion_tokens", sql.BigInteger, nullable=False),
        sql.Column("compute_ms", sql.BigInteger, nullable=False),
        sql.Column("error_code", sql.String(64), nullable=False),
        sql.Column("error_message", sql.String(1024), nullable=False),
        sql.Column("placement", sql.Text, nullable=False),
        sql.Column("input", sql.LargeBinary, nullable=False),
        sql.Column("output", sql.LargeBinary, nullable=False),
        sql.Column("result_expires_at_ms", sql.BigInteger, nullable=False),
    )
    op.create_index("jobs_cleared", "jobs", ["finished_at_ms"])
    op.create_index("jobs_kept", "jobs", ["result_expires_at_ms"], sqlite_where=_KEPT, postgresql_where=_KEPT)
    op.create_index("jobs_of_account", "jobs", ["account", "created_at_ms"])
    op.create_index("jobs_open", "jobs", ["owner", "owner_boot"], sqlite_where=_OPEN, postgresql_where=_OPEN)
    op.create_table(
        "requests",
        sql.Column("id", sql.String(320), primary_key=True),
        sql.Column("fingerprint", sql.String(64), nullable=False),
        sql.Column("job_id", sql.String(320), nullable=False),
        sql.Column("expires_at_ms", sql.BigInteger, nullable=False),
        **_CLUSTERED,
    )
    op.create_table(
        "receipts",
        sql.Column("id", sql.String(320), primary_key=True),
        sql.Column("job_id", sql.String(320), nullable=False),
        sql.Column("island", sql.String(128), nullable=False),
        sql.Column("envelope", sql.LargeBinary, nullable=False),
        sql.Column("paid_micros", sql.BigInteger, nullable=False),
        sql.Column("at_ms", sql.BigInteger, nullable=False),
        **_CLUSTERED,
    )


def _create_tickets() -> None:
    op.create_table(
        "tickets",
        sql.Column("id", sql.String(320), primary_key=True),
        sql.Column("job_id", sql.String(320), nullable=False),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("cargo", sql.String(128), nullable=False),
        sql.Column("island", sql.String(128), nullable=False),
        sql.Column("ask_per_job", sql.BigInteger, nullable=False),
        sql.Column("ask_per_1k_output", sql.BigInteger, nullable=False),
        sql.Column("ask_per_second", sql.BigInteger, nullable=False),
        sql.Column("limit_micros", sql.BigInteger, nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("paid_micros", sql.BigInteger, nullable=False),
        sql.Column("paid_tokens", sql.BigInteger, nullable=False),
        sql.Column("issued_at_ms", sql.BigInteger, nullable=False),
        **_CLUSTERED,
    )
    op.create_index("tickets_of_job", "tickets", ["job_id"])
    op.create_index(
        "tickets_open", "tickets", ["issued_at_ms"], sqlite_where=_STANDING, postgresql_where=_STANDING
    )


def _create_market() -> None:
    op.create_table(
        "bids",
        sql.Column("account", sql.String(128), primary_key=True),
        sql.Column("cargo", sql.String(128), primary_key=True),
        sql.Column("micros", sql.BigInteger, nullable=False),
        sql.Column("set_at_ms", sql.BigInteger, nullable=False),
        **_CLUSTERED,
    )
    op.create_table(
        "quotes",
        sql.Column("id", sql.String(128), primary_key=True),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("body", sql.Text, nullable=False),
        sql.Column("expires_at_ms", sql.BigInteger, nullable=False),
    )
    op.create_table(
        "market_snapshots",
        sql.Column("cargo", sql.String(128), primary_key=True),
        sql.Column("at_ms", sql.BigInteger, primary_key=True),
        sql.Column("body", sql.Text, nullable=False),
        **_CLUSTERED,
    )
    op.create_table(
        "coordinators",
        sql.Column("peer", sql.String(128), primary_key=True),
        sql.Column("boot", sql.BigInteger, nullable=False),
        sql.Column("seen_at_ms", sql.BigInteger, nullable=False),
        sql.Column("url", sql.String(1024), nullable=False),
        **_CLUSTERED,
    )
    op.create_table(
        "writer_turns",
        sql.Column("name", sql.String(16), primary_key=True),
        sql.Column("owner", sql.String(64), nullable=False),
    )
    op.execute(sql.text("INSERT INTO writer_turns (name, owner) VALUES ('books', '')"))
    op.create_table(
        "networks",
        sql.Column("id", sql.String(128), primary_key=True),
        sql.Column("salt_print", sql.String(64), nullable=False),
    )


def _open_accounts() -> None:
    """Every account that has keys, with the transfer that gave it its credits and the balances that follow from it."""
    connection = op.get_bind()
    names = sorted(connection.execute(sql.text("SELECT DISTINCT account FROM api_keys")).scalars())
    now_ms = time.time_ns() // 1_000_000
    for name in names:
        given = {"name": name, "user": f"user:{name}", "id": f"sign-up:{name}", "amount": _SIGN_UP_MICROS, "now": now_ms}
        for statement in (
            "INSERT INTO accounts (name, created_at_ms, rate_limit_per_minute, refilled_day) VALUES (:name, :now, 0, :now / 86400000)",
            "INSERT INTO transfers (id, debit, credit, amount, kind, reference, at_ms) "
            "VALUES (:id, 'system:issue', :user, :amount, 'grant', '', :now)",
            "INSERT INTO balances (account, posted, held, overdraft) VALUES (:user, :amount, 0, FALSE)",
        ):
            connection.execute(sql.text(statement), given)
    if names:
        connection.execute(
            sql.text("INSERT INTO balances (account, posted, held, overdraft) VALUES ('system:issue', :posted, 0, TRUE)"),
            {"posted": -_SIGN_UP_MICROS * len(names)},
        )

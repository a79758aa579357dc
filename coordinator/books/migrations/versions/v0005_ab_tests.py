"""A/B tests: their arms in the jobs, their counters, and promotions of versions of Cargos."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql
from alembic import op

revision, down_revision = "0005", "0004"
branch_labels = depends_on = None

_CLUSTERED: dict[str, Any] = {"sqlite_with_rowid": False}


def upgrade() -> None:
    _jobs()
    _tests()
    _units()
    _promotions()


def _text(name: str, chars: int) -> sql.Column[str]:
    return sql.Column(name, sql.String(chars), nullable=False)


def _int(name: str) -> sql.Column[int]:
    return sql.Column(name, sql.BigInteger, nullable=False)


def _jobs() -> None:
    for name, chars in (("ab_test", 32), ("ab_arm", 64), ("ab_unit", 32)):
        op.add_column("jobs", sql.Column(name, sql.String(chars), nullable=False, server_default=""))
    for name in ("latency_us", "first_word_us"):
        op.add_column("jobs", sql.Column(name, sql.BigInteger, nullable=False, server_default="0"))
    op.add_column("jobs", sql.Column("rating", sql.SmallInteger, nullable=False, server_default="0"))
    tried = sql.text("ab_test <> ''")
    op.create_index("jobs_of_ab_test", "jobs", ["ab_test"], sqlite_where=tried, postgresql_where=tried)


def _tests() -> None:
    op.create_table(
        "ab_tests",
        sql.Column("id", sql.String(32), primary_key=True),
        _text("account", 128),
        _text("base_cargo", 128),
        _text("state", 16),
        sql.Column("plan", sql.Text(), nullable=False),
        *map(_int, ("revision", "created_at_ms", "started_at_ms", "ended_at_ms", "active_ms", "seen_at_ms")),
        _text("base_address", 64),
        _text("winner", 64),
        _text("note", 1024),
        _text("reason", 32),
        sql.Column("seq", sql.BigInteger, nullable=False, unique=True),
    )
    op.create_index("ab_tests_of_account", "ab_tests", ["account", "created_at_ms"])
    active = sql.text("state = 'active'")
    op.create_index("ab_tests_active", "ab_tests", ["base_cargo"], unique=True, sqlite_where=active, postgresql_where=active)
    op.create_table(
        "ab_events",
        sql.Column("id", sql.Integer, primary_key=True, autoincrement=True),
        _text("test", 32),
        _int("at_ms"),
        _text("kind", 32),
        _text("account", 128),
        sql.Column("detail", sql.Text(), nullable=False),
    )
    op.create_index("ab_events_of_test", "ab_events", ["test"])


def _units() -> None:
    sums = "jobs succeeded abandoned cached tokens latency_us first_word_us first_words speed_milli speeds cost_micros ups rated".split()
    op.create_table(
        "ab_units",
        sql.Column("id", sql.String(160), primary_key=True),
        _text("test", 32),
        _text("arm", 64),
        _text("unit", 32),
        *map(_int, sums),
        **_CLUSTERED,
    )
    op.create_index("ab_units_of_test", "ab_units", ["test"])


def _promotions() -> None:
    op.add_column("cargos", sql.Column("moves_name", sql.Boolean, nullable=False, server_default=sql.false()))
    cargos = sql.table("cargos", sql.column("state", sql.String), sql.column("moves_name", sql.Boolean))
    op.execute(sql.update(cargos).where(cargos.c.state.in_(["submitted", "rejected"])).values(moves_name=True))
    op.create_table(
        "cargo_promotions",
        sql.Column("name", sql.String(64), primary_key=True),
        _int("serial"),
        _text("cargo", 64),
        _text("release", 32),
        _text("origin", 128),
        _int("at_ms"),
        sql.Column("envelope", sql.LargeBinary, nullable=False),
        sql.Column("delegation", sql.LargeBinary, nullable=False),
        sql.Column("seq", sql.BigInteger, nullable=False, unique=True),
    )

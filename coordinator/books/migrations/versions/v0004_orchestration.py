"""Runs of several jobs (batches, workflows), files, saved workflows, and what the answer caches of all Coordinators share."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql
from alembic import op

revision, down_revision = "0004", "0003"
branch_labels = depends_on = None

_CLUSTERED: dict[str, Any] = {"sqlite_with_rowid": False}


def upgrade() -> None:
    _jobs()
    _runs()
    _files()
    op.create_table(
        "workflow_definitions",
        sql.Column("id", sql.String(320), primary_key=True),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("name", sql.String(128), nullable=False),
        sql.Column("version", sql.Integer, nullable=False),
        sql.Column("address", sql.String(64), nullable=False),
        sql.Column("is_published", sql.Boolean, nullable=False),
        sql.Column("at_ms", sql.BigInteger, nullable=False),
        sql.Column("body", sql.LargeBinary, nullable=False),
    )
    op.create_index("workflow_definitions_of_account", "workflow_definitions", ["account", "name"])
    _cache()


def _jobs() -> None:
    op.add_column("jobs", sql.Column("parent", sql.String(128), nullable=False, server_default=""))
    child = sql.text("parent <> ''")
    op.create_index("jobs_of_parent", "jobs", ["parent"], sqlite_where=child, postgresql_where=child)


def _runs() -> None:
    op.create_table(
        "runs",
        sql.Column("id", sql.String(128), primary_key=True),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("kind", sql.String(16), nullable=False),
        sql.Column("name", sql.String(128), nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("owner", sql.String(128), nullable=False),
        sql.Column("owner_boot", sql.BigInteger, nullable=False),
        sql.Column("created_at_ms", sql.BigInteger, nullable=False),
        sql.Column("finished_at_ms", sql.BigInteger, nullable=False),
        sql.Column("cancel_wanted", sql.Boolean, nullable=False),
        sql.Column("tries", sql.BigInteger, nullable=False),
        sql.Column("total", sql.BigInteger, nullable=False),
        sql.Column("fingerprint", sql.String(64), nullable=False),
        sql.Column("origin", sql.String(128), nullable=False),
        sql.Column("error_code", sql.String(64), nullable=False),
        sql.Column("error_message", sql.String(1024), nullable=False),
        sql.Column("spec", sql.LargeBinary, nullable=False),
        sql.Column("result", sql.LargeBinary, nullable=False),
        sql.Column("expires_at_ms", sql.BigInteger, nullable=False),
    )
    op.create_index("runs_of_account", "runs", ["account", "created_at_ms"])
    running = sql.text("state = 'running'")
    op.create_index("runs_open", "runs", ["owner", "owner_boot"], sqlite_where=running, postgresql_where=running)


def _files() -> None:
    op.create_table(
        "files",
        sql.Column("id", sql.String(128), primary_key=True),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("purpose", sql.String(32), nullable=False),
        sql.Column("filename", sql.String(1024), nullable=False),
        sql.Column("bytes", sql.BigInteger, nullable=False),
        sql.Column("is_whole", sql.Boolean, nullable=False),
        sql.Column("created_at_ms", sql.BigInteger, nullable=False),
        sql.Column("expires_at_ms", sql.BigInteger, nullable=False),
        **_CLUSTERED,
    )
    op.create_index("files_of_account", "files", ["account", "created_at_ms"])
    op.create_table(
        "file_pieces",
        sql.Column("file_id", sql.String(128), primary_key=True),
        sql.Column("number", sql.Integer, primary_key=True),
        sql.Column("data", sql.LargeBinary, nullable=False),
    )


def _cache() -> None:
    op.create_table(
        "cache_policies",
        sql.Column("cargo", sql.String(128), primary_key=True),
        sql.Column("enabled", sql.Boolean, nullable=False),
        sql.Column("ttl_s", sql.BigInteger, nullable=False),
        sql.Column("similarity_milli", sql.BigInteger, nullable=False),
        sql.Column("is_public", sql.Boolean, nullable=False),
        sql.Column("at_ms", sql.BigInteger, nullable=False),
        **_CLUSTERED,
    )
    op.create_table(
        "cache_purges",
        sql.Column("seq", sql.Integer, primary_key=True, autoincrement=True),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("cargo", sql.String(128), nullable=False),
        sql.Column("key", sql.String(64), nullable=False),
        sql.Column("at_ms", sql.BigInteger, nullable=False),
    )

"""The registry of Cargos: manifests, names, publishers' keys and levels, revocations."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql
from alembic import op

revision, down_revision = "0003", "0002"
branch_labels = depends_on = None

_CLUSTERED: dict[str, Any] = {"sqlite_with_rowid": False}


def upgrade() -> None:
    op.create_table(
        "cargos",
        sql.Column("address", sql.String(64), primary_key=True),
        sql.Column("name", sql.String(64), nullable=False),
        sql.Column("release", sql.String(32), nullable=False),
        sql.Column("runtime", sql.String(16), nullable=False),
        sql.Column("publisher", sql.String(128), nullable=False),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("submitted_at_ms", sql.BigInteger, nullable=False),
        sql.Column("decided_at_ms", sql.BigInteger, nullable=False),
        sql.Column("expires_at_ms", sql.BigInteger, nullable=False),
        sql.Column("revoked_at_ms", sql.BigInteger, nullable=False),
        sql.Column("envelope", sql.LargeBinary, nullable=False),
        sql.Column("seq", sql.BigInteger, nullable=False, unique=True),
    )
    for what in ("name", "account", "publisher"):
        op.create_index(f"cargos_of_{what}", "cargos", [what])
    op.create_table(
        "cargo_names",
        sql.Column("name", sql.String(64), primary_key=True),
        sql.Column("publisher", sql.String(128), nullable=False),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("at_ms", sql.BigInteger, nullable=False),
        **_CLUSTERED,
    )
    op.create_table(
        "publisher_keys",
        sql.Column("publisher", sql.String(128), primary_key=True),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("at_ms", sql.BigInteger, nullable=False),
        **_CLUSTERED,
    )
    op.create_table(
        "publisher_levels",
        sql.Column("account", sql.String(128), primary_key=True),
        sql.Column("level", sql.String(16), nullable=False),
        **_CLUSTERED,
    )
    op.create_table(
        "cargo_revocations",
        sql.Column("id", sql.String(64), primary_key=True),
        sql.Column("cargo", sql.String(64), nullable=False),
        sql.Column("publisher", sql.String(128), nullable=False),
        sql.Column("network", sql.String(128), nullable=False),
        sql.Column("envelope", sql.LargeBinary, nullable=False),
        sql.Column("delegation", sql.LargeBinary, nullable=False),
        sql.Column("at_ms", sql.BigInteger, nullable=False),
        sql.Column("seq", sql.BigInteger, nullable=False, unique=True),
    )

"""API keys, as the first version had them."""

from __future__ import annotations

import sqlalchemy as sql
from alembic import op

revision, down_revision = "0001", None
branch_labels = depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sql.Column("id", sql.Integer, primary_key=True),
        sql.Column("hash", sql.String(64), nullable=False, unique=True),
        sql.Column("hint", sql.String(12), nullable=False),
        sql.Column("account", sql.String(128), nullable=False),
        sql.Column("scopes", sql.String(64), nullable=False),
        sql.Column("rate_limit_per_minute", sql.Integer, nullable=False),
        sql.Column("created_at_ms", sql.BigInteger, nullable=False),
        sql.Column("revoked_at_ms", sql.BigInteger, nullable=True),
    )

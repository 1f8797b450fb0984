"""The ledger of paid requests, and its sums by day."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from manager.adapters.registry.dialects import Whole, only_where

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ledger",
        sa.Column("id", Whole, nullable=False),
        sa.Column("reservation", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("at_us", Whole, nullable=False),
        sa.Column("day", sa.Text(), nullable=False),
        sa.Column("amount", Whole, nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("key", sa.Text()),
        sa.Column("role", sa.Text()),
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("input_tokens", Whole),
        sa.Column("output_tokens", Whole),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    for name, condition in (
        ("ledger_reserved_once", "kind = 'reserved'"),
        ("ledger_closed_once", "kind <> 'reserved'"),
    ):
        op.create_index(name, "ledger", ["reservation"], unique=True, **only_where(sa.text(condition)))
    op.create_table(
        "ledger_days",
        sa.Column("day", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("spent", Whole, nullable=False),
        sa.Column("reserved", Whole, nullable=False),
        sa.PrimaryKeyConstraint("day", "project", "key"),
    )

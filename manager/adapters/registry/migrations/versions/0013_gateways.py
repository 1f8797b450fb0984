"""For gateways that share a database: counts of changes, the use of keys, whose a reservation is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from manager.adapters.registry.dialects import Whole

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("ledger", sa.Column("gateway", sa.Text()))
    op.create_table(
        "changes",
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("number", Whole, nullable=False),
        sa.PrimaryKeyConstraint("topic"),
    )
    op.create_table(
        "documents",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "key_uses",
        sa.Column("gateway", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("at_us", Whole, nullable=False),
        sa.Column("minute", Whole, nullable=False),
        sa.Column("day", sa.Text(), nullable=False),
        sa.Column("tokens", Whole, nullable=False),
        sa.PrimaryKeyConstraint("gateway", "key"),
    )

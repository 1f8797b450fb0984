"""The sums of usage by hour and by day."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from manager.adapters.registry.dialects import Whole

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("usage_hours", "usage_days"):
        op.create_table(
            table,
            sa.Column("begins", Whole, nullable=False),
            *(
                sa.Column(name, sa.Text(), nullable=False)
                for name in ("project", "key", "role", "model", "instance")
            ),
            sa.Column("requests", Whole, nullable=False),
            sa.Column("ok", Whole, nullable=False),
            sa.Column("fallbacks", Whole, nullable=False),
            sa.Column("input_tokens", Whole, nullable=False),
            sa.Column("output_tokens", Whole, nullable=False),
            sa.Column("cost_micro_usd", Whole, nullable=False),
            sa.Column("answered_us", Whole, nullable=False),
            sa.Column("latencies", sa.LargeBinary(), nullable=False),
            sa.PrimaryKeyConstraint("begins", "project", "key", "role", "model", "instance"),
            sqlite_with_rowid=False,
        )

"""The sums of usage by hour and by day."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("usage_hours", "usage_days"):
        op.create_table(
            table,
            sa.Column("begins", sa.Integer(), nullable=False),
            *(
                sa.Column(name, sa.Text(), nullable=False)
                for name in ("project", "key", "role", "model", "instance")
            ),
            sa.Column("requests", sa.Integer(), nullable=False),
            sa.Column("ok", sa.Integer(), nullable=False),
            sa.Column("fallbacks", sa.Integer(), nullable=False),
            sa.Column("input_tokens", sa.Integer(), nullable=False),
            sa.Column("output_tokens", sa.Integer(), nullable=False),
            sa.Column("cost_micro_usd", sa.Integer(), nullable=False),
            sa.Column("answered_us", sa.Integer(), nullable=False),
            sa.Column("latencies", sa.LargeBinary(), nullable=False),
            sa.PrimaryKeyConstraint("begins", "project", "key", "role", "model", "instance"),
            sqlite_with_rowid=False,
        )

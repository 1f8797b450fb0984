"""Async runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from manager.adapters.registry.dialects import Whole

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("number", Whole, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("lane", sa.Text()),
        sa.Column("caller", sa.JSON(), nullable=False),
        sa.Column("idempotent", sa.Boolean(), nullable=False),
        sa.Column("expires_s", sa.Float(), nullable=False),
        sa.Column("body_bytes", Whole, nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("started_at", sa.DateTime()),
        sa.Column("ended_at", sa.DateTime()),
        sa.Column("expires_at", sa.DateTime()),
        sa.Column("executions", Whole, nullable=False),
        sa.Column("instance", sa.String()),
        sa.Column("request_id", sa.String()),
        sa.Column("error", sa.JSON()),
        sa.Column("result", sa.JSON()),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("runs_by_status", "runs", ["status", "number"])

"""Instances, the cards they are bound to, events and learned sizes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from manager.adapters.registry.dialects import Whole

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "instances",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("operation", sa.String()),
        sa.Column("ttl_s", sa.Float()),
        sa.Column("pinned", sa.Boolean()),
        sa.Column("starts", Whole, nullable=False),
        sa.Column("loopback_port", Whole),
        sa.Column("last_used_at", sa.DateTime()),
        sa.Column("recreated_at", sa.DateTime()),
        sa.Column("usage", sa.JSON()),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "bindings",
        sa.Column("instance", sa.String(), nullable=False),
        sa.Column("uuid", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("instance"),
    )
    op.create_table(
        "events",
        sa.Column("id", Whole, nullable=False),
        sa.Column("at", sa.DateTime(), nullable=False),
        sa.Column("instance", sa.String()),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("reason", sa.String()),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "learned_sizes",
        sa.Column("instance", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("vram_bytes", Whole, nullable=False),
        sa.Column("measured_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("instance", "model", "digest"),
    )

"""Readings of the cards in the last day, a row for each minute."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from manager.adapters.registry.dialects import Whole

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "gpu_minutes",
        sa.Column("begins", Whole, nullable=False),
        sa.Column("cards", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("begins"),
    )

"""Of the memory that a model took, the share of each card, where its instance has several."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("learned_sizes", sa.Column("by_card", sa.JSON()))

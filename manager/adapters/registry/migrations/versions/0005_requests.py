"""The history of requests: the record of each one, and the decision behind it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from manager.adapters.registry.dialects import Whole

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "requests",
        sa.Column("id", Whole, primary_key=True),
        sa.Column("request_id", sa.Text, nullable=False, unique=True),
        sa.Column("ended_us", Whole, nullable=False),
        sa.Column("project", sa.Text, nullable=False),
        sa.Column("role", sa.Text),
        sa.Column("model", sa.Text),
        sa.Column("instance", sa.Text),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sa.Column("decision", sa.LargeBinary, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "requests_by_end",
        "requests",
        ["ended_us", "id", "project", "role", "model", "instance", "outcome"],
    )

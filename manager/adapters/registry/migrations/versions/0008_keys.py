"""Keys of clients, and the key of each request in the history."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "keys",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("expires_at", sa.DateTime()),
        sa.Column("secrets", sa.JSON(), nullable=False),
        sa.Column("revoked_at", sa.DateTime()),
        sa.Column("last_used_at", sa.DateTime()),
        sa.PrimaryKeyConstraint("name"),
    )
    op.add_column("requests", sa.Column("key", sa.Text()))
    op.drop_index("requests_by_end", "requests")
    indexed = ["ended_us", "id", "project", "role", "model", "instance", "outcome", "key"]
    op.create_index("requests_by_end", "requests", indexed)

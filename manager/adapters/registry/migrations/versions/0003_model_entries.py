"""Of the models of each volume not only the names, but all that a server says of them."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE model_lists RENAME COLUMN names TO entries")
    op.execute(
        "UPDATE model_lists SET entries ="
        " (SELECT json_group_array(json_object('name', value)) FROM json_each(model_lists.entries))"
    )

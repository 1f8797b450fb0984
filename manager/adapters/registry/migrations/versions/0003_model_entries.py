"""Of the models of each volume not only the names, but all that a server says of them."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE model_lists RENAME COLUMN names TO entries")
    entries = "(SELECT json_group_array(json_object('name', value)) FROM json_each(model_lists.entries))"
    if op.get_bind().dialect.name == "postgresql":
        entries = (
            "coalesce((SELECT json_agg(json_build_object('name', value))"
            " FROM json_array_elements_text(model_lists.entries)), '[]')"
        )
    op.execute(f"UPDATE model_lists SET entries = {entries}")  # noqa: S608  (constants)

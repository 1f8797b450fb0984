"""The registry: one SQLite file, read and written with SQLAlchemy Core, its schema moved by Alembic."""

from manager.adapters.registry.sql import SqlRegistry, open_registry

__all__ = ["SqlRegistry", "open_registry"]

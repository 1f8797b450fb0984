"""The store of collections: one SQLite file beside the registry, which is made with the first collection."""

from manager.adapters.collections.opening import open_collections
from manager.adapters.collections.store import SqlCollections

__all__ = ["SqlCollections", "open_collections"]

"""Tables of vectors in LanceDB. Nothing of LanceDB is imported before the first call that needs it."""

from manager.adapters.vectors.store import LanceVectors, installed

__all__ = ["LanceVectors", "installed"]

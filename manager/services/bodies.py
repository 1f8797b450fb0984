"""One bound for the bodies of all requests together."""

from __future__ import annotations


class BodyBudget:
    """Counts the bytes of request bodies that are held in memory.

    Args:
        most_bytes: the bound. A request that would go beyond it is refused. No body waits for another:
            bodies that wait for each other would wait for ever.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0

    def take(self, count: int) -> bool:
        """Hold so many more bytes; False where they do not fit, and nothing is held then."""
        if self.held_bytes + count > self.most_bytes:
            return False
        self.held_bytes += count
        return True

    def give_back(self, count: int) -> None:
        self.held_bytes -= count

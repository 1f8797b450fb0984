"""Graphics cards: readings and bindings, processes on them, admission by memory, and learned sizes."""

from manager.services.gpus.cards import GpuSnapshot
from manager.services.gpus.gpus import Gpus, Need, Room
from manager.services.gpus.history import GpuHistory

__all__ = ["GpuHistory", "GpuSnapshot", "Gpus", "Need", "Room"]

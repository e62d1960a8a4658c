"""What saved states of blockwise optimizers say about their origin, and whether a checkpoint is complete and intact."""
from .errors import CheckpointError, MismatchError
from .manifest import Manifest, newest_complete, verify
from .record import ACCEPTABLE, Record

__all__ = ["ACCEPTABLE", "CheckpointError", "Manifest", "MismatchError", "Record", "newest_complete", "verify"]

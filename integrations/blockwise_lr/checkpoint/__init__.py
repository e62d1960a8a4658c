"""What saved states of blockwise optimizers say about their origin, and whether a checkpoint is complete and intact."""

from .errors import CheckpointError, MismatchError
from .manifest import Manifest
from .record import Record
from .survey import newest_complete, verify

__all__ = ["CheckpointError", "Manifest", "MismatchError", "Record", "newest_complete", "verify"]

"""What saved states of blockwise optimizers say about their origin, and whether a checkpoint is complete and intact."""

from .errors import CheckpointError, MismatchError
from .manifest import Manifest
from .record import ACCEPTABLE, Record
from .survey import newest_complete, verify

__all__ = ["ACCEPTABLE", "CheckpointError", "Manifest", "MismatchError", "Record", "newest_complete", "verify"]

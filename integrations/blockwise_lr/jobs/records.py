"""Which jobs were sent from here, so that their states, logs and ends can be asked for by number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..blocks import BlockError


@dataclass(frozen=True)
class Sent:
    """A job that was sent."""

    number: str
    cluster: str
    name: str
    log: str
    command: Sequence[str]
    sent: str


class Records:
    """A file with a line of JSON for each job."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, sent: Sent) -> None:
        """Appends one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(sent)) + "\n")

    def all(self) -> list[Sent]:
        """All, the first sent first.

        Raises:
            BlockError: the file holds something else.
        """
        if not self.path.exists():
            return []
        try:
            return [Sent(**json.loads(line)) for line in self.path.read_text().splitlines()]
        except (ValueError, TypeError) as error:
            raise BlockError(
                f"{self.path} holds something else than jobs that were sent ({error}); move it away"
            ) from None

    def find(self, number: str) -> Sent:
        """A job by its number.

        Raises:
            BlockError: there is none.
        """
        for sent in self.all():
            if sent.number == number:
                return sent
        known = ", ".join(sent.number for sent in self.all()) or "none"
        raise BlockError(f"no job {number} was sent from here ({self.path}: {known})")

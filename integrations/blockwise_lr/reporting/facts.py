"""What ran: facts that differ between arms, and those that are equal."""

from __future__ import annotations

from collections.abc import Sequence

from .arms import Arm
from .runs import Run
from .summary import Table

SECTIONS = ("versions", "machine", "blocks", "settings")
_NO_SETTINGS = ("path", "dir", "file", "load", "save", "rank", "cache", "tokenizer_model", "world_size", "address")
_MANY = 5  # settings, from which on a list of them is a whole one


def differing(arms: Sequence[Arm], section: str) -> Table | None:
    """Facts of a section that are not equal in all arms, a column per arm; of one arm none.

    A fact that some do not state counts where all state many.
    """
    facts = [[run.facts.get(section, {}) for run in arm.runs] for arm in arms]
    names = dict.fromkeys(name for of_arm in facts for found in of_arm for name in found if not _is_place(name))
    is_full = min(len(found) for of_arm in facts for found in of_arm) > _MANY
    rows = []
    for name in names:
        cells = [" / ".join(dict.fromkeys(found[name] for found in of_arm if name in found)) for of_arm in facts]
        if len({cell for cell in cells if cell or is_full}) > 1:
            rows.append([name, *cells])
    return Table(section, [section, *(arm.name for arm in arms)], rows) if rows and len(arms) > 1 else None


def common(runs: Sequence[Run], section: str) -> dict[str, str]:
    """Facts of a section that are equal in all runs that have any."""
    facts = [found for run in runs if (found := run.facts.get(section))]
    first = facts[0] if facts else {}
    return {name: value for name, value in first.items() if all(found.get(name) == value for found in facts)}


def _is_place(name: str) -> bool:
    """Whether a setting says where something lies, which differs in every run."""
    return any(part in name.lower().split("_") for part in _NO_SETTINGS)

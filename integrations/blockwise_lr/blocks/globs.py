"""Globs over dotted parameter names: ``*`` is any text, including dots, ``{a,b}`` is a or b; nothing else is special.

Matching is linear in the length of the name for any number of stars: fnmatch.translate makes a regular expression
without backtracking over them.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
import re

from .types import BlockError

_MOST_FORMS = 256  # alternatives that one glob may expand to; each is a regular expression of its own


def checked_glob(glob: str) -> str:
    """Returns the glob unchanged if it is valid.

    Raises:
        BlockError: it is empty, has control characters, unbalanced or nested braces, or too many alternatives.
    """
    if not glob:
        raise BlockError('is empty; give a glob over parameter names, as in "*.adapter.*"')
    if not glob.isprintable():
        raise BlockError("holds a control character, which no parameter's name has; take it out")
    _forms(glob)
    return glob


def matches(glob: str, name: str) -> bool:
    """Whether a name matches a glob; a leading ``*.`` also matches the empty prefix."""
    return any(pattern.match(text) for pattern in _patterns(glob) for text in (name, "." + name))


@functools.lru_cache(maxsize=4096)
def _patterns(glob: str) -> tuple[re.Pattern[str], ...]:
    # escape fnmatch's other special characters, which parameter names may contain
    return tuple(re.compile(fnmatch.translate(form.replace("[", "[[]").replace("?", "[?]"))) for form in _forms(glob))


def _forms(glob: str) -> list[str]:
    """Expands the braces of a glob."""
    parts = re.split(r"\{([^{}]*)\}", glob)  # alternating: text outside braces, text inside
    if any(brace in text for text in parts[::2] for brace in "{}"):
        raise BlockError(
            "has a brace without its partner, or braces in braces; write alternatives as {a,b}, one pair of braces each"
        )
    choices = [part.split(",") if number % 2 else [part] for number, part in enumerate(parts)]
    if math.prod(map(len, choices)) > _MOST_FORMS:
        raise BlockError(
            f"stands for more than {_MOST_FORMS} combinations of alternatives; use * in place of some braces, "
            f"or several rules"
        )
    return ["".join(form) for form in itertools.product(*choices)]

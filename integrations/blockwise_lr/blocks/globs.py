"""Globs over dotted parameter names: ``*`` is any text, dots included, and ``{a,b}`` is either; nothing else is special.

Matching takes time in proportion to the name's length however many stars there are: the standard library's translation
of a glob commits to the first place where each text between two stars is found.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
import re

from .types import BlockError

_MOST_FORMS = 256  # what the braces of one glob may stand for; each form is matched on its own


def checked_glob(glob: str) -> str:
    """The glob itself.

    Raises:
        BlockError: it is empty, holds characters that no name has, or has braces that are not in pairs, nest, or stand
            for too many names.
    """
    if not glob:
        raise BlockError('is empty; give a glob over parameter names, as in "*.adapter.*"')
    if not glob.isprintable():
        raise BlockError("holds a control character, which no parameter's name has; take it out")
    _forms(glob)
    return glob


def matches(glob: str, name: str) -> bool:
    """Whether a name matches a glob; a leading ``*.`` also matches nothing."""
    return any(pattern.match(text) for pattern in _patterns(glob) for text in (name, "." + name))


@functools.lru_cache(maxsize=4096)
def _patterns(glob: str) -> tuple[re.Pattern[str], ...]:
    # fnmatch knows two more special characters, which parameter names may hold
    return tuple(re.compile(fnmatch.translate(form.replace("[", "[[]").replace("?", "[?]"))) for form in _forms(glob))


def _forms(glob: str) -> list[str]:
    """The globs without braces that one with braces stands for."""
    parts = re.split(r"\{([^{}]*)\}", glob)  # texts outside braces and inside them, in turn
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

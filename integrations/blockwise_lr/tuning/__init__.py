"""``blockwise-lr tune`` and ``tune-seqlen``: what fits one's own model, by short runs of one's own script."""

from .search import Found, Search, Setting

__all__ = ["Found", "Search", "Setting"]

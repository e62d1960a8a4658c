"""``blockwise-lr report``: what runs wrote while they trained, read back and compared on one page."""

from .arms import Arm, arms_of, crossing
from .find import find_runs
from .markdown import as_markdown
from .page import as_html
from .runs import Run, Series
from .summary import Report, report_of

__all__ = [
    "Arm",
    "Report",
    "Run",
    "Series",
    "arms_of",
    "as_html",
    "as_markdown",
    "crossing",
    "find_runs",
    "report_of",
]

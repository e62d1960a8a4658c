"""A report as one HTML page that needs nothing else: pictures inside, no links to other places, no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .facts import SECTIONS, common, differing
from .pictures import Picture, Style, pictures_of, with_own_ids
from .summary import Report, Table

_TEMPLATE = Path(__file__).with_name("page.html")
_MARKS = {  # around the middle of a legend's sample
    "o": '<circle cx="17" cy="6" r="2.6" fill="{c}"/>',
    "s": '<rect x="14.6" y="3.6" width="4.8" height="4.8" fill="{c}"/>',
    "^": '<path d="M17 2.8 20 8.6H14z" fill="{c}"/>',
    "v": '<path d="M17 9.2 14 3.4H20z" fill="{c}"/>',
    "D": '<path d="M17 2.6 20.4 6 17 9.4 13.6 6z" fill="{c}"/>',
    "x": '<path d="M14.5 3.5l5 5m0-5l-5 5" stroke="{c}" stroke-width="1.6"/>',
    "P": '<path d="M17 3v6M14 6h6" stroke="{c}" stroke-width="2.4"/>',
    "*": '<path d="M17 2.8v6.4M14.2 4.4l5.6 3.2m0-3.2l-5.6 3.2" stroke="{c}" stroke-width="1.4"/>',
}


def as_html(report: Report, title: str, made_by: str) -> str:
    """The page.

    Args:
        made_by: what stands at its end.

    Raises:
        ImportError: matplotlib or jinja2 is not installed.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    found, tables = pictures_of(report), {table.title: table for table in report.tables()}
    sections = [
        _section(name, tables.get(name), found.get(name, [])) for name in dict.fromkeys(["Losses", *tables, *found])
    ]
    numbered = 0
    for section in sections:
        for picture in section["pictures"]:
            numbered += 1
            picture["svg"] = Markup(with_own_ids(picture["svg"], f"p{numbered}-"))
    runs = [run for arm in report.arms for run in arm.runs]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text()).render(
        title=title,
        notes=report.notes,
        sections=[section for section in sections if section["table"] or section["pictures"]],
        differing=[table for name in SECTIONS if (table := differing(report.arms, name)) is not None],
        common=[(name, facts) for name in SECTIONS if (facts := common(runs, name))],
        runs=[(run.name, run.files) for run in runs],
        made_by=made_by,
        sample=lambda style: Markup(sample(style)),
    )


def _section(name: str, table: Table | None, pictures: Sequence[Picture]) -> dict[str, Any]:
    """Pictures of one legend say it once."""
    legends = {picture.legend for picture in pictures}
    shared = next(iter(legends)) if len(legends) == 1 else None
    if shared is None and legends:  # block types, of which some arms have more
        every = dict(pair for picture in pictures for pair in picture.legend)
        shared = tuple(every.items()) if len(every) <= 10 else None
    shown = [
        {"title": p.title, "svg": p.svg, "caption": p.caption, "legend": () if shared is not None else p.legend}
        for p in pictures
    ]
    return {"name": name, "table": table, "pictures": shown, "legend": shared or ()}


def sample(style: Style) -> str:
    """A short line in a style, as SVG."""
    dash = f' stroke-dasharray="{" ".join(f"{1.5 * part:g}" for part in style.dash)}"' if style.dash else ""
    return (
        '<svg class="sample" viewBox="0 0 34 12" aria-hidden="true">'
        f'<path d="M0 6h34" stroke="{style.color}" stroke-width="2"{dash}/>'
        f"{_MARKS[style.marker].format(c=style.color)}</svg>"
    )

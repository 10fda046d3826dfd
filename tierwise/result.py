"""What the verbs return: the dictionary that ``--format json`` prints, rows of it as tables, drawn in a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from theory.errors import refuse

if TYPE_CHECKING:
    import pandas as pd

STYLE = "max-width:56em;line-height:1.45"
CELL = "padding:0.1em 0.9em 0.1em 0;text-align:{};white-space:nowrap"


class Result(dict[str, Any]):
    """The dictionary that ``--format json`` prints, with its rows as data frames and its tables drawn in a notebook."""

    def __init__(self, content: Mapping[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(content)
        self._show = show

    @property
    def frames(self) -> tuple[str, ...]:
        """The keys that hold rows, as :meth:`frame` takes them: ``by_draft_length``, ``speculation.by_tier``."""
        return tuple(_rows(self))

    def frame(self, key: str) -> pd.DataFrame:
        """Return the rows under ``key`` as a data frame; what is nested in a row becomes columns ``a.b``.

        Parameters
        ----------
        key : str
            One of :attr:`frames`.

        Raises
        ------
        InputError
            If there are no rows under that key; the keys that have some are named.
        """
        import pandas as pd

        if key not in self.frames:
            refuse("key", f"must be one of {', '.join(self.frames)}", key)
        found: Any = self
        for part in key.split("."):
            found = found[part]
        return pd.json_normalize(found)

    def _repr_html_(self) -> str:
        """Return what the command line prints, as HTML without colours of its own: legible in light and dark."""
        from . import show

        page = HtmlConsole()
        with show.onto(page):
            self._show(self)
        return f'<div style="{STYLE}">{"".join(page.parts)}</div>'


def _rows(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{path}{key}.")
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            yield f"{path}{key}"


class HtmlConsole(Console):
    """A console that keeps paragraphs and tables as HTML instead of printing them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def print(self, *objects: Any, **_: Any) -> None:
        """Keep text as a paragraph, a table as a table."""
        for item in objects:
            self.parts.append(
                _table(item) if isinstance(item, Table) else f'<p style="margin:0.3em 0">{_text(item)}</p>'
            )


def _text(cell: object) -> str:
    """Return text with its bold marks as HTML."""
    return re.sub(r"\[(/?)bold\]", r"<\1b>", html.escape(str(cell), quote=False))


def _table(table: Table) -> str:
    aligned = [CELL.format("left" if column.justify == "left" else "right") for column in table.columns]
    head = "".join(f'<th style="{a}">{_text(c.header)}</th>' for a, c in zip(aligned, table.columns, strict=True))
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join(
        "<tr>" + "".join(f'<td style="{a}">{_text(cell)}</td>' for a, cell in zip(aligned, row, strict=True)) + "</tr>"
        for row in rows
    )
    title = f'<caption style="text-align:left;font-weight:bold;padding:0.4em 0">{_text(table.title or "")}</caption>'
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

"""A page from a template: figures inlined as SVG that follow the page's colours, numbers with units, names escaped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from tierwise import __version__
from tierwise.figures.picture import Picture
from tierwise.style import CSS_FONTS, DARK, LIGHT, files_of, style, variables

if TYPE_CHECKING:
    from markupsafe import Markup

SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"
NOTHING = "-"  # in a cell without a value


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a page: cells are texts, the first ``words`` columns words and the others numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    caption: str = ""
    marked: int | None = None  # row that is set off [-]


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture as it stands in a page."""

    name: str
    title: str
    caption: str
    svg: Markup | None


def render(template: str, **context: Any) -> bytes:
    """Return a page: a template filled in, every text escaped; the same context gives the same bytes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tierwise.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"figures": amount, "seconds": seconds, "percent": percent, "upper_first": upper_first}
    colours = {palette.name: variables(palette) for palette in (LIGHT, DARK)}
    page = environment.get_template(template).render(colours=colours, fonts=CSS_FONTS, version=__version__, **context)
    return (page.rstrip() + "\n").encode()


def figures(pictures: Iterable[Picture], rendered: dict[str, bytes] | None = None) -> dict[str, Figure]:
    """Return pictures by name, ready for a page; ``rendered``: their files, if they were written already."""
    found = {}
    with style():
        for p in pictures:
            svg = None
            if p.figure is not None:
                svg = inline((rendered or {}).get(f"{p.name}.svg") or files_of(p.figure)["svg"], p.name, p.title)
            found[p.name] = Figure(p.name, p.title, p.caption, svg)
    return found


def inline(svg: bytes, name: str, title: str) -> Markup:
    """Return an SVG as an element of a page: its ids made unique by ``name``, its colours those of the page."""
    from markupsafe import Markup

    root = ElementTree.fromstring(svg)
    ids = {old: f"{name}-{i}" for i, old in enumerate(_ids(root))}
    _strip(root)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")
        if XLINK in element.attrib:
            element.set("href", element.attrib.pop(XLINK))
        for key, value in element.attrib.items():
            element.set(key, _linked(value, ids))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", title)
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
    for variable, colour in variables(LIGHT).items():
        text = text.replace(f": {colour}", f": var({variable})")
    return Markup(text)  # drawn by matplotlib; its texts are paths or escaped by ElementTree


def _ids(root: ElementTree.Element) -> list[str]:
    return [e.attrib["id"] for e in root.iter() if "id" in e.attrib]


def _strip(parent: ElementTree.Element) -> None:
    """Take out what a page must not have: metadata, and style sheets that would hold for all of it."""
    for child in list(parent):
        if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
            parent.remove(child)
        else:
            _strip(child)


def _linked(value: str, ids: dict[str, str]) -> str:
    if value in ids:
        return ids[value]
    renamed: Callable[[re.Match[str]], str] = lambda match: "#" + ids.get(match[1], match[1])  # noqa: E731
    return re.sub(r"#([A-Za-z_][\w.-]*)", renamed, value) if "url(#" in value or value.startswith("#") else value


# --- numbers ---------------------------------------------------------------------------------------------------------


def amount(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, none in scientific form where a person would not.

    Examples
    --------
    >>> amount(20000.0), amount(0.34960), amount(0.000408644), amount(None)
    ('20,000', '0.350', '0.000409', '-')
    """
    if value is None:
        return NOTHING
    if value == 0 or float(value).is_integer():
        return f"{value:,.0f}"
    size = abs(value)
    if size >= 10**digits:
        return f"{value:,.0f}"
    if size < 1e-6:
        return f"{value:.{digits - 1}e}"
    places = digits - 1
    while size < 1:
        size, places = size * 10, places + 1
    while size >= 10:
        size, places = size / 10, places - 1
    return f"{value:.{max(places, 0)}f}"


def seconds(value: float | None) -> str:
    """Return a time with its unit.

    Examples
    --------
    >>> seconds(0.0152203), seconds(7.006)
    ('15.2 ms', '7.01 s')
    """
    if value is None:
        return NOTHING
    return f"{amount(1e3 * value)} ms" if value < 0.9995 else f"{amount(value)} s"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share in percent."""
    return NOTHING if value is None else f"{100 * value:.{digits}f} %"


def signed(value: float | None) -> str:
    """Return an error with its sign, in percent."""
    return NOTHING if value is None else f"{100 * value + 0.0:+.1f} %".replace("-0.0 %", "+0.0 %")


def span(ends: Sequence[float | None] | None, form: Callable[[float | None], str]) -> str:
    """Return an interval in words, its unit once; "interval unknown" where an end is.

    Examples
    --------
    >>> span([0.0144, 0.016], seconds), span([0.999, 1.02], seconds)
    ('14.4 to 16 ms', '999 ms to 1.02 s')
    """
    if ends is None or ends[0] is None or ends[1] is None:
        return "interval unknown"
    low, high = form(ends[0]), form(ends[1])
    unit = high.partition(" ")[2]
    return f"{low.removesuffix(f' {unit}') if unit else low} to {high}"


def upper_first(text: str) -> str:
    """Return the text with a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]

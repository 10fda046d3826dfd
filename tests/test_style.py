"""The one style: colours that can be read and told apart, three kinds of numbers drawn three ways, the same bytes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from tierwise.style import DARK, LIGHT, PALETTES, Palette, canvas, plain, save, style, variables

BOTH = pytest.mark.parametrize("palette", [LIGHT, DARK], ids=lambda p: p.name)
DRAW = """
from pathlib import Path
from tierwise.style import canvas, save, style
with style() as ink:
    figure, axes = canvas()
    axes.plot([1, 2], [3, 4], **ink.mark("predicted"), label="a")
    axes.legend()
    save(figure, Path({path!r}))
"""


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    """Contrast ratio, WCAG 2.2."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@BOTH
def test_text_can_be_read(palette: Palette) -> None:
    for text, ground in itertools.product((palette.ink, palette.soft), (palette.paper, palette.panel)):
        assert contrast(text, ground) >= 4.5


@BOTH
def test_no_two_names_share_a_colour(palette: Palette) -> None:
    """A page replaces colours by the names of variables, which must not be ambiguous."""
    colours = list(variables(palette).values())
    assert len(colours) == len(set(colours))
    assert variables(LIGHT).keys() == variables(DARK).keys()


@BOTH
def test_what_is_predicted_simulated_and_measured_is_told_apart(palette: Palette) -> None:
    """By shape, by colour, and by lightness for who sees no colour."""
    marks = [palette.mark(kind, point=True) for kind in ("predicted", "simulated", "measured")]
    assert len({m["marker"] for m in marks}) == 3
    assert marks[2]["markerfacecolor"] == "none"
    assert palette.mark("predicted")["linestyle"] == "-"
    assert {m["linestyle"] for m in marks} == {"none"}
    for one, other in itertools.combinations([m["color"] for m in marks], 2):
        assert contrast(one, other) > 1.1


def test_what_was_set_before_is_set_again() -> None:
    before = dict(mpl.rcParams)
    with style(DARK):
        assert mpl.rcParams["figure.facecolor"] == DARK.paper
    assert dict(mpl.rcParams) == before
    assert set(PALETTES) == {"light", "dark"}


def test_the_same_bytes_in_another_process_without_a_date(tmp_path: Path) -> None:
    for name, salt in (("a", "1"), ("b", "2")):
        code = DRAW.format(path=str(tmp_path / name))
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": salt})
    for kind in ("svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert b"date" not in (tmp_path / "a.svg").read_bytes()


def test_a_dollar_is_a_dollar(tmp_path: Path) -> None:
    with style():
        figure, axes = canvas()
        axes.set_title(plain("$a^ costs $ {"))
        assert [p.name for p in save(figure, tmp_path / "odd.name.png")] == ["odd.name.svg", "odd.name.png"]

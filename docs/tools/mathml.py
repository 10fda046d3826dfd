"""Markdown extension: what ``pymdownx.arithmatex`` marks as TeX becomes MathML, so that pages need no script."""

from __future__ import annotations

import html
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from markdown.util import AtomicString
from math_core import LatexToMathML

BETWEEN_INLINE_AND_PRETTY = 15  # after arithmatex has marked the formulas, before text is escaped


class _MathML(Treeprocessor):
    def run(self, root: Element) -> None:
        """Replace the TeX of each marked element; a formula that cannot be read ends the build."""
        tex = LatexToMathML(fancy_error=False)
        for element in root.iter():
            if element.get("class") == "arithmatex" and element.text:
                formula = html.unescape(element.text.strip()[2:-2])  # \( ... \) or \[ ... \]
                display = element.tag == "div"
                mathml = tex.convert_with_local_state(formula, displaystyle=display)
                element.text = AtomicString(self.md.htmlStash.store(mathml))


class MathMLExtension(Extension):
    """TeX to MathML at build time."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - the name Markdown calls
        """Register the tree processor."""
        md.treeprocessors.register(_MathML(md), "mathml", BETWEEN_INLINE_AND_PRETTY)


def makeExtension(**options: Any) -> MathMLExtension:  # noqa: N802 - the name Markdown calls
    """Return the extension."""
    return MathMLExtension(**options)

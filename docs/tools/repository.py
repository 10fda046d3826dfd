"""Markdown extension: links that leave the documentation, such as to a study, lead to the file in the repository."""

from __future__ import annotations

import re
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor

REPOSITORY = "https://github.com/tierwise/tierwise/blob/main/"
OUTSIDE = re.compile(r"(?:\.\./)+(?=(?:studies|theory|simulator|calibration|planner|tierwise|tests)/\w)")
BEFORE_LINKS_ARE_CHECKED = 15


class _Repository(Treeprocessor):
    def run(self, root: Element) -> None:
        """Give each link that leaves the documentation its address in the repository."""
        for link in root.iter("a"):
            if match := OUTSIDE.match(link.get("href", "")):
                link.set("href", REPOSITORY + link.get("href", "")[match.end() :])


class RepositoryExtension(Extension):
    """Links to files of the repository."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - the name Markdown calls
        """Register the tree processor."""
        md.treeprocessors.register(_Repository(md), "repository", BEFORE_LINKS_ARE_CHECKED)


def makeExtension(**options: Any) -> RepositoryExtension:  # noqa: N802 - the name Markdown calls
    """Return the extension."""
    return RepositoryExtension(**options)

"""What is being done and how far it is: one line on stderr, for people only."""

from __future__ import annotations

import sys
from types import TracebackType


class Progress:
    """A line on stderr that is rewritten in place and cleared at the end; nothing when not ``enabled``."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __enter__(self) -> Progress:
        return self

    def __call__(self, what: str, done: int, of: int) -> None:
        """Show that ``done`` of ``of`` steps of ``what`` are behind us."""
        filled = round(24 * done / max(of, 1))
        self._write(f"\r{what:<14} [{'#' * filled}{'.' * (24 - filled)}] {done}/{of}\x1b[K")

    def note(self, text: str) -> None:
        """Write a line that stays."""
        self._write(f"tierwise: {text}\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        if self.enabled:
            sys.stderr.write(text)
            sys.stderr.flush()

"""``python -m tierwise``."""

from .cli import main

main()

"""What holds on every run of the engine is checked on every run of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def conservation() -> Iterator[None]:
    """Requests, tokens, KV blocks and busy time of each replica are conserved, whatever else a test looks at."""
    from simulator import engine
    from simulator.metrics import conserved

    made = engine._records

    def checked(*given: Any) -> engine.Records:
        records = made(*given)
        conserved(records)
        return records

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_records", checked)
        yield

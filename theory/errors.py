"""What is said when an input is refused: the name, the rule with its unit, the value received, the way out."""

from __future__ import annotations

from typing import NoReturn


class InputError(ValueError):
    """An input broke a stated rule; the message is one line a user can act on (exit code 2)."""


class InfeasibleError(Exception):
    """Nothing satisfies the constraints; the message names the one that binds and the nearest plan (exit code 3)."""


def refuse(name: str, rule: str, value: object, way_out: str = "") -> NoReturn:
    """Raise :class:`InputError` with the message ``\\`name\\` rule; got value. way out``.

    Raises
    ------
    InputError
        Always.

    Examples
    --------
    >>> refuse("acceptance", "must lie in [0, 1] [-]", 80, "Pass 0.8, not 80.")
    Traceback (most recent call last):
    ...
    theory.errors.InputError: `acceptance` must lie in [0, 1] [-]; got 80. Pass 0.8, not 80.
    """
    got = repr(value)
    if len(got) > 120:
        got = got[:117] + "..."
    raise InputError(f"`{name}` {rule}; got {got}.{' ' + way_out if way_out else ''}")


def require(ok: bool, name: str, rule: str, value: object, way_out: str = "") -> None:
    """Refuse ``value`` unless ``ok``; see :func:`refuse`.

    Raises
    ------
    InputError
        If not ``ok``.
    """
    if not ok:
        refuse(name, rule, value, way_out)

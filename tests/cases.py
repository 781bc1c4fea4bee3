"""Cases of one test, of which the fast suite runs some and `-m slow` the others."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(every: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """For `pytest.mark.parametrize`: all of them, slow but for those in `fast`."""
    every = list(every)
    assert set(fast) <= set(every), "a fast case is a case"
    return [case if case in fast else slow(case) for case in every]


def slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)

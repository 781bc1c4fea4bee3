"""The nearest known name, for a message about an unknown one."""

import difflib
from collections.abc import Iterable


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant; None where none is similar."""
    names = list(known)
    # The right name under the wrong section comes before a similar one.
    leaf = given.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == leaf]
    return next(iter(same or difflib.get_close_matches(given, names, n=1, cutoff=0.5)), None)


def unknown(kind: str, given: str, known: Iterable[str], dashes: str = "") -> str:
    """One sentence about an unknown name."""
    meant = nearest(given, known)
    hint = f"; did you mean {dashes}{meant}?" if meant else "; see --help"
    return f"unknown {kind} {dashes}{given}{hint}"

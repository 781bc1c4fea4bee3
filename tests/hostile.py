"""Files as an accident or an enemy leaves them: strategies that change bytes, JSON and YAML."""

import json
import struct
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

few = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""The same examples every time; `timeout` of pytest ends one that hangs."""

VALUES: list[Any] = [
    *(None, True, -1, 0, 1.5, 10**12, 10**30, -(10**400), float("nan"), float("inf")),
    *("", "x", "../x", "/etc/passwd", "block-1.safetensors", "a\nb", "\0", "é" * 300),
    *([], {}, [1], [[-1]], {"x": 1}, [10**10] * 3, ["F64"], "F4", "I64", "BOOL"),
    *([0, 2**63], [2**64 - 1, 2**64], [0, 0], [5, 3]),
]
EDITS = ("replace", "remove", "rename", "copy")


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands inside dictionaries and lists."""
    keys: Any = value if isinstance(value, dict) else ()
    if isinstance(value, list):
        keys = range(len(value))
    return [p for k in keys for p in ((*path, k), *_places(value[k], (*path, k)))]


@st.composite
def changed_json(draw: st.DrawFn, original: Any) -> Any:
    """A value of JSON with one to three entries changed, removed, renamed or copied elsewhere."""
    changed = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        places = _places(changed)
        if not places:
            break
        *path, key = draw(st.sampled_from(places))
        owner = changed
        for step in path:
            owner = owner[step]
        edit = draw(st.sampled_from(EDITS))
        if edit == "replace":
            owner[key] = draw(st.one_of(st.sampled_from([*VALUES, _nested(200)]), st.integers()))
        elif edit == "remove":
            del owner[key]
        elif edit == "rename" and isinstance(owner, dict):
            new = draw(st.sampled_from(["", "x", "../x", "/x", "..", "a/b", "shared.x", "\n"]))
            owner[new] = owner.pop(key)
        elif edit == "copy" and len(places) > 1:
            source: Any = changed
            for step in draw(st.sampled_from(places)):
                source = source[step]
            owner[key] = json.loads(json.dumps(source))
    return changed


@st.composite
def changed_bytes(draw: st.DrawFn, original: bytes, inserts: tuple[bytes, ...] = ()) -> bytes:
    """Bytes with one to four of them flipped, cut off, repeated or put in."""
    changed = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(changed)))
        kind = draw(st.sampled_from(("flip", "cut", "remove", "repeat", "insert")))
        if kind == "flip" and place < len(changed):
            changed[place] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del changed[place:]
        elif kind == "remove":
            del changed[place : place + draw(st.integers(1, 20))]
        elif kind == "repeat":
            changed[place:place] = changed[place : place + 50]
        else:
            new = st.binary(min_size=1, max_size=8)
            changed[place:place] = draw(st.sampled_from(inserts) | new if inserts else new)
    return bytes(changed)


@st.composite
def changed_safetensors(draw: st.DrawFn, original: bytes) -> bytes:
    """A safetensors file with another header, or other bytes in it."""
    (size,) = struct.unpack("<Q", original[:8])
    header, data = original[8 : 8 + size], original[8 + size :]
    kind = draw(st.sampled_from(("json", "json", "bytes", "length", "data")))
    if kind == "length":
        other = draw(st.sampled_from([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1]))
        return struct.pack("<Q", other) + header + data
    if kind == "json":
        header = json.dumps(draw(changed_json(json.loads(header)))).encode()
    elif kind == "bytes":
        header = draw(changed_bytes(header))
    else:
        data = draw(changed_bytes(data))
    return struct.pack("<Q", len(header)) + header + data

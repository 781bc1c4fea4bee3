"""Compares the data with those that a checkpoint was trained on, at every use.

A manifest or a block's part holds `data`: name and class names, `spec` (what a model must know of
the data: classes, sizes, scaling) and `train` and `test` (number and digest of the samples). Older
ones hold less, and are compared on what they have.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dbdist.checkpoint.names import blocks_in, step_folders, step_of
from dbdist.checkpoint.parts import differences, read_part
from dbdist.errors import CheckpointError

Data = Mapping[str, Any]


def data_entry(identity: Data) -> dict[str, Any]:
    """What a manifest says of its data. identity: the spec's own, and `train` and `test`."""
    splits = {key: identity[key] for key in ("train", "test") if key in identity}
    spec = {key: value for key, value in identity.items() if key not in splits}
    named = {key: spec.get(key) for key in ("name", "class_names")}
    return {**named, "spec": spec, **splits}


def meaning_of(entry: Data) -> dict[str, Any]:
    """The part of an entry that gives a model's numbers their meaning: classes and scaling."""
    return {key: value for key, value in entry.items() if key not in ("train", "test")}


def differences_in_both(old: Data, new: Data) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) of what both have and have differently."""
    common = {key: value for key, value in new.items() if key in old}
    for key, value in common.items():
        if isinstance(value, Mapping) and isinstance(old[key], Mapping):
            inner = differences_in_both(old[key], value)
            yield from ((f"{key}.{name}", a, b) for name, a, b in inner)
        else:
            yield from differences({key: _plain(old[key])}, {key: _plain(value)})


def check_meaning(where: Path, stored: Data, now: Data) -> None:
    """Raises CheckpointError, naming the first difference, for other classes or another scaling.

    where: the run or checkpoint that was trained on the stored data.
    """
    for key, old, new in differences_in_both(meaning_of(stored), meaning_of(now)):
        what = key.removeprefix("spec.").replace("class_names", "classes")
        raise CheckpointError(
            f"{where} was trained with {what} {_shown(old)}, the data now has {_shown(new)}; use "
            "the data it was trained on, or another run_dir"
        )


def check_training_samples(where: Path, stored: Data, now: Data) -> None:
    """Raises CheckpointError where the training samples are others, or in another order."""
    if (difference := samples_differ(stored, now, "train")) is not None:
        raise CheckpointError(
            f"{where} was trained on other samples ({difference}); use the data it was trained on, "
            "or another run_dir"
        )


def other_test_samples(where: Path, stored: Data, now: Data) -> str | None:
    """A warning where the test samples are others than those that a run knew; None if not."""
    if (difference := samples_differ(stored, now, "test")) is None:
        return None
    return f"{where} was trained beside another test set ({difference}); the figures do not compare"


def stored_data(run_dir: Path) -> Data | None:
    """The data of the newest block that has saved in a run directory by itself, if any."""
    for path in sorted(step_folders(run_dir / "checkpoints"), key=step_of, reverse=True):
        for block in blocks_in(path):
            return read_part(path, block)["data"]
    return None


def samples_differ(stored: Data, now: Data, split: str) -> str | None:
    """How a split's samples differ; None if they do not, or nothing is known of them."""
    old, new = stored.get(split), now.get(split)
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return None
    if old.get("num_samples") != new.get("num_samples"):
        return f"{old.get('num_samples')} then, {new.get('num_samples')} now"
    if old.get("digest") != new.get("digest"):
        return "as many, but not the same or not in the same order"
    return None


def _plain(value: Any) -> Any:
    return [*value] if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    """A value in a message: of long lists the beginning."""
    if not isinstance(value, list | tuple):
        return str(value)
    words = [str(word) for word in value]
    return ", ".join(words[:8]) + (f", … ({len(words)})" if len(words) > 8 else "")

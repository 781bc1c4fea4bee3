"""`dbdist check-data` opens everything once and lists what is bad."""

from pathlib import Path

import pytest
from PIL import Image

from dbdist.commands.check_data import run
from dbdist.errors import ConfigError, DataError


def write_set(root: Path, n: int = 40) -> list[str]:
    """Two classes; the words that name the set."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (8, 8), (i, i, i)).save(root / split / name / f"{i:02}.png")
    return ["--data.name", "image_folder", "--data.root", str(root), "--data.image_size", "8"]


def test_a_good_set_is_counted_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(write_set(tmp_path, 3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train 6 images of 2 classes, test 6"
    assert [line.split() for line in lines[2:4]] == [["0", "cat", "3", "3"], ["1", "dog", "3", "3"]]
    assert lines[-1] == "all 12 samples can be used"


def test_all_that_is_bad_is_listed_even_where_training_would_replace_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = write_set(tmp_path)
    bad = [tmp_path / name for name in ("train/cat/05.png", "train/dog/39.png", "val/cat/00.png")]
    for path in bad:
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="3 of 160 samples cannot be used"):
        run([*words, "--data.on_error", "skip"])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad")]
    assert [line.partition(" is not a readable image")[0] for line in told] == [
        f"bad: {path}" for path in bad
    ]


def test_sets_of_any_kind_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    run(["digits"])
    out = capsys.readouterr().out
    assert out.startswith("train 1,437 images of 10 classes, test 360\n")
    assert out.endswith("all 1,797 samples can be used\n")


@pytest.mark.parametrize("option", ["data.image_size", "data.num_workers"])
def test_a_value_outside_its_range_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        run(["digits", f"--{option}", "-1"])

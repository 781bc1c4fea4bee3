"""What was found is said in one line, and written down so that other data is known as other."""

import json
from pathlib import Path

from data_files import Points, write_folder, write_image

from dbdist.data.found import describe_found, identity_of
from dbdist.data.options import ImageOptions
from dbdist.data.sets import load_dataset


def splits(data: ImageOptions) -> tuple:
    return load_dataset(data, "train"), load_dataset(data, "test")


def test_one_line_says_what_was_found() -> None:
    line = describe_found(*splits(ImageOptions(name="digits")))
    assert line == "train 1,437 images of 10 classes, test 360"
    assert describe_found(Points(), Points()) == "train 6 samples, test 6"


def test_the_identity_names_classes_scaling_sizes_and_samples(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "cat", "dog")
    identity = identity_of(*splits(data))
    assert json.loads(json.dumps(identity)) == identity
    assert identity["class_names"] == ["cat", "dog"]
    assert identity["mean"] == [0.485, 0.456, 0.406]
    assert (identity["image_size"], identity["train"]["num_samples"]) == (8, 4)


def test_another_class_picture_or_size_is_another_identity(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "cat", "dog")
    seen = [identity_of(*splits(data))]
    write_image(tmp_path / "val/dog/new.png")
    seen.append(identity_of(*splits(data)))
    for split in ("train", "val"):
        (tmp_path / split / "cat").rename(tmp_path / split / "wildcat")
    seen.append(identity_of(*splits(data)))
    seen.append(identity_of(*splits(ImageOptions(**{**vars(data), "image_size": 16}))))
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])
    assert seen[0]["train"] == seen[1]["train"]

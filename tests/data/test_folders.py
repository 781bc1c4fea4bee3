"""Image folders as people have them: classes, pictures and labels, and what is left out."""

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import assert_one_sentence, config, refusal, write_folder, write_image
from hostile import changed_bytes, few
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from dbdist.data.found import describe_found
from dbdist.data.images import ImageFiles
from dbdist.data.sources import dataset_spec, load_dataset, prepare
from dbdist.errors import DataError


def load(data: Any, split: Any = "train") -> ImageFiles:
    dataset = load_dataset(data, split)
    assert isinstance(dataset, ImageFiles)
    return dataset


def names(data: Any, split: Any = "train") -> list[str]:
    """Used pictures, below the set's root."""
    return [str(path.relative_to(data.root)) for path in load(data, split)._images]


def test_plain_folders_give_the_order_of_torchvision(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "dog", "Cat", "b-a", "b", "äpfel")
    for path in ("b/z/1.png", "b/a/2.png", "b/a.b/3.png", "b/10.PNG", "b/9.jpeg"):
        write_image(tmp_path / "train" / path)
    dataset, expected = load(data), ImageFolder(str(tmp_path / "train"))
    assert dataset.spec.class_names == tuple(expected.classes)
    pairs = zip(dataset._images, dataset.labels.tolist(), strict=True)
    assert [(str(path), label) for path, label in pairs] == expected.samples


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_pictures_are_resized_and_cropped_to_the_middle(tmp_path: Path, held_out: str) -> None:
    for split in ("train", held_out):
        write_image(tmp_path / split / "cat" / "a.jpeg", 90, 40)
        write_image(tmp_path / split / "dog" / "b.png", 30, 50)
    data = config("image_folder", tmp_path, image_size=16)
    spec = dataset_spec(data)
    assert (spec.class_names, spec.num_classes, spec.image_size) == (("cat", "dog"), 2, 16)
    for split in ("train", "test"):
        batch = load(data, split).__getitems__([1, 0])
        assert batch["image"].shape == (2, 3, 16, 16)
        assert batch["label"].tolist() == [1, 0]


def test_hidden_and_system_folders_are_no_classes_and_hidden_files_no_pictures(
    tmp_path: Path,
) -> None:
    data = write_folder(tmp_path, "cat", "dog", n=1)
    for split in ("train", "val"):
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git/x", "lost+found"):
            write_image(tmp_path / split / name / "0.png")
            write_image(tmp_path / split / "cat" / name / "0.png")
        (tmp_path / split / "cat" / "._0.png").write_bytes(b"\0\5\26\7Mac OS X")
        for name in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "cat/.0.png.swp"):
            (tmp_path / split / name).write_bytes(b"x")
    assert dataset_spec(data).class_names == ("cat", "dog")
    assert names(data) == ["train/cat/0.png", "train/dog/0.png"]
    assert names(data, "test") == ["val/cat/0.png", "val/dog/0.png"]
    assert load(data).remarks == []


def test_pictures_are_known_by_ending_or_content_and_others_are_counted(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "cat", n=1)
    folder, png = tmp_path / "train/cat", (tmp_path / "train/cat/0.png").read_bytes()
    used = ["0.png", "1.PNG", "a.gif", "b.jfif", "c.jpe", "d.JPEG", "e.pgm", "no-ending"]
    for name in (*used, "f.heic", "g.HEIC", "h.svg", "i.bak", "notes.txt", "x.json", "no-picture"):
        (folder / name).write_bytes(png)
    (folder / "no-picture").write_bytes(b"text")
    assert names(data) == [f"train/cat/{name}" for name in used]
    train, test = load(data), load(data, "test")
    assert describe_found(train, test) == (
        "train 8 images of 1 class, test 1; left out, as pictures of other kinds: 1 .bak, 2 .heic, "
        "1 .svg"
    )


def test_pictures_in_no_class_folder_are_counted(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "cat")
    for name in ("a.png", "b.JPG", "classes.txt"):
        write_image(tmp_path / "train/cat/x.png")
        (tmp_path / "train/cat/x.png").rename(tmp_path / "train" / name)
    assert load(data).remarks == ["left out, as pictures in no class folder: 2"]


def test_a_name_that_is_not_utf8_is_trained_on(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "cat", "dog")
    folder = os.fsencode(tmp_path) + b"/train"
    os.rename(folder + b"/cat/0.png", folder + b"/cat/caf\xe9.png")
    os.rename(folder + b"/dog", folder + b"/caf\xe9")
    os.rename(os.fsencode(tmp_path) + b"/val/dog", os.fsencode(tmp_path) + b"/val/caf\xe9")
    train = load(data)
    assert train.spec.class_names == ("caf\\xe9", "cat")
    assert len(train.digest()) == 64
    assert train.__getitems__([0, 1, 2, 3])["label"].tolist() == [0, 0, 1, 1]


def test_an_accent_may_be_written_in_two_ways(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "café")
    decomposed = unicodedata.normalize("NFD", "café")
    (tmp_path / "val/café").rename(tmp_path / "val" / decomposed)
    assert load(data, "test").labels.tolist() == [0, 0]


def test_a_link_to_a_class_folder_is_a_class(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "cat", "dog")
    (tmp_path / "train/cat").rename(tmp_path / "elsewhere")
    (tmp_path / "train/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "val/cat/linked.png").symlink_to(tmp_path / "elsewhere/0.png")
    assert load(data).labels.tolist() == [0, 0, 1, 1]
    assert len(load(data, "test")) == 5


@pytest.mark.parametrize(
    "target", ["..", "../..", "../cat", ".", "../../val", "../../val/dog", "in"]
)
def test_each_real_folder_counts_once_whatever_links_lead_to_it(
    tmp_path: Path, target: str
) -> None:
    data = write_folder(tmp_path, "cat", "dog")
    (tmp_path / "train/dog/in").mkdir()
    before = names(data)
    (tmp_path / "train/dog/up").symlink_to(target)
    assert names(data) == before
    (remark,) = load(data).remarks
    assert str(tmp_path / "train/dog/") in remark


def test_links_that_lead_nowhere_are_left_out_and_named(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "cat", "dog")
    for i in range(5):
        (tmp_path / f"train/dog/dead{i}.png").symlink_to("nowhere.png")
    (tmp_path / "train/dog/self.png").symlink_to("self.png")
    train = load(data)
    assert len(train) == 4
    (remark,) = train.remarks
    assert "left out, as links that lead nowhere: " in remark
    assert f"{tmp_path}/train/dog/dead2.png and 3 more" in remark
    (tmp_path / "train/eel").symlink_to("nowhere")
    assert f"{tmp_path}/train/eel is a link that leads nowhere" in refusal(data)


def test_two_classes_are_not_one_folder(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "cat", "dog")
    (tmp_path / "train/wolf").symlink_to("dog")
    assert "train/dog and " in refusal(data)
    assert "train/wolf are the same folder" in refusal(data)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_class_may_have_no_pictures_to_test(tmp_path: Path, is_there: bool) -> None:
    data = write_folder(tmp_path, "ant", "bee", "cat")
    for path in (tmp_path / "val/bee").iterdir():
        path.unlink()
    if not is_there:
        (tmp_path / "val/bee").rmdir()
    test = load(data, "test")
    assert test.labels.tolist() == [0, 0, 2, 2]
    assert test.spec.num_classes == 3


def test_a_class_to_test_must_be_one_to_train(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "cat")
    (tmp_path / "val/cow").mkdir()
    assert len(load(data, "test")) == 2  # an empty folder says nothing
    write_image(tmp_path / "val/cow/a.png")
    assert f"{tmp_path}/val/cow is no class of {tmp_path}/train" in refusal(data, "test")


def test_a_class_without_pictures_to_train_is_refused_by_name(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "cat", "dog", n=1)
    (tmp_path / "train/dog/0.png").rename(tmp_path / "train/dog/0.heic")
    message = refusal(data)
    assert f"{tmp_path}/train/dog holds no pictures" in message
    assert "1 .heic" in message


def test_folders_without_splits_or_classes_are_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="incomplete: train, val missing") as caught:
        dataset_spec(config("image_folder", tmp_path))
    assert str(tmp_path) in str(caught.value)
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    assert "holds no class folders" in refusal(config("image_folder", tmp_path))


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_picture_is_refused_before_training(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "cat")
    os.mkfifo(tmp_path / "train/cat/control")  # no picture by its name: nobody's business
    assert len(load(data)) == 2
    os.mkfifo(tmp_path / "train/cat/pipe.png")
    assert refusal(data) == f"{tmp_path}/train/cat/pipe.png is a named pipe, not a file"


def test_the_digest_follows_names_and_sizes_and_not_the_place(tmp_path: Path) -> None:
    sets = [write_folder(tmp_path / name, "cat", "dog") for name in ("here", "there")]
    digests = {load(data).digest() for data in sets}
    assert len(digests) == 1
    folder = tmp_path / "there/train/dog"
    (folder / "0.png").rename(folder / "00.png")
    digests.add(load(sets[1]).digest())
    (folder / "00.png").write_bytes((folder / "00.png").read_bytes() + b"\0")
    digests.add(load(sets[1]).digest())
    (folder / "deeper").mkdir()
    (folder / "00.png").rename(folder / "deeper/00.png")
    digests.add(load(sets[1]).digest())
    assert len(digests) == 4


def test_a_damaged_picture_stops_or_is_replaced_by_one_of_its_class(tmp_path: Path) -> None:
    data = write_folder(tmp_path, "cat", "dog", n=4)
    for name in ("0", "2"):
        (tmp_path / f"train/dog/{name}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"train/dog/0\.png is not a readable image"):
        load(data).__getitems__([0, 4])
    data = config("image_folder", tmp_path, image_size=8, on_error="skip")
    train = load(data)
    batch = train.__getitems__([0, 4, 5, 6, 4])
    assert batch["label"].tolist() == [0, 1, 1, 1, 1]
    assert torch.equal(batch["image"][1], batch["image"][4])
    notes = train.take_notes()
    assert len(notes) == 3
    assert notes[0].startswith(f"{tmp_path}/train/dog/0.png is not a readable image: ")
    assert notes[0].endswith(
        ("; train/dog/1.png takes its place", "; train/dog/3.png takes its place")
    )
    assert train.take_notes() == []
    assert torch.equal(load(data).__getitems__([4])["image"][0], batch["image"][1])


def test_a_class_of_damaged_pictures_ends_in_one_sentence(tmp_path: Path) -> None:
    write_folder(tmp_path, "cat", "dog")
    for name in ("0", "1"):
        (tmp_path / f"train/dog/{name}.png").write_bytes(b"no picture")
    train = load(config("image_folder", tmp_path, image_size=8, on_error="skip"))
    with pytest.raises(DataError, match="nor can others of its class be used"):
        train.__getitems__([2])


# -- Tiny-ImageNet's annotations -------------------------------------------------------------------


def test_tiny_imagenet_test_labels_come_from_its_annotations(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-imagenet-200"
    names = [f"n{i:08d}" for i in range(200)]
    for i, name in enumerate(names):
        write_image(folder / "train" / name / "images" / f"{name}_0.JPEG", shade=i)
    lines = []
    for i, label in enumerate((199, 3)):
        write_image(folder / "val" / "images" / f"val_{i}.JPEG", shade=label)
        lines.append(f"val_{i}.JPEG\t{names[label]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    data = config("tiny-imagenet", tmp_path)
    prepare(data)
    train, test = load_dataset(data, "train"), load_dataset(data, "test")
    assert train.labels.tolist() == list(range(200))
    assert test.labels.tolist() == [199, 3]
    image = test[1]["image"]
    assert image.shape == (3, 64, 64)
    torch.testing.assert_close(image, train[3]["image"], atol=0.05, rtol=0)

    (folder / "val" / "images" / "val_1.JPEG").unlink()
    assert "line 2" in refusal(data, "test")
    (folder / "val" / "val_annotations.txt").unlink()
    assert "val/val_annotations.txt missing" in refusal(data, "test")


@settings(few, max_examples=40)
@given(data=st.data())
def test_changed_annotations_are_used_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("annotated")
    write_folder(folder, "cat", "dog")
    write_image(folder / "val/images/v.png")
    lines = b"v.png\tcat\t0\t0\nv.png\tdog\t1\t1\n"
    content = data.draw(changed_bytes(lines, (b"../x", b"/etc/passwd", b"\xff", b"\n\t\n", b"\0")))
    (folder / "val/val_annotations.txt").write_bytes(content)
    try:
        load_dataset(config("image_folder", folder), "test")
    except DataError as error:
        assert_one_sentence(error)


@pytest.mark.timeout(20)
def test_annotations_that_are_no_text_or_no_file_are_refused(tmp_path: Path) -> None:
    data, annotations = write_folder(tmp_path, "cat"), tmp_path / "val/val_annotations.txt"
    annotations.write_bytes(b"\xff\xfe\x00")
    assert "val_annotations.txt cannot be read" in refusal(data, "test")
    annotations.unlink()
    os.mkfifo(annotations)
    assert "val_annotations.txt is a named pipe" in refusal(data, "test")

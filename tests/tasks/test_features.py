"""Figures of generated images on scikit-learn's digits, and the files behind them."""

import logging
import re
from dataclasses import replace

import pytest
import torch

from dbdist.data.images import DatasetSpec
from dbdist.data.options import ImageOptions
from dbdist.data.sources import load_dataset
from dbdist.errors import ConfigError, DataError
from dbdist.tasks import extractor, features
from dbdist.tasks.extractor import subset
from dbdist.tasks.extractor_cache import file_of, folder_of, read_cached
from dbdist.tasks.features import feature_figures, features_of, prepare_features
from dbdist.tasks.options import FeatureOptions

OPTIONS = FeatureOptions(name="any")


def digits_in(root, **options):
    return ImageOptions(name="digits", root=str(root), **options)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Prepared as a run prepares them."""
    data = digits_in(tmp_path_factory.mktemp("data"))
    prepare_features(OPTIONS, data, load_dataset(data, "train"))
    return data


@pytest.fixture(scope="module")
def figures(digits):
    return feature_figures(OPTIONS, digits)


@pytest.fixture(scope="module")
def test_batch(digits):
    test_set = load_dataset(digits, "test")
    return test_set.__getitems__(list(range(len(test_set))))


@pytest.fixture(scope="module")
def train_set(digits):
    return load_dataset(digits, "train")


@pytest.fixture
def short(monkeypatch):
    """Ten steps of training: enough where nobody looks at figures."""
    monkeypatch.setattr(extractor, "MIN_SEEN", 640)
    monkeypatch.setattr(extractor, "EPOCHS", 0)


def scores(figures, answers, batch):
    found = {}
    for figure in figures:
        found |= figure.result(figure.checked(figure.add(answers, batch))[None])
    return found


# -- figures ---------------------------------------------------------------------------------------


def test_real_test_images_are_recognised_as_often_as_the_extractor_is_right(figures, test_batch):
    found = scores(figures, test_batch["image"], test_batch)
    assert found["label_accuracy"] == found["extractor_accuracy"] > 0.94
    assert abs(found["frechet"]) < 1e-6


def test_images_of_other_classes_than_asked_are_recognised_by_chance(figures, test_batch):
    order = torch.randperm(360, generator=torch.Generator().manual_seed(0))
    wrong = {**test_batch, "label": test_batch["label"][order]}
    assert 0.04 < scores(figures, test_batch["image"], wrong)["label_accuracy"] < 0.18
    next_class = {**test_batch, "label": (test_batch["label"] + 1) % 10}
    assert scores(figures, test_batch["image"], next_class)["label_accuracy"] < 0.02


def test_training_images_reach_the_floor_and_are_told_to_be_copies(figures, test_batch, train_set):
    real = train_set.__getitems__(subset(train_set, 360, "reference"))["image"]
    found = scores(figures, real, test_batch)
    assert found["frechet"] == pytest.approx(found["frechet_floor"], rel=1e-4)
    assert found["frechet_floor_samples"] == 360
    assert abs(found["kid"]) < 0.01
    assert found["train_distance"] == 0
    assert found["train_distance_of_test"] > 1
    assert found["train_distance_images"] == len(train_set) == 1437


def test_class_means_and_noise_are_far_from_real_images(figures, test_batch, train_set):
    train = train_set.__getitems__(list(range(len(train_set))))
    means = torch.stack([train["image"][train["label"] == k].mean(dim=0) for k in range(10)])
    found = scores(figures, means[test_batch["label"]], test_batch)
    assert found["frechet"] > 5 * found["frechet_floor"]
    assert found["kid"] > 0.02
    assert found["label_accuracy"] > 0.9, "a mean is of its class; the distances tell"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(test_batch["image"].shape, generator=generator)
    of_noise = scores(figures, noise, test_batch)
    assert of_noise["frechet"] > found["frechet"]
    assert of_noise["label_accuracy"] < 0.3


# -- files -----------------------------------------------------------------------------------------


def test_files_that_are_there_are_used(digits, train_set, monkeypatch):
    path = file_of(folder_of(digits.root), "small", train_set)
    before = path.stat()
    monkeypatch.setattr(features.extractor, "train_small_network", None)  # would fail
    prepare_features(OPTIONS, digits, train_set)
    assert path.stat() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [damage, cut, empty])
def test_a_damaged_file_is_refused_and_made_again_as_it_was(spoil, short, tmp_path, caplog):
    data = digits_in(tmp_path)
    train_set = load_dataset(data, "train")
    prepare_features(OPTIONS, data, train_set)
    path = file_of(folder_of(data.root), "small", train_set)
    whole = path.read_bytes()
    spoil(path)
    with pytest.raises(DataError, match=r"is damaged \(.*\); delete it to have it made again$"):
        feature_figures(OPTIONS, data)
    with caplog.at_level(logging.WARNING, "dbdist"):
        logging.getLogger("dbdist").addHandler(caplog.handler)
        prepare_features(OPTIONS, data, train_set)
        logging.getLogger("dbdist").removeHandler(caplog.handler)
    assert path.read_bytes() == whole
    assert caplog.messages == [f"{path} is damaged and is made again"]
    assert len(feature_figures(OPTIONS, data)) == 2


def test_a_missing_file_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"small-[0-9a-f]{16}\.safetensors is missing"):
        feature_figures(OPTIONS, digits_in(tmp_path))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "extractors").write_text("a file")
    data = digits_in(tmp_path)
    with pytest.raises(DataError, match=r"extractors cannot be written \(File exists\)"):
        prepare_features(OPTIONS, data, load_dataset(data, "train"))


def test_other_images_have_other_files_and_another_scaling_has_not(digits, train_set):
    folder = folder_of(digits.root)
    mine = file_of(folder, "small", train_set)
    larger = load_dataset(replace(digits, image_size=16), "train")
    assert file_of(folder, "small", larger) != mine
    assert file_of(folder, "small", load_dataset(digits, "test")) != mine
    rescaled = load_dataset(digits, "train")
    rescaled.spec = replace(rescaled.spec, mean=(0.5,), std=(0.5,))
    assert file_of(folder, "small", rescaled) == mine


def test_a_file_holds_the_network_and_features_of_training_images(digits, train_set):
    tensors = read_cached(file_of(folder_of(digits.root), "small", train_set)).tensors
    assert tensors["reference"].shape == (1437, 64)
    assert tensors["logits.weight"].shape == (10, 64)


# -- choice ----------------------------------------------------------------------------------------


def spec_of(channels, side):
    return DatasetSpec("photos", channels, side, 10, (0.5,) * channels, (0.5,) * channels, None)


def test_auto_takes_the_published_network_for_photographs_where_it_is_there(tmp_path, monkeypatch):
    data = digits_in(tmp_path)
    assert features_of(OPTIONS, data, spec_of(3, 32)) == "small"
    folder_of(tmp_path).mkdir()
    (folder_of(tmp_path) / features.inception.WEIGHTS).touch()
    assert features_of(OPTIONS, data, spec_of(3, 32)) == "inception"
    assert features_of(OPTIONS, data, spec_of(3, 16)) == "small"
    assert features_of(OPTIONS, data, spec_of(1, 32)) == "small"
    asked = FeatureOptions(name="any", features="inception")
    assert features_of(asked, data, spec_of(1, 8)) == "inception"
    assert features_of(replace(asked, features="small"), data, spec_of(3, 32)) == "small"
    for other in (spec_of(4, 32), object()):
        if isinstance(other, DatasetSpec):
            with pytest.raises(ConfigError, match="sees grey and colour images"):
                features_of(asked, data, other)
    monkeypatch.setattr(features.inception, "find_spec", lambda name: None)
    assert features_of(OPTIONS, data, spec_of(3, 32)) == "small"
    with pytest.raises(ConfigError, match=re.escape("pip install 'dbdist[fid]'")):
        features_of(asked, data, spec_of(3, 32))


def test_weights_that_are_missing_are_asked_for_by_name_and_place(tmp_path):
    asked = FeatureOptions(name="any", features="inception")
    path = folder_of(tmp_path) / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(ConfigError, match=re.escape(f"inception needs {path}; get https://")):
        features_of(asked, digits_in(tmp_path), spec_of(3, 32))

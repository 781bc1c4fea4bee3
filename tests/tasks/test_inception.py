"""The network of the published FID: torch-fidelity's own, with weights that are only data."""

import os
import pickle

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dbdist.data.images import DatasetSpec
from dbdist.data.options import ImageOptions
from dbdist.data.sources import load_dataset
from dbdist.errors import ConfigError
from dbdist.tasks import features, inception
from dbdist.tasks.extractor import Extractor
from dbdist.tasks.extractor_cache import file_of
from dbdist.tasks.features import feature_figures, prepare_features
from dbdist.tasks.inception import WEIGHTS, Inception, load_inception
from dbdist.tasks.options import FeatureOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A weights file with the published form and other numbers."""
    folder = tmp_path_factory.mktemp("data") / "extractors"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *_, **__: None)
        network = FeatureExtractorInceptionV3("any", ["2048"], feature_extractor_weights_path="")
    state = network.state_dict()
    wide = {name: 6**0.5 * value for name, value in state.items() if value.ndim == 4}
    torch.save({**state, **wide}, folder / WEIGHTS)  # signals keep their size, layer by layer
    return folder


@pytest.fixture
def any_hash(monkeypatch):
    monkeypatch.setattr(inception, "SHA256", "")


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_those_of_torch_fidelity_for_8_bit_colours(folder, any_hash, channels):
    spec = DatasetSpec("any", channels, 32, 10, (0.4,) * channels, (0.3,) * channels, None)
    pixels = torch.randint(256, (2, channels, 32, 32), generator=torch.Generator().manual_seed(0))
    images = (pixels / 255 - 0.4) / 0.3
    seen = Extractor(load_inception(folder), inception.NUM_FEATURES, spec)(images)
    own = FeatureExtractorInceptionV3(
        "any", ["2048"], feature_extractor_weights_path=str(folder / WEIGHTS)
    )
    (expected,) = own(pixels.to(torch.uint8).expand(-1, 3, -1, -1))
    torch.testing.assert_close(seen.features, expected)
    assert seen.features.mean() > 0.01
    assert seen.features.shape == (2, 2048)
    assert not torch.allclose(*seen.features, rtol=0.01)
    assert seen.logits is None


def test_another_file_than_the_published_is_refused(folder):
    with pytest.raises(ConfigError, match="its SHA-256 does not begin with 6726825d"):
        load_inception(folder)


class Malice:
    def __reduce__(self):
        return os.mkdir, (os.environ["MALICE"],)


def test_a_weights_file_cannot_run_anything(any_hash, tmp_path, monkeypatch):
    monkeypatch.setenv("MALICE", str(tmp_path / "done"))
    (tmp_path / WEIGHTS).write_bytes(pickle.dumps(Malice(), protocol=2))
    with pytest.raises(ConfigError, match="does not hold the network's weights"):
        load_inception(tmp_path)
    assert not (tmp_path / "done").exists()


def test_weights_of_another_network_are_refused(any_hash, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match=r"weights \(RuntimeError\); get it from https"):
        load_inception(tmp_path)


def test_a_pipe_in_place_of_weights_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_inception(tmp_path)


def test_figures_take_features_from_it_and_classes_from_the_small_network(
    folder, any_hash, monkeypatch
):
    """With a narrow stand-in for 94 MB of convolutions; its file is its own."""

    class Narrow(torch.nn.Module):
        def forward(self, shown):
            return (shown.flatten(1).float()[:, :130] / 255,)

    monkeypatch.setattr(inception, "load_inception", lambda folder: Inception(Narrow()))
    monkeypatch.setattr(inception, "NUM_FEATURES", 130)
    monkeypatch.setattr(features.extractor, "MIN_SEEN", 640)
    monkeypatch.setattr(features.extractor, "EPOCHS", 0)
    data = ImageOptions(name="digits", root=str(folder.parent))
    options = FeatureOptions(name="any", features="inception")
    train_set, test_set = load_dataset(data, "train"), load_dataset(data, "test")
    prepare_features(options, data, train_set)
    assert file_of(folder, "inception", train_set).exists()
    figure, _ = feature_figures(options, data)
    batch = test_set.__getitems__(list(range(100)))
    found = figure.result(figure.add(batch["image"], batch)[None])
    assert found["frechet_features"] == 130
    assert found["frechet_floor"] > 0
    assert found["label_accuracy"] == found["extractor_accuracy"] > 0.1
    assert "kid_standard_error" in found

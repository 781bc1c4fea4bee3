"""The small network: its forms, its training, and what it sees whatever is set around it."""

import pytest
import torch

from dbdist.data.images import DatasetSpec, ImagesInMemory, random_images
from dbdist.tasks import extractor
from dbdist.tasks.extractor import (
    NUM_FEATURES,
    Extractor,
    as_shown,
    images_of,
    subset,
    train_small_network,
)

CPU = torch.device("cpu")
SPEC = DatasetSpec("digits", 1, 8, 10, (0.3,), (0.4,), None)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Ten steps of training."""
    monkeypatch.setattr(extractor, "MIN_SEEN", 640)
    monkeypatch.setattr(extractor, "EPOCHS", 0)


def trained(images, seed=0):
    return Extractor(train_small_network(images, CPU, seed), NUM_FEATURES, images.spec)


@pytest.mark.parametrize(
    ("channels", "side", "num_classes"),
    [(1, 1, 2), (1, 8, 10), (1, 28, 10), (3, 25, 1), (3, 32, 100), (4, 65, 5), (3, 96, 200)],
)
def test_any_size_channels_and_classes_are_trained_on(channels, side, num_classes, monkeypatch):
    monkeypatch.setattr(extractor, "MIN_SEEN", 64)
    spec = DatasetSpec(
        "any", channels, side, num_classes, (0.5,) * channels, (0.2,) * channels, None
    )
    images = random_images(spec, 70)
    seen = trained(images)(images.__getitems__([0, 1, 2])["image"])
    assert seen.features.shape == (3, 64)
    assert seen.logits is not None
    assert seen.logits.shape == (3, num_classes)
    assert seen.features.isfinite().all()
    assert (seen.features >= 0).all()
    assert seen.features.square().mean() < 1.001, "what normalisation before the ReLU leaves"


def test_the_network_is_a_function_of_images_and_seed():
    images = random_images(SPEC, 100)
    state = torch.get_rng_state()
    first, again, other = (trained(images, seed).network.state_dict() for seed in (0, 0, 1))
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["features.weight"].equal(other["features.weight"])
    assert torch.get_rng_state().equal(state), "nobody else's random numbers moved"


def test_training_sees_every_image_in_turn_unchanged_by_augmentation():
    asked = []

    class Recorder(ImagesInMemory):
        def __getitems__(self, keys):
            asked.extend(keys)
            return super().__getitems__(keys)

    trained(Recorder(SPEC, torch.rand(100, 1, 8, 8), [0] * 100))
    assert all(type(key) is int for key in asked), "no seed of an augmentation"
    assert sorted(asked[:100]) == sorted(asked[100:200]) == list(range(100))
    assert asked[:100] != asked[100:200]


def test_its_optimizer_is_adam():
    target = torch.randn(5, generator=torch.Generator().manual_seed(0))
    mine, theirs = (torch.nn.Parameter(torch.zeros(5)) for _ in range(2))
    ours, adam = extractor._Adam([mine]), torch.optim.Adam([theirs])
    for lr in (0.1, 0.01, 0.3):
        ours.step((mine - target).pow(4).sum(), lr)
        adam.param_groups[0]["lr"] = lr
        adam.zero_grad()
        (theirs - target).pow(4).sum().backward()
        adam.step()
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("num_images", "steps"), [(10, 312), (4_000, 312), (50_000, 2343)])
def test_the_number_of_steps_is_bounded(num_images, steps, monkeypatch):
    monkeypatch.undo()
    assert extractor._num_steps(num_images) == steps


def test_what_is_seen_depends_on_neither_precision_nor_scaling_nor_companions(float64):
    images = random_images(SPEC, 100)
    network, batch = trained(images), images.__getitems__(list(range(20)))["image"]
    seen = network(batch.double()).features
    assert seen.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert network(batch.float()).features.equal(seen)
    assert torch.allclose(network(batch[3:4]).features, seen[3:4], atol=1e-5)
    symmetric = DatasetSpec("digits", 1, 8, 10, (0.5,), (0.5,), None)
    network.spec = symmetric
    rescaled = (batch * SPEC.std[0] + SPEC.mean[0] - 0.5) / 0.5
    assert torch.allclose(network(rescaled).features, seen, atol=1e-5)


def test_what_cannot_be_shown_is_cut_off_and_latents_are_left_alone():
    images = torch.tensor([-100.0, -0.75, 0.5, 1.75, 100.0]).view(1, 1, 1, 5).expand(1, 1, 5, 5)
    shown = as_shown(images, SPEC)[0, 0, 0]
    torch.testing.assert_close(shown, torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]))
    assert as_shown(images, object()).equal(images)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_has_no_features(bad):
    images = random_images(SPEC, 100)
    batch = images.__getitems__([0, 1])["image"].clone()
    batch[1, 0, 3, 3] = bad
    features, logits = trained(images)(batch)
    assert features[0].isfinite().all()
    assert features[1].isnan().all()
    assert logits[1].isnan().all()


def test_a_subset_is_the_start_of_a_larger_one_and_no_image_comes_twice():
    images = random_images(SPEC, 100)
    small, all_of_them = subset(images, 30, "reference"), subset(images, 1000, "reference")
    assert all_of_them[:30] == small
    assert sorted(all_of_them) == list(range(100))
    assert small != subset(images, 30, "nearest")
    parts = list(images_of(images, small, size=16))
    assert [len(part) for part in parts] == [16, 14]
    assert torch.cat(parts).equal(images.__getitems__(small)["image"])

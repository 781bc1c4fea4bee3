"""Figures of generated images: sums over any cut, each against its definition."""

import math

import pytest
import torch

from dbdist.data.images import DatasetSpec, random_images
from dbdist.tasks import extractor
from dbdist.tasks.extractor import NUM_FEATURES, Extractor, Seen, as_shown, train_small_network
from dbdist.tasks.frechet import (
    block_kernel_distance,
    frechet_distance,
    kernel_distance,
    mean_and_covariance,
    moments,
    self_kernels,
)
from dbdist.tasks.image_figures import FeatureFigures, NearestFigures

SPEC = DatasetSpec("digits", 1, 8, 4, (0.3,), (0.4,), None)
IMAGES = random_images(SPEC, 200)
BATCH = IMAGES.__getitems__(list(range(60)))
ANSWERS = IMAGES.__getitems__(list(range(100, 160)))["image"] * 0.8 + 0.1
DIGEST = "00ff" * 16


@pytest.fixture(scope="module")
def small():
    patch = pytest.MonkeyPatch()
    patch.setattr(extractor, "MIN_SEEN", 640)
    patch.setattr(extractor, "EPOCHS", 0)
    network = train_small_network(IMAGES, torch.device("cpu"))
    patch.undo()
    return Extractor(network, NUM_FEATURES, SPEC)


@pytest.fixture(scope="module")
def wide():
    """200 fixed features that know no classes, as Inception's."""
    mixing = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)) / 8

    class Wide(torch.nn.Module):
        def forward(self, pixels):
            return Seen((pixels.flatten(1) @ mixing).relu(), None)

    return Extractor(Wide(), 200, SPEC)


def figures_of(extractor, classifier, digest=DIGEST):
    reference = extractor(IMAGES.__getitems__(list(range(150, 200)))["image"]).features
    return FeatureFigures(extractor, classifier, reference, digest)


def rows(start, stop):
    return ANSWERS[start:stop], {name: value[start:stop] for name, value in BATCH.items()}


def totals_of(figure, sizes=(60,), num_blocks=1):
    """Of the same answers after every block."""
    total, start = torch.zeros(figure.size, dtype=torch.float64), 0
    for size in sizes:
        total += figure.checked(figure.add(*rows(start, start + size)))
        start += size
    return total.expand(num_blocks, -1)


def frechet(a, b):
    of_a, of_b = (mean_and_covariance(moments(x, 2), x.shape[1]) for x in (a, b))
    return frechet_distance(*of_a, *of_b)


@pytest.mark.parametrize("sizes", [(60,), (59, 1), (7, 13, 40), (1,) * 60])
def test_figures_of_few_features_do_not_depend_on_the_cut(small, sizes):
    figure = figures_of(small, small)
    found = figure.result(totals_of(figure, sizes, num_blocks=2))
    made, real = small(ANSWERS), small(BATCH["image"])
    kid = kernel_distance(
        *(moments(made.features, 3), self_kernels(made.features)),
        *(moments(real.features, 3), self_kernels(real.features)),
        NUM_FEATURES,
    )
    asked, known = (
        (seen.logits.argmax(1) == BATCH["label"]).double().mean().item() for seen in (made, real)
    )
    distance = frechet(made.features, real.features)
    assert found == {
        "frechet": pytest.approx(distance, rel=1e-6),
        "frechet_after_block": [pytest.approx(distance, rel=1e-6)] * 2,
        "frechet_floor": pytest.approx(frechet(figure.reference, real.features), rel=1e-6),
        "frechet_floor_samples": 50,
        "frechet_features": 64,
        "kid": pytest.approx(kid, rel=1e-6),
        "kid_after_block": [pytest.approx(kid, rel=1e-6)] * 2,
        "label_accuracy": asked,
        "label_accuracy_after_block": [asked] * 2,
        "extractor_accuracy": known,
    }


def test_the_floor_takes_as_many_training_images_as_were_scored(small):
    figure = figures_of(small, small)
    found = figure.result(totals_of(figure, (30,)))
    real = small(BATCH["image"][:30]).features
    assert found["frechet_floor_samples"] == 30
    assert found["frechet_floor"] == pytest.approx(frechet(figure.reference[:30], real), rel=1e-6)


def test_kid_of_many_features_is_the_weighted_mean_over_micro_batches(wide, small):
    figure, sizes = figures_of(wide, small), [20, 25, 14, 1]
    found = figure.result(totals_of(figure, sizes))
    made, real = (wide(x).features.split(sizes) for x in (ANSWERS, BATCH["image"]))
    of_block = torch.stack([block_kernel_distance(made[i], real[i]) for i in range(3)])
    weight = torch.tensor(sizes[:3], dtype=torch.float64) / 59
    mean = (weight * of_block).sum()
    error = (weight * (of_block - mean)).square().sum().sqrt()
    assert found["kid"] == pytest.approx(mean.item(), rel=1e-9)
    assert found["kid_standard_error"] == pytest.approx(error.item(), rel=1e-6)
    assert found["frechet"] == pytest.approx(frechet(torch.cat(made), torch.cat(real)), rel=1e-6)
    assert (
        found["label_accuracy"]
        == figures_of(small, small).result(totals_of(figures_of(small, small)))["label_accuracy"]
    )


def test_a_network_that_differs_between_processes_is_told_by_the_identity(small):
    figure, other = figures_of(small, small), figures_of(small, small, "0100" * 16)
    assert figure.identity() == figures_of(small, small).identity()
    assert figure.identity() != other.identity()


def test_figures_are_the_same_in_any_precision_around_them(small):
    figure, nearest = figures_of(small, small), NearestFigures(as_shown(ANSWERS, SPEC), SPEC)
    for kind in (figure, nearest):
        plain = kind.add(ANSWERS, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            assert kind.add(ANSWERS, BATCH).equal(plain)


def test_an_answer_that_is_not_finite_spoils_distances_and_is_of_no_class(small):
    figure = figures_of(small, small)
    answers = torch.full_like(ANSWERS, math.nan)
    total = figure.add(answers, {**BATCH, "label": torch.zeros(60, dtype=torch.int64)})
    found = figure.result(total[None])
    assert math.isnan(found["frechet"])
    assert math.isnan(found["kid"])
    assert found["label_accuracy"] == 0
    assert found["frechet_floor"] > 0


def test_sums_of_nobody_and_of_one_sample_can_be_read(small, wide):
    for figure in (figures_of(small, small), figures_of(wide, small)):
        for total in (torch.zeros(2, figure.size), torch.ones(2, figure.size)):
            assert math.isnan(figure.result(total.double())["frechet"])


def test_the_distance_is_that_to_the_nearest_training_image():
    train = IMAGES.__getitems__(list(range(160, 200)))["image"]
    figure = NearestFigures(as_shown(train, SPEC), SPEC)
    found = figure.result(totals_of(figure, (13, 47), num_blocks=3))
    made, of_test = (
        torch.cdist(*(as_shown(x, SPEC).flatten(1).double() for x in (images, train)))
        .min(dim=1)
        .values.mean()
        .item()
        for images in (ANSWERS, BATCH["image"])
    )
    assert found == {
        "train_distance": pytest.approx(made, rel=1e-6),
        "train_distance_after_block": [pytest.approx(made, rel=1e-6)] * 3,
        "train_distance_of_test": pytest.approx(of_test, rel=1e-6),
        "train_distance_images": 40,
    }
    copies = figure.add(train[:20], {"image": BATCH["image"][:20]})
    assert copies[1] == 0, "copies are at no distance"

"""Classification as denoising: targets, losses, draws and readout, each against its equation."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from ranks import config_of, setup_of
from torch import nn
from vits import block_of, randomize, shared_of

from dbdist.data.images import DatasetSpec
from dbdist.errors import ConfigError
from dbdist.models.denoiser import Denoiser
from dbdist.models.vit import ViTConfig
from dbdist.processes.direct import Direct
from dbdist.processes.gaussian import Gaussian, NoiseSchedule
from dbdist.tasks.base import DenoisingLoss, Draws, draws_of_step
from dbdist.tasks.classification import (
    ClassFigures,
    Classification,
    PlainClassification,
    targets,
)
from dbdist.tasks.options import ClassificationOptions, ClassificationSamplerOptions

SCHEDULE = NoiseSchedule(3)
PROCESS = Gaussian(SCHEDULE)
SPEC = DatasetSpec("digits", 1, 4, 5, (0.3,), (0.4,), None)
SIZES = ViTConfig(
    image_size=4, channels=1, num_classes=5, patch_size=2, hidden_size=12, num_heads=2, mlp_size=16
)
NO_DRAWS = Draws(None, None, None)


def task_of(weighting="none", kind=Classification, **sampler):
    options = ClassificationOptions(weighting=weighting)
    return kind(options, ClassificationSamplerOptions(**sampler), SPEC, 12, 3)


def build(weighting="none"):
    shared = randomize(shared_of(SIZES))
    block = randomize(block_of(SIZES, range(2)), 1)
    return DenoisingLoss(Denoiser(shared, block, PROCESS), task_of(weighting))


def build_plain():
    shared = randomize(shared_of(SIZES, is_plain=True))
    block = randomize(block_of(SIZES, range(2), is_plain=True), 1)
    return DenoisingLoss(Denoiser(shared, block, Direct()), task_of(kind=PlainClassification))


def batch(num_samples=8):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(num_samples, 1, 4, 4, generator=generator)
    labels = torch.randint(5, (num_samples,), generator=generator)
    return {"image": images, "label": labels}


def draw(block=1, step=0, num_samples=8, condition_dropout=0.0, seed=0):
    return draws_of_step(
        task_of(),
        PROCESS,
        condition_dropout=condition_dropout,
        seed=seed,
        block=block,
        step=step,
        num_samples=num_samples,
    )


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["none", "per_sample", "published"])
def test_the_loss_is_the_weighted_cross_entropy(float64, weighting):
    objective, samples, draws = build(weighting), batch(), draw()
    images, labels = samples["image"], samples["label"]
    table = objective.denoiser.shared.label_table.detach()
    z0 = (table / table.norm(dim=1, keepdim=True))[labels]
    z = z0 + draws.level_N[:, None] * draws.corruption
    logits = objective.denoiser(images, z, draws.level_N).detach().numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    cross_entropy = -log_p[np.arange(8), labels.numpy()]
    s = draws.level_N.numpy()
    weight = (s**2 + 0.25) / (s * 0.5) ** 2
    expected = {
        "none": cross_entropy.mean(),
        "per_sample": (cross_entropy * weight).mean(),
        "published": cross_entropy.mean() * weight.mean(),
    }[weighting]
    loss = objective(samples, draws)
    assert set(loss.per_sample) == {"cross_entropy"}
    np.testing.assert_allclose(loss.value.item(), expected, rtol=1e-10)
    np.testing.assert_allclose(loss.per_sample["cross_entropy"].numpy(), cross_entropy, rtol=1e-10)
    assert not loss.per_sample["cross_entropy"].requires_grad


def test_gradients_reach_the_label_table_through_the_target(float64):
    """The table enters the loss nowhere but in z0; its gradient equals finite differences."""
    objective, samples, draws = build(), batch(), draw()
    labels = samples["label"]
    table = objective.denoiser.shared.label_table
    objective(samples, draws).value.backward()
    grad, step = table.grad.clone(), 1e-6
    assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == set(labels.tolist())
    for place in ((int(labels[0]), 3), (int(labels[1]), 0)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                table[place] += sign * step
                values.append(objective(samples, draws).value.item())
                table[place] -= sign * step
        expected = (values[0] - values[1]) / (2 * step)
        assert grad[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_loss_gives_gradients_to_every_parameter_of_its_block_and_the_shared_modules():
    objective = build()
    objective(batch(), draw()).value.backward()
    assert not [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()]


def test_dropped_images_are_zero_and_others_are_not_touched(float64):
    objective, samples, draws = build(), batch(), draw()
    images = samples["image"]
    keep = torch.tensor([True, False] * 4)
    blank = torch.where(keep[:, None, None, None], images, torch.zeros_like(images))

    def losses(samples, draws):
        return objective(samples, draws).per_sample["cross_entropy"]

    dropped = losses(samples, draws._replace(keep_N=keep))
    expected = losses(samples | {"image": blank}, draws)
    torch.testing.assert_close(dropped, expected, rtol=0, atol=0)
    assert torch.equal(dropped == losses(samples, draws), keep)


def test_an_untrained_model_is_undecided(float64):
    """Head and AdaLN start at zero, so that the loss starts at ln K whatever the noise."""
    denoiser = Denoiser(shared_of(SIZES), block_of(SIZES, range(2)), PROCESS)
    objective = DenoisingLoss(denoiser, task_of())
    assert objective(batch(), draw()).value.item() == pytest.approx(np.log(5))


def test_the_end_to_end_loss_is_the_mean_cross_entropy(float64):
    objective, samples = build_plain(), batch()
    loss = objective(samples, NO_DRAWS)
    logits = objective.denoiser(samples["image"], torch.zeros(8, 0), None)
    p = logits.softmax(-1)[torch.arange(8), samples["label"]]
    torch.testing.assert_close(loss.per_sample["cross_entropy"], -p.log(), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.value, -p.log().mean(), rtol=1e-10, atol=0)


def test_a_plain_step_draws_nothing_but_what_is_dropped():
    task = task_of(kind=PlainClassification)
    names = {"seed": 0, "block": 0, "step": 0, "num_samples": 8}
    draws = draws_of_step(task, Direct(), condition_dropout=0.0, **names)
    assert draws == NO_DRAWS
    draws = draws_of_step(task, Direct(), condition_dropout=0.5, **names)
    assert torch.equal(draws.keep_N, draw(block=0, condition_dropout=0.5).keep_N)


@pytest.mark.parametrize("is_plain", [False, True])
def test_the_loss_is_computed_in_full_precision_under_autocast(is_plain):
    with torch.autocast("cpu", torch.bfloat16):
        loss = build_plain()(batch(), NO_DRAWS) if is_plain else build()(batch(), draw())
    assert loss.value.dtype == loss.per_sample["cross_entropy"].dtype == torch.float32
    assert bool(loss.value.isfinite())


# -- draws -----------------------------------------------------------------------------------------


def test_draws_depend_on_seed_block_and_step_alone():
    first, again = draw(), draw()
    assert torch.equal(first.level_N, again.level_N)
    assert torch.equal(first.corruption, again.corruption)
    for other in (draw(block=2), draw(step=1), draw(seed=1)):
        assert not torch.equal(first.corruption, other.corruption)
        assert not torch.equal(first.level_N, other.level_N)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_parts_of_replicas_make_the_draws_of_the_batch(parts):
    whole, size = draw(condition_dropout=0.5), 8 // parts
    split = [whole.rows(i * size, (i + 1) * size) for i in range(parts)]
    for field in Draws._fields:
        joined = torch.cat([getattr(part, field) for part in split])
        assert torch.equal(joined, getattr(whole, field))
    assert draw().rows(0, 4).keep_N is None


def test_noise_is_unit_normal_and_sigma_lies_in_the_blocks_range():
    for block in range(3):
        draws = draw(block=block, num_samples=2000)
        low, high = SCHEDULE.block_range(block)
        assert low * (1 - 1e-6) <= draws.level_N.min() < draws.level_N.max() <= high * (1 + 1e-6)
        assert draws.corruption.mean().item() == pytest.approx(0, abs=0.03)
        assert draws.corruption.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("probability", [0.1, 0.5, 1.0])
def test_conditions_are_dropped_at_their_frequency_independently_of_the_noise(probability):
    draws = draw(num_samples=5000, condition_dropout=probability)
    assert draws.keep_N is not None
    assert 1 - draws.keep_N.double().mean().item() == pytest.approx(probability, abs=0.02)
    without = draw(num_samples=5000)
    assert without.keep_N is None
    assert torch.equal(draws.level_N, without.level_N)
    assert torch.equal(draws.corruption, without.corruption)


def test_draws_have_the_default_precision(float64):
    assert draw().level_N.dtype == draw().corruption.dtype == torch.float64


# -- the readout -----------------------------------------------------------------------------------


def with_table(table):
    """Shared modules, as far as the readout looks at them."""
    shared = nn.Module()
    shared.label_table = nn.Parameter(table)
    return shared


def test_targets_are_label_embeddings_of_unit_length(float64):
    table = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) * 7
    labels = torch.tensor([4, 0, 4])
    z0 = targets(table, labels)
    torch.testing.assert_close(z0.norm(dim=1), torch.ones(3))
    for i, label in enumerate(labels.tolist()):
        torch.testing.assert_close(z0[i] * table[label].norm(), table[label])


@pytest.mark.parametrize("normalized", [True, False])
def test_logits_stand_for_a_mean_of_label_embeddings(float64, normalized):
    generator = torch.Generator().manual_seed(0)
    table, logits = torch.randn(5, 12, generator=generator), torch.randn(3, 5, generator=generator)
    task = task_of(label_table="normalized" if normalized else "raw")
    rows = table / table.norm(dim=1, keepdim=True) if normalized else table
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(task.answer(logits, with_table(table)), p)
    torch.testing.assert_close(
        task.denoised(logits, with_table(table)), sum(p[:, k : k + 1] * rows[k] for k in range(5))
    )


def test_a_certain_answer_stands_for_its_training_target(float64):
    table = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 0, 1])
    logits = torch.full((3, 5), -1e4)
    logits[torch.arange(3), labels] = 1e4
    assert torch.equal(task_of().denoised(logits, with_table(table)), targets(table, labels))


@pytest.mark.parametrize(
    ("readout", "expected"),
    [
        ("last", [(0,), (1,), (2,)]),
        ("all", [(0,), (0, 1), (0, 1, 2)]),
        ((1,), [(0,), (1,), (1,)]),
        ((0, 2), [(0,), (0,), (0, 2)]),
    ],
)
def test_the_answer_after_a_block_is_the_mean_of_its_readers_so_far(float64, readout, expected):
    """Before the first reader it is that block's answer."""
    task = task_of(readout=readout)
    answers = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    carry = torch.zeros(4, *(task.carry_shape or (0,)))
    for block, readers in enumerate(expected):
        carry, answer = task.read(block, answers[block], carry)
        torch.testing.assert_close(answer, sum(answers[r] for r in readers) / len(readers))


def test_what_the_last_block_alone_answers_needs_no_carry():
    assert task_of(readout="last").carry_shape == task_of(readout=(2,)).carry_shape == ()
    assert task_of(readout="all").carry_shape == task_of(readout=(1,)).carry_shape == (5,)


# -- the figures -----------------------------------------------------------------------------------


def scored(num_samples=200):
    """(probabilities (blocks, N, K), labels), confident enough to fill most bins."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, num_samples, 5, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(5, (num_samples,), generator=generator)
    labels = torch.where(torch.rand(num_samples, generator=generator) < 0.6,
                         logits[1].argmax(1), labels)  # fmt: skip
    return logits.softmax(-1), labels


def test_figures_are_accuracy_nll_and_calibration_error():
    answers, labels = scored()
    figures = ClassFigures()
    totals = torch.stack([figures.add(p, {"label": labels}) for p in answers])
    found, y, p = figures.result(totals), labels.numpy(), answers[1].numpy()
    right = [float((a.numpy().argmax(1) == y).mean()) for a in answers]
    assert found["accuracy_after_block"] == pytest.approx(right)
    assert found["accuracy"] == pytest.approx(right[1])
    assert found["nll"] == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean())
    confidence, is_right = p.max(1), p.argmax(1) == y
    error, edges = 0.0, np.linspace(0, 1, 16)
    for low, high in pairwise(edges):
        chosen = (confidence >= low) & (confidence < high)
        if chosen.any():
            gap = confidence[chosen].mean() - is_right[chosen].mean()
            error += chosen.mean() * abs(gap)
    assert error > 0.01
    assert found["ece"] == pytest.approx(error)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_figures_add_up_over_micro_batches(size):
    answers, labels = scored()
    figures = ClassFigures()
    whole = figures.add(answers[1], {"label": labels})
    parts = zip(answers[1].split(size), labels.split(size), strict=True)
    total = sum(figures.add(p, {"label": label}) for p, label in parts)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)


def test_answers_that_are_certain_have_finite_figures():
    answers, labels = torch.eye(5), torch.tensor([0, 1, 2, 3, 0])
    figures = ClassFigures()
    found = figures.result(figures.add(answers, {"label": labels})[None])
    assert found["accuracy"] == 0.8
    assert found["ece"] == pytest.approx(0.2)
    assert np.isfinite(found["nll"])


def test_one_block_without_levels_is_refused_but_as_an_end_to_end_control():
    words = ["noise.name=direct", "model.num_blocks=1"]
    with pytest.raises(ConfigError, match=r"noise\.name"):
        setup_of(config_of(*words))
    setup = setup_of(config_of(*words, "mode=end_to_end"))
    assert isinstance(setup.task, PlainClassification)
    assert setup.process == Direct()

"""Classification as denoising: targets, losses, draws and readout, each against its equation."""

import numpy as np
import pytest
import torch

from dbdist.config.options import TaskConfig
from dbdist.models import vit
from dbdist.models.denoiser import Denoiser
from dbdist.processes.gaussian import NoiseSchedule
from dbdist.tasks.classification import (
    ClassReadout,
    DenoisingLoss,
    Draws,
    EndToEndLoss,
    sample_draws,
    targets,
)

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule(3)
SIZES = vit.ViTConfig(
    image_size=4, channels=1, num_classes=5, patch_size=2, hidden_size=12, num_heads=2, mlp_size=16
)


@torch.no_grad()
def randomize(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    return module


def build(weighting="none"):
    shared = randomize(vit.build_shared(SIZES, 0, CPU), 0)
    block = randomize(vit.build_block(SIZES, range(2), 0, CPU), 1)
    return DenoisingLoss(Denoiser(shared, block, SCHEDULE), weighting)


def batch(num_samples=8):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(num_samples, 1, 4, 4, generator=generator)
    labels = torch.randint(5, (num_samples,), generator=generator)
    return images, labels


def draw(block=1, step=0, num_samples=8, condition_dropout=0.0, seed=0):
    return sample_draws(
        TaskConfig(condition_dropout=condition_dropout),
        SCHEDULE,
        seed=seed,
        block=block,
        step=step,
        num_samples=num_samples,
        hidden_size=12,
    )


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["none", "per_sample", "published"])
def test_the_loss_is_the_weighted_cross_entropy(float64, weighting):
    objective, (images, labels), draws = build(weighting), batch(), draw()
    table = objective.denoiser.shared.label_table.detach()
    z0 = (table / table.norm(dim=1, keepdim=True))[labels]
    z = z0 + draws.sigma_N[:, None] * draws.noise_ND
    logits = objective.denoiser(images, z, draws.sigma_N).detach().numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    cross_entropy = -log_p[np.arange(8), labels.numpy()]
    s = draws.sigma_N.numpy()
    weight = (s**2 + 0.25) / (s * 0.5) ** 2
    expected = {
        "none": cross_entropy.mean(),
        "per_sample": (cross_entropy * weight).mean(),
        "published": cross_entropy.mean() * weight.mean(),
    }[weighting]
    loss = objective(images, labels, draws)
    np.testing.assert_allclose(loss.value.item(), expected, rtol=1e-10)
    np.testing.assert_allclose(loss.cross_entropy_N.numpy(), cross_entropy, rtol=1e-10)
    assert not loss.cross_entropy_N.requires_grad


def test_gradients_reach_the_label_table_through_the_target(float64):
    """The table enters the loss nowhere but in z0; its gradient equals finite differences."""
    objective, (images, labels), draws = build(), batch(), draw()
    table = objective.denoiser.shared.label_table
    objective(images, labels, draws).value.backward()
    grad, step = table.grad.clone(), 1e-6
    assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == set(labels.tolist())
    for place in ((int(labels[0]), 3), (int(labels[1]), 0)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                table[place] += sign * step
                values.append(objective(images, labels, draws).value.item())
                table[place] -= sign * step
        expected = (values[0] - values[1]) / (2 * step)
        assert grad[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_loss_gives_gradients_to_every_parameter_of_its_block_and_the_shared_modules():
    objective = build()
    objective(*batch(), draw()).value.backward()
    assert not [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()]


def test_dropped_images_are_zero_and_others_are_not_touched(float64):
    objective, (images, labels) = build(), batch()
    draws = draw()
    keep = torch.tensor([True, False] * 4)
    blank = torch.where(keep[:, None, None, None], images, torch.zeros_like(images))
    dropped = objective(images, labels, draws._replace(keep_N=keep))
    expected = objective(blank, labels, draws)
    torch.testing.assert_close(dropped.cross_entropy_N, expected.cross_entropy_N, rtol=0, atol=0)
    whole = objective(images, labels, draws)
    same = dropped.cross_entropy_N == whole.cross_entropy_N
    assert torch.equal(same, keep)


def test_an_untrained_model_is_undecided(float64):
    """Head and AdaLN start at zero, so that the loss starts at ln K whatever the noise."""
    shared = vit.build_shared(SIZES, 0, CPU)
    objective = DenoisingLoss(
        Denoiser(shared, vit.build_block(SIZES, range(2), 0, CPU), SCHEDULE), "none"
    )
    assert objective(*batch(), draw()).value.item() == pytest.approx(np.log(5))


def test_the_end_to_end_loss_is_the_mean_cross_entropy(float64):
    shared = randomize(vit.build_plain_shared(SIZES, 0, CPU), 0)
    block = randomize(vit.build_block(SIZES, range(2), 0, CPU, conditioned=False), 1)
    model = vit.PlainViT(shared, block)
    images, labels = batch()
    loss = EndToEndLoss(model)(images, labels)
    p = model(images).softmax(-1)[torch.arange(8), labels]
    torch.testing.assert_close(loss.cross_entropy_N, -p.log(), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.value, -p.log().mean(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_the_loss_is_computed_in_full_precision_under_autocast(end_to_end):
    images, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        if end_to_end:
            shared = vit.build_plain_shared(SIZES, 0, CPU)
            block = vit.build_block(SIZES, range(2), 0, CPU, conditioned=False)
            loss = EndToEndLoss(vit.PlainViT(shared, block))(images, labels)
        else:
            loss = build()(images, labels, draw())
    assert loss.value.dtype == loss.cross_entropy_N.dtype == torch.float32
    assert bool(loss.value.isfinite())


# -- draws -----------------------------------------------------------------------------------------


def test_draws_depend_on_seed_block_and_step_alone():
    first, again = draw(), draw()
    assert torch.equal(first.sigma_N, again.sigma_N)
    assert torch.equal(first.noise_ND, again.noise_ND)
    for other in (draw(block=2), draw(step=1), draw(seed=1)):
        assert not torch.equal(first.noise_ND, other.noise_ND)
        assert not torch.equal(first.sigma_N, other.sigma_N)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_parts_of_replicas_make_the_draws_of_the_batch(parts):
    whole, size = draw(condition_dropout=0.5), 8 // parts
    split = [whole.part(i * size, (i + 1) * size) for i in range(parts)]
    for field in Draws._fields:
        joined = torch.cat([getattr(part, field) for part in split])
        assert torch.equal(joined, getattr(whole, field))
    assert draw().part(0, 4).keep_N is None


def test_noise_is_unit_normal_and_sigma_lies_in_the_blocks_range():
    for block in range(3):
        draws = draw(block=block, num_samples=2000)
        low, high = SCHEDULE.block_range(block)
        assert low * (1 - 1e-6) <= draws.sigma_N.min() < draws.sigma_N.max() <= high * (1 + 1e-6)
        assert draws.noise_ND.mean().item() == pytest.approx(0, abs=0.03)
        assert draws.noise_ND.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("probability", [0.1, 0.5, 1.0])
def test_conditions_are_dropped_at_their_frequency_independently_of_the_noise(probability):
    draws = draw(num_samples=5000, condition_dropout=probability)
    assert draws.keep_N is not None
    assert 1 - draws.keep_N.double().mean().item() == pytest.approx(probability, abs=0.02)
    without = draw(num_samples=5000)
    assert without.keep_N is None
    assert torch.equal(draws.sigma_N, without.sigma_N)
    assert torch.equal(draws.noise_ND, without.noise_ND)


def test_draws_have_the_default_precision(float64):
    assert draw().sigma_N.dtype == draw().noise_ND.dtype == torch.float64


# -- the readout -----------------------------------------------------------------------------------


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
    readout = ClassReadout(table, normalized)
    rows = table / table.norm(dim=1, keepdim=True) if normalized else table
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(readout.probabilities(logits), p)
    torch.testing.assert_close(
        readout.denoised(logits), sum(p[:, k : k + 1] * rows[k] for k in range(5))
    )


def test_a_certain_answer_stands_for_its_training_target(float64):
    table = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 0, 1])
    logits = torch.full((3, 5), -1e4)
    logits[torch.arange(3), labels] = 1e4
    assert torch.equal(ClassReadout(table).denoised(logits), targets(table, labels))

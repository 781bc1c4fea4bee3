"""D(z): preconditioning around shared modules and one block, whose loss reaches nothing else."""

import pytest
import torch
from torch import nn
from vits import block_of, randomize, shared_of

from dbdist.models import vit
from dbdist.models.denoiser import Denoiser
from dbdist.processes.gaussian import Gaussian, NoiseSchedule

SCHEDULE = NoiseSchedule(3, sigma_data=0.4)
PROCESS = Gaussian(SCHEDULE)
SIZES = vit.ViTConfig(
    image_size=4, channels=2, num_classes=5, patch_size=2, hidden_size=12, num_heads=3, mlp_size=16
)


def build(sizes=SIZES):
    shared = randomize(shared_of(sizes))
    blocks = [randomize(block_of(sizes, range(b, b + 1)), b + 1) for b in range(3)]
    return shared, blocks, [Denoiser(shared, block, PROCESS).eval() for block in blocks]


def batch(num_samples=6):
    generator = torch.Generator().manual_seed(9)
    images = torch.randn(num_samples, 2, 4, 4, generator=generator)
    z = torch.randn(num_samples, 12, generator=generator)
    return images, z, SCHEDULE.sample_level(1, num_samples, generator).to(z.dtype)


def test_output_is_the_head_of_the_preconditioned_state(float64):
    shared, blocks, denoisers = build()
    images, z, sigma = batch()
    for block, denoiser in zip(blocks, denoisers, strict=True):
        s, d = sigma[:, None], SCHEDULE.sigma_data
        level = shared.embed_noise(sigma.log() / 4)
        tokens, _ = shared.embed(images, z / (s**2 + d**2).sqrt(), sigma.log() / 4)
        raw = shared.norm(block(tokens, level)[:, 0])
        state = d**2 / (s**2 + d**2) * z + s * d / (s**2 + d**2).sqrt() * raw
        shift, scale = shared.adaln(level)
        expected = shared.head(state * (1 + scale) + shift)
        torch.testing.assert_close(denoiser(images, z, sigma), expected, rtol=1e-12, atol=1e-14)


def test_the_loss_of_a_block_gives_gradients_to_its_own_layers_and_the_shared_modules_only():
    shared, blocks, denoisers = build()
    for own, denoiser in enumerate(denoisers):
        denoiser(*batch()).square().sum().backward()
        for index, block in enumerate(blocks):
            grads = [p.grad for p in block.parameters()]
            assert all((g is not None and g.abs().sum() > 0) == (index == own) for g in grads)
        # The label table meets the loss through z0, which this test does not make.
        names = {
            name for name, p in shared.named_parameters() if p.grad is None or not p.grad.any()
        }
        assert names == {"label_table"}
        for module in (shared, *blocks):
            module.zero_grad()


def test_samples_do_not_see_each_other(float64):
    denoiser = build()[2][1]
    images, z, sigma = batch()
    together = denoiser(images, z, sigma)
    alone = torch.cat(
        [denoiser(images[i : i + 1], z[i : i + 1], sigma[i : i + 1]) for i in range(len(z))]
    )
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)


def test_the_output_has_the_precision_of_the_state_under_autocast():
    denoiser = build()[2][0]
    images, z, sigma = batch()
    full = denoiser(images, z, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        half = denoiser(images, z, sigma)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)


def test_extreme_noise_levels_give_finite_outputs_and_gradients():
    shared, _, denoisers = build()
    images, z, _ = batch(2)
    for sigma in (1e-4, 0.002, 80.0, 1e4):
        shared.zero_grad()
        levels = torch.full((2,), sigma)
        denoisers[0](images, sigma * z, levels).sum().backward()
        for name, parameter in shared.named_parameters():
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), (name, sigma)


def test_a_noise_level_of_another_count_than_states_is_refused():
    denoiser = build()[2][0]
    images, z, sigma = batch()
    with pytest.raises(RuntimeError, match="size"):
        denoiser(images, z, sigma[:-1])


def test_the_denoiser_never_looks_inside_the_state():
    """A backbone for image latents: the coefficients broadcast over any trailing shape."""

    class Latents(nn.Module):
        def embed(self, condition, z, level_N):
            return z, level_N

        def output(self, tokens, combine, context):
            return combine(tokens)

    class Same(nn.Module):
        def forward(self, tokens, context):
            return tokens

    denoiser = Denoiser(Latents(), Same(), PROCESS)
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 1.0, 10.0])
    result = denoiser(z, z, sigma)
    for i, s in enumerate(sigma.tolist()):
        norm = s**2 + 0.4**2
        expected = 0.4**2 / norm * z[i] + s * 0.4 / norm**0.5 * (z[i] / norm**0.5)
        torch.testing.assert_close(result[i], expected)

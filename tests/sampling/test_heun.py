"""Heun's method: EDM's Algorithm 1, its order of accuracy, and which block does what."""

import math

import pytest
import torch
from toy_generation import DATA_STD, denoiser_of_normal_data, task_of

from dbdist.processes.gaussian import Gaussian, NoiseSchedule
from dbdist.sampling.sampler import Sampler

SCHEDULE = NoiseSchedule(3)
SHARED = torch.nn.Identity()


def sampler_of(num_steps, order, **options):
    return Sampler(Gaussian(SCHEDULE), SCHEDULE.steps(num_steps), order=order, **options)


def run(sampler, denoise, condition, z):
    for block in range(3):
        z, answer = sampler.run_block(block, denoise, task_of(), SHARED, condition, z)
    return answer


def algorithm_1(denoise, condition, z, sigmas):
    """EDM (2206.00364), Algorithm 1; its last level is 0, where D has become the state."""
    for sigma, next_sigma in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        slope = (z - denoise(condition, z, torch.full((len(z),), sigma))) / sigma
        ahead = z + (next_sigma - sigma) * slope
        if next_sigma:
            there = denoise(condition, ahead, torch.full((len(z),), next_sigma))
            slope = slope / 2 + (ahead - there) / (2 * next_sigma)
            ahead = z + (next_sigma - sigma) * slope
        z = ahead
    return z


def start(num_samples=4):
    generator = torch.Generator().manual_seed(0)
    return 80 * torch.randn(num_samples, 2, 4, 4, generator=generator)


def denoise(condition, z, sigma_N):
    """Any smooth function of the class, the state and its level."""
    sigma = sigma_N.reshape(-1, 1, 1, 1)
    return torch.tanh(condition.reshape(-1, 1, 1, 1) + z / (1 + sigma))


@pytest.mark.parametrize("num_steps", [3, 7, 18])
def test_the_blocks_together_take_the_steps_of_algorithm_1(float64, num_steps):
    sampler, condition = sampler_of(num_steps, order=2), torch.tensor([0, 1, 2, 3])
    answer = run(sampler, denoise, condition, start())
    expected = algorithm_1(denoise, condition, start(), list(sampler.steps.levels))
    torch.testing.assert_close(answer, expected, rtol=1e-10, atol=1e-10)


def test_guidance_acts_on_both_evaluations(float64):
    sampler, condition = sampler_of(5, order=2, guidance_scale=2.0), torch.tensor([0, 1, 2, 3])

    def guided(condition, z, sigma_N):
        free = denoise(torch.full_like(condition, 5), z, sigma_N)
        return free + 2 * (denoise(condition, z, sigma_N) - free)

    answer = run(sampler, denoise, condition, start())
    expected = algorithm_1(guided, condition, start(), list(sampler.steps.levels))
    torch.testing.assert_close(answer, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("order", "ratio"), [(1, 2), (2, 4)])
def test_twice_the_steps_divide_the_error_by_two_to_the_order(float64, order, ratio):
    """Of normal data the exact end of the probability-flow ODE is known."""
    z, condition = start(), torch.zeros(4, dtype=torch.int64)
    sigma = SCHEDULE.sigma_min
    at_end = math.sqrt((DATA_STD**2 + sigma**2) / (DATA_STD**2 + 80**2)) * z
    exact = DATA_STD**2 / (DATA_STD**2 + sigma**2) * at_end

    def error(num_steps):
        sampler = Sampler(
            Gaussian(SCHEDULE), SCHEDULE.steps(num_steps, grid="rho", rho=7.0), order=order
        )
        answer = run(sampler, denoiser_of_normal_data, condition, z)
        return (answer - exact).norm().item()

    assert error(201) / error(401) == pytest.approx(ratio, rel=0.1)


def test_the_owner_of_a_level_also_evaluates_at_the_next():
    sampler, seen = sampler_of(6, order=2), []

    def noting(condition, z, sigma_N):
        seen.append(sigma_N[0].item())
        return z

    levels = sampler.steps.levels
    for block in range(3):
        seen.clear()
        sampler.run_block(
            block, noting, task_of(), SHARED, torch.zeros(2).long(), torch.ones(2, 2, 4, 4)
        )
        expected = []
        for i in sampler.steps.of(block):
            expected += levels[i : i + 2]  # the last of all has no next
        assert seen == pytest.approx(expected)

"""The sampler against a written-out Euler loop for several shapes; starts, draws, guidance."""

import math

import pytest
import torch
from torch import nn

from dbdist.processes.gaussian import Gaussian, NoiseSchedule
from dbdist.processes.partition import Steps
from dbdist.sampling.sampler import Rows, Sampler
from dbdist.tasks.base import Task

SCHEDULE = NoiseSchedule(3, p_mean=0.0)
SHARED = nn.Identity()


class Twice(Task):
    """A task whose head's output is half the denoised state."""

    def __init__(self, *state_shape):
        self.state_shape = state_shape

    @classmethod
    def of(cls, config, spec, model, process):
        raise NotImplementedError

    def condition(self, batch):
        return batch["condition"]

    def drop(self, condition, keep_N):
        return condition * keep_N

    def clean(self, batch, shared):
        raise NotImplementedError

    def loss(self, output, z0, batch, level_N, weight_N):
        raise NotImplementedError

    def denoised(self, output, shared):
        assert shared is SHARED
        return 2 * output

    def answer(self, output, shared):
        return output.flatten(1).cumsum(1)

    def figures(self):
        raise NotImplementedError


def sampler_of(num_steps, start="mean", level=None, schedule=SCHEDULE, **options):
    return Sampler(Gaussian(schedule), schedule.steps(num_steps, level), start=start, **options)


def initial(sampler, num_samples, shape, first=0, dtype=torch.float32):
    return sampler.initial_state(Twice(*shape), Rows(first, first + num_samples), dtype)


def denoise(condition, z, sigma_N):
    """Any smooth function of the condition, the state and its level."""
    shape = (-1, *[1] * (z.ndim - 1))
    return torch.tanh(condition.reshape(shape) + z / (1 + sigma_N.reshape(shape)))


def euler(sampler, condition, z):
    """Every step on all states at once; the answer at each step."""
    sigmas = sampler.steps.levels
    answers = []
    for i, sigma in enumerate(sigmas):
        level = torch.full((len(z),), sigma, dtype=z.dtype)
        output = denoise(condition, z, level)
        if sampler.guidance_scale:
            free = denoise(torch.zeros_like(condition), z, level)
            output = free + sampler.guidance_scale * (output - free)
        answers.append(output.flatten(1).cumsum(1))
        if i + 1 < len(sigmas):
            direction = (z - 2 * output) / sigma  # dz/dsigma of the probability-flow ODE
            z = z + (sigmas[i + 1] - sigma) * direction
    return z, answers


def run(sampler, condition, z):
    answers = []
    for block in range(sampler.process.partition.num_blocks):
        z, answer = sampler.run_block(block, denoise, Twice(), SHARED, condition, z)
        answers.append(answer)
    return z, answers


@pytest.mark.parametrize("shape", [(5,), (2, 3, 3), (4, 5)])
@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 3},
        {"num_steps": 7},
        {"num_steps": 6, "level": 5.0},
        {"num_steps": 4, "guidance_scale": 1.5},
    ],
)
def test_the_blocks_together_take_the_euler_steps(float64, shape, options):
    sampler = sampler_of(**options)
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(4, generator=generator)
    z = torch.randn(4, *shape, generator=generator) * sampler.steps.levels[0]
    own_z, own_answers = run(sampler, condition, z)
    z, answers = euler(sampler, condition, z)
    torch.testing.assert_close(own_z, z, rtol=1e-12, atol=1e-12)
    for block, answer in enumerate(own_answers):
        last = max(sampler.steps.of(block))
        torch.testing.assert_close(answer, answers[last], rtol=1e-12, atol=1e-12)


def test_each_block_takes_the_steps_it_is_given(float64):
    """Whatever the partition would say: published weights have owners of their own."""
    steps = Steps(SCHEDULE.levels(4), (0, 0, 2, 2))
    sampler = Sampler(Gaussian(SCHEDULE), steps)
    condition, z = torch.ones(2), torch.ones(2, 4)
    expected, answers = euler(sampler, condition, z)
    for block, last in ((0, 1), (2, 3)):
        z, answer = sampler.run_block(block, denoise, Twice(), SHARED, condition, z)
        torch.testing.assert_close(answer, answers[last], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)


def test_a_single_step_reads_out_where_it_starts_and_leaves_the_state(float64):
    sampler = sampler_of(1, level=3.0, schedule=NoiseSchedule(1))
    condition, z = torch.ones(2), torch.ones(2, 4)
    own_z, answer = sampler.run_block(0, denoise, Twice(), SHARED, condition, z)
    assert torch.equal(own_z, z)
    torch.testing.assert_close(answer, denoise(condition, z, torch.full((2,), 3.0)).cumsum(1))


@pytest.mark.parametrize("num_draws", [1, 3])
def test_draws_of_a_sample_are_adjacent_and_their_answers_averaged(float64, num_draws):
    sampler = sampler_of(5, "noise", num_draws=num_draws)
    condition = torch.tensor([0.3, -0.7])
    z = initial(sampler, 2, (4,), dtype=torch.float64)
    assert z.shape == (2 * num_draws, 4)
    own_z, own = run(sampler, condition, z)
    single = sampler_of(5, "noise")
    for sample in range(2):
        rows = slice(sample * num_draws, (sample + 1) * num_draws)
        apart = [
            run(single, condition[sample : sample + 1], z[i : i + 1])
            for i in range(rows.start, rows.stop)
        ]
        torch.testing.assert_close(
            own_z[rows], torch.cat([z for z, _ in apart]), rtol=1e-12, atol=1e-14
        )
        for block in range(3):
            mean = sum(answers[block][0] for _, answers in apart) / num_draws
            torch.testing.assert_close(own[block][sample], mean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_is_linear_between_the_zero_and_the_true_condition(float64, scale):
    calls = []

    def counted(condition, z, sigma_N):
        calls.append(condition)
        return denoise(condition, z, sigma_N)

    condition, z, sigma = torch.tensor([0.5, 1.0]), torch.ones(2, 3), torch.tensor([1.0, 2.0])
    sampler = sampler_of(3, guidance_scale=scale)
    guided = sampler.guided(counted, Twice(), condition, z, sigma)
    with_image = denoise(condition, z, sigma)
    without = denoise(torch.zeros(2), z, sigma)
    expected = with_image if scale == 0 else (1 - scale) * without + scale * with_image
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-14)
    assert [len(c) for c in calls] == [2 if scale == 0 else 4], "one pass, guided on twice the rows"


def test_the_mean_start_is_zero():
    z = initial(sampler_of(3, "mean"), 5, (2, 4, 4), dtype=torch.float64)
    assert z.shape == (5, 2, 4, 4)
    assert z.dtype == torch.float64
    assert not z.any()


@pytest.mark.parametrize("sigma_start", [None, 2.0])
def test_the_noise_start_has_the_variance_of_the_first_level(sigma_start):
    z = initial(sampler_of(6, "noise", sigma_start), 400, (50,))
    assert z.std().item() == pytest.approx(math.sqrt(1 + (sigma_start or 80.0) ** 2), rel=0.02)
    assert abs(z.mean().item()) < 0.03 * z.std().item()


def test_the_noise_start_is_named_by_seed_and_sample():
    def start(seed, first):
        return initial(sampler_of(6, "noise", seed=seed), 3, (4,), first)

    assert torch.equal(start(0, 1), start(0, 1))
    assert not torch.equal(start(0, 1), start(0, 2))
    assert not torch.equal(start(0, 1), start(1, 1))


def test_a_perfect_denoiser_is_followed_to_the_clean_state(float64):
    clean = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    sampler = sampler_of(6, "noise")
    z = initial(sampler, 4, (5,), dtype=torch.float64)
    for block in range(3):
        z, _ = sampler.run_block(
            block, lambda c, z, s: clean / 2, Twice(), SHARED, torch.zeros(4), z
        )
    residue = (z - clean).norm() / SCHEDULE.sigma_max
    assert residue < 10 * SCHEDULE.sigma_min / SCHEDULE.sigma_max * math.sqrt(20)


def test_without_noise_between_two_levels_nothing_is_random():
    sampler = sampler_of(5)
    state = torch.get_rng_state()
    condition, z = torch.ones(2), torch.ones(2, 3)
    first, again = run(sampler, condition, z), run(sampler, condition, z)
    assert torch.equal(first[0], again[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_draws", [1, 2])
def test_a_sample_starts_from_the_same_noise_however_samples_are_cut(num_draws):
    sampler = sampler_of(6, "noise", num_draws=num_draws)
    whole = initial(sampler, 5, (4,), 3)
    cuts = [
        sampler.initial_state(Twice(4), Rows(start, stop), torch.float32)
        for start, stop in ((3, 5), (5, 7), (7, 8))
    ]
    assert torch.equal(torch.cat(cuts), whole)

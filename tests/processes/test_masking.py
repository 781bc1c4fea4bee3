"""Laws of masking: counts, bands and their cut, visible tokens, and the sampler's step."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from dbdist.errors import ConfigError
from dbdist.processes.gaussian import Gaussian, NoiseSchedule
from dbdist.processes.masking import MASK, MaskedShares, Masking, masked_count
from dbdist.processes.options import (
    GaussianSamplerOptions,
    MaskingOptions,
    MaskingSamplerOptions,
)

BITS = (0.1, 0.4, 0.2, 0.3, 0.5, 0.9)
CUTS = [{}, {"schedule": "cosine"}, {"bits": BITS}]
PROCESS = Masking(MaskedShares(3))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(num, length, num_symbols=5, seed=0):
    return torch.randint(num_symbols, (num, length), generator=seeded(seed))


# -- how many, and which --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 3, 10, 128, 1024])
def test_a_level_of_l_in_t_masks_l_tokens(length, dtype):
    count = torch.arange(1, length + 1)
    assert masked_count(count.double().div(length).to(dtype), length).equal(count)
    between = (count.double() - 0.5) / length
    assert masked_count(between.to(dtype), length).equal(count)


def test_uniform_levels_mask_every_number_of_tokens_as_often():
    level = (torch.arange(7000, dtype=torch.float64) + 0.5) / 7000
    assert masked_count(level, 7).bincount().tolist() == [0, *[1000] * 7]
    assert masked_count(torch.tensor([1e-9]), 7).item() == 1


def test_exactly_the_tokens_with_the_smallest_draws_are_masked():
    z0, level = tokens(64, 13), torch.rand(64, generator=seeded(1))
    draw = PROCESS.draw((64, 13), seeded(2), torch.int64)
    z = PROCESS.corrupt(z0, level, draw)
    for i in range(64):
        wanted = math.ceil(level[i].item() * 13)
        smallest = np.argsort(draw[i, :, 0].numpy())[:wanted]
        assert set(np.flatnonzero(z[i].numpy() == MASK)) == set(smallest)
    assert z[z != MASK].equal(z0[z != MASK])
    assert z.dtype == torch.int64


def test_every_row_is_corrupted_by_its_own_draws():
    z0, level = tokens(8, 6), torch.rand(8, generator=seeded(1))
    draw = PROCESS.draw((8, 6), seeded(2), torch.int64)
    whole = PROCESS.corrupt(z0, level, draw)
    parts = [PROCESS.corrupt(z0[a:b], level[a:b], draw[a:b]) for a, b in ((0, 3), (3, 4), (4, 8))]
    assert whole.equal(torch.cat(parts))


# -- bands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 6])
def test_the_bands_tile_the_levels_from_the_most_masked_down(num_blocks, cut):
    partition = MaskedShares(num_blocks, t_min=0.01, **cut)
    ranges = [partition.own_range(b) for b in range(num_blocks)]
    assert ranges[0][1] == 1.0
    assert ranges[-1][0] == 0.01
    for (low, _), (_, high) in itertools.pairwise(ranges):
        assert low == high
    for fraction in np.linspace(0, 1, 23):
        level = partition.level_at(torch.tensor(fraction)).item()
        assert partition.fraction_of(level) == pytest.approx(fraction, abs=1e-12)


def test_linear_bands_have_equal_lengths_and_cosine_ones_equal_times():
    linear = MaskedShares(3, t_min=0.01).boundaries
    torch.testing.assert_close(linear.diff(), torch.full((3,), 0.33, dtype=torch.float64))
    cosine = MaskedShares(3, "cosine", t_min=1e-9).boundaries
    np.testing.assert_allclose(cosine, np.sin(np.pi / 2 * np.arange(4) / 3), atol=1e-8)


def test_bands_cut_by_measured_bits_have_equal_sums_of_a_known_profile():
    """The density 3 t^2 in 12 bands: below t lies t^3, linear inside a band."""
    edges = np.linspace(1e-4, 1, 13)
    bits = tuple(np.diff(edges**3))
    for num_blocks in (2, 3, 4):
        partition = MaskedShares(num_blocks, bits=bits)
        below = np.interp(partition.boundaries, edges, np.concatenate([[0], np.cumsum(bits)]))
        np.testing.assert_allclose(np.diff(below), below[-1] / num_blocks, rtol=1e-9)
    exact = (np.arange(1, 4) / 4) ** (1 / 3)
    np.testing.assert_allclose(MaskedShares(4, bits=bits).boundaries[1:-1], exact, atol=6e-3)


def test_equal_bits_everywhere_are_equal_times():
    even = MaskedShares(3, bits=(0.7, 0.7, 0.7, 0.7, 0.7))
    torch.testing.assert_close(even.boundaries, MaskedShares(3).boundaries)


def test_overlap_widens_a_band_by_a_fraction_of_its_length_and_stays_inside():
    partition = MaskedShares(4, t_min=0.2, overlap=0.25)  # bands of 0.2, widened by 0.05
    expected = [(0.75, 1.0), (0.55, 0.85), (0.35, 0.65), (0.2, 0.45)]
    for block, ends in enumerate(expected):
        assert partition.block_range(block) == pytest.approx(ends, abs=1e-12)
    whole = MaskedShares(1, overlap=1.0)
    assert whole.block_range(0) == (1e-4, 1.0)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("block", [0, 1, 2])
def test_sampled_levels_are_uniform_inside_the_widened_band(block, cut):
    partition = MaskedShares(3, **cut)
    level = partition.sample_level(block, 20_000, seeded(block))
    low, high = partition.block_range(block)
    assert level.dtype == torch.float64
    assert low <= level.min() <= level.max() <= high
    assert stats.kstest((level - low) / (high - low), "uniform").pvalue > 0.01


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_the_samplers_steps_are_shared_evenly_and_lie_with_their_owners(num_blocks, cut):
    process = Masking(MaskedShares(num_blocks, **cut))
    steps = process.steps(MaskingSamplerOptions(), 12 * num_blocks + 1)
    assert steps.levels[0] == 1.0
    assert steps.levels[-1] == 1e-4
    for block in range(num_blocks):
        low, high = process.partition.own_range(block)
        own = [steps.levels[i] for i in steps.of(block)]
        assert len(own) == 12 + (block == num_blocks - 1)
        assert all(low - 1e-9 <= level <= high + 1e-9 for level in own)


def test_linear_steps_are_equal_and_cosine_ones_those_of_md4():
    linear = Masking(MaskedShares(1, t_min=1e-9)).steps(MaskingSamplerOptions(), 11).levels
    np.testing.assert_allclose(linear, np.linspace(1, 0, 11), atol=1e-8)
    process = Masking(MaskedShares(1, "cosine", t_min=1e-9))
    cosine = process.steps(MaskingSamplerOptions(), 11).levels
    np.testing.assert_allclose(cosine, np.cos(np.pi / 2 * np.linspace(0, 1, 11)), atol=1e-8)


# -- the network's output -------------------------------------------------------------------------


def denoised(raw, z):
    return PROCESS.denoise(lambda z_in, level_N, combine: combine(raw), z, torch.rand(len(z)))


def test_a_visible_token_is_certain_and_a_masked_one_has_the_networks_probabilities():
    z = tokens(4, 6)
    z[torch.rand(4, 6, generator=seeded(1)) < 0.5] = MASK
    raw = 3 * torch.randn(4, 6, 5, generator=seeded(2))
    log_p = denoised(raw, z)
    masked = z == MASK
    torch.testing.assert_close(log_p[masked], F.log_softmax(raw, dim=-1)[masked])
    torch.testing.assert_close(
        log_p[~masked].exp(), F.one_hot(z[~masked], 5).float(), rtol=0, atol=0
    )
    assert log_p.isfinite().all()
    assert log_p[~masked].max(dim=-1).values.eq(0).all()


def test_the_network_sees_state_and_level_as_they_are():
    z, level = tokens(2, 3), torch.tensor([0.25, 0.5])
    seen = []

    def network(z_in, level_N, combine):
        seen.extend([z_in, level_N])
        return combine(torch.zeros(2, 3, 5))

    PROCESS.denoise(network, z, level)
    assert seen[0].equal(z)
    assert seen[1].equal(level)


def test_visible_tokens_have_no_cross_entropy_and_no_gradient():
    z0 = tokens(4, 6)
    z = z0.clone()
    z[torch.rand(4, 6, generator=seeded(1)) < 0.5] = MASK
    raw = (100 * torch.randn(4, 6, 5, generator=seeded(2))).requires_grad_()
    nats = -denoised(raw, z).gather(-1, z0[..., None]).squeeze(-1)
    assert nats[z != MASK].eq(0).all()
    nats.sum().backward()
    assert raw.grad[z != MASK].eq(0).all()
    expected = raw.detach().softmax(dim=-1) - F.one_hot(z0, 5)
    torch.testing.assert_close(raw.grad[z == MASK], expected[z == MASK], rtol=1e-4, atol=1e-6)


def test_log_probabilities_of_half_precision_are_float32():
    log_p = denoised(torch.randn(2, 3, 5).bfloat16(), torch.full((2, 3), MASK))
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.exp().sum(dim=-1), torch.ones(2, 3))


# -- the sampler's step ---------------------------------------------------------------------------


def log_p_of(p, num, length):
    return torch.tensor(p, dtype=torch.float64).log().expand(num, length, len(p))


def test_a_step_fills_in_the_right_share_with_the_right_values_and_touches_nothing_else():
    p, num, length = [0.5, 0.3, 0.15, 0.05], 2000, 20
    z = tokens(num, length, 4)
    z[torch.rand(num, length, generator=seeded(1)) < 0.6] = MASK
    draw = PROCESS.draw((num, length), seeded(2), torch.int64)
    after = PROCESS.step(z, log_p_of(p, num, length), 0.6, 0.45, draw)
    masked = z == MASK
    assert after[~masked].equal(z[~masked])
    filled = masked & (after != MASK)
    assert stats.binomtest(filled.sum().item(), masked.sum().item(), 0.25).pvalue > 0.01
    counts = after[filled].bincount(minlength=4).numpy()
    assert stats.chisquare(counts, counts.sum() * np.array(p)).pvalue > 0.01


def test_steps_down_the_grid_leave_the_masked_share_that_the_level_names():
    levels = PROCESS.steps(MaskingSamplerOptions(), 9).levels
    z = PROCESS.start((500, 40), "noise", 1.0, seeded(), torch.int64)
    assert z.eq(MASK).all()
    generator, log_p = seeded(3), log_p_of([0.5, 0.5], 500, 40)
    for level, next_level in itertools.pairwise(levels):
        draw = PROCESS.draw((500, 40), generator, torch.int64)
        z = PROCESS.step(z, log_p, level, next_level, draw)
        left = z.eq(MASK).sum().item()
        assert stats.binomtest(left, z.numel(), next_level).pvalue > 0.001


def test_values_are_drawn_in_float64():
    """With p = 1e-10 for the last token: only draws of the highest 1e-10 give it."""
    z = torch.full((1, 3), MASK)
    draw = torch.zeros(1, 3, 2, dtype=torch.float64)
    draw[0, :, 1] = torch.tensor([1 - 0.9e-10, 1 - 1.1e-10, 0.0], dtype=torch.float64)
    after = PROCESS.step(z, log_p_of([0.5, 0.5 - 1e-10, 1e-10], 1, 3), 0.5, 0.25, draw)
    assert after.tolist() == [[2, 1, 0]]


def test_what_is_impossible_is_never_drawn():
    lowest = torch.finfo(torch.float32).min
    log_p = torch.tensor([lowest, math.log(0.5), lowest, math.log(0.5), lowest])
    draw = PROCESS.draw((50, 40), seeded(), torch.int64)
    draw[0, :, 1], draw[1, :, 1] = 0.0, 1 - 2.0**-53
    draw[..., 0] = 0.0
    z = torch.full((50, 40), MASK)
    after = PROCESS.step(z, log_p.expand(50, 40, 5), 0.5, 0.25, draw)
    assert set(after.flatten().tolist()) == {1, 3}


def test_a_step_on_a_whole_text_changes_nothing():
    z, draw = tokens(2, 3), PROCESS.draw((2, 3), seeded(), torch.int64)
    assert PROCESS.step(z, log_p_of([0.2] * 5, 2, 3), 0.5, 1e-4, draw).equal(z)


# -- options --------------------------------------------------------------------------------------


def test_options_become_the_partition_and_a_description_that_json_holds():
    options = MaskingOptions(t_min=0.01, overlap=0.1, bits=(1.0, 2.0))
    process = Masking.of(options, 2)
    assert process.partition == MaskedShares(2, "linear", 0.01, 0.1, (1.0, 2.0))
    assert json.loads(json.dumps(process.describe())) == process.describe()
    assert process.describe()["bits"] == [1.0, 2.0]
    assert process.weight(torch.tensor([0.5, 0.1])).tolist() == pytest.approx([2.0, 10.0])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (MaskingOptions(bits=()), r"noise\.bits is an empty list"),
        (MaskingOptions(bits=(1.0,), schedule="cosine"), r"noise\.bits and noise\.schedule"),
        (MaskingSamplerOptions(num_draws=2), r"sampler\.num_draws is 2"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        options.check()


def test_bits_that_leave_a_block_without_levels_are_refused():
    with pytest.raises(ConfigError, match=r"noise\.bits \[1e-300, 1\.0\] cannot be cut"):
        MaskedShares(3, bits=(1e-300, 1.0), t_min=1 - 1e-16)
    with pytest.raises(ConfigError, match="num_blocks is 0"):
        MaskedShares(0)


def test_a_process_is_refused_where_the_tasks_sampler_is_of_another():
    with pytest.raises(ConfigError, match=r"noise\.name: masking masks tokens"):
        PROCESS.steps(GaussianSamplerOptions(), 6)
    with pytest.raises(ConfigError, match=r"noise\.name: gaussian adds noise to numbers"):
        Gaussian(NoiseSchedule(3)).steps(MaskingSamplerOptions(), 6)

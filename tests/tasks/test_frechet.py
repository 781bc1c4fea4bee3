"""Distances of feature sets from sums, against torchmetrics, torch-fidelity and closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from dbdist.tasks.frechet import (
    block_kernel_distance,
    frechet_distance,
    kernel_distance,
    mean_and_covariance,
    moments,
    num_moments,
    self_kernels,
)

WIDTH = 24
FIRST, KERNEL = "frechet_inception_distance", {"kid_kernel": "poly", "kid_kernel_poly_degree": 3}


def features(num_samples, seed, shift=0.0, width=WIDTH):
    """Correlated and never negative, as of a ReLU layer."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(num_samples, width, generator=generator)
    return (noise @ mixing / width**0.5 + shift).relu().double()


def frechet(a, b):
    of_a, of_b = (mean_and_covariance(moments(x, 2), x.shape[1]) for x in (a, b))
    return frechet_distance(*of_a, *of_b)


def kid(a, b):
    of_a, of_b = ((moments(x, 3), self_kernels(x)) for x in (a, b))
    return kernel_distance(*of_a, *of_b, a.shape[1])


class Same(nn.Module):
    """An "extractor" whose images are the features."""

    num_features = WIDTH

    def forward(self, images):
        return images.flatten(1)


# -- sums ------------------------------------------------------------------------------------------


def test_moments_are_the_distinct_products_of_each_sample():
    x = features(7, 0, width=5)
    y = torch.cat([torch.ones(7, 1), x], dim=1)
    pairs = torch.einsum("ni,nj->ij", y, y)
    triples = torch.einsum("ni,nj,nk->ijk", y, y, y)
    second = [pairs[i, j] for i in range(6) for j in range(i, 6)]
    third = [triples[i, j, k] for i in range(6) for j in range(i, 6) for k in range(j, 6)]
    torch.testing.assert_close(moments(x, 2), torch.stack(second))
    torch.testing.assert_close(moments(x, 3), torch.stack(third))
    assert (num_moments(5, 2), num_moments(5, 3)) == (len(second), len(third))
    torch.testing.assert_close(moments(x, 3)[: len(second)], moments(x, 2))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_sums_are_equal_however_the_samples_are_cut(order, size):
    x = features(200, 0).float()
    whole = moments(x, order)
    torch.testing.assert_close(sum(moments(part, order) for part in x.split(size)), whole)
    assert whole.dtype == torch.float64


def test_mean_and_covariance_are_those_of_the_samples():
    x = features(50, 0, shift=3.0)
    mean, covariance = mean_and_covariance(moments(x, 3), WIDTH)
    np.testing.assert_allclose(mean.numpy(), x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance.numpy(), np.cov(x.numpy(), rowvar=False), atol=1e-12)


# -- Frechet distance ------------------------------------------------------------------------------


def full(seed):
    return features(300, seed, shift=0.2 * seed)


def fewer_samples_than_features(seed):
    return features(WIDTH // 2, seed, shift=0.2 * seed)


def dead_and_equal_features(seed):
    x = features(300, seed, shift=0.2 * seed)
    x[:, :5] = 0
    x[:, 5:9] = x[:, 9:13]
    return x


@pytest.mark.parametrize("sets", [full, fewer_samples_than_features, dead_and_equal_features])
def test_the_frechet_distance_is_that_of_torch_fidelity_and_torchmetrics(sets):
    a, b = sets(0), sets(1)
    statistics = [
        {"mu": x.numpy().mean(0), "sigma": np.cov(x.numpy(), rowvar=False)} for x in (a, b)
    ]
    expected = fid_statistics_to_metric(*statistics, verbose=False)[FIRST]
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)
    metric = FrechetInceptionDistance(
        feature=Same(), normalize=True, input_img_size=(1, 1, WIDTH)
    ).set_dtype(torch.float64)
    metric.update(a[:, None, None], real=True)
    metric.update(b[:, None, None], real=False)
    assert frechet(a, b) == pytest.approx(metric.compute().item(), rel=1e-6)


def test_the_frechet_distance_of_gaussians_has_its_closed_form():
    """Covariances with the same eigenvectors: sum of (s_a - s_b)^2 beside the means."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    std_a = torch.tensor([3.0, 1.0, 0.5, 2.0, 0.0, 0.0], dtype=torch.float64)
    std_b = torch.tensor([1.0, 1.5, 0.5, 0.0, 4.0, 0.0], dtype=torch.float64)
    cov_a, cov_b = (directions * std**2 @ directions.T for std in (std_a, std_b))
    mean = torch.arange(6.0).double()
    expected = mean.square().sum() + (std_a - std_b).square().sum()
    found = frechet_distance(mean, cov_a, torch.zeros_like(mean), cov_b)
    assert found == pytest.approx(expected.item(), rel=1e-6)
    draws = torch.randn(2, 100_000, 6, generator=generator, dtype=torch.float64)
    a, b = mean + draws[0] * std_a @ directions.T, draws[1] * std_b @ directions.T
    assert frechet(a, b) == pytest.approx(expected.item(), rel=0.02)


def test_covariances_that_share_no_direction_have_the_closed_form_of_two_by_two_matrices():
    """tr(M^(1/2)) = sqrt(tr M + 2 sqrt(det M)) for M = C_a C_b."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=torch.float64)
    m, zero = (a @ b).numpy(), torch.zeros(2, dtype=torch.float64)
    root = math.sqrt(np.trace(m) + 2 * math.sqrt(np.linalg.det(m)))
    expected = np.trace(a.numpy()) + np.trace(b.numpy()) - 2 * root
    assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-12)


def test_a_set_is_at_no_distance_from_itself_and_as_far_either_way():
    a, b = dead_and_equal_features(0), dead_and_equal_features(1)
    assert abs(frechet(a, a)) < 1e-6
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_give_nan(bad):
    a, b = full(0), full(1)
    b[3, 2] = bad
    assert math.isnan(frechet(a, b))
    assert math.isnan(frechet(a[:1], a)), "one sample has no covariance"


# -- kernel distance -------------------------------------------------------------------------------


def test_kid_over_all_pairs_is_that_of_torchmetrics():
    a, b = full(0), full(1)
    expected = poly_mmd(a, b).item()
    assert kid(a, b) == pytest.approx(expected, rel=1e-9)
    metric = KernelInceptionDistance(feature=Same(), subsets=1, subset_size=300, normalize=True)
    metric.update(a[:, None, None], real=True)
    metric.update(b[:, None, None], real=False)
    assert kid(a, b) == pytest.approx(metric.compute()[0].item(), rel=1e-9)


def test_kid_of_sets_of_unequal_size_is_the_mean_over_pairs_of_different_samples():
    a, b = full(0)[:20], full(1)[:30]

    def mean(x, y, is_same):
        pairs = [
            (float(x[i] @ y[j]) / WIDTH + 1) ** 3
            for i in range(len(x))
            for j in range(len(y))
            if not (is_same and i == j)
        ]
        return sum(pairs) / len(pairs)

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert kid(a, b) == pytest.approx(expected, rel=1e-9)


def test_kid_of_a_block_is_that_of_torchmetrics_and_torch_fidelity():
    a, b = full(0)[:40], full(1)[:40]
    found = block_kernel_distance(a, b).item()
    assert found == pytest.approx(poly_mmd(a, b).item(), rel=1e-9)
    options = {**KERNEL, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1.0}
    assert found == pytest.approx(kernel_mmd(a.numpy(), b.numpy(), **options), rel=1e-9)
    assert found == pytest.approx(kid(a, b), rel=1e-9)


def test_kid_of_two_samples_of_one_distribution_is_zero_on_average():
    found = torch.tensor([kid(features(40, 2 * i), features(40, 2 * i + 1)) for i in range(100)])
    assert abs(found.mean()) < 3 * found.std() / 10

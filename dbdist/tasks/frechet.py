"""Distances between two sets of feature vectors, from sums that add up over any cut.

`moments` gives the distinct entries of the sum over samples of y y (order 2) or y y y (order 3),
outer products of y = (1, x): so they hold the count, the sum of x, of x x, and of x x x. Mean and
covariance need order 2. The cubic kernel of KID is an inner product of outer products of order 3,
so sums over all pairs need no pairs. Float64 throughout; knows nothing of images.
"""

from functools import cache
from math import nan

import torch
from jaxtyping import Float
from torch import Tensor


def num_moments(num_features: int, order: int) -> int:
    """Length of `moments`."""
    width = num_features + 1
    pairs = width * (width + 1) // 2
    return pairs if order == 2 else pairs * (width + 2) // 3


def moments(features_ND: Float[Tensor, "n d"], order: int) -> Float[Tensor, " size"]:
    """Sums over samples of the products y_i y_j [y_k], i <= j [<= k], in that order.

    order: factors, 2 or 3. The sums of order 2 are the first of order 3, where i = 0 and y_0 = 1.
    """
    x_ND = features_ND.double()
    y_NE = torch.cat([torch.ones_like(x_ND[:, :1]), x_ND], dim=1)
    first, second = _pairs(y_NE.shape[1]).to(y_NE.device)
    if order == 2:
        return (y_NE.T @ y_NE)[first, second]
    pair, third = _triples(y_NE.shape[1]).to(y_NE.device)
    return ((y_NE[:, first] * y_NE[:, second]).T @ y_NE)[pair, third]


def mean_and_covariance(
    moments: Float[Tensor, " size"], num_features: int
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Of the samples behind the sums; the covariance divides by their number less one."""
    width = num_features + 1
    sums = moments.new_zeros(width, width)
    first, second = _pairs(width)
    sums[first, second] = sums[second, first] = moments[: len(first)]
    count, mean = sums[0, 0], sums[0, 1:] / sums[0, 0]
    return mean, (sums[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1)


def frechet_distance(
    mean_a: Float[Tensor, " d"],
    covariance_a: Float[Tensor, "d d"],
    mean_b: Float[Tensor, " d"],
    covariance_b: Float[Tensor, "d d"],
) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); nan where an entry is not finite.

    The root's trace is the sum of the singular values of A^T B, where C_a = A A^T and C_b = B B^T:
    no root of a matrix that is not symmetric, and none of a negative eigenvalue.
    Source: TTUR (1706.08500), equation 6.
    """
    if not (covariance_a.isfinite().all() and covariance_b.isfinite().all()):
        return nan
    overlap = torch.linalg.svdvals(_root(covariance_a).T @ _root(covariance_b)).sum()
    traces = covariance_a.trace() + covariance_b.trace()
    return ((mean_a - mean_b).square().sum() + traces - 2 * overlap).item()


def kernel(a_ND: Float[Tensor, "n d"], b_MD: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """(a . b / d + 1)^3 of every pair. Source: KID (1801.01401)."""
    return (a_ND.double() @ b_MD.double().T / a_ND.shape[1] + 1) ** 3


def self_kernels(features_ND: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The kernel of each sample with itself, summed."""
    x_ND = features_ND.double()
    return ((x_ND.square().sum(dim=1) / x_ND.shape[1] + 1) ** 3).sum()


def kernel_distance(
    moments_a: Float[Tensor, " size"],
    self_a: Float[Tensor, ""],
    moments_b: Float[Tensor, " size"],
    self_b: Float[Tensor, ""],
    num_features: int,
) -> float:
    """Unbiased squared MMD over all pairs, from moments of order 3 and `self_kernels`.

    Needs two samples in each set. Source: KID (1801.01401).
    """
    weight = _kernel_weights(num_features)
    of_a, of_b = moments_a[0], moments_b[0]
    within_a = ((weight * moments_a * moments_a).sum() - self_a) / (of_a * (of_a - 1))
    within_b = ((weight * moments_b * moments_b).sum() - self_b) / (of_b * (of_b - 1))
    return (within_a + within_b - 2 * (weight * moments_a * moments_b).sum() / (of_a * of_b)).item()


def block_kernel_distance(
    a_ND: Float[Tensor, "n d"], b_ND: Float[Tensor, "n d"]
) -> Float[Tensor, ""]:
    """Unbiased squared MMD over the pairs of one block of samples, two at least."""
    num_pairs = len(a_ND) * (len(a_ND) - 1)
    within = kernel(a_ND, a_ND).sum() - self_kernels(a_ND)
    within = within + kernel(b_ND, b_ND).sum() - self_kernels(b_ND)
    return within / num_pairs - 2 * kernel(a_ND, b_ND).mean()


def _root(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """A of A A^T = C; directions without variance, but for rounding, are exactly zero."""
    variance, directions = torch.linalg.eigh(covariance)
    rounding = len(variance) * torch.finfo(variance.dtype).eps * variance.abs().max()
    return directions * variance.where(variance > rounding, 0).sqrt()


@cache
def _pairs(width: int) -> Tensor:
    """(i, j) with i <= j, in order, as two rows."""
    return torch.triu_indices(width, width)


@cache
def _triples(width: int) -> Tensor:
    """(number of the pair (i, j), k) with i <= j <= k, in order, as two rows."""
    second = _pairs(width)[1]
    is_sorted = second[:, None] <= torch.arange(width)
    return is_sorted.nonzero().T.contiguous()


@cache
def _kernel_weights(num_features: int) -> Float[Tensor, " size"]:
    """How often an entry stands in y y y, over d for each factor that is not y_0."""
    width = num_features + 1
    pair, third = _triples(width)
    first, second = _pairs(width)[:, pair]
    num_equal = (first == second).long() + (second == third).long()
    times = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64)[num_equal]
    num_factors = (first > 0).long() + (second > 0).long() + (third > 0).long()
    return times / float(num_features) ** num_factors.double()

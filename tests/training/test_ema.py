"""The moving average of weights, and that swapping it in always ends."""

import math

import pytest
import torch
from torch import nn

from dbdist.training.ema import Ema


def build(decay=0.9):
    parameters = {
        "a": nn.Parameter(torch.tensor([1.0, -2.0])),
        "b": nn.Parameter(torch.tensor([[3.0]])),
    }
    return parameters, Ema(decay, parameters)


@torch.no_grad()
def set_to(parameters, value):
    for parameter in parameters.values():
        parameter.fill_(value)


def test_the_average_is_the_weighted_sum_of_all_weights_so_far(float64):
    parameters, ema = build(decay=0.8)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    history = [0.5, -1.0, 2.0, 7.0]
    for step, value in enumerate(history, start=1):
        set_to(parameters, value)
        ema.update(step)
    n = len(history)
    drawn = sum(0.2 * 0.8 ** (n - 1 - i) * value for i, value in enumerate(history))
    for name, average in ema.averages.items():
        torch.testing.assert_close(average, 0.8**n * start[name] + drawn, rtol=1e-14, atol=0)


def test_a_ramp_forgets_the_initial_weights_and_ends_at_the_decay(float64):
    parameters = {"a": nn.Parameter(torch.tensor([1e6]))}
    ema = Ema(0.9, parameters, rampup=0.05)
    set_to(parameters, 2.0)
    for step in range(1, 101):
        ema.update(step)
        # EDM: half-life of 5 % of the steps so far, or that of the decay, ln .5 / ln .9 = 6.58
        expected = 0.5 ** (1 / min(0.05 * step, math.log(0.5) / math.log(0.9)))
        assert ema.decay_at(step) == pytest.approx(expected, rel=1e-12)
    assert ema.averages["a"].item() == pytest.approx(2.0, abs=1e-3)
    assert ema.decay_at(131) < ema.decay_at(200) == 0.9


def test_decay_zero_is_the_last_weights():
    parameters, ema = build(decay=0.0)
    set_to(parameters, 0.3)
    ema.update(1)
    for name, parameter in parameters.items():
        assert torch.equal(ema.averages[name], parameter)


def test_an_update_leaves_weights_and_gradients_alone():
    parameters, ema = build()
    (parameters["a"].sum() * 2).backward()
    before = parameters["a"].detach().clone()
    ema.update(1)
    assert torch.equal(parameters["a"], before)
    assert torch.equal(parameters["a"].grad, torch.full((2,), 2.0))
    assert not any(average.requires_grad for average in ema.averages.values())


@pytest.mark.parametrize("fails", [False, True])
def test_swapped_shows_the_averages_and_restores_every_bit(fails):
    parameters, ema = build()
    set_to(parameters, 1 / 3)
    ema.update(1)
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    averages = {name: a.clone() for name, a in ema.averages.items()}
    storage = {name: p.data_ptr() for name, p in parameters.items()}

    def look():
        with ema.swapped():
            assert all(torch.equal(p, averages[name]) for name, p in parameters.items())
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            look()
    else:
        look()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(ema.averages[name], averages[name])
        assert parameter.data_ptr() == storage[name], "optimizers and DDP hold on to the storage"


def test_averages_are_replaced_by_name_and_a_foreign_name_is_an_error():
    _, ema = build()
    ema.load({"b": torch.tensor([[9.0]])})
    assert ema.averages["b"].item() == 9
    assert ema.averages["a"].tolist() == [1, -2]
    with pytest.raises(KeyError):
        ema.load({"c": torch.zeros(1)})

"""Loss spikes and the report of a bad step, without processes."""

import json
import math

import pytest
import torch

from dbdist.training.numerics import BadStep, LossSpikes, norms_of


def losses(mean, num):
    """Around a mean, by a tenth of it, always the same."""
    noise = torch.randn(num, generator=torch.Generator().manual_seed(0))
    return (mean * (1 + 0.1 * noise)).tolist()


def test_a_jump_is_flagged_and_what_it_jumped_from_is_told():
    spikes = LossSpikes()
    assert not any(spikes.add(loss) for loss in losses(1.0, 60))
    told = spikes.add(4.0)
    assert told is not None
    assert told.startswith("loss 4, after 1.0")
    assert told.endswith("in 60 steps")


@pytest.mark.parametrize("loss", [1.3, 0.01])
def test_noise_and_progress_are_none(loss):
    spikes = LossSpikes()
    assert not any(spikes.add(value) for value in (*losses(1.0, 200), loss))


def test_the_first_steps_are_not_judged():
    spikes = LossSpikes()
    assert not any(spikes.add(loss) for loss in (*losses(1.0, 29), 100.0))


def test_a_tiny_loss_that_doubles_twice_is_not_hidden_by_its_size():
    spikes = LossSpikes()
    assert not any(spikes.add(loss) for loss in losses(1e-4, 100))
    assert spikes.add(4e-4) is not None


def test_the_report_is_json_that_everybody_reads(tmp_path):
    bad = BadStep(
        step=7,
        block=1,
        rank=3,
        replica=1,
        loss=math.nan,
        grad_norm=math.inf,
        indices=[4, 2],
        per_sample={"energy": torch.tensor([0.5, math.nan]), "sigma": torch.tensor([0.25, 2.0])},
        grad_norms=norms_of({"w": torch.tensor([3.0, 4.0]), "v": torch.tensor([math.inf])}),
        lr=0.1,
    )
    path = bad.write(tmp_path)
    assert path == tmp_path / "nonfinite/step-00000007-block-1-rank-3.json"
    report = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert report == {
        "step": 7,
        "block": 1,
        "rank": 3,
        "replica": 1,
        "lr": 0.1,
        "loss": "nan",
        "grad_norm": "inf",
        "batch_indices": [4, 2],
        "energy": [0.5, "nan"],
        "sigma": [0.25, 2.0],
        "grad_norms": {"w": 5.0, "v": "inf"},
    }
    assert str(bad) == "loss nan, gradient norm inf"

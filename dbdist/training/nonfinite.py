"""What is known of a step of this rank whose loss or gradient is not finite."""

from collections.abc import Mapping

import torch
from torch import nn

from dbdist.checkpoint.names import PREFIX
from dbdist.monitor.levels import Levels
from dbdist.parallel.topology import Topology
from dbdist.training.numerics import BadStep, norms_of
from dbdist.training.records import StepResult, Trainee


def bad_step(
    trainee: Trainee,
    done: StepResult,
    topology: Topology,
    shared_parameters: Mapping[str, nn.Parameter],
    levels: Levels | None,
    loss: float,
    grad_norm: float,
) -> BadStep:
    """The samples, noise levels and gradients of the step that a block has just computed."""
    owned = trainee.owned
    shared = {PREFIX + name: p for name, p in shared_parameters.items()}
    level_N = {levels.name: torch.cat(done.level_N)} if levels else {}
    named = {**owned.parameters, **shared}
    return BadStep(
        step=trainee.steps_done + 1,
        block=owned.index,
        rank=topology.rank,
        replica=topology.replica,
        loss=loss,
        grad_norm=grad_norm,
        indices=trainee.batches.indices_of_step(trainee.steps_done),
        per_sample=done.values() | level_N,
        grad_norms=norms_of({n: p.grad for n, p in named.items() if p.grad is not None}),
        lr=owned.engine.optimizer.param_groups[0]["lr"],
    )

"""The end of training before its last step: what is saved then, and what is reported."""

from collections.abc import Callable

from dbdist.errors import CheckpointError, DataError, Fault
from dbdist.parallel.health.stopping import Stop
from dbdist.parallel.topology import Topology
from dbdist.training.saving import Saving

MAX_APART_S = 15.0
"""Blocks that never wait for each other stop after a common step if all can come to it in this
time. Launchers kill a rank 30 s after its SIGTERM."""


def any_fault(topology: Topology) -> Stop | None:
    """What the first of the ranks has found wrong; a fault before a user's mistake. Collective."""
    topology.watch.at("waiting for the others", waits=True)
    found = [
        stop for stop in topology.gather(topology.watch.stopping.own_fault) if stop is not None
    ]
    return next((stop for stop in found if stop.kind == "fault"), found[0] if found else None)


def save_and_stop(
    stop: Stop, step: int, topology: Topology, saving: Saving, save: Callable[[int], None]
) -> None:
    """Saves what may be saved of this step. save: with all ranks, which have come to it too.

    Raises Fault if something is wrong, and DataError for what the user has to mend.
    """
    if stop.kind == "together":
        stop = any_fault(topology) or stop
    is_new = saving.is_new(step)
    match stop.kind:
        case "together":
            if is_new:
                save(step)
            saving.finish()
        case "apart":
            if is_new and saving.refusal is None and saving.has_own_block:
                saving.save_own_block(step)
            else:
                saving.finish_own_block()
        case "rank_gone":
            saved = _rescue(step, saving) or "; nothing new is saved"
            raise Fault(f"{stop.reason}, but a rank is gone{saved}")
        case "fault":
            raise Fault(stop.reason + _rescue(step, saving))
    if stop.is_mistake:
        raise DataError(f"{stop.reason}; step {step} is saved, the same command continues there")


def _rescue(step: int, saving: Saving) -> str:
    """Saves this rank's block, if it needs no other for that; what to say of it."""
    if not (saving.is_new(step) and saving.refusal is None and saving.has_own_block):
        return ""
    try:
        saving.save_own_block(step)
    except CheckpointError as error:
        return f"; {error}"
    return f"; blocks {saving.own_blocks} saved step {step}"

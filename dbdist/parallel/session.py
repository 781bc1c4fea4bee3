"""From the launcher's environment to a joined, watched process group, and out of it again."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from dbdist import log
from dbdist.config.config import Config
from dbdist.errors import Fault, UserError
from dbdist.parallel.agreement import flat
from dbdist.parallel.health.guard import LOST
from dbdist.parallel.health.signals import Signals
from dbdist.parallel.launch import Launch
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology, build_topology
from dbdist.version import __version__, digest_of_code

_CONNECTION = re.compile(
    r"gloo|NCCL|monitoredBarrier|[Cc]onnection|[Bb]roken pipe|[Tt]imed? ?out|store"
)


def facts_of(config: Config) -> dict[str, object]:
    """What every rank must have alike from the start."""
    values = flat(asdict(config))
    for key in ("device", "data.root", "data.num_workers"):  # a node's own affair
        del values[key]
    return {
        **values,
        "the version of torch": torch.__version__,
        "the version of dbdist": __version__,
        "the code of dbdist": digest_of_code(),
    }


@contextmanager
def joined(
    config: Config,
    layout: Layout,
    launch: Launch,
    facts: Mapping[str, object],
    say: Callable[[str], None],
    blocks: Sequence[int] | None = None,
) -> Iterator[Topology]:
    """The topology, for as long as the ranks work together. Collective.

    facts: what all ranks must have alike. say: shows a line. blocks: see `start_watch`. An error of
    a connection leaves it as a Fault that names the rank that is gone; other errors get a note of
    where this rank was.
    """
    timeout_s = config.parallel.timeout_s
    topology = build_topology(layout, launch, config.device, timeout_s, facts=facts)
    topology.start_watch(timeout_s, say, blocks, Path(config.run_dir) / "stuck")
    if topology.world_size > 1:
        block = topology.block
        log.join(topology.rank, blocks[block] if blocks and block is not None else block)
    try:
        yield topology
    except (UserError, Fault) as error:
        topology.watch.close(f"ended: {error}")
        raise
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        if _is_out_of_memory(error):
            fault = Fault(_out_of_memory(config, topology))
            topology.watch.close(f"ended: {fault}")
            raise fault from None
        if topology.store is not None and _is_of_connection(error):
            missing = topology.watch.missing()
            here = topology.watch.here()
            topology.watch.close(LOST)
            raise Fault(f"{missing or first}; this is {here}") from None
        error.add_note(f"dbdist: this was {topology.watch.here()}")
        topology.watch.close(f"ended: {type(error).__name__}: {first}")
        raise
    finally:
        log.leave()
    topology.close()


@contextmanager
def leaving_no_group() -> Iterator[None]:
    """Ends the process group after an error, so that this process can join another one."""
    try:
        yield
    except BaseException:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory or the host's has ended; torch's CPU allocator has no own error."""
    is_of_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or is_of_host


def _out_of_memory(config: Config, topology: Topology) -> str:
    """One line that says where memory ended, with which batches, and what to lower."""
    t, e = config.train, config.eval
    samples = t.batch_size // (topology.layout.num_replicas * t.accumulation_steps)
    kind = "GPU memory" if topology.device.type == "cuda" else "memory"
    return (
        f"{topology.watch.here()}, is out of {kind}, with {max(1, samples)} training samples at a "
        f"time (train.batch_size {t.batch_size}) or {e.micro_batch_size} in an evaluation; raise "
        "train.accumulation_steps, set train.activation_checkpointing true, or lower "
        "train.batch_size, eval.micro_batch_size or the model's sizes"
    )


def _is_of_connection(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    is_plain = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    return is_plain and _CONNECTION.search(str(error)) is not None


@contextmanager
def hearing_signals(
    topology: Topology, say: Callable[[str], None] | None, grace_s: float
) -> Iterator[None]:
    """Lets signals ask all ranks to stop after a common step.

    say: shows a line; None leaves signals to others. grace_s: the time that this rank gets to save
    its own work once another is stuck.
    """
    if say is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = topology.watch
    watch.grace_s = grace_s
    signals = Signals(watch.stopping, watch.names[topology.rank], say)
    yield  # after an error the process ends: until then no signal shall cut short what it says
    signals.close()
    watch.grace_s = 0.0

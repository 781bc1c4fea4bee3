"""`torchrun … -m dbdist.evaluate RUN`: the test set through the chain of blocks.

As many processes as blocks (or a multiple: replicas share the samples), or one plain process that
holds one block at a time. From Python: `dbdist.evaluate(RUN, sampler__num_steps=12)`.
"""

import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dbdist.commands.command_line import (
    announce,
    guarded,
    print_anything,
    say,
    with_first,
    without_local_rank,
)
from dbdist.parallel.launch import Launch

if TYPE_CHECKING:
    from dbdist.config.config import Config
    from dbdist.sampling.evaluation import Evaluation


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist evaluate", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    from dbdist.config.parse import config_of_folder, parse_config

    words = with_first("--run_dir", without_local_rank(argv))
    own = config_of_folder(words)
    parse_config("dbdist evaluate RUN", __doc__ or "", words, first=own)  # mistakes need no torch
    announce("dbdist evaluate")
    from dbdist.run.folder import config_of_run

    _evaluate(config_of_run("dbdist evaluate", "", words))


def evaluate(run_dir: str | os.PathLike[str], **overrides: Any) -> "Evaluation":
    """Scores a run's checkpoint, in this process or as one rank of a launcher's.

    overrides: values that win over the run's own, by dotted key: `sampler__num_steps=12`.
    Collective. Raises a `dbdist.errors.UserError` or `Fault`.
    """
    from dbdist.config.parse import make_config
    from dbdist.parallel.session import leaving_no_group
    from dbdist.run.folder import config_file_of

    print_anything()
    folder = Path(run_dir).expanduser()
    config = make_config(config_file_of(folder), {**overrides, "run_dir": folder})
    with leaving_no_group():
        return _evaluate(config.validate())


def _evaluate(config: "Config") -> "Evaluation":
    from dbdist.inference.of_run import evaluate_run, layout_for_evaluation
    from dbdist.parallel.session import facts_of, joined

    launch = Launch.from_environment()
    layout = layout_for_evaluation(config, launch.world_size)
    tell = partial(say, "dbdist evaluate")
    with joined(config, layout, launch, facts_of(config), tell) as topology:
        return evaluate_run(config, topology)


class _Callable(ModuleType):
    """This module, which is `dbdist.evaluate` too: called, it evaluates."""

    def __call__(self, run_dir: str | os.PathLike[str], **overrides: Any) -> "Evaluation":
        return evaluate(run_dir, **overrides)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    main()

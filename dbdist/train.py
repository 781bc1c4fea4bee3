"""Trains, or continues a run: `torchrun … -m dbdist.train CONFIG`.

CONFIG is a YAML file or the name of a preset (`dbdist configs`); options come after it, and win.
From Python: `dbdist.train(CONFIG, train__lr=1e-3)`.
"""

import sys
from functools import partial
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
    guarded(
        "dbdist train",
        lambda: run(sys.argv[1:] if argv is None else argv),
        interrupted="the same command continues from the newest checkpoint",
    )


def run(argv: list[str]) -> None:
    from dbdist.config.parse import parse_config

    words = with_first("--config", without_local_rank(argv))
    config = parse_config("dbdist train [CONFIG]", __doc__ or "", words)
    announce("dbdist train")
    _train(config, hears_signals=True)


def train(config: object, **overrides: Any) -> "Evaluation | None":
    """Trains a configuration, in this process or as one rank of a launcher's.

    config: a path, the name of a preset, a mapping or a `Config`. overrides: values that win, by
    dotted key: `train__lr=1e-3`, or `**{"train.lr": 1e-3}`. Returns the evaluation of the trained
    model; None if the run was asked to stop, or trains only some blocks. Collective. Raises a
    `dbdist.errors.UserError` or `Fault`.
    """
    from dbdist.config.parse import make_config
    from dbdist.parallel.session import leaving_no_group

    print_anything()
    is_launched = Launch.from_environment().world_size > 1
    with leaving_no_group():
        return _train(make_config(config, overrides), hears_signals=is_launched)


def _train(config: "Config", *, hears_signals: bool) -> "Evaluation | None":
    """hears_signals: a signal saves and stops; after an error the process must end."""
    config.validate()

    from dbdist.parallel.layout import layout_of
    from dbdist.parallel.session import facts_of, joined
    from dbdist.training import setup

    launch = Launch.from_environment()
    layout = layout_of(config, launch.world_size)
    if config.parallel.replica_engine == "deepspeed":
        from dbdist.parallel.engines.zero_settings import settings

        settings(config, layout.num_replicas)  # raises before anybody is waited for
    tell = partial(say, "dbdist train")
    with joined(config, layout, launch, facts_of(config), tell, config.trained_blocks) as topology:
        return setup.train(config, topology, tell if hears_signals else None)


class _Callable(ModuleType):
    """This module, which is `dbdist.train` too: called, it trains."""

    def __call__(self, config: object, **overrides: Any) -> "Evaluation | None":
        return train(config, **overrides)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    main()

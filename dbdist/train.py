"""`torchrun … -m dbdist.train --config FILE`: trains, or continues where the run directory left
off."""

import sys
from functools import partial

from torch.distributed.elastic.multiprocessing.errors import record

from dbdist.commands.command_line import guarded, say, without_local_rank
from dbdist.config.parse import parse_config
from dbdist.parallel.launch import Launch
from dbdist.parallel.layout import layout_of
from dbdist.parallel.session import facts_of, joined
from dbdist.training.setup import train


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist train", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    config = parse_config("dbdist train", __doc__ or "", without_local_rank(argv)).validate()

    launch = Launch.from_environment()
    layout = layout_of(config, launch.world_size)
    if config.parallel.replica_engine == "deepspeed":
        from dbdist.parallel.engines.zero_settings import settings

        settings(config, layout.num_replicas)  # raises before anybody is waited for
    tell = partial(say, "dbdist train")
    with joined(config, layout, launch, facts_of(config), tell, config.trained_blocks) as topology:
        train(config, topology, tell)


if __name__ == "__main__":
    record(main)()

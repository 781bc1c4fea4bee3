"""`torchrun … -m dbdist.evaluate --run_dir RUN`: the test set through the chain of blocks.

As many processes as blocks (or a multiple: replicas share the images), or one plain process that
holds one block at a time.
"""

import sys
from functools import partial

from torch.distributed.elastic.multiprocessing.errors import record

from dbdist.commands.command_line import guarded, say, without_local_rank
from dbdist.inference.of_run import evaluate_run, layout_for_evaluation
from dbdist.parallel.launch import Launch
from dbdist.parallel.session import facts_of, joined
from dbdist.run.folder import config_of_run


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist evaluate", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    argv = without_local_rank(argv)
    config = config_of_run("dbdist evaluate", __doc__ or "", argv)

    launch = Launch.from_environment()
    layout = layout_for_evaluation(config, launch.world_size)
    tell = partial(say, "dbdist evaluate")
    with joined(config, layout, launch, facts_of(config), tell) as topology:
        evaluate_run(config, topology)


if __name__ == "__main__":
    record(main)()

"""What this rank saves of a run: with the other ranks, or its own block without them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbdist.checkpoint.writer import CheckpointWriter
from dbdist.config.config import Config
from dbdist.parallel.topology import Topology
from dbdist.training.rank_state import RankState
from dbdist.training.state_files import files_of


class Saving:
    """This rank's share of every checkpoint."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        state: RankState,
        about: Callable[[int], dict[str, Any]],
        start_step: int,
        is_recorded: Callable[[int], bool],
    ) -> None:
        """Keeps what every save of this rank needs.

        about: what the manifest says of a step beside its files. is_recorded: see
        `CheckpointWriter`.
        """
        self._config, self._topology, self._state = config, topology, state
        self._about, self._start_step = about, start_step
        self.own_blocks = [owned.index for owned in state.blocks]
        self.has_own_block = config.has_copies and bool(state.blocks)
        """Whether this rank can save its block without the other ranks."""
        self.refusal: str | None = None
        """Why what this rank holds must not be saved any more."""
        is_writer = self.has_own_block and topology.is_leader
        self.writer = CheckpointWriter(
            Path(config.run_dir),
            topology,
            writers_of(topology),
            config.checkpoint.keep_last,
            state.blocks[0].index if is_writer else None,
            config.trained_blocks,
            is_recorded,
        )

    def is_new(self, step: int) -> bool:
        """Whether there is something at this step that is not saved yet."""
        return step > self._start_step and step != self.writer.last_step

    def save(self, step: int) -> None:
        """Begins to save a step, together with all ranks. Collective."""
        self._topology.watch.at("saving")
        files, about = files_of(self._state), self._about(step)
        self.writer.save(step, files, about, refusal=self.refusal)

    def finish(self) -> None:
        """Waits until the last step is saved. Collective. Raises CheckpointError if it is not."""
        with self._topology.agree():
            self._topology.watch.at("completing the checkpoint", waits=True)
            self.writer.finish(self._config.parallel.timeout_s)

    def save_own_block(self, step: int) -> None:
        """Saves this rank's block without the other ranks; raises CheckpointError."""
        self._topology.watch.at("saving")
        self.writer.save_own_block(step, files_of(self._state), self._about(step))
        self.writer.finish(self._config.parallel.timeout_s)

    def finish_own_block(self) -> None:
        """Waits until what this rank has saved is written; raises CheckpointError."""
        self.writer.leave_others()
        self.writer.finish(self._config.parallel.timeout_s)


def writers_of(topology: Topology) -> set[int]:
    """The ranks that write files of each checkpoint: rank 0 and each block's first replica."""
    layout = topology.layout
    return {0, *(layout.rank_of(block, 0) for block in range(layout.num_blocks))}

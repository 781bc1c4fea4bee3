"""Real ranks for tests: processes that are started once and run one function after the other.

Each run meets through a file of its own (no ports). A failure carries every rank's traceback; a
rank that hangs or
dies costs its own test alone: the pool ends its processes and starts new ones.
"""

import gc
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from forks import Forked, Forks

from dbdist import log
from dbdist.config.config import Config
from dbdist.parallel.launch import Launch
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology, build_topology


class Rank:
    """What a test function gets: its place, and a way to join the others."""

    def __init__(self, rank: int, world_size: int, path: str) -> None:
        self.launch = Launch(rank, world_size, rank, world_size)
        self.store = dist.FileStore(path, world_size)

    def join(
        self,
        layout: Layout,
        timeout_s: float = 60.0,
        device: Literal["auto", "cpu", "cuda"] = "cpu",
    ) -> Topology:
        # Every collective is checked against its peers', but for DDP: torch 2.15 crashes in its
        # set-up then.
        is_checked = layout.num_replicas == 1 and device == "cpu"
        dist.set_debug_level(dist.DebugLevel.DETAIL if is_checked else dist.DebugLevel.OFF)
        return build_topology(
            layout, self.launch, device, timeout_s, dist.PrefixStore("run", self.store)
        )


class RankPool:
    """Processes that stay; `run(world_size, function, *args)` calls function(rank, *args) on
    each."""

    def __init__(self, forks: Forks) -> None:
        self._forks = forks
        self._workers: list[tuple[Forked, Connection]] = []
        self._preloaded: set[str] = set()
        self._folder = tempfile.TemporaryDirectory()  # what relative paths are in

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0
    ) -> list[Any]:
        """Each rank's result, in rank order. Raises AssertionError with all tracebacks."""
        while len(self._workers) < world_size:
            self._start_worker()
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world_size):
                task = pickle.dumps((function, args, rank, world_size, f"{folder}/store"))
                self._workers[rank][1].send((sys.path, task))
            answers = self._answers(world_size, timeout_s)
        failures = [f"--- rank {r}\n{text}" for r, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    def preload(self, *modules: str) -> None:
        """From now on every rank has imported them, at once instead of one by one."""
        for module in modules:
            if module not in self._preloaded:
                self._preloaded.add(module)
                self.close()
                self._forks.preload(module)

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.wait()
        self._workers.clear()

    def _start_worker(self) -> None:
        with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/meet") as listener:
            words = ["-m", "ranks", f"{folder}/meet", self._folder.name]
            here = Path(__file__).parent
            process = self._forks.start(words, dict(os.environ), here, Path(os.devnull))
            self._workers.append((process, listener.accept()))

    def _answers(self, world_size: int, timeout_s: float) -> list[tuple[bool, Any]]:
        deadline = time.monotonic() + timeout_s
        answers: list[tuple[bool, Any]] = []
        for process, pipe in self._workers[:world_size]:
            try:
                if pipe.poll(max(0.1, deadline - time.monotonic())):
                    answers.append(pickle.loads(pipe.recv_bytes()))
                else:
                    answers.append((False, f"no answer within {timeout_s} s (pid {process.pid})"))
            except EOFError:
                answers.append((False, f"died (exit code {process.wait(10)})"))
        return answers


def serve(pipe: Connection) -> None:
    """Runs what the pool sends, in one of its processes."""
    torch.set_num_threads(1)
    linear = torch.nn.functional.linear
    while True:
        try:
            sys.path, task = pipe.recv()
        except EOFError:
            return
        try:
            torch.set_default_dtype(torch.float32)
            # DeepSpeed's stage 3 replaces it for the whole process, and with it the order of sums.
            torch.nn.functional.linear = linear
            function, args, rank, world_size, path = pickle.loads(task)
            log.share_terminal(None)
            answer = True, function(Rank(rank, world_size, path), *args)
        except BaseException:
            answer = False, traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # trainers are cycles that keep gloo's threads
        pipe.send_bytes(pickle.dumps(answer))  # whole: shared memory needs a common parent


def warnings_from_now_on() -> list[str]:
    """A list that all later warnings of this process come to, without their prefix."""
    found: list[str] = []
    log.share_terminal(lambda line: found.append(line.partition("warning: ")[2]))
    return found


def config_of(*options: str) -> Config:
    """A tiny model on digits, changed by `key=value` options."""
    from dbdist.config.parse import parse_config

    base = (
        "model.num_layers=3 train.batch_size=8 train.max_steps=4 eval.batch_size=128 "
        "eval.micro_batch_size=50 train.lr=0.01"
    )
    tasks = [option for option in options if option.startswith("task.name=")]
    if tasks[-1:] in ([], ["task.name=classification"]):
        base += " model.hidden_size=12 model.num_heads=2 model.patch_size=4"
    words = [f"--{option}" for option in (*base.split(), *options)]
    return parse_config("test", "", words).validate()


def without(config: Config, *sections: str) -> dict[str, Any]:
    """A configuration as nested dicts, without some sections."""
    return {k: v for k, v in asdict(config).items() if k not in sections}


def setup_of(config: Config) -> Any:
    """Task, model and process of a configuration for its own data set."""
    from dbdist.build import build_setup
    from dbdist.data.sources import dataset_spec

    return build_setup(config, dataset_spec(config.data))


if __name__ == "__main__":
    import ranks

    os.chdir(sys.argv[2])
    ranks.serve(Client(sys.argv[1]))

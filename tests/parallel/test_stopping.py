"""Agreement on the last step, between threads that play ranks over one real store."""

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from dbdist.parallel import stopping as module
from dbdist.parallel.stopping import Stopping


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, 1, True)


class Player:
    """A rank: its main thread takes steps, another talks with the store."""

    def __init__(self, rank, world_size, store, step_s, partners=None):
        self.stopping = Stopping()
        self.stopping.join(rank, world_size, [rank], store.clone())
        self.step_s, self.partners = step_s, partners
        self.done, self.stop = 0, None
        self.is_over = threading.Event()
        self.main = threading.Thread(target=self._train)
        self.talker = threading.Thread(target=self._talk)
        self.main.start()
        self.talker.start()

    def _train(self):
        for step in range(100_000):
            self.stop = self.stopping.may_begin(step)
            if self.stop is not None:
                return
            time.sleep(self.step_s)
            if self.partners is not None:
                self.partners.wait(10)  # a step that needs all ranks
            self.done = step + 1

    def _talk(self):
        while not self.is_over.wait(0.01):
            self.stopping.attend()

    def end(self):
        self.main.join(20)
        self.is_over.set()
        self.talker.join()
        assert not self.main.is_alive()


@pytest.mark.parametrize("is_lockstep", [False, True])
def test_all_end_after_the_same_step_whoever_asks(store, is_lockstep):
    generator = random.Random(0)
    for trial in range(6):
        own = dist.PrefixStore(str(trial), store)
        partners = threading.Barrier(3) if is_lockstep else None
        players = [Player(r, 3, own, 0.001 * (1 + r), partners) for r in range(3)]
        time.sleep(generator.uniform(0, 0.2))
        asked = [r for r in range(3) if generator.random() < 0.6] or [1]
        for rank in asked:
            players[rank].stopping.ask(f"rank {rank}")
        for player in players:
            player.end()
        assert len({player.done for player in players}) == 1
        assert len({player.stop for player in players}) == 1
        assert players[0].stop.last_step == players[0].done
        assert players[0].stop.reason in {f"rank {rank}" for rank in asked}


@pytest.mark.parametrize("gone", [0, 2])
def test_without_one_rank_the_others_stop_where_they_are(store, gone, monkeypatch):
    monkeypatch.setattr(module, "AGREE_S", 0.5)
    players = [Player(r, 3, store, 0.001) for r in range(3) if r != gone]
    players[0].stopping.ask("a signal")
    for player in players:
        player.end()
        assert player.stop.reason == "a signal"
        assert player.stop.last_step is None


def test_blocks_that_are_too_far_apart_stop_each_by_itself_and_copies_together(store):
    """Ranks 0 and 1 are copies, and are told at different times; rank 2 is far behind."""
    players = [Stopping() for _ in range(3)]
    for rank, player in enumerate(players):
        player.join(rank, 3, [[0, 1], [0, 1], [2]][rank], store.clone())
        player.max_apart = 10
        assert player.may_begin([40, 41, 5][rank]) is None
    players[2].ask("a signal")
    for _ in range(3):
        for player in players:
            player.attend()
    assert players[0].may_begin(41) is None, "its copy has begun this step"
    for player, step in zip(players, (42, 42, 6), strict=True):
        stop = player.may_begin(step)
        assert stop is not None
        assert (stop.last_step, stop.apart) == (None, "the blocks are 36 steps apart")


def test_a_fault_after_a_signal_is_kept():
    stopping = Stopping()
    stopping.may_begin(3)
    stopping.ask("a signal")
    stopping.ask("nan", is_fault=True)
    assert stopping.asked is not None
    assert stopping.asked.reason == "a signal"
    assert stopping.own_fault is not None
    assert stopping.own_fault.reason == "nan"


def test_one_process_ends_after_the_step_it_has_begun():
    stopping = Stopping()
    assert stopping.may_begin(6) is None
    stopping.ask("a signal")
    stop = stopping.may_begin(7)
    assert stop is not None
    assert (stop.reason, stop.is_fault, stop.last_step) == ("a signal", False, 7)


LISTENING = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from dbdist.parallel.stopping import Signals, Stopping
stopping = Stopping()
stopping.may_begin(0)
signals = Signals(stopping, "rank 0", lambda text: print(text, flush=True))
print("ready", flush=True)
time.sleep(60)
"""


def test_the_first_signal_asks_and_the_second_ends():
    words = [sys.executable, "-c", LISTENING]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    line = process.stdout.readline()
    assert line == "SIGUSR1: finishes the step and saves; again ends at once\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM again: ends at once\n"
    assert process.wait(5) == 128 + signal.SIGTERM
    process.stdout.close()

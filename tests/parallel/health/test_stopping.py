"""Agreement on the last step, between threads that play ranks over one real store."""

import os
import random
import signal
import threading
import time

import pytest
import torch.distributed as dist
from machine import wait_for_text

from dbdist.parallel.health import stopping as module
from dbdist.parallel.health.stopping import Stopping


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
        assert (player.stop.kind, player.stop.last_step) == ("rank_gone", None)


def test_blocks_that_are_too_far_apart_stop_each_by_itself_and_copies_together(store, monkeypatch):
    """Ranks 0 and 1 are copies, and are told at different times; rank 2 is far behind."""
    players = [Stopping() for _ in range(3)]
    for rank, player in enumerate(players):
        player.join(rank, 3, [[0, 1], [0, 1], [2]][rank], store.clone())
        player.max_apart_s = 15.0
        monkeypatch.setattr(player, "_step_s", lambda: 0.5)  # 36 steps of the last rank are 18 s
        assert player.may_begin([40, 41, 5][rank]) is None
    players[2].ask("a signal")
    for _ in range(3):
        for player in players:
            player.attend()
    assert players[0].may_begin(41) is None, "its copy has begun this step"
    for player, step in zip(players, (42, 42, 6), strict=True):
        stop = player.may_begin(step)
        assert stop is not None
        assert (stop.kind, stop.last_step) == ("apart", None)


@pytest.mark.parametrize("is_far", [False, True])
def test_who_has_finished_waits_for_all_unless_they_stop_by_themselves(store, is_far):
    """Rank 0 has taken all of its 50 steps, rank 1 takes its last ten now."""
    first, second = Stopping(), Stopping()
    for rank, player in enumerate((first, second)):
        player.join(rank, 2, [rank], store.clone())
        player.max_apart_s = 0.0 if is_far else 15.0
        player.may_begin([49, 39][rank])
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(first.wait_for_all()))
    waiting.start()
    time.sleep(0.05)
    second.ask("a signal")
    for _ in range(3):
        for player in (first, second):
            player.attend()
    steps = [step for step in range(40, 50) if second.may_begin(step) is None]
    if is_far:
        assert not steps
    else:
        assert steps == list(range(40, 50)), "up to the last, which is the common one"
        assert waiting.is_alive()
        assert second.wait_for_all() is None
    waiting.join(10)
    assert not waiting.is_alive()
    assert [stop and stop.reason for stop in answers] == ["a signal" if is_far else None]


def test_who_is_late_takes_the_answer_that_is_there(store, monkeypatch):
    """And who finds none makes it everybody's that a rank is gone."""
    monkeypatch.setattr(module, "AGREE_S", 0.2)
    for trial in ("answered", "not answered"):
        own = dist.PrefixStore(trial, store)
        players = [Stopping(), Stopping()]
        for rank, player in enumerate(players):
            player.join(rank, 2, [rank], own.clone())
            assert player.may_begin(6 + rank) is None
        players[0].ask("a signal")
        players[1].attend()
        if trial == "answered":
            players[0].attend()
        monkeypatch.setattr(players[1], "_deadline", 0.0)
        players[1].attend()
        players[0].attend()
        stops = [player.may_begin(8) for player in players]
        assert stops[0] == stops[1]
        assert stops[0].last_step == (8 if trial == "answered" else None)


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
    assert (stop.kind, stop.reason, stop.last_step) == ("together", "a signal", 7)


LISTENING = """
import os, sys, time
from dbdist.commands.command_line import say
from dbdist.parallel.health.signals import Signals
from dbdist.parallel.health.stopping import Stopping

class Hanging(Stopping):  # as with a store that does not answer
    def ask(self, reason, is_fault=False):
        print(reason, flush=True)
        time.sleep(60)

if "no terminal" in sys.argv:
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(read)
signals = Signals(Hanging(), "rank 0", lambda text: say("test", text))
worker = os.fork()  # as data loading does
if worker and "close" in sys.argv:
    signals.close()
    os.kill(worker, 9)
elif worker:
    print("ready", flush=True)
time.sleep(0 if "close" in sys.argv and worker else 60)
"""


@pytest.mark.parametrize("options", [(), ("no terminal",)])
def test_the_first_signal_asks_and_the_second_ends(machine, options):
    """Though the store does not answer, and nobody reads what is printed."""
    job = machine.script(LISTENING, *options)
    wait_for_text(job, "ready")
    job.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    job.send_signal(signal.SIGTERM)  # from whoever signals all processes at once
    wait_for_text(job, "SIGUSR1 on rank 0\n")
    time.sleep(1.2)
    assert job.poll() is None, "it was one request"
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 128 + signal.SIGTERM
    (worker,) = job.processes()
    os.kill(worker, signal.SIGKILL)
    lines = [line for line in job.printed().splitlines() if line.startswith("test: ")]
    if not options:
        assert lines == [
            "test: SIGUSR1: finishes the step and saves; again ends at once",
            "test: SIGTERM again: ends at once",
        ]


def test_a_worker_that_lives_on_holds_nobody(machine):
    assert machine.script(LISTENING, "close").wait(60) == 0

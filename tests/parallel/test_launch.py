"""What a process believes of its launcher, and how the ranks of one start find each other."""

import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from dbdist.commands.command_line import without_local_rank
from dbdist.errors import ConfigError, TopologyError
from dbdist.parallel.launch import Launch, _launcher

VARIABLES = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE GROUP_RANK CROSS_RANK CROSS_SIZE "
    "MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT TORCHELASTIC_USE_AGENT_STORE "
    "SLURM_STEP_NUM_TASKS OMPI_COMM_WORLD_SIZE PMI_SIZE"
).split()
MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Sets the launcher's variables, and no others."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return put


# -- what the launcher says ------------------------------------------------------------------------


def test_without_a_launcher_there_is_one_process(environment):
    environment(LOCAL_RANK=3)  # says nothing alone
    assert Launch.from_environment() == Launch(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param(
            {"RANK": 5, "WORLD_SIZE": 6, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 3, "GROUP_RANK": 1}
            | {"TORCHELASTIC_RESTART_COUNT": 2},
            Launch(5, 6, 2, 3, attempt=2, node=1),
            id="torchrun",
        ),
        pytest.param(
            {"RANK": 1, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 1},
            Launch(1, 3, 0, 2, node=1),
            id="torchrun on nodes of 1 and 2 ranks",
        ),
        pytest.param(
            {"RANK": 2, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 1}
            | {"LOCAL_SIZE": 3, "CROSS_RANK": 0},
            Launch(2, 3, 0, 2, node=1),
            id="torchrun's names come first",
        ),
        pytest.param(
            {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_SIZE": 2}
            | {"CROSS_RANK": 1, "CROSS_SIZE": 2},
            Launch(3, 4, 1, 2, node=1),
            id="deepspeed",
        ),
        pytest.param(
            {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4},
            Launch(5, 8, 1, 4, node=1),
            id="by hand, ranks in the nodes' order",
        ),
        pytest.param({"RANK": 2, "WORLD_SIZE": 3}, Launch(2, 3, 2, 3), id="by hand, one node"),
        pytest.param(
            {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4, "GROUP_RANK": 0},
            Launch(2, 4, 0, 4, fills_its_node=True),
            id="torchrun --virtual-local-rank",
        ),
        pytest.param({"RANK": 0, "WORLD_SIZE": 1}, Launch(0, 1, 0, 1), id="a world of one"),
    ],
)
def test_the_launchers_names_say_the_same(environment, variables, expected):
    environment(**variables, **(MASTER if variables["WORLD_SIZE"] > 1 else {}))
    assert Launch.from_environment() == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": 0}, "WORLD_SIZE is missing"),
        ({"WORLD_SIZE": 3}, "RANK is missing"),
        ({"RANK": "", "WORLD_SIZE": 3}, "RANK is missing"),
        ({"RANK": "first", "WORLD_SIZE": 3}, "RANK is 'first'"),
        ({"RANK": -1, "WORLD_SIZE": 3}, "RANK is '-1'"),
        ({"RANK": 3, "WORLD_SIZE": 3}, "contradicts itself: rank 3 of 3"),
        ({"RANK": 0, "WORLD_SIZE": 0}, "rank 0 of 0"),
        ({"RANK": 1, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 0}, "0 of 0 on its node"),
        ({"RANK": 1, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 4}, "1 of 4 on its node"),
        ({"RANK": 1, "WORLD_SIZE": 3, "LOCAL_RANK": 2, "LOCAL_SIZE": 2}, "2 of 2 on its node"),
        ({"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1}, "set LOCAL_WORLD_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": 4}, r"4 processes .*SLURM_STEP_NUM_TASKS.*launch/README\.md"),
        ({"OMPI_COMM_WORLD_SIZE": 2}, "2 processes .*torchrun on each node"),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(environment, variables, message):
    environment(**MASTER, **variables)
    with pytest.raises(TopologyError, match=message) as caught:
        Launch.from_environment()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_many_ranks_need_an_address_to_meet_at(environment, missing):
    environment(RANK=0, WORLD_SIZE=2, **{k: v for k, v in MASTER.items() if k != missing})
    with pytest.raises(TopologyError, match=f"{missing} is missing"):
        Launch.from_environment()


# -- --local_rank ----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]])
def test_local_rank_is_accepted_and_changes_nothing(environment, words):
    environment(RANK=1, WORLD_SIZE=3, LOCAL_RANK=1, LOCAL_SIZE=3, **MASTER)
    assert without_local_rank([*words, "--seed", "3"]) == ["--seed", "3"]


@pytest.mark.parametrize("words", [["--local_rank=2"], ["--local_rank", "one"], ["--local_rank"]])
def test_another_local_rank_than_the_environments_is_refused(environment, words):
    environment(RANK=1, WORLD_SIZE=3, LOCAL_RANK=1, LOCAL_SIZE=3, **MASTER)
    with pytest.raises(ConfigError, match="but the launcher's environment says 1"):
        without_local_rank(words)


# -- the command that continues --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["/bin/dbdist", "train", "digits", "--run_dir", "a b"],
            "dbdist train digits --run_dir 'a b'",
        ),
        (["/x/dbdist/train.py", "--seed", "1"], "python -m dbdist.train --seed 1"),
        (["mine.py", "--fast"], "python mine.py --fast"),
    ],
)
def test_the_printed_command_is_what_was_typed(environment, monkeypatch, argv, expected):
    environment()
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr("dbdist.parallel.launch._launcher", lambda words: [])
    assert Launch.command("dbdist.train") == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python", "/x/bin/torchrun", "-m", "dbdist.train"], ["torchrun", "-m", "dbdist.train"]),
        (["python", "-m", "torch.distributed.run", "x.py"], ["torchrun", "x.py"]),
        (["python", "/x/accelerate", "launch", "x.py"], ["accelerate", "launch", "x.py"]),
        (["python", "-m", "accelerate.commands.launch", "x.py"], ["accelerate", "launch", "x.py"]),
        (["bash", "-c", "echo torchrun"], []),
        (["bash"], []),
        ([], []),
    ],
)
def test_a_launcher_is_known_by_its_first_words(words, expected):
    assert _launcher(words) == expected


def test_ranks_of_an_unknown_launcher_say_what_it_started(environment, monkeypatch):
    environment(RANK=0, WORLD_SIZE=2)
    monkeypatch.setattr(sys, "argv", ["/x/dbdist/train.py", "--seed", "1"])
    expected = "the launcher's command with: python -m dbdist.train --seed 1"
    assert Launch.command("dbdist.train") == expected


# -- the ranks of one start meet -------------------------------------------------------------------


@pytest.fixture
def store():
    return dist.HashStore()


def meet(store, world_size, *ranks, timeout_s=10.0):
    """What each of these ranks calls the start they meet for; the error of one that meets nobody.
    Each is a thread, as the store is this process's."""
    store.set_timeout(timedelta(seconds=timeout_s))

    def join(rank):
        try:
            return Launch(rank, world_size, rank, world_size)._meet(store, timeout_s)
        except (TopologyError, dist.DistStoreError) as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(join, ranks))


def test_every_start_has_a_name_of_its_own_in_a_store_that_stays(store):
    starts = [meet(store, 3, 0, 1, 2) for _ in range(3)]
    assert all(len(set(names)) == 1 and isinstance(names[0], str) for names in starts), starts
    assert len({names[0] for names in starts}) == 3


def test_starts_that_were_cut_short_do_not_confuse_the_next(store):
    assert isinstance(meet(store, 3, 1, timeout_s=0.2)[0], dist.DistStoreError)
    first, _ = meet(store, 3, 0, 2, timeout_s=0.5)
    assert str(first) == "rank 1 of 3 did not come within 0.5 s (parallel.timeout_s)"
    names = meet(store, 3, 0, 1, 2)
    assert len(set(names)) == 1
    assert isinstance(names[0], str)


def test_rank_0_names_the_ranks_it_waits_for(environment):
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment(RANK=0, WORLD_SIZE=3, MASTER_ADDR="127.0.0.1", MASTER_PORT=agent.port)
    environment(TORCHELASTIC_USE_AGENT_STORE=True)
    with pytest.raises(TopologyError, match=r"^ranks 1, 2 of 3 did not come within 0\.3 s"):
        Launch.from_environment().store(0.3)


def test_rank_0_without_an_agent_holds_the_store_and_tells_when_nobody_came(environment):
    environment(RANK=0, WORLD_SIZE=3, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    with pytest.raises(TopologyError, match=r"^rank 0 does not meet .* 1/3 clients joined"):
        Launch.from_environment().store(0.3)


def test_a_rank_that_reaches_nobody_says_where_it_looked(environment):
    environment(RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    with pytest.raises(TopologyError, match=r"^rank 1 does not meet .* at 127\.0\.0\.1:1: .+"):
        Launch.from_environment().store(1.0)

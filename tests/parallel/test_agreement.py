"""What ranks must have alike, on real ranks that have not."""

import re

import numpy as np
import pytest
import torch
from ranks import config_of, setup_of

from dbdist.data.sources import load_dataset
from dbdist.errors import Fault, TopologyError
from dbdist.parallel.agreement import digest_of, find_difference, flat
from dbdist.parallel.layout import Layout, layout_of
from dbdist.parallel.session import facts_of
from dbdist.parallel.topology import build_topology
from dbdist.training import setup
from dbdist.training.trainer import Trainer


def differ(rank, facts):
    topology = rank.join(Layout(3))
    return find_difference(facts[rank.launch.rank], range(topology.world_size))


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ([{"a": 1}] * 3, None),
        ([{"a": 1}, {"a": 1}, {"a": 2}], "rank 2 has a 2, rank 0 has 1"),
        ([{"a": "x"}, {"a": "y"}, {"a": "y"}], 'rank 0 has a "x", rank 1 has "y"'),
        ([{"a": 1, "b": 2}, {"a": 1}, {"a": 1, "b": 2}], None),
        ([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"c": 9}], "rank 1 has b 3, rank 0 has 2"),
        ([{"a": [1, None]}, {"a": (1, None)}, {"a": [1, 2]}], "rank 2 has a [1, 2], rank 0 has"),
    ],
)
def test_the_odd_rank_and_the_key_are_named(ranks, facts, told):
    found = ranks.run(3, differ, facts)
    assert len(set(found)) == 1
    assert found[0] == told if told is None else found[0].startswith(told)


def join_with(rank, options):
    config = config_of(*options[rank.launch.rank])
    layout = layout_of(config, rank.launch.world_size)
    try:
        topology = build_topology(layout, rank.launch, "cpu", 60.0, rank.store, facts_of(config))
        topology.barrier()  # else one leaves while the other still connects
    except TopologyError as error:
        return str(error)
    return None


def test_ranks_with_other_options_do_not_start(ranks):
    own = ["model.num_blocks=2", "model.num_layers=2"]
    told = ranks.run(2, join_with, (own, [*own, "train.lr=0.5"]))
    assert set(told) == {
        "rank 1 has train.lr 0.5, rank 0 has 0.01; start all ranks with the same options, code and "
        "data"
    }


def test_even_a_rank_that_wants_another_world_is_told_the_cause(ranks):
    options = ["model.num_layers=6", "model.num_blocks=2"]
    told = ranks.run(2, join_with, (options, [*options, "model.num_blocks=3"]))
    assert {text.partition(";")[0] for text in told} == {
        "rank 1 has model.num_blocks 3, rank 0 has 2"
    }


def test_what_belongs_to_a_node_may_differ(ranks):
    options = ["model.num_blocks=2", "model.num_layers=2", "data.root=here"]
    assert ranks.run(2, join_with, (options, [*options, "data.root=there"])) == [None, None]


def test_facts_hold_every_option_the_code_and_torch():
    facts = facts_of(config_of())
    assert facts["train.lr"] == 0.01
    assert facts["the version of torch"] == torch.__version__
    assert len(str(facts["the code of dbdist"])) == 64
    assert flat({"a": {"b": 1, "c": {"d": 2}}}) == {"a.b": 1, "a.c.d": 2}


def test_a_digest_sees_every_bit_and_name():
    tensors = {"a": torch.zeros(3), "b": torch.tensor(1, dtype=torch.int64)}
    digests = {digest_of(tensors), digest_of({"b": tensors["b"], "a": tensors["a"]})}
    assert len(digests) == 1, "in order of names"
    other = torch.zeros(3)
    other.numpy().view(np.uint8)[5] = 1
    digests |= {digest_of(tensors | {"a": other}), digest_of({"c": tensors["a"]})}
    assert len(digests) == 3


def train_with_drift(rank, options, drifting):
    """Trains; in step 3 one rank's copy of a weight changes by a bit."""
    config = config_of(*options)
    topology = rank.join(layout_of(config, rank.launch.world_size))
    topology.start_watch(60.0, lambda line: None)
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    trainer = Trainer(setup_of(config), topology, *data)
    step = trainer.train_step

    def drift(index):
        step(index)
        trainer.state.settle()  # what is still on its way would replace the bit
        if index == 2 and rank.launch.rank == drifting[0]:
            module = trainer.state.shared if drifting[1] else trainer.state.blocks[0].module
            weight = next(module.parameters()).detach().view(-1)[:1]
            weight.numpy().view(np.uint8)[2] ^= 1  # not the last: a step may round it away

    trainer.train_step = drift
    try:
        trainer.fit()
    except Fault as fault:
        return str(fault), trainer.step
    finally:
        topology.close()
    return None, trainer.step


@pytest.mark.parametrize(
    ("options", "drifting", "told"),
    [
        (("parallel.replicas=2",), (1, False), "rank 1 has block 0 "),
        (("parallel.replicas=2", "parallel.sync=never"), (3, True), "rank 3 has shared modules "),
        (("parallel.replicas=2",), None, None),
    ],
)
def test_drifting_weights_stop_the_run(ranks, tmp_path, options, drifting, told):
    own = ("model.num_blocks=2", "model.num_layers=2", "train.max_steps=8", f"run_dir={tmp_path}")
    options = (*own, "parallel.check_every=2", *options)
    results = ranks.run(4, train_with_drift, options, drifting or (None, False))
    results = [(fault and fault.partition("; blocks ")[0], step) for fault, step in results]
    assert len(set(results)) == 1
    fault, step = results[0]
    if told is None:
        assert (fault, step) == (None, 8)
        return
    assert fault.startswith("step 4: weights that must be alike are not: ")
    assert told in fault
    assert not list(tmp_path.glob("checkpoints/*/manifest.json"))


def test_drifting_shared_modules_are_found_among_all_ranks(ranks, tmp_path):
    """With sync: step the coordinator sends new ones every step: what differs is found before."""
    options = ("model.num_blocks=3", "train.max_steps=6", "parallel.check_every=1")
    results = ranks.run(3, train_with_drift, (*options, f"run_dir={tmp_path}"), (2, True))
    assert len(set(results)) == 1
    assert "step 3: weights that must be alike are not: rank 2 has shared modules" in results[0][0]


def train_on_other_data(rank, options):
    """Rank 1 has one label otherwise. Returns the error."""
    config = config_of(*options)
    topology = rank.join(layout_of(config, rank.launch.world_size))
    real = setup.load_dataset

    def load(*arguments):
        dataset = real(*arguments)
        dataset.labels[0] = (dataset.labels[0] + (rank.launch.rank == 1)) % 10
        return dataset

    setup.load_dataset = load
    try:
        setup.train(config, topology)
    except TopologyError as error:
        return str(error)
    finally:
        setup.load_dataset = real
    return None


def test_ranks_with_other_data_do_not_start(ranks, tmp_path):
    options = ("model.num_blocks=3", f"run_dir={tmp_path / 'run'}")
    told = ranks.run(3, train_on_other_data, options)
    assert len(set(told)) == 1
    assert re.match(r'rank 1 has the training set "\w{64}", rank 0 has "\w{64}"; start', told[0])
    assert not (tmp_path / "run").exists(), "nothing is half-written"


def describe_with_a_tensor_of_its_own(rank):
    """Copies of one block, of which rank 1 has a parameter more, as another code might."""
    config = config_of("model.num_blocks=1", "model.num_layers=1", "parallel.replicas=2")
    topology = rank.join(layout_of(config, 2))
    sets = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    state = Trainer(setup_of(config), topology, *sets).state
    if rank.launch.rank == 1:
        state.blocks[0].form["extra"] = torch.empty(2, device="meta")
    with pytest.raises(TopologyError) as caught:
        topology.check_agreement(state.describe_parameters())
    return str(caught.value)


def test_a_copy_with_a_tensor_more_is_refused(ranks):
    for told in ranks.run(2, describe_with_a_tensor_of_its_own):
        assert re.search(r"block 0: number of tensors", told)

"""Training on several nodes, simulated: where ranks stand changes nothing that they learn."""

from dataclasses import replace

from ranks import config_of, setup_of

from dbdist.data.sources import load_dataset
from dbdist.parallel.layout import layout_of
from dbdist.training.trainer import Trainer


def weights_of_rank(rank, nodes):
    """(place, weights by name) after training."""
    config = config_of(
        "model.num_blocks=2", "model.num_layers=2", "parallel.replicas=2", "train.max_steps=2"
    )
    rank.launch = replace(rank.launch, node=nodes[rank.launch.rank])
    topology = rank.join(layout_of(config, 4))
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    trainer = Trainer(setup_of(config), topology, *data)
    trainer.fit()
    return topology.place, {k: v.tolist() for k, v in trainer.state.parameters.items()}


def test_what_is_learned_does_not_depend_on_the_nodes(ranks):
    """Block 0's copies are ranks 0 and 3, of two nodes."""
    block_by_block = dict(ranks.run(4, weights_of_rank, (0, 0, 0, 0)))
    answers = ranks.run(4, weights_of_rank, (0, 1, 1, 1))
    assert [place for place, _ in answers] == [(0, 0), (1, 0), (1, 1), (0, 1)]
    assert dict(answers) == block_by_block

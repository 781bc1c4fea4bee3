"""A rank never holds another block: every tensor that lives at any moment of set-up and training is
counted."""

import weakref

import pytest
import torch
from ranks import config_of, setup_of
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbdist.checkpoint.manifest import find_checkpoint
from dbdist.data.sources import load_dataset
from dbdist.inference.load_models import load_block
from dbdist.parallel.layout import Layout, layout_of
from dbdist.parallel.topology import Topology
from dbdist.sampling.evaluation import evaluate
from dbdist.training.trainer import Trainer

# Blocks of different sizes, each of several layers, so that a foreign one would show.
LAYERS = [2, 4, 6]
OPTIONS = (
    "model.num_layers=12",
    f"model.layers_per_block={LAYERS}",
    "model.hidden_size=96",
    "model.num_heads=4",
    "train.max_steps=1",
)
LAYER_BYTES = 4 * 12 * 96 * 96


class LiveBytes(TorchDispatchMode):
    """Bytes of all real (not meta) storages made by torch operators that are alive, and their
    peak."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            is_real = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
            if is_real and value.device.type != "meta":  # a DTensor's own part is counted itself
                self._count(value.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if key in self._known or storage.nbytes() == 0:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self._known.discard(key)
        self.live -= size


def peaks_of_rank(rank, options):
    config = config_of(*options)
    topology = rank.join(layout_of(config, rank.launch.world_size))
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    with LiveBytes() as setup:
        trainer = Trainer(setup_of(config), topology, *data)
    parameters = sum(p.numel() for o in trainer.state.blocks for p in o.module.parameters())
    trainer.fit()
    names = sorted(
        {n.split(".")[1] for o in trainer.state.blocks for n, _ in o.module.named_parameters()}
    )
    return setup.peak, parameters, names


def test_setting_up_a_rank_never_allocates_more_than_its_own_block(ranks, tmp_path):
    results = ranks.run(3, peaks_of_rank, [f"run_dir={tmp_path}", *OPTIONS])
    first = 0
    for num_layers, (peak, parameters, names) in zip(LAYERS, results, strict=True):
        assert names == sorted(str(i) for i in range(first, first + num_layers))
        first += num_layers
        assert LAYER_BYTES * num_layers < 4 * parameters < 1.2 * LAYER_BYTES * num_layers
        # Its own weights, the shared modules and the one tensor being drawn: less than any other
        # block more.
        assert 4 * parameters <= peak < 4 * parameters + 1.9 * LAYER_BYTES
    options = [f"run_dir={tmp_path}/d", "parallel.coordinator=dedicated", *OPTIONS]
    peak, parameters, names = ranks.run(4, peaks_of_rank, options)[0]
    assert (parameters, names) == (0, [])
    assert peak < LAYER_BYTES, "a dedicated coordinator holds no block at all"


@pytest.mark.slow
def test_fsdp_never_has_a_whole_block_on_a_rank(ranks, tmp_path):
    """Not in set-up either: half of it on each of two, and the one tensor that is being drawn."""
    options = [f"run_dir={tmp_path}", *OPTIONS, "model.num_blocks=1", "model.layers_per_block=null"]
    whole = ranks.run(1, peaks_of_rank, options)[0]
    split = [*options, "parallel.replicas=2", "parallel.replica_engine=fsdp"]
    for peak, parameters, _ in ranks.run(2, peaks_of_rank, split):
        assert parameters == whole[1]
        assert 2 * parameters <= peak < 2 * parameters + 1.9 * LAYER_BYTES


def test_one_process_evaluates_with_one_block_resident(ranks, tmp_path):
    options = [f"run_dir={tmp_path}", *OPTIONS]
    ranks.run(3, peaks_of_rank, options)
    config = config_of(*options)
    data, checkpoint = load_dataset(config.data, "test"), find_checkpoint(tmp_path)
    assert checkpoint is not None
    setup = setup_of(config)
    models = []
    resident = []

    def load(block):
        model = load_block(setup, checkpoint, block, torch.device("cpu"))
        models.append(weakref.ref(model))
        resident.append(sum(reference() is not None for reference in models))
        return model

    evaluate(setup, Topology(Layout(1)), data, load, 1)
    assert resident == [1, 1, 1], "the block before is gone when the next one is loaded"

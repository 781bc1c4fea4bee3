"""The order of samples, whatever the replicas, the workers and the step of a resume."""

import multiprocessing
import time
from typing import Any

import pytest
import torch

from dbdist.data.base import Dataset
from dbdist.data.images import ImagesInMemory
from dbdist.data.loader import BatchStream, num_test_samples, test_batches
from dbdist.data.options import AugmentOptions, ImageOptions
from dbdist.data.sources import dataset_spec

AUGMENT = AugmentOptions(crop_padding=2, flip=True, randaugment_ops=1)


def numbered(n: int = 10, augment: AugmentOptions | None = None) -> ImagesInMemory:
    """Random images whose labels are their indices."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return ImagesInMemory(dataset_spec(ImageOptions()), images, list(range(n)), augment)


def stream(dataset: Dataset, batch_size: int = 4, block: int = 0, **values: Any) -> BatchStream:
    return BatchStream(dataset, batch_size, seed=1, block=block, **values)


def assert_same(ones: Any, others: Any) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_each_epoch_holds_every_sample_once_across_the_seams() -> None:
    seen = [int(i) for batch in stream(numbered(), num_steps=10) for i in batch["label"]]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_batch_may_be_larger_than_the_set() -> None:
    indices = stream(numbered(3), batch_size=12).indices_of_step(1)
    assert sorted(indices) == sorted([*range(3)] * 4)


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_parts_of_replicas_join_to_the_batch_of_one(num_replicas: int) -> None:
    dataset = numbered(augment=AUGMENT)
    whole = list(stream(dataset, num_steps=6))
    parts = [
        list(stream(dataset, replica=r, num_replicas=num_replicas, num_steps=6))
        for r in range(num_replicas)
    ]
    joined = [
        {name: torch.cat([batch[name] for batch in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_batch_size_that_replicas_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 4 is not a multiple of num_replicas 3"):
        stream(numbered(), num_replicas=3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resumed_stream_equals_the_straight_one(num_workers: int) -> None:
    dataset = numbered(augment=AUGMENT)
    straight = list(stream(dataset, num_steps=9))
    resumed = list(stream(dataset, start_step=4, num_steps=9, num_workers=num_workers))
    assert_same(straight[4:], resumed)
    assert list(stream(dataset, start_step=9, num_steps=9)) == []


def test_far_start_replays_nothing() -> None:
    started = time.monotonic()
    far = stream(numbered(), start_step=10**12)
    next(far)
    assert time.monotonic() - started < 1
    assert far.indices_of_step(10**12) == stream(numbered()).indices_of_step(10**12)


def test_blocks_and_seeds_shuffle_differently() -> None:
    dataset = numbered(50)
    orders = [stream(dataset, 50, block=b).indices_of_step(0) for b in (0, 1)]
    orders.append(BatchStream(dataset, 50, seed=2, block=0).indices_of_step(0))
    assert len({tuple(order) for order in orders}) == 3


def test_same_sample_is_augmented_anew_each_epoch() -> None:
    keys = stream(numbered(augment=AUGMENT), batch_size=20).keys_of_step(0)
    assert len({key[1] for key in keys if isinstance(key, tuple)}) == 20
    assert stream(numbered(), batch_size=20).keys_of_step(0)[0] in range(10)


def workers() -> list[Any]:
    """The loaders' processes; those of `ranks.RankPool`, which may be there, are spawned."""
    spawned = multiprocessing.get_context("spawn").Process
    return [p for p in multiprocessing.active_children() if not isinstance(p, spawned)]


def test_workers_give_the_same_bits_and_end_with_the_stream() -> None:
    dataset = numbered(augment=AUGMENT)
    before = torch.get_rng_state()
    with_workers = stream(dataset, num_workers=2)
    without = stream(dataset)
    assert_same([next(with_workers) for _ in range(8)], [next(without) for _ in range(8)])
    assert len(workers()) == 2
    with_workers.close()
    assert workers() == []
    with pytest.raises(StopIteration):
        next(with_workers)
    assert torch.equal(before, torch.get_rng_state())


def test_workers_end_after_the_last_step() -> None:
    assert len(list(stream(numbered(), num_steps=3, num_workers=1))) == 3
    assert workers() == []


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("num_shards", [1, 2, 5])
@pytest.mark.parametrize(("drop_last", "total"), [(False, 10), (True, 8)])
def test_shards_hold_every_test_sample_once(
    num_workers: int, num_shards: int, drop_last: bool, total: int
) -> None:
    dataset = numbered()
    batches = {
        i: batch["label"].tolist()
        for shard in range(num_shards)
        for batch, i in test_batches(dataset, 4, shard, num_shards, drop_last, num_workers)
        if i % num_shards == shard
    }
    assert [label for i in sorted(batches) for label in batches[i]] == list(range(total))
    assert num_test_samples(dataset, 4, drop_last) == total
    assert workers() == []

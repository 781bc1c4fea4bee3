"""Block-parallel training on real ranks against an independent single-process computation, in
float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import config_of, setup_of

from dbdist import seeds
from dbdist.build import build_process
from dbdist.data.loader import BatchStream
from dbdist.data.sources import load_dataset
from dbdist.parallel.layout import Layout, layout_of
from dbdist.processes.gaussian import NoiseSchedule
from dbdist.training.trainer import Trainer

STEPS = 5


def train_rank(rank, options, steps=None):
    """Trains on this rank; returns its weights by name and what crossed the wire."""
    torch.set_default_dtype(torch.float64)
    config = config_of(*options)
    topology = rank.join(layout_of(config, rank.launch.world_size))
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    trainer = Trainer(setup_of(config), topology, *data)
    evaluation = trainer.fit()
    weights = {k: v.tolist() for k, v in trainer.state.parameters.items()}
    return weights, dict(topology.meter.received), evaluation


def tensors(weights):
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in weights.items()}


def assert_equal(own, expected, atol):
    assert own.keys() == expected.keys()
    for name in own:
        torch.testing.assert_close(
            own[name], expected[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


class HandAdamW:
    """AdamW written out (decoupled weight decay, Kingma & Ba with bias correction)."""

    def __init__(self, parameters, lr, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8):
        self.parameters, self.lr, self.weight_decay, self.betas, self.eps = (
            parameters,
            lr,
            weight_decay,
            betas,
            eps,
        )
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]
        self.t = 0

    @torch.no_grad()
    def step(self, grads):
        self.t += 1
        b1, b2 = self.betas
        for p, g, m, v in zip(self.parameters, grads, self.m, self.v, strict=True):
            p.mul_(1 - self.lr * self.weight_decay)
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            p.sub_(self.lr * (m / (1 - b1**self.t)) / ((v / (1 - b2**self.t)).sqrt() + self.eps))


def loss_of(shared, block, schedule: NoiseSchedule, images, labels, sigma, noise):
    """Cross-entropy of one block, its equations written out."""
    table = shared.label_table
    z0 = table[labels] / table[labels].norm(dim=-1, keepdim=True)
    z = z0 + sigma[:, None] * noise
    s2, d2 = sigma[:, None] ** 2, schedule.sigma_data**2
    level = shared.embed_noise(sigma.log() / 4)
    tokens, _ = shared.embed(images, z / (s2 + d2).sqrt(), sigma.log() / 4)
    out = shared.norm(block(tokens, level))[:, 0]
    state = d2 / (s2 + d2) * z + sigma[:, None] * schedule.sigma_data / (s2 + d2).sqrt() * out
    shift, scale = shared.adaln(level)
    logits = shared.head(state * (1 + scale) + shift)
    return -F.log_softmax(logits, -1)[torch.arange(len(labels)), labels].mean()


def single_process(options, sync):
    """The B losses, clipped gradients, averages and steps of block-parallel training, one after the
    other. Returns each block's weights together with its copy of the shared modules."""
    config = config_of(*options)
    train_set = load_dataset(config.data, "train")
    setup, schedule = setup_of(config), build_process(config).partition
    cpu, num_blocks, batch_size = torch.device("cpu"), config.num_blocks, config.train.batch_size
    copies = num_blocks if sync in ("never", "every") else 1
    shared = [setup.shared(config.seed, cpu) for _ in range(copies)]
    blocks = [setup.block(b, config.seed, cpu) for b in range(num_blocks)]
    streams = [BatchStream(train_set, batch_size, config.seed, b) for b in range(num_blocks)]
    of_shared = [HandAdamW(list(s.parameters()), config.train.lr) for s in shared]
    of_block = [HandAdamW(list(b.parameters()), config.train.lr) for b in blocks]
    for step in range(config.train.max_steps):
        shared_grads = []
        for b in range(num_blocks):
            own = shared[b % copies]
            indices = streams[b].indices_of_step(step)
            images, labels = train_set.__getitems__(indices).values()
            sigma = schedule.sample_level(
                b, batch_size, seeds.generator(config.seed, "sigma", b, step)
            )
            generator = seeds.generator(config.seed, "noise", b, step)
            noise = torch.randn(batch_size, config.model.hidden_size, generator=generator)
            loss = loss_of(own, blocks[b], schedule, images.double(), labels, sigma, noise)
            parameters = [*blocks[b].parameters(), *own.parameters()]
            grads = torch.autograd.grad(loss, parameters)
            norm = math.sqrt(sum(g.square().sum().item() for g in grads))
            grads = [g * min(1.0, config.train.clip_norm / (norm + 1e-6)) for g in grads]
            count = len(of_block[b].parameters)
            of_block[b].step(grads[:count])
            shared_grads.append(grads[count:])
        if copies == 1:
            of_shared[0].step([sum(g) / num_blocks for g in zip(*shared_grads, strict=True)])
        else:
            for optimizer, grads in zip(of_shared, shared_grads, strict=True):
                optimizer.step(grads)
        if sync == "every" and (step + 1) % config.parallel.sync_every == 0:
            with torch.no_grad():
                for same in zip(*(s.parameters() for s in shared), strict=True):
                    mean = sum(same) / num_blocks
                    for parameter in same:
                        parameter.copy_(mean)
    return [
        {f"shared.{n}": p.detach() for n, p in shared[b % copies].named_parameters()}
        | {n: p.detach() for n, p in blocks[b].named_parameters()}
        for b in range(num_blocks)
    ]


def options_for(run_dir, sync, *more):
    return [
        f"run_dir={run_dir}",
        f"train.max_steps={STEPS}",
        f"parallel.sync={sync}",
        "data.name=digits",
        *more,
    ]


@pytest.mark.parametrize(
    ("sync", "more"),
    [
        ("step", ()),
        ("every", ("parallel.sync_every=1",)),
        ("every", ("parallel.sync_every=2",)),
        ("never", ()),
    ],
)
def test_three_ranks_equal_the_single_process_computation(ranks, tmp_path, float64, sync, more):
    options = options_for(tmp_path, sync, *more)
    results = ranks.run(3, train_rank, options)
    for (weights, _, _), expected in zip(results, single_process(options, sync), strict=True):
        assert_equal(tensors(weights), expected, atol=1e-10)


@pytest.mark.parametrize("sync", ["step", "every"])
def test_dedicated_and_colocated_coordinator_agree_bit_for_bit(ranks, tmp_path, sync):
    more = ("parallel.sync_every=2", "train.ema_decay=0.5", "train.schedule=cosine")
    colocated = ranks.run(3, train_rank, options_for(tmp_path / "c", sync, *more))
    options = options_for(tmp_path / "d", sync, *more, "parallel.coordinator=dedicated")
    dedicated = ranks.run(4, train_rank, options)
    for (own, _, evaluation), (other, _, expected) in zip(dedicated[1:], colocated, strict=True):
        assert_equal(tensors(own), tensors(other), atol=0)
        assert evaluation.after_block == expected.after_block
    assert not any(name.startswith("layers") for name in dedicated[0][0])


def train_alone(rank, options, block):
    """Block `block` of three, trained by a process that has never met another."""
    torch.set_default_dtype(torch.float64)
    config = config_of(*options)
    data = load_dataset(config.data, "train"), load_dataset(config.data, "test")
    trainer = Trainer(setup_of(config), rank.join(Layout(1)), *data, blocks=[block])
    for step in range(trainer.max_steps):
        trainer.train_step(step)
    return {k: v.tolist() for k, v in trainer.state.parameters.items()}


def test_never_equals_separate_runs_bit_for_bit_and_moves_no_byte(ranks, tmp_path):
    options = options_for(tmp_path, "never")
    together = ranks.run(3, train_rank, options)
    for block, (weights, received, _) in enumerate(together):
        alone = ranks.run(1, train_alone, options, block)[0]
        assert_equal(tensors(weights), tensors(alone), atol=0)
        assert received.get("shared", 0) == received.get("replica", 0) == 0


def test_only_shared_modules_cross_the_wire_while_training(ranks, tmp_path):
    results = ranks.run(3, train_rank, options_for(tmp_path, "step"))
    shared_bytes = 8 * sum(
        len(torch.tensor(v).flatten()) for k, v in results[0][0].items() if k[:6] == "shared"
    )
    for rank, (_, received, _) in enumerate(results):
        senders = 2 if rank == 0 else 1
        assert received["shared"] == senders * STEPS * shared_bytes
        assert received.get("replica", 0) == 0


def test_replicas_equal_one_process_per_block_with_the_joined_batch(ranks, tmp_path):
    more = ("model.num_blocks=2", "model.num_layers=2")
    single = ranks.run(2, train_rank, options_for(tmp_path / "1", "step", *more))
    options = options_for(tmp_path / "2", "step", *more, "parallel.replicas=2")
    replicated = ranks.run(4, train_rank, options)
    for rank, (weights, received, evaluation) in enumerate(replicated):
        assert_equal(tensors(weights), tensors(single[rank // 2][0]), atol=1e-10)
        assert weights == replicated[rank // 2 * 2][0], "replicas of a block are bit-identical"
        assert received["replica"] > 0
        assert evaluation.value == single[0][2].value


def test_gradient_accumulation_equals_the_whole_batch(ranks, tmp_path):
    whole = ranks.run(3, train_rank, options_for(tmp_path / "1", "step"))
    parts = ranks.run(
        3, train_rank, options_for(tmp_path / "2", "step", "train.accumulation_steps=4")
    )
    for (own, _, _), (expected, _, _) in zip(parts, whole, strict=True):
        assert_equal(tensors(own), tensors(expected), atol=1e-10)


def test_batches_and_noise_of_a_block_do_not_depend_on_the_topology():
    train_set = load_dataset(config_of().data, "train")
    joined = BatchStream(train_set, 8, 0, 1).indices_of_step(3)
    parts = [BatchStream(train_set, 8, 0, 1, r, 2).indices_of_step(3) for r in range(2)]
    assert parts[0] + parts[1] == joined

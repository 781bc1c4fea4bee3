"""The chain on real ranks equals the single-process sampler, in float64."""

import pytest
import torch
from ranks import config_of, setup_of

from dbdist.build import build_setup
from dbdist.data.sources import load_dataset
from dbdist.parallel.chain import Chain
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.sampling.evaluation import chain_answers, evaluate, process_answers
from dbdist.sampling.sampler import Rows, build_sampler

SAMPLES = 50  # not a multiple of the batch or of the micro-batch: the last ones are partial


def test_set(config):
    """The first images of digits' test set."""
    data = load_dataset(config.data, "test")
    data.labels = data.labels[:SAMPLES]
    return data


test_set.__test__ = False


def build_denoiser(config, spec, block):
    """A block whose weights are all random, so that nothing is zero by initialisation."""
    setup, cpu = build_setup(config, spec), torch.device("cpu")
    shared, module = setup.shared(0, cpu), setup.block(block, 0, cpu)
    for part, seed in ((shared, 100), (module, block)):
        generator = torch.Generator().manual_seed(seed)
        for parameter in part.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
    return setup.denoiser(shared, module).eval()


@torch.no_grad()
def answers_of_rank(rank, layout, cases):
    torch.set_default_dtype(torch.float64)
    topology = rank.join(layout)
    results = []
    for options in cases:
        config = config_of(*options)
        data = test_set(config)
        if topology.block is None:
            results.append(None)
            continue
        denoiser = build_denoiser(config, data.spec, topology.block)
        answers = list(chain_answers(setup_of(config), topology, data, denoiser))
        results.append(
            (
                torch.cat([a.answer for a in answers]),
                torch.cat([a.batch["label"] for a in answers]),
            )
        )
    return results


@torch.no_grad()
def whole_sampler(config):
    """Every block in turn on all images at once, written out; answers after each block and the
    last."""
    data = test_set(config)
    setup = setup_of(config)
    sampler = build_sampler(setup)
    images, labels = data.__getitems__(list(range(SAMPLES))).values()
    z = sampler.initial_state(setup.task, Rows(0, SAMPLES), torch.float64)
    draws, grid = config.sampler.num_draws, torch.tensor(sampler.steps.levels, dtype=torch.float64)
    images = images.double().repeat_interleave(draws, dim=0)
    owners = setup.process.partition.steps(len(grid), config.sampler.sigma_start).owners
    answers = {}
    for step, block in enumerate(owners):
        denoiser = build_denoiser(config, data.spec, block)
        table = torch.nn.functional.normalize(denoiser.shared.label_table, dim=-1)
        sigma = grid[step].expand(len(z))
        logits = denoiser(images, z, sigma)
        if config.sampler.guidance_scale:
            free = denoiser(torch.zeros_like(images), z, sigma)
            logits = free + config.sampler.guidance_scale * (logits - free)
        probabilities = logits.softmax(-1)
        answers[block] = probabilities.reshape(SAMPLES, draws, -1).mean(1)
        if step + 1 < len(grid):
            denoised = probabilities @ table
            z = denoised + grid[step + 1] / grid[step] * (z - denoised)
    so_far = {}
    for block in range(3):
        read = [answers[b] for b in setup.task.readers if b <= block]
        so_far[block] = torch.stack(read or [answers[block]]).mean(0)
    return so_far, labels


CASES = [
    [f"sampler.num_steps={k}", f"sampler.guidance_scale={g}", f"sampler.start={start}",
     f"eval.micro_batch_size={micro}", "eval.batch_size=32"]
    for k in (3, 6, 13)
    for g, start in ((0.0, "noise"), (1.5, "mean"))
    for micro in (1, 7, 50)
] + [
    ["sampler.start=noise", "sampler.num_draws=3", "sampler.readout=all",
     "eval.micro_batch_size=7"],
    ["sampler.readout=[0,1]", "eval.micro_batch_size=16"],
    ["sampler.readout=[1]", "sampler.start=noise"],
    ["sampler.readout=last", "sampler.start=noise"],
    ["sampler.sigma_start=5", "eval.batch_size=20", "eval.micro_batch_size=64"],
]  # fmt: skip


def test_the_chain_equals_the_single_process_sampler(ranks, float64):
    by_rank = ranks.run(3, answers_of_rank, Layout(3), CASES)
    for case, options in enumerate(CASES):
        config = config_of(*options)
        after, labels = whole_sampler(config)
        for block in range(3):
            own, own_labels = by_rank[block][case]
            assert own_labels.tolist() == labels.tolist()
            torch.testing.assert_close(
                own, after[block], rtol=0, atol=1e-10, msg=lambda m, o=options: f"{o}: {m}"
            )


@pytest.mark.parametrize("options", [CASES[4], CASES[-3], CASES[-2]])
def test_one_process_equals_the_sampler_with_one_block_resident(options, float64):
    config = config_of(*options)
    data = test_set(config)
    after, _ = whole_sampler(config)
    resident = []

    def load(block):
        resident.append(block)
        return build_denoiser(config, data.spec, block)

    found = {b: [] for b in range(3)}
    with torch.no_grad():
        for block, answers in process_answers(setup_of(config), Topology(Layout(1)), data, load):
            found[block].append(answers.answer)
    assert resident == [0, 1, 2]
    for block in range(3):
        torch.testing.assert_close(torch.cat(found[block]), after[block], rtol=0, atol=1e-10)


def scores_of_rank(rank, layout, options):
    torch.set_default_dtype(torch.float64)
    topology = rank.join(layout)
    config = config_of(*options)
    data = test_set(config)
    return evaluate(
        setup_of(config), topology, data, lambda b: build_denoiser(config, data.spec, b), 7
    )


@pytest.mark.parametrize("layout", [Layout(3), Layout(3, 1, "dedicated"), Layout(2, 2)])
def test_accuracy_does_not_depend_on_the_topology_and_counts_the_last_partial_batch(
    ranks, float64, layout
):
    options = [f"model.num_blocks={layout.num_blocks}", "model.num_layers=6", "eval.batch_size=16",
               "eval.micro_batch_size=7", "sampler.start=noise"]  # fmt: skip
    expected = scores_of_process(options)
    for evaluation in ranks.run(layout.world_size, scores_of_rank, layout, options):
        assert evaluation.num_samples == SAMPLES
        assert evaluation.value == expected.value
        assert evaluation.after_block == expected.after_block
        assert evaluation.world_size == layout.world_size
    dropped = scores_of_process([*options, "eval.drop_last=true"])
    assert dropped.num_samples == 48


def scores_of_process(options):
    config = config_of(*options)
    data = test_set(config)
    return evaluate(
        setup_of(config),
        Topology(Layout(1)),
        data,
        lambda b: build_denoiser(config, data.spec, b),
        7,
    )


def test_a_micro_batch_is_read_before_the_next_one_is_worked_on():
    """So a rank keeps one of them, however large the test set is."""
    events = []

    def work(i, states):
        events.append(f"work {i}")
        return states

    chain = Chain(Topology(Layout(1)))
    for i in chain.run([2, 2, 1], (3,), torch.float32, lambda i: torch.zeros(2, 3), work):
        events.append(f"read {i}")
    assert events == ["work 0", "read 0", "work 1", "read 1", "work 2", "read 2"]

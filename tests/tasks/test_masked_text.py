"""Masked text: its bound against exact laws, its gradients, and texts that the chain writes."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact_texts import Letters, MarkovText, denoiser_of
from scipy import integrate, stats
from torch import nn

from dbdist import seeds
from dbdist.build import Setup
from dbdist.config.parse import parse_config
from dbdist.data.images import DatasetSpec
from dbdist.errors import ConfigError
from dbdist.parallel.layout import Layout
from dbdist.parallel.topology import Topology
from dbdist.processes.gaussian import Gaussian, NoiseSchedule
from dbdist.processes.masking import MASK, MaskedShares, Masking
from dbdist.processes.options import MaskingSamplerOptions
from dbdist.sampling.evaluation import evaluate
from dbdist.sampling.sampler import Rows, Sampler
from dbdist.tasks.base import DenoisingLoss, draws_of_step
from dbdist.tasks.masked_text import NUM_BANDS, BoundFigures, MaskedText, TextRequests
from dbdist.tasks.options import MaskedTextOptions

P = np.array([0.5, 0.3, 0.15, 0.05])
CHAIN = MarkovText(
    [[0.7, 0.1, 0.1, 0.1], [0.05, 0.8, 0.1, 0.05], [0.3, 0.1, 0.1, 0.5], [0.4, 0.4, 0.1, 0.1]]
)
CUTS = [{}, {"schedule": "cosine"}, {"bits": (0.1, 0.2, 0.3, 0.3)}]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unigram(z):
    return torch.from_numpy(np.log(P)).expand(*z.shape, 4)


def wrong(z):
    """Some denoiser that sees all visible tokens and is far from any truth."""
    places = torch.arange(z.shape[1]).double()
    seen = ((z + 1) * (places + 1)).sum(dim=1, keepdim=True) / z.shape[1]
    return torch.sin(seen[..., None] + places[:, None] + torch.arange(4)) * 1.5


def measured(denoiser, texts, batch_size=256, seed=0, name="bits_per_char"):
    """What an evaluation says, micro-batch by micro-batch."""
    figures, num_blocks = BoundFigures(name), denoiser.process.partition.num_blocks
    totals = torch.zeros(num_blocks, figures.size, dtype=torch.float64)
    for block, (i, rows) in itertools.product(
        range(num_blocks), enumerate(texts.split(batch_size))
    ):
        generator = seeded(1000 * seed + 100 * block + i)
        totals[block] += figures.measure(denoiser, {"tokens": rows}, block, generator)
    return figures.result(totals)


# -- the bound ------------------------------------------------------------------------------------


def test_the_bound_of_the_exact_unigram_model_is_the_entropy_and_each_third_has_a_third():
    texts = torch.from_numpy(np.random.default_rng(0).choice(4, (2000, 32), p=P))
    found = measured(denoiser_of(unigram, 3), texts)
    entropy, error = -(P * np.log2(P)).sum(), found["bits_per_char_stderr"]
    assert 0 < error < 0.02
    assert abs(found["bits_per_char"] - entropy) < 3 * error
    np.testing.assert_allclose(found["bits_per_block"], entropy / 3, atol=3 * error)
    np.testing.assert_allclose(found["bits_by_level"], entropy / NUM_BANDS, atol=3 * error)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_the_bound_of_the_exact_model_of_a_markov_chain_is_its_entropy(num_blocks, cut):
    texts = CHAIN.draw(1500, 12)
    found = measured(denoiser_of(CHAIN.log_p, num_blocks, **cut), texts)
    error = found["bits_per_char_stderr"]
    assert error < 0.04
    assert abs(found["bits_per_char"] - CHAIN.entropy(12)) < 3 * error


@pytest.mark.parametrize("cut", CUTS)
def test_the_parts_of_blocks_and_of_bands_add_up_to_the_bound_of_one_block(cut):
    texts = CHAIN.draw(3000, 9)
    whole = measured(denoiser_of(wrong), texts)
    parts = measured(denoiser_of(wrong, 4, **cut), texts, seed=1)
    error = math.hypot(whole["bits_per_char_stderr"], parts["bits_per_char_stderr"])
    assert abs(whole["bits_per_char"] - parts["bits_per_char"]) < 3 * error
    for found in (whole, parts):
        assert sum(found["bits_per_block"]) == pytest.approx(found["bits_per_char"], rel=1e-12)
        assert sum(found["bits_by_level"]) == pytest.approx(found["bits_per_char"], rel=1e-12)


def time_integral(text, log_p, schedule):
    """MD4 (2406.04329) equation 5 in bits per token, tokens masked one by one.

    int over time of -alpha' / (1 - alpha) E[summed cross-entropy of masked tokens], by quadrature
    over all 2^T masks.
    """
    length = len(text)
    masks = torch.tensor(list(itertools.product([False, True], repeat=length)))
    rows = text.expand(len(masks), -1)
    p = log_p(torch.where(masks, MASK, rows)).log_softmax(dim=-1)
    nats = -(p.gather(-1, rows[..., None]).squeeze(-1) * masks).sum(dim=1).numpy()
    count = masks.sum(dim=1).numpy()

    def integrand(time):
        share = time if schedule == "linear" else math.cos(math.pi / 2 * (1 - time))
        slope = 1 if schedule == "linear" else math.pi / 2 * math.sin(math.pi / 2 * (1 - time))
        return slope / share * (share**count * (1 - share) ** (length - count) * nats).sum()

    return integrate.quad(integrand, 1e-12, 1)[0] / length / math.log(2)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_fixed_count_bound_is_the_integral_over_time_of_either_schedule(schedule):
    text = torch.tensor([0, 2, 1, 3, 0])
    found = measured(denoiser_of(wrong, 3, schedule=schedule), text.expand(6000, -1), 6000)
    exact = [time_integral(text, wrong, kind) for kind in ("linear", "cosine")]
    assert exact[0] == pytest.approx(exact[1], rel=1e-6)
    assert found["bits_per_char_stderr"] < 0.01 * exact[0]
    assert abs(found["bits_per_char"] - exact[0]) < 3 * found["bits_per_char_stderr"]


def test_the_standard_error_covers_the_spread_of_repetitions():
    texts = CHAIN.draw(200, 12)
    repeated = [measured(denoiser_of(wrong, 3), texts, seed=seed) for seed in range(30)]
    spread = np.std([found["bits_per_char"] for found in repeated])
    error = repeated[0]["bits_per_char_stderr"]
    assert 0.1 * error < spread < error


def test_bits_measured_by_level_cut_blocks_of_equal_bits():
    texts = CHAIN.draw(3000, 12)
    even = measured(denoiser_of(CHAIN.log_p, 3), texts)
    bits = tuple(even["bits_by_level"])
    cut = measured(denoiser_of(CHAIN.log_p, 3, bits=bits), texts, seed=1)
    uneven = np.ptp(even["bits_per_block"])
    assert uneven > 0.15
    assert np.ptp(cut["bits_per_block"]) < 0.2 * uneven


def test_figures_are_named_after_the_unit_and_json_holds_them():
    names = {"character": "bits_per_char", "byte": "bits_per_byte", "token": "bits_per_token"}
    for unit, name in names.items():
        task = MaskedText(Letters(4, 12, unit))
        assert (task.main.name, task.main.is_higher_better) == (name, False)
        (figures,) = task.figures()
        texts = CHAIN.draw(5, 12)
        found = measured(denoiser_of(wrong, 2), texts, name=figures.name)
        assert set(found) == {name, f"{name}_stderr", "bits_per_block", "bits_by_level"}
        assert json.loads(json.dumps(found)) == found


# -- training -------------------------------------------------------------------------------------


class Network(nn.Module):
    """A small trainable denoiser, in the place of a text model's shared modules."""

    def __init__(self, num_symbols, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(num_symbols + 1, width)
        self.mix = nn.Conv1d(width, width, 5, padding=2)
        self.head = nn.Linear(width, num_symbols)

    def embed(self, condition, z, level_N):
        inputs = self.table(torch.where(z == MASK, self.table.num_embeddings - 1, z))
        return self.mix(inputs.mT).mT.tanh(), None

    def output(self, tokens, combine, context):
        self.raw = self.head(tokens)
        return combine(self.raw)


def objective_of(length=10, num_blocks=3):
    task, denoiser = MaskedText(Letters(4, length)), denoiser_of(None, num_blocks)
    denoiser.shared = Network(4)
    return DenoisingLoss(denoiser, task)


def draws_of(objective, block, num_samples, step=0):
    return draws_of_step(
        objective.task,
        objective.denoiser.process,
        condition_dropout=0.0,
        seed=0,
        block=block,
        step=step,
        num_samples=num_samples,
    )


def test_the_loss_is_the_mean_of_masked_tokens_cross_entropy_and_visible_ones_have_no_gradient():
    objective, texts = objective_of(), CHAIN.draw(32, 10)
    draws = draws_of(objective, 1, 32)
    loss = objective({"tokens": texts}, draws)
    z = objective.denoiser.process.corrupt(texts, draws.level_N, draws.corruption)
    masked, raw = z == MASK, objective.denoiser.shared.raw
    nats = [nn.functional.cross_entropy(raw[i, masked[i]], texts[i, masked[i]]) for i in range(32)]
    expected = torch.stack(nats)
    torch.testing.assert_close(loss.value, expected.mean())
    torch.testing.assert_close(loss.per_sample["bits_per_char"], expected.detach() / math.log(2))
    raw.retain_grad()
    loss.value.backward()
    assert raw.grad[~masked].eq(0).all()
    assert raw.grad[masked].ne(0).any(dim=-1).all()


def test_any_cut_of_a_batch_has_the_same_draws_and_losses():
    objective, texts = objective_of(), CHAIN.draw(12, 10)
    draws = draws_of(objective, 2, 12)
    assert draws.corruption.dtype == torch.float64
    whole = objective({"tokens": texts}, draws).per_sample["bits_per_char"]
    parts = [
        objective({"tokens": texts[a:b]}, draws.rows(a, b)).per_sample["bits_per_char"]
        for a, b in ((0, 5), (5, 6), (6, 12))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_a_trained_block_beats_the_unigram_model_on_its_own_levels():
    objective, texts = objective_of(num_blocks=2), CHAIN.draw(512, 10)
    optimizer = torch.optim.AdamW(objective.parameters(), 3e-2)
    for step in range(60):
        rows = texts[torch.randint(512, (64,), generator=seeded(step))]
        loss = objective({"tokens": rows}, draws_of(objective, 1, 64, step)).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fresh = CHAIN.draw(2000, 10, seed=1)
    with torch.no_grad():
        found = measured(objective.denoiser, fresh)["bits_per_block"][1]
    exact = measured(denoiser_of(CHAIN.log_p, 2), fresh)["bits_per_block"][1]
    of_unigram = -(CHAIN.stationary * np.log2(CHAIN.stationary)).sum() / 2
    assert exact < found < 0.75 * of_unigram


# -- texts ----------------------------------------------------------------------------------------


def written(num, num_steps, length=8, num_blocks=3, parts=1, seed=0, first=0):
    """Texts that the exact denoiser of the chain writes through the sampler, block by block."""
    denoiser, task = denoiser_of(CHAIN.log_p, num_blocks), MaskedText(Letters(4, length))
    process = denoiser.process
    sampler = Sampler(process, process.steps(MaskingSamplerOptions(), num_steps), seed)
    answers = []
    for start in range(first, first + num, num // parts):
        rows = Rows(start, start + num // parts)
        z, answer = sampler.initial_state(task, rows, torch.float32), None
        for block in range(num_blocks):
            shown = z != MASK
            before = z
            z, answer = sampler.run_block(block, denoiser, task, denoiser.shared, (), z, rows)
            assert z[shown].equal(before[shown])
            assert answer[shown].equal(before[shown])
        answers.append(answer)
    return torch.cat(answers)


def bigram_test(texts):
    """That neighbours have the chain's own law, at three places far enough apart."""
    pairs = torch.cat([texts[:, i] * 4 + texts[:, i + 1] for i in (0, 6, 12)])
    counts = pairs.bincount(minlength=16).numpy()
    return stats.chisquare(counts, counts.sum() * CHAIN.bigrams.flatten()).pvalue


def test_many_steps_of_the_exact_denoiser_write_the_chain_itself():
    texts = written(400, num_steps=46, length=14)
    assert bigram_test(CHAIN.draw(400, 14)) > 0.01
    assert bigram_test(texts) > 0.01
    first = texts[:, 0].bincount(minlength=4).numpy()
    assert stats.chisquare(first, 400 * CHAIN.stationary).pvalue > 0.01


def test_few_steps_of_the_exact_denoiser_do_not():
    assert bigram_test(written(400, num_steps=4, length=14)) < 1e-6


def test_a_text_depends_on_its_number_and_not_on_the_batch():
    whole = written(12, num_steps=9)
    assert written(12, num_steps=9, parts=3).equal(whole)
    assert written(4, num_steps=9, first=8).equal(whole[8:])
    assert not written(12, num_steps=9, seed=1).equal(whole)


def answer_of(task):
    """A chain whose answer to sample i says i, or i + 100 for another seed."""

    def answer(batch, first, seed=0, steps=None):
        numbers = batch["number"] + 100 * seed
        assert numbers[0] == first + 100 * seed
        return (numbers[:, None] // 10 ** torch.arange(task.state_shape[0])) % 4

    return answer


def test_a_loaded_model_gives_texts_the_same_ones_however_many_are_asked_for():
    task = MaskedText(Letters(4, 3), MaskedShares(3))
    writer = task.loaded(answer_of(task), torch.device("cpu"), torch.float32)
    writer.probe()
    texts = writer.sample(10)
    assert texts[:4] == ["aaa", "baa", "caa", "daa"]
    assert writer.sample(10, batch_size=3) == texts
    assert writer.sample(4) == texts[:4]
    assert writer.sample(4, seed=1) != texts[:4]
    assert writer.sample(0) == []


def test_texts_are_written_to_a_file_and_previewed(tmp_path):
    task, answers = MaskedText(Letters(4, 3)), torch.tensor([[0, 1, 2], [3, 3, 3]])
    (file,) = task.show(answers, tmp_path)
    assert file == tmp_path / "samples.txt"
    assert file.read_text() == f"abc\n{'-' * 80}\nddd\n"
    assert task.preview(answers) == "abc\n\nddd"


def test_requests_are_for_texts_and_have_no_classes():
    task = MaskedText(Letters(4, 3))
    requests = task.requests(None, 5)
    assert len(requests) == 5
    assert requests.__getitems__([3, (4, 7)])["number"].tolist() == [3, 4]
    assert requests.digest() != task.requests(None, 6).digest()
    with pytest.raises(ConfigError, match="text has no classes"):
        task.requests([1], 5)


# -- evaluation -----------------------------------------------------------------------------------


class Model:
    """Any architecture: the task asks nothing of it."""

    def build_shared(self):
        raise NotImplementedError

    def build_layer(self, index):
        raise NotImplementedError

    def weights(self, module, seed):
        raise NotImplementedError

    def describe(self):
        raise NotImplementedError


def test_an_evaluation_has_the_bound_of_all_texts_and_writes_no_more_than_it_shows():
    num_texts, length = 70, 10
    task, process = MaskedText(Letters(4, length)), Masking(MaskedShares(3))
    words = ["--model.num_layers=3", "--eval.batch_size=40", "--eval.micro_batch_size=20"]
    config = parse_config("test", "", ["--train.max_steps=1", *words])
    config = replace(config, sampler=MaskingSamplerOptions(num_steps=7))
    setup = Setup(config, task.spec, task, Model(), process)
    denoiser, written = denoiser_of(None, 3), []
    denoiser.shared = Network(4)
    denoiser.shared.head.register_forward_hook(lambda module, inputs, raw: written.append(len(raw)))

    class Texts(TextRequests):
        def __getitems__(self, keys):
            return {"tokens": CHAIN.draw(num_texts, length)[list(keys)]}

    texts = Texts(task.spec, num_texts)
    found = evaluate(setup, Topology(Layout(1)), texts, lambda block: denoiser, 1)
    assert sum(written) == 3 * num_texts + 7 * 32
    assert found.preview.count("\n\n") == 7
    assert found.value == found.figures["bits_per_char"]

    totals = torch.zeros(3, BoundFigures("x").size, dtype=torch.float64)
    for block, (start, stop) in itertools.product(
        range(3), ((0, 20), (20, 40), (40, 60), (60, 70))
    ):
        generator = seeds.generator(config.seed, "levels", block, start)
        batch = texts.__getitems__(range(start, stop))
        with torch.no_grad():
            totals[block] += BoundFigures("x").measure(denoiser, batch, block, generator)
    assert found.figures["bits_per_block"] == BoundFigures("x").result(totals)["bits_per_block"]


# -- what does not fit ----------------------------------------------------------------------------


def config_of(noise="masking"):
    return SimpleNamespace(noise=SimpleNamespace(name=noise), task=MaskedTextOptions())


def test_a_process_that_masks_nothing_is_refused():
    masking = Masking(MaskedShares(3))
    assert isinstance(MaskedText.of(config_of(), Letters(4, 3), Model(), masking), MaskedText)
    gaussian = Gaussian(NoiseSchedule(3))
    with pytest.raises(ConfigError, match=r"noise\.name: gaussian does not"):
        MaskedText.of(config_of("gaussian"), Letters(4, 3), Model(), gaussian)


def test_images_are_refused():
    images = DatasetSpec("digits", 1, 4, 5, (0.3,), (0.4,), None)
    with pytest.raises(ConfigError, match=r"needs text, which data\.name: digits is not"):
        MaskedText.build_model(config_of(), images, None)

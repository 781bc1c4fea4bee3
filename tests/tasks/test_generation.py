"""Generation: the loss in its two forms, dropped classes, the held-out loss, pictures, refusals."""

import math

import pytest
import torch
from PIL import Image
from ranks import setup_of
from toy_generation import DATA_STD, SPEC, batch, denoiser_of_normal_data, task_of

from dbdist.config.parse import parse_config
from dbdist.data.images import DatasetSpec, normalize
from dbdist.errors import ConfigError
from dbdist.models.denoiser import Denoiser
from dbdist.processes.gaussian import Gaussian, NoiseSchedule
from dbdist.tasks.base import DenoisingLoss, draws_of_step
from dbdist.tasks.generation import UnitLoss, unit_loss
from dbdist.tasks.generator import Generator
from dbdist.tasks.pictures import grid

PROCESS = Gaussian(NoiseSchedule(3))
TINY = "--model.num_layers 3 --model.hidden_size 8 --model.num_heads 2 --model.patch_size 4".split()


def config_of(*words):
    words = ["--task.name", "generation", "--train.max_steps", "1", *TINY, *words]
    return parse_config("test", "", words).validate()


# -- the loss --------------------------------------------------------------------------------------


def coefficients(sigma_N):
    sigma = sigma_N.double().reshape(-1, 1, 1, 1)
    norm = (sigma**2 + 0.25).sqrt()
    return 0.25 / norm**2, sigma * 0.5 / norm, 1 / norm


def test_the_loss_is_the_weighted_error_of_d_and_the_plain_error_of_f(float64):
    """EDM (2206.00364), equations 2 and 8, at levels from sigma_min to sigma_max."""
    generator = torch.Generator().manual_seed(0)
    sigma_N = torch.logspace(math.log10(0.002), math.log10(80), 8)
    z0 = batch(8)["image"]
    raw, noise = (torch.randn(z0.shape, generator=generator) for _ in range(2))
    z = z0 + sigma_N.reshape(-1, 1, 1, 1) * noise
    c_skip, c_out, _ = coefficients(sigma_N)
    denoised = c_skip * z + c_out * raw
    lam = (sigma_N**2 + 0.25) / (sigma_N * 0.5) ** 2
    weighted = lam * (denoised - z0).square().mean(dim=(1, 2, 3))
    unit = (raw - (z0 - c_skip * z) / c_out).square().mean(dim=(1, 2, 3))
    loss = task_of().loss(denoised, z0, {}, sigma_N, PROCESS.weight(sigma_N))
    torch.testing.assert_close(loss.per_sample["unit_loss"], weighted, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.per_sample["unit_loss"], unit, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.value, unit.mean(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("sigma", [0.002, 0.05, 1.0, 80.0])
def test_float32_keeps_the_loss_and_its_gradient_at_every_level(sigma):
    """Against float64, with a network's output F as good as training makes it."""
    generator = torch.Generator().manual_seed(1)
    z0 = (2 * torch.rand(64, 3, 8, 8, generator=generator, dtype=torch.float64) - 1).float()
    noise = torch.randn(z0.shape, generator=generator)
    sigma_N = torch.full((64,), sigma)
    z = PROCESS.corrupt(z0, sigma_N, noise)
    c_skip, c_out, _ = coefficients(sigma_N)
    wanted = (z0.double() - c_skip * z.double()) / c_out
    raw = (wanted + 0.1 * torch.randn(z0.shape, generator=generator).double()).float()
    raw.requires_grad_()

    output = PROCESS.denoise(lambda z_in, level_N, combine: combine(raw), z, sigma_N)
    loss_N = unit_loss(output, z0, PROCESS.weight(sigma_N))
    (gradient,) = torch.autograd.grad(loss_N.sum(), raw)
    error = raw.detach().double() - wanted
    exact_N = error.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss_N.double(), exact_N, rtol=1e-4, atol=0)
    difference = gradient.double() - 2 * error / error[0].numel()
    assert difference.norm() < 1e-3 * gradient.norm()


def test_the_objective_trains_with_the_class_or_without():
    config = config_of("--task.condition_dropout", "0.5")
    setup = setup_of(config)
    shared = setup.shared(0, torch.device("cpu"))
    denoiser = setup.denoiser(shared, setup.block(1, 0, torch.device("cpu")))
    samples = batch(64, setup.spec)
    draws = draws_of_step(
        setup.task,
        setup.process,
        condition_dropout=0.5,
        seed=0,
        block=1,
        step=0,
        num_samples=64,
    )
    seen = []
    denoiser.shared.label_table.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    loss = DenoisingLoss(denoiser, setup.task)(samples, draws)
    (label_N,) = seen
    assert torch.equal(label_N[draws.keep_N], samples["label"][draws.keep_N])
    assert label_N[~draws.keep_N].eq(10).all()
    assert 20 < draws.keep_N.sum() < 44
    # F is zero at first, so the loss is the mean square of what F is to be.
    sigma = draws.level_N.double().reshape(-1, 1, 1, 1)
    c_skip, c_out, _ = coefficients(draws.level_N)
    z = samples["image"].double() + sigma * draws.corruption.double()
    wanted = (samples["image"].double() - c_skip * z) / c_out
    assert loss.value.item() == pytest.approx(wanted.square().mean().item(), rel=1e-5)


def test_without_a_class_every_label_is_the_last_index():
    label_N = torch.tensor([0, 3, 4])
    assert task_of().no_condition(label_N, 3).tolist() == [5, 5, 5]
    assert task_of().drop(label_N, torch.tensor([True, False, True])).tolist() == [0, 5, 4]


# -- the held-out loss -----------------------------------------------------------------------------


class Exact(Denoiser):
    """The denoiser that no other beats, for pixels that are N(0, DATA_STD^2)."""

    def __init__(self, process):
        super().__init__(torch.nn.Identity(), torch.nn.Identity(), process)
        self.seen = []

    def forward(self, condition, z, level_N):
        self.seen += level_N.tolist()
        return denoiser_of_normal_data(condition, z, level_N)


def exact_loss(process, block):
    """The mean over the block's own levels of weight times the posterior's variance."""
    partition = process.partition
    place = (torch.arange(10_000).double() + 0.5) / 10_000
    sigma = partition.level_at((partition.num_blocks - 1 - block + place) / partition.num_blocks)
    variance = sigma**2 * DATA_STD**2 / (sigma**2 + DATA_STD**2)
    return (process.weight(sigma) * variance).mean().item()


def measured(process, num_samples=600):
    task, blocks = task_of(schedule=process.partition), range(process.partition.num_blocks)
    figure, denoiser = UnitLoss(task), Exact(process)
    totals = []
    for block in blocks:
        generator = torch.Generator().manual_seed(block)
        totals.append(figure.measure(denoiser, batch(num_samples), block, generator))
    return figure.result(torch.stack(totals)), denoiser


def test_the_held_out_loss_of_a_block_is_the_mean_over_its_own_levels(float64):
    result, _ = measured(PROCESS)
    exact = [exact_loss(PROCESS, block) for block in range(3)]
    assert result["loss_per_block"] == pytest.approx(exact, rel=0.02)
    assert result["loss"] == pytest.approx(sum(exact) / 3, rel=0.02)


def test_one_block_of_all_layers_is_scored_on_the_same_levels(float64):
    of_three, of_one = measured(PROCESS)[0], measured(Gaussian(NoiseSchedule(1)))[0]
    assert of_one["loss"] == pytest.approx(of_three["loss"], rel=0.02)


def test_levels_are_stratified_inside_the_band_without_overlap(float64):
    _, denoiser = measured(PROCESS, num_samples=8)
    edges = PROCESS.partition.level_at(torch.linspace(0, 1, 97, dtype=torch.float64))
    seen = torch.tensor(denoiser.seen).reshape(3, 32).flip(0).flatten().sort().values
    assert (edges[:-1] <= seen).all()
    assert (seen <= edges[1:]).all()
    low, high = PROCESS.partition.own_range(1)
    of_block = torch.tensor(denoiser.seen[32:64])
    assert low <= of_block.min() <= of_block.max() <= high


# -- pictures --------------------------------------------------------------------------------------


def pictures_of(spec, num_samples):
    shape = num_samples, spec.channels, spec.image_size, spec.image_size
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
def test_shown_pictures_are_the_answers_as_files(tmp_path, channels):
    means = (0.5, 0.2, 0.9)[:channels]
    spec = DatasetSpec("digits", channels, 4, 5, means, (0.5, 0.3, 0.2)[:channels], None)
    pictures = pictures_of(spec, 3)
    files = task_of(spec).show(normalize(pictures, spec), tmp_path)
    names = ["samples.png", "sample-00000.png", "sample-00001.png", "sample-00002.png"]
    assert files == [tmp_path / name for name in names]
    for file, picture in zip(files[1:], pictures, strict=True):
        pixels = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8)
        assert torch.equal(pixels.reshape(4, 4, channels).movedim(-1, 0), picture)
    # Enlarged eight times, three in a row, a black line between them.
    preview = task_of(spec).preview(normalize(pictures, spec))
    assert preview.shape == (channels, 32, 3 * 33 - 1)
    assert torch.equal(preview[:, ::8, 33:65:8], pictures[1])
    assert not preview[:, :, 32].any()


def test_a_grid_goes_row_by_row_and_may_end_early():
    pictures = torch.arange(1, 24, dtype=torch.uint8).reshape(23, 1, 1, 1).expand(-1, 1, 32, 32)
    whole = grid(pictures)
    assert whole.shape == (1, 3 * 33 - 1, 10 * 33 - 1)
    centres = whole[0, 16::33, 16::33]
    assert centres.flatten().tolist() == [*range(1, 24), *[0] * 7]


def test_a_preview_has_a_hundred_pictures_at_most():
    spec = DatasetSpec("digits", 1, 32, 5, (0.5,), (0.5,), None)
    preview = task_of(spec).preview(torch.zeros(105, 1, 32, 32))
    assert preview.shape == (1, 10 * 33 - 1, 10 * 33 - 1)


class Latents:
    name, channels, image_size, num_classes, class_names = "latents", 4, 4, 3, None


def test_latents_stay_what_they_are(tmp_path):
    task, answers = task_of(Latents()), torch.randn(2, 4, 4, 4)
    assert task.preview(answers) is None
    assert task.show(answers, tmp_path) == [*tmp_path.iterdir()] == []


# -- requests --------------------------------------------------------------------------------------


def test_requests_go_round_the_classes():
    spec = DatasetSpec("digits", 1, 4, 3, (0.5,), (0.5,), ("cat", "dog", "7"))
    labels = task_of(spec).requests(["dog", 0, "2"], 5).__getitems__([0, 1, 2, 3, 4])
    assert labels["label"].tolist() == [1, 0, 2, 1, 0]
    assert task_of(spec).requests(None, 4).labels.tolist() == [0, 1, 2, 0]
    assert task_of(spec).requests(["7"], 1).labels.tolist() == [2], "a name before an index"


@pytest.mark.parametrize("classes", [["cow"], [3], [-1], [True + 7]])
def test_classes_that_there_are_not_are_refused(classes):
    spec = DatasetSpec("digits", 1, 4, 3, (0.5,), (0.5,), ("cat", "dog", "emu"))
    with pytest.raises(ConfigError, match=r"is no class of digits; they are 0 to 2, or cat, dog"):
        task_of(spec).requests(classes, 1)
    with pytest.raises(ConfigError, match="no class of digits is given"):
        task_of(spec).requests([], 1)


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sampler.num_draws 2", "the mean of several images is no image"),
        ("--sampler.start mean", "would make every image of a class the same"),
        (
            "--sampler.guidance_scale 2 --task.condition_dropout 0",
            "guidance_scale 2 needs a network that was also trained without classes",
        ),
        ("--model.patch_size 3", "patch_size 3 does not divide the image side 8"),
        ("--sampler.method heum", "sampler.method"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(words, message):
    with pytest.raises(ConfigError, match=message) as refused:
        setup_of(config_of(*words.split()))
    assert "\n" not in str(refused.value)


def test_another_model_or_process_is_refused():
    words = ["--task.name", "generation", "--train.max_steps", "1"]
    with pytest.raises(ConfigError, match=r"needs a model that denoises images, which model\.name"):
        setup_of(parse_config("test", "", [*words, "--model.name", "vit"]))
    config = parse_config("test", "", [*words, "--noise.name", "direct", "--model.num_blocks", "1"])
    with pytest.raises(ConfigError, match=r"noise\.name: direct does not add"):
        setup_of(config)
    with pytest.raises(ConfigError, match="do not fit together"):
        setup_of(parse_config("test", "", ["--model.name", "dit", "--train.max_steps", "1"]))


def test_a_loaded_model_is_not_guided_beyond_what_it_learned():
    def refuse(*arguments, **changes):
        raise AssertionError("nothing may be drawn")

    for dropout, scale in ((0.0, 2.0), (0.1, -1.0), (0.1, math.nan)):
        model = Generator(SPEC, refuse, torch.device("cpu"), PROCESS.partition, dropout)
        with pytest.raises(ConfigError, match=r"sampler\.guidance_scale"):
            model.sample(0, 1, guidance=scale)


def test_latents_are_drawn_as_they_are_or_decoded():
    def answer(batch, first, **changes):
        place = torch.arange(first, first + len(batch["label"]))
        return (10 * place + batch["label"]).reshape(-1, 1, 1, 1).expand(-1, 4, 4, 4).double()

    model = Generator(Latents(), answer, torch.device("cpu"), PROCESS.partition, 0.1)
    latents = model.sample([2, 0], 5, batch_size=2)
    assert latents.dtype == torch.float32
    assert latents[:, 3, 1, 2].tolist() == [2, 10, 22, 30, 42]
    twice = model.sample([2, 0], 5, batch_size=2, decode=lambda x: x.repeat(1, 1, 2, 2).byte())
    assert (twice.shape, twice.dtype) == ((5, 4, 8, 8), torch.uint8)
    assert model.sample(num=0).shape == (0, 4, 4, 4)
    pictures = Generator(SPEC, answer, torch.device("cpu"), PROCESS.partition, 0.1)
    with pytest.raises(ConfigError, match="pictures already"):
        pictures.sample(0, decode=lambda x: x)

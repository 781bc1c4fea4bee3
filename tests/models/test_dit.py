"""The diffusion transformer against diffusers' DiT; sizes, positions, initial weights, options."""

import math

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn
from vits import CPU, randomize

from dbdist.config.parse import parse_config
from dbdist.data.images import DatasetSpec
from dbdist.errors import ConfigError
from dbdist.models.base import build_block, build_shared, count_parameters, materialise
from dbdist.models.denoiser import Denoiser
from dbdist.models.dit import DiT, DiTConfig, positions_2d
from dbdist.models.options import DiTOptions
from dbdist.processes.gaussian import Gaussian, NoiseSchedule
from dbdist.tensors import named_tensors


def spec_of(channels=3, image_size=32, num_classes=10):
    grey = (0.5,) * channels
    return DatasetSpec("digits", channels, image_size, num_classes, grey, grey, None)


def dit_of(image_size=8, patch_size=2, channels=3, num_classes=5, **options):
    options = {"hidden_size": 24, "num_heads": 3, "num_layers": 2} | options
    return DiT.of(
        DiTOptions(patch_size=patch_size, **options), spec_of(channels, image_size, num_classes)
    )


def built(model, num_layers=2, seed=0):
    shared, block = build_shared(model), build_block(model, range(num_layers))
    return tuple(materialise(m, CPU, model.weights(m, seed)) for m in (shared, block))


# -- the equations, as diffusers has them ----------------------------------------------------------


def reference_of(shared, block):
    """diffusers' DiT with these weights. It has an embedder of level and class in every block."""
    config = shared.config
    reference = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.channels,
        out_channels=config.channels,
        num_layers=len(block.layers),
        sample_size=config.image_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    ).eval()
    pairs = [
        (reference.pos_embed.proj, shared.patch_embed),
        (reference.proj_out_1, shared.adaln.linear),
        (reference.proj_out_2, shared.head),
    ]
    for theirs, ours in zip(reference.transformer_blocks, block.layers.values(), strict=True):
        theirs.norm1.emb.time_proj.downscale_freq_shift = 0
        q, k, v = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        for i, linear in enumerate((q, k, v)):
            for name, part in linear.named_parameters():
                part.data = getattr(ours.attention.qkv, name).chunk(3)[i].detach()
        pairs += [
            (theirs.norm1.emb.timestep_embedder.linear_1, shared.level_mlp_in),
            (theirs.norm1.emb.timestep_embedder.linear_2, shared.level_mlp_out),
            (theirs.norm1.emb.class_embedder.embedding_table, shared.label_table),
            (theirs.norm1.linear, ours.adaln.linear),
            (theirs.attn1.to_q, q),
            (theirs.attn1.to_k, k),
            (theirs.attn1.to_v, v),
            (theirs.attn1.to_out[0], ours.attention.out),
            (theirs.ff.net[0].proj, ours.mlp_in),
            (theirs.ff.net[2], ours.mlp_out),
        ]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    return reference


@pytest.mark.parametrize(
    ("image_size", "patch_size", "channels"), [(8, 2, 3), (12, 4, 1), (6, 1, 4), (7, 7, 1)]
)
def test_the_network_equals_diffusers_dit(image_size, patch_size, channels):
    model = dit_of(image_size, patch_size, channels)
    shared, block = (randomize(module, i) for i, module in enumerate(built(model)))
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, channels, image_size, image_size, generator=generator)
    level, label = torch.tensor([-1.55, 0.37, 1.1, 713.25]), torch.tensor([0, 4, 2, 5])
    tokens, context = shared.embed(label, z, level)
    output = shared.output(block(tokens, context), lambda raw: raw, context)
    reference = reference_of(shared, block)
    with torch.no_grad():
        expected = reference(z, timestep=level, class_labels=label).sample
    scale = expected.abs().max()
    torch.testing.assert_close(output / scale, expected / scale, rtol=1e-5, atol=1e-5)


def test_the_denoiser_is_edms_preconditioning_around_diffusers_dit():
    shared, block = (randomize(module, i) for i, module in enumerate(built(dit_of())))
    sigma, label = torch.tensor([0.01, 0.4, 70.0]), torch.tensor([1, 5, 0])
    z = sigma.view(-1, 1, 1, 1) * torch.randn(
        3, 3, 8, 8, generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        denoised = Denoiser(shared, block, Gaussian(NoiseSchedule(1)))(label, z, sigma)
        norm = (sigma**2 + 0.25).sqrt().view(-1, 1, 1, 1)
        raw = reference_of(shared, block)(z / norm, sigma.log() / 4, label).sample
    expected = 0.25 / norm**2 * z + sigma.view(-1, 1, 1, 1) * 0.5 / norm * raw
    torch.testing.assert_close(denoised, expected, rtol=1e-5, atol=1e-5)


def test_the_level_is_scaled_before_its_sinusoids(float64):
    plain, scaled = built(dit_of())[0], built(dit_of(level_scale=250.0))[0]
    level = torch.tensor([-1.0, 0.2])
    torch.testing.assert_close(scaled.embed_level(level), plain.embed_level(250 * level))
    assert not torch.allclose(scaled.embed_level(level), plain.embed_level(level))


def test_positions_are_sines_and_cosines_of_the_column_then_of_the_row():
    table = positions_2d(3, 8)
    for row in range(3):
        for column in range(3):
            for half, place in enumerate((column, row)):
                for k, frequency in enumerate((1.0, 0.01)):
                    of_patch = table[3 * row + column, 4 * half :]
                    assert of_patch[k] == pytest.approx(math.sin(place * frequency))
                    assert of_patch[2 + k] == pytest.approx(math.cos(place * frequency))


# -- sizes and weights -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "spec", "layers", "shared"),
    [("S", spec_of(), 31.92e6, 0.556e6), ("L", spec_of(4, 32, 1000), 453.35e6, 4.47e6)],
)
def test_published_sizes_have_the_published_parameters(size, spec, layers, shared):
    options = DiTOptions(size=size)
    model = DiT.of(options, spec)
    of_layer = count_parameters(build_block(model, [0]))
    assert of_layer * options.num_layers == pytest.approx(layers, rel=2e-4)
    assert count_parameters(build_shared(model)) == pytest.approx(shared, rel=2e-3)


def test_at_first_layers_are_the_identity_and_the_raw_output_is_zero():
    shared, block = built(dit_of())
    z, label, level = torch.randn(2, 3, 8, 8), torch.tensor([0, 5]), torch.zeros(2)
    tokens, context = shared.embed(label, z, level)
    assert torch.equal(block(tokens, context), tokens)
    assert not shared.output(tokens, lambda raw: raw, context).any()


def test_initial_weights_have_the_spread_of_dit():
    shared, block = built(dit_of(hidden_size=96, num_classes=500, label_std=0.5))
    qkv = block.layers["1"].attention.qkv.weight
    assert qkv.abs().max().item() == pytest.approx(math.sqrt(6 / (4 * 96)), rel=1e-2)
    kernel = shared.patch_embed.weight
    assert kernel.abs().max().item() == pytest.approx(math.sqrt(6 / (96 + 12)), rel=1e-2)
    assert shared.label_table.weight.std().item() == pytest.approx(0.5, rel=2e-2)
    assert shared.level_mlp_in.weight.std().item() == pytest.approx(0.02, rel=2e-2)
    assert not any(p.any() for n, p in shared.named_parameters() if n.endswith("bias"))
    torch.testing.assert_close(shared.positions.double(), positions_2d(4, 96), rtol=0, atol=1e-6)


def test_weights_depend_on_seed_and_name_alone():
    model = dit_of()
    whole = named_tensors(built(model, 2)[1])
    alone = build_block(model, [1])
    materialise(alone, CPU, model.weights(alone, 0))
    for name, tensor in named_tensors(alone).items():
        assert torch.equal(tensor, whole[name])
    kernels = [built(model, seed=seed)[0].patch_embed.weight for seed in (0, 1)]
    assert not torch.equal(*kernels)


def test_models_differ_by_their_sizes_and_level_scale_but_not_by_their_start():
    assert dit_of(label_std=0.5).describe() == dit_of().describe()
    assert dit_of(level_scale=2.0).describe() != dit_of().describe()
    assert dit_of(num_heads=4).describe() != dit_of().describe()


# -- options ---------------------------------------------------------------------------------------


def config_of(*words):
    return parse_config(
        "test", "", ["--task.name", "generation", "--train.max_steps", "1", *words]
    ).validate()


def test_a_size_stands_for_layers_width_and_heads():
    model = config_of("--model.size", "B").model
    assert (model.num_layers, model.hidden_size, model.num_heads) == (12, 768, 12)
    assert config_of("--model.size", "B", "--model.num_layers", "12").model == model
    plain = config_of("--model.num_layers", "9").model
    assert (plain.num_layers, plain.hidden_size, plain.num_heads) == (9, 64, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("size", "S", "num_layers", "6"), "model.size: S has num_layers 12, but"),
        (("size", "XL", "hidden_size", "384"), "model.size: XL has hidden_size 1152, but"),
        (("hidden_size", "64", "num_heads", "5"), "model.num_heads 5 does not divide"),
        (("hidden_size", "30", "num_heads", "3"), "must be a multiple of 4"),
        (("size", "S", "num_blocks", "5"), "num_blocks 5 does not divide model.num_layers 12"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(words, message):
    pairs = zip(words[::2], words[1::2], strict=True)
    with pytest.raises(ConfigError, match=message):
        config_of(*(word for key, value in pairs for word in (f"--model.{key}", value)))


def test_patches_that_do_not_tile_the_image_are_refused():
    with pytest.raises(ConfigError, match="patch_size 3 does not divide the image side 8"):
        DiTConfig(image_size=8, channels=1, num_classes=2, patch_size=3, hidden_size=8, num_heads=1)

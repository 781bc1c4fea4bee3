"""The vision transformer against its equations; initial weights; recomputation and dropout."""

import math

import pytest
import torch
from torch import nn
from vits import CPU, block_of, randomize, shared_of

from dbdist.errors import ConfigError
from dbdist.models import vit
from dbdist.models.denoiser import Denoiser
from dbdist.models.layers import Attention
from dbdist.processes.direct import Direct


def sizes(**changes):
    values = {
        "image_size": 8,
        "channels": 2,
        "num_classes": 5,
        "patch_size": 4,
        "hidden_size": 24,
        "num_heads": 3,
        "mlp_size": 32,
    }
    return vit.ViTConfig(**values | changes)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# -- the equations ---------------------------------------------------------------------------------


def norm(x, weights, name):
    """LayerNorm written out."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attend(x, weights, name, num_heads):
    """softmax(Q K^T / sqrt(k)) V, head by head."""
    q, k, v = linear(x, weights, f"{name}.qkv").chunk(3, dim=-1)
    size = x.shape[-1] // num_heads
    heads = []
    for h in range(num_heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(size)
        heads.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v[..., part])
    return linear(torch.cat(heads, dim=-1), weights, f"{name}.out")


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def silu(x):
    return x / (1 + (-x).exp())


def patches(images, weights, size):
    """Each patch as a vector (channel, row, column), times the convolution's weight."""
    n, _, side, _ = images.shape
    rows = []
    for y in range(0, side, size):
        for x in range(0, side, size):
            rows.append(images[:, :, y : y + size, x : x + size].reshape(n, -1))
    kernel = weights["patch_embed.weight"].flatten(1)
    return torch.stack(rows, dim=1) @ kernel.T + weights["patch_embed.bias"]


def weights_of(module):
    return dict(module.named_parameters())


def test_attention_is_softmax_of_scaled_products(float64):
    attention = randomize(Attention(24, 3))
    x = randn(2, 5, 24)
    weights = {f"a.{k}": v for k, v in weights_of(attention).items()}
    torch.testing.assert_close(attention(x), attend(x, weights, "a", 3), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("image_size", [8, 12])
def test_the_plain_vit_equals_its_equations(float64, image_size):
    config = sizes(image_size=image_size)
    shared = randomize(shared_of(config, is_plain=True))
    block = randomize(block_of(config, range(3), is_plain=True), 1)
    images = randn(2, 2, image_size, image_size)
    w, s = weights_of(block), weights_of(shared)
    x = (
        torch.cat([s["class_token"].expand(2, 1, 24), patches(images, s, 4)], dim=1)
        + s["positions"]
    )
    for i in range(3):
        p = f"layers.{i}"
        x = x + attend(norm(x, w, f"{p}.norm1"), w, f"{p}.attention", 3)
        x = x + linear(gelu(linear(norm(x, w, f"{p}.norm2"), w, f"{p}.mlp_in")), w, f"{p}.mlp_out")
    expected = linear(norm(x[:, 0], s, "norm"), s, "head")
    logits = Denoiser(shared, block, Direct())(images, images.new_zeros(2, 0), None)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)


def test_the_conditioned_vit_equals_its_equations(float64):
    config = sizes()
    shared = randomize(shared_of(config))
    block = randomize(block_of(config, range(2, 4)), 1)
    images, z_in, c_noise = randn(3, 2, 8, 8), randn(3, 24), torch.tensor([-1.5, 0.0, 1.1])
    w, s = weights_of(block), weights_of(shared)

    frequency = 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angle = c_noise[:, None] * frequency
    level = torch.cat([angle.cos(), angle.sin()], dim=1)
    level = silu(linear(silu(linear(level, s, "noise_mlp_in")), s, "noise_mlp_out"))
    torch.testing.assert_close(shared.embed_noise(c_noise), level, rtol=1e-10, atol=1e-12)
    assert level.shape == (3, 24 // 6)

    x = torch.cat([z_in[:, None], patches(images, s, 4)], dim=1) + s["positions"]
    tokens, context = shared.embed(images, z_in, c_noise)
    torch.testing.assert_close(tokens, x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(context, level, rtol=1e-10, atol=1e-12)
    for i in (2, 3):
        p = f"layers.{i}"
        chunks = silu(linear(level, w, f"{p}.adaln.linear"))[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift2, scale2, gate2 = chunks
        y = attend(norm(x, w, f"{p}.norm1") * (1 + scale) + shift, w, f"{p}.attention", 3)
        x = x + gate * y
        y = gelu(linear(norm(x, w, f"{p}.norm2") * (1 + scale2) + shift2, w, f"{p}.mlp_in"))
        x = x + gate2 * linear(y, w, f"{p}.mlp_out")
    torch.testing.assert_close(block(tokens, context), x, rtol=1e-9, atol=1e-10)

    read = []
    logits = shared.output(x, lambda raw: read.append(raw) or z_in, context)
    torch.testing.assert_close(read[0], norm(x[:, 0], s, "norm"), rtol=1e-10, atol=1e-12)
    shift, scale = silu(linear(level, s, "adaln.linear")).chunk(2, dim=-1)
    expected = linear(z_in * (1 + scale) + shift, s, "head")
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)


# -- initial weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_plain", [False, True])
def test_initial_weights_do_not_depend_on_the_cut_nor_on_other_blocks(is_plain):
    config = sizes()

    def build(layers, seed=3):
        return weights_of(block_of(config, layers, seed, is_plain=is_plain))

    whole = build(range(6))
    for cut in ([range(2), range(2, 4), range(4, 6)], [range(1), range(1, 6)], [range(4, 6)]):
        for layers in cut:
            for name, value in build(layers).items():
                assert torch.equal(value, whole[name]), name
    other_seed = build(range(6), seed=4)
    drawn = [name for name, value in whole.items() if value.std() > 0 and "norm" not in name]
    assert drawn
    assert not any(torch.equal(whole[name], other_seed[name]) for name in drawn)
    values = [whole[name].flatten()[:20].tolist() for name in drawn]
    assert len({tuple(v) for v in values}) == len(drawn), "no two parameters share a stream"


def test_building_moves_no_global_generator():
    state = torch.get_rng_state()
    shared_of(sizes())
    block_of(sizes(), range(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_weights_have_their_shapes_only():
    config = sizes()
    drawn = weights_of(block_of(config, range(2, 4)))
    empty = weights_of(block_of(config, range(2, 4), None))
    assert {k: v.shape for k, v in drawn.items()} == {k: v.shape for k, v in empty.items()}
    assert all(v.device == CPU for v in empty.values())


def is_zero_at_first(name):
    return name.endswith("bias") or "adaln" in name or name == "head.weight"


@pytest.mark.parametrize("init", ["fan_in", "published"])
def test_adaln_biases_and_the_conditioned_head_start_at_zero(init):
    config = sizes(init=init)
    weights = weights_of(shared_of(config))
    weights |= weights_of(block_of(config, range(2)))
    for name, value in weights.items():
        if "norm" in name:
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
        else:
            assert bool(value.any()) != is_zero_at_first(name), name


def test_the_plain_head_does_not_start_at_zero():
    weights = weights_of(shared_of(sizes(), is_plain=True))
    assert weights["head.weight"].any()
    assert weights["class_token"].any()
    assert not weights["head.bias"].any()


WIDE = {"hidden_size": 192, "mlp_size": 320, "num_classes": 60}
TRUNCATED = 0.8796  # standard deviation of a unit normal cut at two


@pytest.mark.parametrize("is_plain", [False, True])
def test_published_initial_weights_have_standard_deviation_0_02(is_plain):
    config = sizes(init="published", **WIDE)
    weights = weights_of(shared_of(config, is_plain=is_plain))
    weights |= weights_of(block_of(config, range(1), is_plain=is_plain))
    for name, value in weights.items():
        if "norm" in name or not value.any():
            continue
        assert value.std().item() == pytest.approx(0.02, rel=0.1), name
        assert value.abs().max().item() > 0.04, f"{name} is not cut at two deviations"


@pytest.mark.parametrize("is_plain", [False, True])
def test_fan_in_initial_weights_keep_the_variance_of_their_inputs(is_plain):
    config = sizes(init="fan_in", **WIDE)
    modules = [
        shared_of(config, is_plain=is_plain),
        block_of(config, range(1), is_plain=is_plain),
    ]
    checked = 0
    for module in modules:
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear | nn.Conv2d) and part.weight.any():
                inputs = part.weight[0].numel()
                expected = TRUNCATED / math.sqrt(inputs)
                assert part.weight.std().item() == pytest.approx(expected, rel=0.1), name
                assert part.weight.abs().max().item() <= 2 / math.sqrt(inputs), name
                checked += 1
        for name, table in module.named_parameters(recurse=False):
            assert table.std().item() == pytest.approx(0.02, rel=0.25), name
    assert checked == (6 if is_plain else 7)


def test_patches_must_tile_the_image():
    with pytest.raises(ConfigError, match=r"model\.patch_size 3"):
        sizes(patch_size=3)


# -- recomputation and dropout ---------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_gives_the_same_outputs_and_gradients_and_keeps_less(dropout):
    config = sizes(dropout=dropout, attention_dropout=dropout)
    x, level = randn(4, 5, 24), randn(4, 4)
    results = []
    for recompute in (False, True):
        block = randomize(block_of(config, range(3), recompute=recompute))
        kept = []

        def pack(tensor, kept=kept):
            kept.append(tensor.nbytes)
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = block(x, level)
        forward_bytes = sum(kept)
        y.square().mean().backward()
        results.append((y, [p.grad for p in block.parameters()], forward_bytes))
    (y, grads, kept), (y2, grads2, kept2) = results
    assert torch.equal(y, y2)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads2, strict=True))
    assert kept2 < kept / 5


def test_dropout_acts_in_training_only():
    config = sizes(dropout=0.5, attention_dropout=0.5)
    plain = sizes()
    x, level, images = randn(4, 5, 24), randn(4, 4), randn(4, 2, 8, 8)

    def run(config, training):
        block = randomize(block_of(config, range(2))).train(training)
        shared = randomize(shared_of(config)).train(training)
        whole = randomize(shared_of(config, is_plain=True)).train(training)
        c_noise, no_state = torch.linspace(-1.0, 1.0, 4), x.new_zeros(4, 0)
        tokens, _ = shared.embed(images, x[:, 0], c_noise)
        return block(x, level), tokens, whole.embed(images, no_state, None)[0]

    for evaluated, without in zip(run(config, False), run(plain, True), strict=True):
        assert torch.equal(evaluated, without)
    for once, again in zip(run(config, True), run(config, True), strict=True):
        assert not torch.equal(once, again)


@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_attention_dropout_drops_attention_weights_at_its_rate(rate):
    attention = randomize(Attention(24, 1, rate))
    with torch.no_grad():  # all tokens attend alike and v is 1: what is left is the share kept
        attention.qkv.weight.zero_()
        attention.qkv.bias.copy_(torch.cat([torch.zeros(48), torch.ones(24)]))
        attention.out.weight.copy_(torch.eye(24))
        attention.out.bias.zero_()
    torch.manual_seed(0)
    y = attention.train()(torch.zeros(200, 16, 24))
    kept = (y * 16 * (1 - rate)).round()
    assert (kept.mean() / 16).item() == pytest.approx(1 - rate, abs=0.02)
    assert torch.equal(attention.eval()(torch.zeros(2, 16, 24)).round(), torch.ones(2, 16, 24))


def test_images_of_another_size_than_the_position_table_are_refused():
    shared = shared_of(sizes(), is_plain=True)
    with pytest.raises(RuntimeError):
        shared.embed(randn(2, 2, 12, 12), torch.zeros(2, 0), None)


def test_layers_are_named_by_their_index_in_the_whole_model():
    names = weights_of(block_of(sizes(), range(4, 6)))
    assert {name.split(".")[1] for name in names} == {"4", "5"}
    plain = weights_of(block_of(sizes(), range(4, 6), is_plain=True))
    assert names.keys() - plain.keys() == {
        f"layers.{i}.adaln.linear.{leaf}" for i in (4, 5) for leaf in ("weight", "bias")
    }

"""The transformer on symbols against its equations; masks, positions, levels; initial weights."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vits import CPU, randomize

from dbdist.data.text import TextSpec
from dbdist.errors import ConfigError
from dbdist.models.base import Block, build_block, build_shared, materialise
from dbdist.models.layers import modulate, timestep_features
from dbdist.models.options import TextModelOptions
from dbdist.models.text import Context, TextModel, TextShared, rotary_tables, rotate

V, D, HEADS = 11, 24, 3
SPEC = TextSpec("text", V, 7, "character", tuple("abcdefghijk"))
KINDS: list[dict[str, Any]] = [
    {"mlp": mlp, "level": level} for mlp in ("gelu", "swiglu") for level in ("none", "adaln")
]


def model_of(**values: Any) -> TextModel:
    given = {"hidden_size": D, "num_heads": HEADS, "condition_size": 10} | values
    return TextModel.of(TextModelOptions(**given), SPEC)


def built(model: TextModel, layers: range = range(2), seed: int = 0) -> tuple[Any, Block]:
    """Shared modules and a block with initial weights."""
    shared, block = build_shared(model), build_block(model, layers)
    return tuple(materialise(m, CPU, model.weights(m, seed)) for m in (shared, block))  # type: ignore


def random_of(model: TextModel, layers: range = range(2)) -> tuple[Any, Block]:
    """The same with weights that are nowhere zero."""
    shared, block = built(model, layers)
    return randomize(shared), randomize(block, 1)


def logits(
    shared: Any, block: nn.Module, z: torch.Tensor, level: torch.Tensor | None = None
) -> Any:
    tokens, context = shared.embed(None, z, level)
    return shared.output(block(tokens, context), lambda raw: raw, context)


def states(n: int = 3, length: int = 7) -> torch.Tensor:
    """Ids, of which about a third are masked."""
    generator = torch.Generator().manual_seed(n + length)
    z = torch.randint(V, (n, length), generator=generator)
    return torch.where(torch.rand(n, length, generator=generator) < 0.3, -1, z)


LEVELS = torch.tensor([0.1, 0.5, 1.0])


# -- the equations, in numpy -----------------------------------------------------------------------

Array = NDArray[Any]
Weights = dict[str, Array]


def weights_of(module: nn.Module) -> Weights:
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def linear(x: Array, weights: Weights, name: str) -> Array:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def norm(x: Array, weights: Weights, name: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def turned(x: Array, position: int) -> Array:
    """A head's vector as complex numbers (x_k, x_{k + K/2}), each turned by its own angle."""
    half = len(x) // 2
    angle = position * 10_000.0 ** (-2 * np.arange(half) / len(x))
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag])


def attend(x: Array, weights: Weights, name: str) -> Array:
    """Sample by sample, head by head, pair by pair."""
    n, length, d = x.shape
    q, k, v = np.split(linear(x, weights, f"{name}.qkv"), 3, axis=-1)
    out, size = np.zeros_like(x), d // HEADS
    for i in range(n):
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            for a in range(length):
                query = turned(q[i, a, part], a)
                keys = [turned(k[i, b, part], b) for b in range(length)]
                scores = np.exp([query @ key / math.sqrt(size) for key in keys])
                out[i, a, part] = scores @ v[i, :, part] / scores.sum()
    return linear(out, weights, f"{name}.out")


def mlp(x: Array, weights: Weights, name: str, kind: str) -> Array:
    if kind == "gelu":
        return linear(gelu_tanh(linear(x, weights, f"{name}.inner")), weights, f"{name}.outer")
    gate = silu(linear(x, weights, f"{name}.gate"))
    return linear(gate * linear(x, weights, f"{name}.inner"), weights, f"{name}.outer")


def condition(level: Array, weights: Weights) -> Array:
    frequency = np.exp(-math.log(10_000) * np.arange(128) / 128)
    angle = 1000 * level[:, None] * frequency
    features = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    return silu(linear(silu(linear(features, weights, "level_in")), weights, "level_out"))


def expected_logits(
    shared: Weights, block: Weights, layers: range, z: Array, level: Array, kind: dict[str, str]
) -> Array:
    x = shared["symbols.weight"][np.where(z < 0, V, z)]
    c = condition(level, shared)[:, None] if kind["level"] == "adaln" else None
    for i in layers:
        p = f"layers.{i}"
        shift, scale, gate, shift2, scale2, gate2 = (
            (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)
            if c is None
            else np.split(linear(c, block, f"{p}.adaln.linear"), 6, axis=-1)
        )
        y = norm(x, block, f"{p}.norm1") * (1 + scale) + shift
        x = x + gate * attend(y, block, f"{p}.attention")
        y = norm(x, block, f"{p}.norm2") * (1 + scale2) + shift2
        x = x + gate2 * mlp(y, block, f"{p}.mlp", kind["mlp"])
    x = norm(x, shared, "norm")
    if c is not None:
        shift, scale = np.split(linear(c, shared, "adaln.linear"), 2, axis=-1)
        x = x * (1 + scale) + shift
    return linear(x, shared, "head")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_transformer_equals_its_equations(kind: dict[str, str]) -> None:
    layers = range(2, 4)
    shared, block = random_of(model_of(**kind), layers)
    z, level = states(), LEVELS.double()
    expected = expected_logits(
        weights_of(shared), weights_of(block), layers, z.numpy(), level.numpy(), kind
    )
    assert expected.shape == (3, 7, V)
    np.testing.assert_allclose(logits(shared, block, z, level).detach(), expected, rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_what_combine_makes_of_the_logits_is_the_output() -> None:
    shared, block = random_of(model_of())
    tokens, context = shared.embed(None, states(), None)
    doubled = shared.output(block(tokens, context), lambda raw: 2 * raw, context)
    torch.testing.assert_close(doubled, 2 * logits(shared, block, states()))


# -- positions -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("width", [2, 8, 64])
def test_attention_scores_depend_on_the_distance_alone(width: int) -> None:
    cos, sin = rotary_tables(40, width, CPU, torch.float64)
    generator = torch.Generator().manual_seed(width)
    q, k = (torch.randn(width, generator=generator).expand(1, 1, 40, width) for _ in range(2))
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2))[0, 0]
    for distance in range(-39, 40):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores.diagonal(0)[0] == pytest.approx(float(q[0, 0, 0] @ k[0, 0, 0]))
    assert scores[0].std() > 0


@pytest.mark.usefixtures("float64")
def test_rotation_keeps_lengths_and_gives_tables_for_any_length() -> None:
    x = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    y = rotate(x, *rotary_tables(50, 8, CPU, torch.float64))
    torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1))
    assert torch.equal(x[:, :, 0], y[:, :, 0])
    assert not torch.allclose(x[:, :, 1:], y[:, :, 1:])


@pytest.mark.usefixtures("float64")
def test_a_text_that_repeats_gives_other_logits_by_its_order() -> None:
    shared, block = random_of(model_of())
    there = logits(shared, block, torch.tensor([[0, 1, 2, 3]]))
    back = logits(shared, block, torch.tensor([[3, 2, 1, 0]]))
    assert not torch.allclose(there, back.flip(1), rtol=1e-3)


# -- masks, directions, levels ---------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_masked_symbols_have_the_last_row_of_the_embedding() -> None:
    shared, block = random_of(model_of())
    z = states()
    tokens, _ = shared.embed(None, z, None)
    assert torch.equal(tokens[z < 0], shared.symbols.weight[V].expand(int((z < 0).sum()), D))
    assert torch.equal(tokens[z >= 0], shared.symbols.weight[z[z >= 0]])
    as_itself = logits(shared, block, z)
    as_symbol = logits(shared, block, torch.where(z < 0, 2, z))
    assert not torch.allclose(as_itself, as_symbol)
    with torch.no_grad():
        shared.symbols.weight[V] = shared.symbols.weight[2]
    assert torch.equal(logits(shared, block, z), as_symbol)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("changed", [0, 3, 6])
def test_every_symbol_is_seen_from_every_position_of_its_sample_only(changed: int) -> None:
    shared, block = random_of(model_of(), range(1))
    z = states()
    other = z.clone()
    other[1, changed] = (z[1, changed] + 2) % V
    difference = (logits(shared, block, z) - logits(shared, block, other)).abs().amax(dim=-1)
    assert (difference[1] > 1e-6).all()
    assert not difference[[0, 2]].any()


@pytest.mark.usefixtures("float64")
def test_without_adaln_no_level_changes_anything() -> None:
    shared, block = random_of(model_of(level="none"))
    z = states()
    expected = logits(shared, block, z, None)
    for level in (LEVELS, 1 - LEVELS):
        assert torch.equal(logits(shared, block, z, level), expected)


@pytest.mark.usefixtures("float64")
def test_with_adaln_levels_change_the_logits_of_their_own_sample() -> None:
    shared, block = random_of(model_of(level="adaln"))
    z, level = states(), LEVELS.double()
    other = level.clone()
    other[0] = 0.11
    difference = (logits(shared, block, z, level) - logits(shared, block, z, other)).abs()
    assert (difference[0].amax(dim=-1) > 1e-6).all()
    assert not difference[1:].any()


def test_layers_with_adaln_start_as_the_identity_whatever_the_level() -> None:
    shared, block = built(model_of(level="adaln"))
    for level in (LEVELS, 1 - LEVELS):
        tokens, context = shared.embed(None, states(), level)
        assert context.condition_NE.any()
        assert torch.equal(block(tokens, context), tokens)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_first_prediction_is_uniform(kind: dict[str, Any]) -> None:
    shared, block = built(model_of(**kind))
    assert not logits(shared, block, states(), LEVELS).any()


# -- initial weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_initial_weights_depend_on_the_seed_and_the_name_alone(kind: dict[str, Any]) -> None:
    model = model_of(**kind)
    state = torch.get_rng_state()
    whole = dict(built(model, range(6), seed=3)[1].named_parameters())
    for layers in (range(2), range(2, 3), range(3, 6)):
        for name, value in built(model, layers, seed=3)[1].named_parameters():
            assert torch.equal(value, whole[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    other = dict(built(model, range(6), seed=4)[1].named_parameters())
    drawn = [name for name, value in whole.items() if value.std() > 0]
    assert not any(torch.equal(whole[name], other[name]) for name in drawn)
    values = {tuple(whole[name].flatten()[:20].tolist()) for name in drawn}
    assert len(values) == len(drawn), "no two parameters share a stream"


def test_norms_start_as_the_identity_and_adaln_head_and_biases_at_zero() -> None:
    for module in built(model_of(level="adaln")):
        for name, value in module.named_parameters():
            if "norm" in name:
                assert (value == 1).all(), name
            else:
                is_zero = name.endswith("bias") or "adaln" in name or name == "head.weight"
                assert bool(value.any()) != is_zero, name


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_initial_weights_keep_the_variance_of_their_inputs(kind: dict[str, Any]) -> None:
    shared, block = built(model_of(hidden_size=192, condition_size=96, **kind), range(1))
    checked = 0
    assert shared.symbols.weight.std().item() == pytest.approx(1, rel=0.1)
    for module in (shared, block):
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear) and part.weight.any():
                inputs = part.in_features
                assert part.weight.std().item() == pytest.approx(0.88 / math.sqrt(inputs), rel=0.1)
                assert part.weight.abs().max().item() <= 2 / math.sqrt(inputs), name
                checked += 1
    assert checked == 4 + (kind["mlp"] == "swiglu") + 2 * (kind["level"] == "adaln")


def test_nothing_but_attention_knows_how_long_a_text_is() -> None:
    shared, block = built(model_of())
    assert [t.shape for t in shared.buffers()] == []
    assert [t.shape for t in block.buffers()] == []
    for length in (1, 3, 50):
        assert logits(shared, block, states(2, length)).shape == (2, length, V)


# -- sizes and names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"hidden_size": 24}, 96),
        ({"hidden_size": 24, "mlp": "swiglu"}, 64),
        ({"hidden_size": 768, "mlp": "swiglu"}, 2048),
        ({"hidden_size": 24, "mlp": "swiglu", "mlp_size": 5}, 5),
    ],
)
def test_a_gated_mlp_is_as_large_as_a_plain_one(values: dict[str, Any], expected: int) -> None:
    assert TextModelOptions(**values).mlp_width == expected


def test_md4s_sizes_have_its_parameters() -> None:
    """12 layers of width 768 with a gated MLP of 2,048: 4 d^2 + 3 x 2,048 d, and two norms."""
    model = model_of(hidden_size=768, num_heads=12, mlp="swiglu")
    with torch.device("meta"):
        layer = model.build_layer(0)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 768**2 + 3 * 2048 * 768 + 2 * 768


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_heads": 5}, r"model\.num_heads 5 does not divide model\.hidden_size 24"),
        ({"num_heads": 8}, "heads of odd width"),
    ],
)
def test_heads_must_divide_the_width_evenly(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        TextModelOptions(**{"hidden_size": 24} | values).check()
    TextModelOptions().check()


def test_models_of_other_sizes_describe_themselves_otherwise() -> None:
    seen = [
        model_of(**values).describe()
        for values in ({}, {"mlp": "swiglu"}, {"level": "adaln"}, {"num_heads": 6})
    ]
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])
    assert seen[0]["name"] == "text"
    assert seen[0]["vocabulary_size"] == V
    assert model_of(dropout=0.1).describe() == seen[0]
    assert model_of(condition_size=20).describe() == seen[0], "without AdaLN there is none"


# -- precision, devices, dropout -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bf16_changes_logits_a_little(kind: dict[str, Any]) -> None:
    shared, block = built(model_of(**kind))
    nn.init.normal_(shared.head.weight, 0, 0.2, generator=torch.Generator().manual_seed(0))
    exact = logits(shared, block, states(), LEVELS)
    with torch.autocast("cpu", torch.bfloat16):
        close = logits(shared, block, states(), LEVELS)
    assert close.dtype == torch.bfloat16
    assert 0 < (close - exact).abs().max() < 0.05 * exact.abs().max()
    halves = logits(shared.bfloat16(), block.bfloat16(), states(), LEVELS)
    assert halves.dtype == torch.bfloat16
    assert (halves - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_everything_stays_on_the_gpu(kind: dict[str, Any]) -> None:
    model, mode = model_of(**kind), FakeTensorMode()
    with mode, torch.device("cuda"):
        shared = model.build_shared()
        block = Block({0: model.build_layer(0)})
        z = torch.empty(3, 7, dtype=torch.int64)
        level = torch.empty(3)
    with mode:
        output = logits(shared, block, z, level)
    assert (output.device.type, output.shape) == ("cuda", (3, 7, V))


def test_recomputing_gives_the_same_gradients() -> None:
    model = model_of(level="adaln", mlp="swiglu")
    grads = []
    for recompute in (False, True):
        shared = randomize(built(model)[0])
        block = build_block(model, range(2), recompute=recompute)
        materialise(block, CPU, model.weights(block, 0))
        randomize(block)
        logits(shared, block, states(), LEVELS).square().mean().backward()
        grads.append([p.grad for module in (shared, block) for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dropout_acts_in_training_only() -> None:
    shared, block = random_of(model_of(dropout=0.5))
    _, plain = random_of(model_of())
    tokens, context = shared.embed(None, states(), None)
    assert isinstance(context, Context)
    assert torch.equal(block.eval()(tokens, context), plain(tokens, context))
    assert not torch.equal(block.train()(tokens, context), block(tokens, context))


def test_the_state_is_all_that_a_text_is_predicted_from() -> None:
    shared, _ = random_of(model_of())
    assert isinstance(shared, TextShared)
    tokens, _ = shared.embed(torch.ones(3, 2), states(), None)
    assert torch.equal(tokens, shared.embed(None, states(), None)[0])


# -- layers that architectures share ---------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_features_of_a_level_are_cosines_then_sines() -> None:
    level = torch.tensor([-1.5, 0.0, 3.0])
    features = timestep_features(level, 6)
    for k in range(3):
        frequency = math.exp(-math.log(10_000) * k / 3)
        torch.testing.assert_close(features[:, k], (level * frequency).cos())
        torch.testing.assert_close(features[:, 3 + k], (level * frequency).sin())


@pytest.mark.usefixtures("float64")
def test_modulation_scales_and_shifts_all_tokens_of_a_sample_alike() -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    shift, scale = torch.arange(8.0).reshape(2, 4), -torch.arange(8.0).reshape(2, 4)
    y = modulate(x, shift, scale)
    for n in range(2):
        for t in range(3):
            torch.testing.assert_close(y[n, t], x[n, t] * (1 + scale[n]) + shift[n])

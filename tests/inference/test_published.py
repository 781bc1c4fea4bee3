"""Published weights: agreement with the published code's own numbers, and files that must be
refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import dbdist
from dbdist import seeds
from dbdist.cli import main
from dbdist.errors import CheckpointError, ConfigError
from dbdist.inference.published import load_published_vit, published_block_of_step
from dbdist.tasks.base import DenoisingLoss, Draws
from dbdist.tasks.classification import Classification
from dbdist.tasks.options import ClassificationOptions, ClassificationSamplerOptions

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def published():
    return load_published_vit(GOLDEN / "a/weights.safetensors")


def loss_of(model, block, images, labels, draws, weighting="none"):
    """The objective of one block of a published model."""
    options = ClassificationOptions(weighting=weighting)
    sizes = model.config
    sampler = ClassificationSamplerOptions()
    task = Classification(options, sampler, sizes.spec(), sizes.hidden_size, sizes.num_blocks)
    return DenoisingLoss(model.denoiser(block), task)({"image": images, "label": labels}, draws)


def sizes_in(path):
    with safe_open(path, "pt") as file:
        return {k: int(v) for k, v in file.metadata().items()}


@pytest.mark.parametrize("block", [0, 1, 2])
def test_logits_agree_with_the_published_code(published, golden, block):
    v = golden("a/vectors")
    logits = published.denoise(block, v["images"], v[f"block{block}/z"], v[f"block{block}/sigma"])
    torch.testing.assert_close(logits, v[f"block{block}/logits"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("num_steps", [3, 4, 6, 12])
def test_sampler_agrees_with_the_published_code(published, golden, num_steps, cfg_scale):
    v, prefix = golden("a/vectors"), f"sample/cfg{cfg_scale}/K{num_steps}"
    assert (
        published_block_of_step(published.schedule, num_steps)
        == v[f"{prefix}/block_of_step"].tolist()
    )
    logits = published.sample(v["images"], v[f"{prefix}/z_init"], num_steps, cfg_scale)
    torch.testing.assert_close(logits, v[f"{prefix}/logits_final"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_loss_and_gradients_agree_with_the_published_code(published, golden, block):
    v = golden("a/vectors")
    draws = Draws(v[f"block{block}/sigma"], v[f"block{block}/noise"], None)
    loss = loss_of(published, block, v["images"], v["labels"], draws)
    cross_entropy = loss.per_sample["cross_entropy"]
    torch.testing.assert_close(
        cross_entropy, v[f"block{block}/cross_entropy"], rtol=1e-7, atol=1e-9
    )
    loss.value.backward()
    prefix = f"block{block}/grad_mean_ce/"
    shared = published.shared
    pairs = {
        "vit.embeddings.label_embeddings.weight": shared.label_table.grad,
        "vit.embeddings.position_embeddings": shared.positions.grad,
        "classifier.weight": shared.head.weight.grad,
        "vit.time_embedder.mlp.0.weight": shared.noise_mlp_in.weight.grad,
        "adaLN_modulation.linear.weight": shared.adaln.linear.weight.grad,
    }
    for index, layer in published.blocks[block].layers.items():
        stem = f"vit.encoder.layer.{index}"
        q, k, value = layer.attention.qkv.weight.grad.chunk(3)
        pairs |= {
            f"{stem}.attention.attention.query.weight": q,
            f"{stem}.attention.attention.key.weight": k,
            f"{stem}.attention.attention.value.weight": value,
            f"{stem}.adaLN_modulation.linear.weight": layer.adaln.linear.weight.grad,
            f"{stem}.output.dense.weight": layer.mlp_out.weight.grad,
        }
    checked = 0
    for key, own in pairs.items():
        expected = v.get(prefix + key)
        if expected is None:
            continue
        scale = expected.abs().max()
        torch.testing.assert_close(
            own.reshape(expected.shape) / scale, expected / scale, rtol=0, atol=1e-6
        )
        checked += 1
    assert checked >= 14
    others = [b for b in range(3) if b != block]
    assert all(p.grad is None for b in others for p in published.blocks[b].parameters())
    published_loss = loss_of(published, block, v["images"], v["labels"], draws, "published")
    torch.testing.assert_close(
        published_loss.value, v[f"block{block}/loss_published"], rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("block", [0, 1, 2])
def test_every_stage_agrees_with_the_published_code(golden, block):
    s = golden("stages/vectors")
    model = load_published_vit(GOLDEN / "stages/weights.safetensors").double()
    shared, layers, p = model.shared, model.blocks[block].layers, f"f64.block{block}."
    images, sigma = s["in.x"].double(), s["in.sigma"][block].double()
    z0 = F.normalize(shared.label_table[s["in.labels"]], dim=-1)
    torch.testing.assert_close(z0, s["f64.z"], rtol=0, atol=1e-12)
    z = z0 + sigma[:, None] * s["in.eps"][block].double()
    torch.testing.assert_close(z, s[p + "zt"], rtol=1e-12, atol=1e-12)
    c = model.schedule.preconditioning(sigma)
    x, level = shared.embed(images, c.c_in[:, None] * z, c.c_noise)
    torch.testing.assert_close(level, s[p + "conditioning"], rtol=0, atol=1e-10)
    torch.testing.assert_close(x, s[p + "tokens_in"], rtol=0, atol=1e-11)
    assert [int(i) for i in layers] == s[p + "layers"].tolist()
    for layer, expected in zip(layers.values(), s[p + "hidden_after_layer"], strict=True):
        x = layer(x, level)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-10 * expected.abs().max().item())

    def combine(pooled):
        torch.testing.assert_close(pooled, s[p + "pooled"], rtol=0, atol=1e-10)
        out = c.c_out[:, None] * pooled + c.c_skip[:, None] * z
        torch.testing.assert_close(out, s[p + "model_out"], rtol=0, atol=1e-10)
        return out

    logits = shared.output(x, combine, level)
    torch.testing.assert_close(logits, s[p + "logits"], rtol=0, atol=1e-9)
    guided = model.denoise(block, images, z, sigma, cfg_scale=1.5)
    torch.testing.assert_close(guided, s[p + "logits_cfg1.5"], rtol=0, atol=1e-9)
    draws = Draws(sigma, s["in.eps"][block].double(), None)
    for weighting, key in (("published", "loss"), ("per_sample", "loss_persample")):
        loss = loss_of(model, block, images, s["in.labels"], draws, weighting)
        torch.testing.assert_close(loss.value, s[p + key], rtol=1e-10, atol=0)


@pytest.mark.parametrize("table", ["raw", "normalized"])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("num_steps", [3, 4, 6])
def test_sampler_agrees_stage_by_stage_set(golden, num_steps, cfg_scale, table):
    s = golden("stages/vectors")
    prefix = f"f64.sample.n{num_steps}.cfg{cfg_scale}." + (
        "normemb." if table == "normalized" else ""
    )
    if prefix + "final_logits" not in s:
        pytest.skip("not in the golden set")
    model = load_published_vit(GOLDEN / "stages/weights.safetensors").double()
    logits = model.sample(s["in.x"].double(), s[prefix + "z"][0], num_steps, cfg_scale, table)
    torch.testing.assert_close(logits, s[prefix + "final_logits"], rtol=0, atol=1e-6)


def test_four_published_optimizer_steps_are_reproduced(golden):
    """One AdamW over everything, as published, equals one per block plus one for the shared
    modules."""
    s = golden("stages/vectors")
    model = load_published_vit(GOLDEN / "stages/weights.safetensors").double()
    settings = {"lr": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
    shared = torch.optim.AdamW(model.shared.parameters(), **settings)
    of_block = [torch.optim.AdamW(block.parameters(), **settings) for block in model.blocks]
    images, labels = s["in.x"].double(), s["in.labels"]
    for i, block in enumerate(s["f64.opt.blocks"].tolist()):
        model.zero_grad(set_to_none=True)
        draws = Draws(s["in.sigma"][block].double(), s["in.eps"][block].double(), None)
        loss = loss_of(model, block, images, labels, draws, "published")
        loss.value.backward()
        parameters = [*model.shared.parameters(), *model.blocks[block].parameters()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        torch.testing.assert_close(loss.value.detach(), s["f64.opt.loss"][i], rtol=1e-9, atol=0)
        torch.testing.assert_close(norm, s["f64.opt.grad_norm"][i], rtol=1e-8, atol=0)
        shared.step()
        of_block[block].step()
    after = {
        k.removeprefix("f64.opt.after."): v for k, v in s.items() if k.startswith("f64.opt.after.")
    }
    expected = load_published_vit(after, sizes_in(GOLDEN / "stages/weights.safetensors"))
    for (name, own), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        if name.endswith("qkv.bias"):  # key biases have gradients of pure rounding noise
            d = len(own) // 3
            own, other = torch.cat([own[:d], own[2 * d :]]), torch.cat([other[:d], other[2 * d :]])
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_float32_weights_agree_to_float32_tolerance(published, golden):
    v = golden("a/vectors")
    logits = published.float().denoise(
        0, v["images"].float(), v["block0/z"].float(), v["block0/sigma"].float()
    )
    torch.testing.assert_close(logits.double(), v["block0/logits"], rtol=1e-4, atol=1e-4)


def test_a_state_dict_needs_the_sizes_that_shapes_do_not_tell(golden):
    weights = golden("a/weights")
    with pytest.raises(CheckpointError, match="num_heads"):
        load_published_vit(weights)
    model = load_published_vit(weights, {"num_heads": 4, "num_blocks": 3})
    assert model.config.image_size == 16
    with pytest.raises(ConfigError, match="num_headz"):
        load_published_vit(weights, {"num_headz": 4})
    with pytest.raises(CheckpointError, match="hidden_size"):
        load_published_vit(weights, {"num_heads": 4, "num_blocks": 3, "hidden_size": 64})


def test_missing_and_foreign_tensors_are_named(golden):
    sizes = {"num_heads": 4, "num_blocks": 3}
    weights = golden("a/weights")
    del weights["vit.encoder.layer.3.output.dense.bias"]
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp_out\.bias"):
        load_published_vit(weights, sizes)
    weights = golden("a/weights") | {"vit.surprise.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="surprise"):
        load_published_vit(weights, sizes)


@pytest.mark.parametrize("cut", [4, 100, -100])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, capfd, cut):
    content = (GOLDEN / "a/weights.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[:cut])
    with pytest.raises(CheckpointError, match="damaged"):
        load_published_vit(tmp_path / "w.safetensors")


def test_a_lightning_checkpoint_is_imported_and_predicts_as_the_published_sampler(tmp_path, golden):
    weights = {f"model.{k}": v.float() for k, v in golden("a/weights").items()}
    hyper = {"num_attention_heads": 4, "num_blocks": 3}
    content = {
        "state_dict": weights | {"sigmas": torch.ones(3)},
        "hyper_parameters": hyper,
        "epoch": 3,
    }
    torch.save(content, tmp_path / "last.ckpt")
    main(["import-published", str(tmp_path / "last.ckpt"), str(tmp_path / "out")])
    model = dbdist.load(tmp_path / "out")
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = [torch.randn(1, 32, generator=seeds.generator(0, "sampler", i)) for i in range(6)]
    z = (1 + 80.0**2) ** 0.5 * torch.cat(noise)
    logits = load_published_vit(tmp_path / "last.ckpt").sample(images, z, 3)
    torch.testing.assert_close(model.predict_proba(images), logits.softmax(-1))
    assert model.predict(images).tolist() == logits.argmax(-1).tolist()
    assert json.loads((tmp_path / "out/config.json").read_text())["sampler"]["label_table"] == "raw"


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for name, payload in (
        ("a.ckpt", {"state_dict": {}, "hyper_parameters": Bomb()}),
        ("b.ckpt", Bomb()),
    ):
        torch.save(payload, tmp_path / name)
        with pytest.raises(CheckpointError, match="nothing in it was executed"):
            load_published_vit(tmp_path / name)
    (tmp_path / "c.ckpt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        load_published_vit(tmp_path / "c.ckpt")
    assert not (tmp_path / "executed").exists()


def test_pickles_of_another_form_are_refused(tmp_path):
    path, loop = tmp_path / "x.ckpt", {}
    loop["self"] = loop
    for content in (
        {0: torch.ones(1)},
        {"state_dict": [torch.ones(1)]},
        {"state_dict": {}, "hyper_parameters": loop},
        [torch.ones(1)],
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError):
            load_published_vit(path)

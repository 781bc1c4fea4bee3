"""diffusers' AutoencoderKL, from a folder on disk: images to latents, and latents to images.

Latents are as diffusers' pipelines have them, (raw - shift) x scaling. Nothing is downloaded.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dbdist.data.latent_files import VaeIdentity, sha256_of
from dbdist.data.latents import LatentSpec, denormalize
from dbdist.data.paths import require_file, shown
from dbdist.errors import ConfigError, DataError
from dbdist.whole_files import read_file

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BATCH = 32
"""Latents that are decoded at a time."""


@dataclass(frozen=True)
class Vae:
    """An autoencoder, ready to be used, and what tells it from others."""

    model: Any
    identity: VaeIdentity
    image_channels: int
    channels: int
    """Of a latent."""
    factor: int
    """How many pixels of a side make one of a latent."""
    device: torch.device

    @torch.no_grad()
    def encode(
        self, images: Float[Tensor, "n c h w"]
    ) -> tuple[Float[Tensor, "n k s s"], Float[Tensor, "n k s s"]]:
        """(mean, standard deviation) of the posteriors, on the CPU. images: in [-1, 1]."""
        posterior = self.model.encode(images.to(self.device)).latent_dist
        scaling, shift = self.identity.scaling, self.identity.shift
        mean, std = (posterior.mean - shift) * scaling, posterior.std * abs(scaling)
        return mean.cpu(), std.cpu()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n k s s"]) -> Float[Tensor, "n c h w"]:
        """Images, in [-1, 1] or nearly so, on the CPU."""
        raw = latents.to(self.device) / self.identity.scaling + self.identity.shift
        return self.model.decode(raw).sample.cpu()


def decode_latents(
    latents: Float[Tensor, "n k s s"], vae: Vae, spec: LatentSpec
) -> UInt8[Tensor, "n c h w"]:
    """The images that latents of a data set, or a model's of the same form, stand for.

    Raises ConfigError for another autoencoder than the data set was encoded by.
    """
    own = vae.identity
    if own.sha256 != spec.vae_sha256:
        raise ConfigError(
            f"the latents were made by another autoencoder than {own.name}: the SHA-256 of its "
            f"weights is {spec.vae_sha256[:16]}…, not {own.sha256[:16]}…"
        )
    own = replace(own, scaling=spec.scaling, shift=spec.shift)  # the latents' own unit
    vae = replace(vae, identity=own)
    side = vae.factor * latents.shape[-1]
    parts = [torch.empty(0, vae.image_channels, side, side)]
    for start in range(0, len(latents), BATCH):
        parts.append(vae.decode(denormalize(latents[start : start + BATCH].float(), spec)))
    pixels = torch.cat(parts)
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load_vae(path: Path, device: torch.device) -> Vae:
    """The autoencoder of a folder, in float32. Raises ConfigError and DataError."""
    config = _read_config(path)
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError(
            "autoencoders need diffusers: pip install 'dbdist[latents]' (in a checkout: uv sync "
            "--extra latents)"
        ) from None
    require_file(path / WEIGHTS)
    try:
        kind: Any = AutoencoderKL
        model, found = kind.from_pretrained(
            str(path),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            torch_dtype=torch.float32,
        )
        problems = _problems(found)
        model = model if problems else model.to(device).eval()
        identity = VaeIdentity(
            path.absolute().name,
            sha256_of(path / WEIGHTS),
            float(model.config["scaling_factor"]),
            float(model.config["shift_factor"] or 0.0),
        )
        sizes = int(model.config["in_channels"]), int(model.config["latent_channels"])
        factor = 2 ** (len(model.config["block_out_channels"]) - 1)
    except Exception as error:  # a damaged or foreign folder can raise anything
        reason = " ".join(shown(str(error)).split())[:300] or type(error).__name__
        raise DataError(f"{shown(path)} cannot be loaded as {config}: {reason}") from error
    if problems:
        raise DataError(f"{shown(path / WEIGHTS)} is not of its config.json: {problems}")
    if not identity.scaling:
        raise DataError(f"{shown(path / CONFIG)} has scaling_factor 0")
    return Vae(model, identity, *sizes, factor, device)


def _read_config(path: Path) -> str:
    """The class that config.json names; DataError unless it is AutoencoderKL."""
    if not path.is_dir():
        raise DataError(
            f"{shown(path)} is no folder; it must hold {CONFIG} and {WEIGHTS} of a diffusers "
            "AutoencoderKL (nothing is downloaded)"
        )
    if not (path / CONFIG).exists() and (path / "vae" / CONFIG).exists():
        raise DataError(f"{shown(path)} is a pipeline; its autoencoder is {shown(path / 'vae')}")
    require_file(path / CONFIG)
    try:
        name = json.loads(read_file(path / CONFIG))["_class_name"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise DataError(f"{shown(path / CONFIG)} is no configuration of diffusers") from None
    if name != "AutoencoderKL":
        raise DataError(f"{shown(path)} holds {shown(str(name))}; it must be an AutoencoderKL")
    return name


def _problems(found: dict[str, Any]) -> str:
    """How weights do not fit, in words; diffusers leaves such tensors at random values."""
    kinds: dict[str, Sequence[Any]] = {
        "lacks": found["missing_keys"],
        "has a foreign": found["unexpected_keys"],
        "has another shape of": found["mismatched_keys"],
        "failed:": found["error_msgs"],
    }
    said = [f"it {kind} {sorted(map(str, keys))[0]}" for kind, keys in kinds.items() if keys]
    return " and ".join(said)

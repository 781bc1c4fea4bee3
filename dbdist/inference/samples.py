"""Samples of a run's model, drawn through the chain of blocks or in one process.

A sample is the same either way: what is random for it depends on the seed and its number alone.
"""

from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dbdist.build import Setup, build_setup
from dbdist.config.config import Config
from dbdist.data.base import Dataset
from dbdist.data.latents import LatentSpec
from dbdist.data.vae import decode_latents, load_vae
from dbdist.errors import ConfigError
from dbdist.inference.load_models import spec_of_checkpoint
from dbdist.inference.of_run import blocks_here, checkpoint_of_run
from dbdist.parallel.topology import Topology
from dbdist.sampling.evaluation import ModelOfBlock, answers_here
from dbdist.tasks.pictures import write_pictures
from dbdist.whole_files import write_whole

SAMPLES = "samples.safetensors"
"""Key `samples`, and the tensors that asked for each of them, such as `label`."""


def draw(
    config: Config,
    topology: Topology,
    classes: tuple[int, ...] | None,
    num: int,
    out: Path | None = None,
    vae: Path | None = None,
) -> list[Path]:
    """Draws samples from a run's checkpoint and writes them; rank 0's files. Collective.

    out: None for a folder in the run's. vae: folder of the autoencoder that decodes latents. Raises
    ConfigError or CheckpointError.
    """
    with closing(checkpoint_of_run(config, topology, {})) as checkpoint:
        with topology.agree("reading the checkpoint"):
            setup = build_setup(config, spec_of_checkpoint(config, checkpoint))
            checkpoint.check_fits(setup.describe())
            requests = setup.task.requests(classes, num)
            if vae is not None and not isinstance(setup.spec, LatentSpec):
                raise ConfigError(f"--vae decodes latents, but {config.run_dir} makes none")
            decoder = None
            if vae is not None and topology.is_coordinator:
                decoder = load_vae(vae, topology.device)
        name = f"samples-{checkpoint.path.name}-seed-{config.seed}"
        out = Path(config.run_dir) / name if out is None else out
        with topology.agree("taking the folder"):
            if topology.is_coordinator:
                _take(out)
        _draw_own(setup, topology, requests, blocks_here(setup, topology, checkpoint), out)
    files: list[Path] = []
    with topology.agree("writing the samples"):
        if topology.is_coordinator:
            samples = _join(out, num)
            files = [out / SAMPLES, *setup.task.show(samples["samples"], out)]
            if decoder is not None:
                decoded = decode_latents(samples["samples"], decoder, setup.spec)
                files += write_pictures(decoded, out)
    return files


@torch.no_grad()
def _draw_own(
    setup: Setup, topology: Topology, requests: Dataset, blocks: ModelOfBlock, out: Path
) -> None:
    """Leaves what this rank finishes in files, for rank 0. Collective."""
    topology.watch.at("sampling", waits=True)
    is_bf16 = setup.config.train.precision == "bf16"
    with torch.autocast(topology.device.type, torch.bfloat16, enabled=is_bf16):
        for block, answers in answers_here(setup, topology, requests, blocks):
            if block == setup.config.num_blocks - 1:
                tensors = {**answers.batch, "samples": answers.answer}
                on_host = {name: t.cpu().contiguous() for name, t in tensors.items()}
                write_whole(out / f".rows-{answers.rows.start:09d}", save(on_host))
    topology.barrier()


def _join(out: Path, num: int) -> dict[str, Tensor]:
    """Joins what the ranks have left to one file."""
    pieces = sorted(out.glob(".rows-*"))
    loaded = [load_file(piece) for piece in pieces]
    found = {name: torch.cat([tensors[name] for tensors in loaded]) for name in loaded[0]}
    if len(found["samples"]) != num:
        raise ConfigError(
            f"{out} holds {len(found['samples'])} of {num} samples: it must be one folder that all "
            "nodes share"
        )
    write_whole(out / SAMPLES, save(found))
    for piece in pieces:
        piece.unlink()
    return found


def _take(out: Path) -> None:
    """Makes the folder, or empties one of earlier samples. Raises ConfigError for any other."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in out.iterdir())
        foreign = [name for name in held if not name.startswith(("sample", ".rows-"))]
        if foreign:
            raise ConfigError(f"{out} holds {foreign[0]}, which is no sample; give another --out")
        for name in held:
            (out / name).unlink()
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror})") from None

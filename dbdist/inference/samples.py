"""Samples of a run's model, drawn through the chain of blocks or in one process.

A sample is the same either way: what is random for it depends on the seed and its number alone.
"""

import hashlib
import json
import re
import uuid
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dbdist.build import Setup, build_setup
from dbdist.checkpoint.names import step_folder
from dbdist.config.config import Config
from dbdist.data.base import Dataset
from dbdist.data.latents import LatentSpec
from dbdist.data.vae import decode_latents, load_vae
from dbdist.errors import ConfigError
from dbdist.inference.load_models import spec_of_checkpoint
from dbdist.inference.of_run import blocks_here, checkpoint_of_run
from dbdist.parallel.topology import Topology
from dbdist.run.folder import read_config
from dbdist.sampling.evaluation import ModelOfBlock, answers_here
from dbdist.tasks.pictures import write_pictures
from dbdist.whole_files import write_whole

OURS = re.compile(
    r"samples\.(safetensors|png|txt)|sample-\d{5,}\.png|\.rows-\w+-\d+|.*\.partial", re.ASCII
)
"""Files of earlier samples, which may be removed."""
SAMPLES = "samples.safetensors"
"""Key `samples`, the `number` of each, and the tensors that asked for it, such as `label`."""


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
    topology.check_agreement({"what is asked for": f"{num} of {classes}", "folder": str(out)})
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
        out = Path(config.run_dir) / _name(config, checkpoint.step, classes) if out is None else out
        with topology.agree("taking the folder"):
            if topology.is_coordinator:
                _take(out)
        token = topology.gather(uuid.uuid4().hex)[0]  # nobody else's rows are taken for ours
        rows = _draw_own(setup, topology, requests, blocks_here(setup, topology, checkpoint))
        with topology.agree("writing the samples"):
            if rows:
                _write(out / f".rows-{token}-{topology.rank}", rows)
    files: list[Path] = []
    with topology.agree("writing the samples"):
        if topology.is_coordinator:
            try:
                samples = _join(out, token, num)
                files = [out / SAMPLES, *setup.task.show(samples["samples"], out)]
                if decoder is not None:
                    decoded = decode_latents(samples["samples"], decoder, setup.spec)
                    files += write_pictures(decoded, out)
            except OSError as error:
                raise ConfigError(f"{out} cannot be written ({error.strerror})") from None
    return files


@torch.no_grad()
def _draw_own(
    setup: Setup, topology: Topology, requests: Dataset, blocks: ModelOfBlock
) -> list[dict[str, Tensor]]:
    """What this rank finishes: `samples`, what asked for them, and the `number` of each."""
    topology.watch.at("sampling", waits=True)
    is_bf16 = setup.config.train.precision == "bf16"
    found: list[dict[str, Tensor]] = []
    with torch.autocast(topology.device.type, torch.bfloat16, enabled=is_bf16):
        for block, answers in answers_here(setup, topology, requests, blocks):
            if block == setup.config.num_blocks - 1:
                number = torch.arange(answers.rows.start, answers.rows.stop)
                tensors = {**answers.batch, "samples": answers.answer, "number": number}
                found.append({name: tensor.cpu() for name, tensor in tensors.items()})
    topology.barrier()
    return found


def _write(path: Path, rows: list[dict[str, Tensor]]) -> None:
    """Leaves a rank's rows for rank 0. Raises ConfigError."""
    joined = {name: torch.cat([tensors[name] for tensors in rows]) for name in rows[0]}
    try:
        write_whole(path, save({name: tensor.contiguous() for name, tensor in joined.items()}))
    except OSError as error:
        raise ConfigError(
            f"{path.parent} cannot be written ({error.strerror}); it must be one folder that all "
            "nodes share"
        ) from None


def _join(out: Path, token: str, num: int) -> dict[str, Tensor]:
    """Joins what the ranks have left to one file, in the order of the numbers."""
    pieces = [*out.glob(f".rows-{token}-*")]
    loaded = [load_file(piece) for piece in pieces]
    numbers = torch.cat([torch.empty(0, dtype=torch.int64), *(x["number"] for x in loaded)])
    if len(numbers) != num:
        raise ConfigError(
            f"{out} holds {len(numbers)} of {num} samples: it must be one folder that all nodes "
            "share, and of one command at a time"
        )
    order = numbers.argsort()
    found = {name: torch.cat([x[name] for x in loaded])[order] for name in loaded[0]}
    write_whole(out / SAMPLES, save(found))
    for piece in pieces:
        piece.unlink()
    return found


def _name(config: Config, step: int, classes: tuple[int, ...] | None) -> str:
    """A folder in the run's for these samples; other settings than the run's own have theirs."""
    name = f"samples-{step_folder(step)}-seed-{config.seed}"
    own = read_config(Path(config.run_dir)) or config
    settings = [asdict(config.sampler), classes]
    if settings != [asdict(own.sampler), None]:
        text = json.dumps(settings, sort_keys=True, default=str)
        name += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name


def _take(out: Path) -> None:
    """Makes the folder, or empties one of earlier samples. Raises ConfigError for any other."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in out.iterdir())
        foreign = [name for name in held if not OURS.fullmatch(name)]
        if foreign:
            raise ConfigError(f"{out} holds {foreign[0]}, which is no sample; give another --out")
        for name in held:
            (out / name).unlink()
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror})") from None

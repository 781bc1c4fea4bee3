"""Folders of random latents, written without an autoencoder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbdist.data.latent_files import Contents, Form, Split, VaeIdentity
from dbdist.data.latent_writer import opened_writer

NUM_SAMPLES: Mapping[Split, int] = {"train": 23, "test": 7}
FORM = Form(4, 6, "float16", has_posterior=True, has_mirrored=False)
CONTENTS = Contents(
    FORM, VaeIdentity("random", "0" * 64, 0.5, 0.25), 3, ("ant", "bee", "cat"), 8, {"name": "none"}
)
"""Three shards to train, one to test."""
OFFSETS = torch.tensor([1.0, 0.5, 0.0, -0.5]).view(-1, 1, 1)
SCALES = torch.tensor([0.8, 0.6, 1.2, 0.3]).view(-1, 1, 1)


def contents(**form: Any) -> Contents:
    """The same of another form."""
    return replace(CONTENTS, form=replace(FORM, **form))


def values(what: Contents, split: Split) -> dict[str, Tensor]:
    """All tensors of a split and its labels: means far apart, wide posteriors."""
    generator = torch.Generator().manual_seed(len(split))
    n, form = NUM_SAMPLES[split], what.form
    shape = n, form.channels, form.image_size, form.image_size
    found = {}
    for name in form.all_names(split):
        noise = torch.randn(shape, generator=generator)
        found[name] = noise.abs() * 0.3 if "std" in name else noise * SCALES + OFFSETS
    return {**found, "labels": torch.arange(n) % what.num_classes}


def write(
    out: Path, what: Contents = CONTENTS, limit: int = 10**9, **given: Mapping[str, Tensor]
) -> list[str]:
    """Writes what is missing of a folder, or only `limit` shards; the names of those written.

    given: the values of a split, in place of `values`.
    """
    written: list[str] = []
    with opened_writer(out, what, NUM_SAMPLES) as writer:
        for split in ("train", "test"):
            all_of = given.get(split) or values(what, split)
            for number, samples in writer.missing(split):
                if len(written) == limit:
                    return written
                rows = {
                    name: tensor[samples.start : samples.stop] for name, tensor in all_of.items()
                }
                written.append(writer.add(split, number, rows, rows.pop("labels")).file)
        writer.finish()
    return written

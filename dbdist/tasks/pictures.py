"""Pictures in one grid, for people to look at."""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from dbdist.data.images import DatasetSpec
from dbdist.data.pictures import png_of
from dbdist.whole_files import write_whole

COLUMNS = 10
IN_GRID = 100
"""Pictures in a grid at most."""
SMALLEST = 32
"""Side in pixels that smaller pictures are enlarged to in a grid, by whole factors."""


def is_of_pictures(spec: Any) -> bool:
    """Whether a data set's samples are pictures; else they are latents."""
    return isinstance(spec, DatasetSpec)


def grid(pictures: UInt8[Tensor, "n c h w"], columns: int = COLUMNS) -> UInt8[Tensor, "c y x"]:
    """Pictures row by row with black lines between them; the last row may not be full."""
    columns = min(columns, len(pictures))
    factor = max(1, -(-SMALLEST // pictures.shape[-1]))
    large = pictures.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
    missing = -len(large) % columns
    framed = F.pad(large, (0, 1, 0, 1, 0, 0, 0, missing))
    rows = framed.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)
    return rows.flatten(3, 4).flatten(1, 2)[:, :-1, :-1]


def write_pictures(pictures: UInt8[Tensor, "n c h w"], folder: Path) -> list[Path]:
    """folder/samples.png, a grid of the first 100, and every picture by itself."""
    shown = [grid(pictures[:IN_GRID]), *pictures]
    names = ["samples", *(f"sample-{i:05}" for i in range(len(pictures)))]
    files = [folder / f"{name}.png" for name in names]
    for file, picture in zip(files, shown, strict=True):
        write_whole(file, png_of(picture))
    return files

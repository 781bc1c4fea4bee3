"""A generator in a user's hands, and what it is asked for: classes in, pictures out."""

import hashlib
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from dbdist.data.base import Batch, Key
from dbdist.data.images import denormalize
from dbdist.errors import ConfigError
from dbdist.processes.partition import Partition
from dbdist.tasks.base import Answer
from dbdist.tasks.pictures import is_of_pictures


class Requests:
    """Images that are asked for, by class: a `Dataset` whose samples have a `label` only."""

    augments = False

    def __init__(self, spec: Any, classes: Sequence[int], num: int) -> None:
        """classes: indices, gone round until there are `num`."""
        self.spec = spec
        self.labels = torch.tensor([*islice(cycle(classes), num)], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index = [key if isinstance(key, int) else key[0] for key in keys]
        return {"label": self.labels[index]}

    def digest(self) -> str:
        """SHA-256 of the classes."""
        return hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()


class Generator:
    """`dbdist.load(OUT)` of a generator; holds no process group and needs no config file.

    `class_names[i]` is what index i stands for.
    """

    def __init__(
        self,
        spec: Any,
        answer: Answer,
        device: torch.device,
        partition: Partition,
        condition_dropout: float,
    ) -> None:
        """partition: of the noise levels. condition_dropout: what it was trained with."""
        self.spec, self.device = spec, device
        self._answer, self._partition = answer, partition
        self._condition_dropout = condition_dropout

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their indices."""
        return names_of(self.spec)

    @torch.no_grad()
    def sample(
        self,
        classes: Sequence[int | str] | int | str | None = None,
        num: int = 1,
        seed: int = 0,
        guidance: float | None = None,
        batch_size: int = 64,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> Shaped[Tensor, "n _ _ _"]:
        """`num` pictures as uint8 (n, C, S, S), going round these classes.

        A model of latents gives latents, floats scaled as the data set's, or what `decode` makes of
        a batch of them.

        classes: an index, a name, or several; None: all. A picture depends on its place, its class
        and the seed alone, however many are made. guidance: scale of classifier-free guidance, 0
        for none; None: as the model was exported. Raises ConfigError for classes that there are
        not, and for guidance that the model was not trained for.
        """
        is_picture = is_of_pictures(self.spec)
        if decode is not None and is_picture:
            raise ConfigError(f"{self.spec.name} are pictures already; leave out decode")
        changes: dict[str, Any] = {"seed": seed}
        if guidance is not None:
            check_guidance(guidance, self._condition_dropout)
            changes["guidance_scale"] = guidance
        requests = Requests(self.spec, classes_of(self.spec, classes), num)
        shape = self.spec.channels, self.spec.image_size, self.spec.image_size
        made: list[Tensor] = []
        for first in range(0, max(num, 1), batch_size):
            label = requests.labels[first : first + batch_size].to(self.device)
            if len(label) > 0:
                answers = self._answer({"label": label}, first, **changes).cpu().float()
            else:
                answers = torch.empty(0, *shape)
            if is_picture:
                answers = denormalize(answers, self.spec)
            made.append(answers if decode is None else decode(answers))
        return torch.cat(made)

    def probe(self) -> None:
        """Raises what a wrong description would raise at the first image; one step a block."""
        label = torch.zeros(1, dtype=torch.int64, device=self.device)
        steps = self._partition.steps(self._partition.num_blocks)
        self._answer({"label": label}, 0, steps=steps)


def check_guidance(scale: float, condition_dropout: float) -> None:
    """Raises ConfigError for guidance by a network that never saw an image without its class."""
    if scale not in (0, 1) and condition_dropout == 0:
        raise ConfigError(
            f"sampler.guidance_scale {scale:g} needs a network that was also trained without "
            "classes, but task.condition_dropout is 0; train with more, or set the scale to 0"
        )
    if not 0 <= scale < float("inf"):
        raise ConfigError(f"sampler.guidance_scale is {scale}; it must be at least 0")


def names_of(spec: Any) -> tuple[str, ...]:
    """Names of the classes of a data set; their numbers where they have none."""
    return spec.class_names or tuple(map(str, range(spec.num_classes)))


def classes_of(spec: Any, classes: Sequence[int | str] | int | str | None) -> list[int]:
    """Indices of classes that are given by index or name; None: all. Raises ConfigError."""
    if classes is None:
        return [*range(spec.num_classes)]
    names = names_of(spec)
    found: list[int] = []
    for given in [classes] if isinstance(classes, int | str) else classes:
        if isinstance(given, str) and given in names:
            found.append(names.index(given))
        elif str(given).isdecimal() and int(given) < spec.num_classes:
            found.append(int(given))
        else:
            raise ConfigError(
                f"{given!r} is no class of {spec.name}; they are 0 to {spec.num_classes - 1}"
                f"{_shown(names, spec)}"
            )
    if not found:
        raise ConfigError(f"no class of {spec.name} is given; give one, or None for all")
    return found


def _shown(names: tuple[str, ...], spec: Any) -> str:
    if not spec.class_names or names == tuple(map(str, range(len(names)))):
        return ""
    more = ", …" if len(names) > 10 else ""
    return f", or {', '.join(names[:10])}{more}"

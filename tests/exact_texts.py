"""Texts whose law is known, and the denoiser that knows it: what masked text is held against."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dbdist.models.base import Block
from dbdist.models.denoiser import Denoiser
from dbdist.processes.masking import MASK, MaskedShares, Masking


@dataclass(frozen=True)
class Letters:
    """A spec of texts with an alphabet of a few letters."""

    vocabulary_size: int
    length: int
    unit: str = "character"
    name: str = "letters"

    def identity(self) -> dict[str, Any]:
        return asdict(self)

    def decode(self, ids: Any) -> str:
        return "".join("abcdefghij"[int(i)] for i in ids)


class MarkovText:
    """Texts of a stationary Markov chain: p(x_1) prod p(x_i | x_i-1)."""

    def __init__(self, transition: Any) -> None:
        self.transition = np.asarray(transition, dtype=np.float64)
        values, vectors = np.linalg.eig(self.transition.T)
        stationary = np.real(vectors[:, np.argmax(np.real(values))])
        self.stationary = stationary / stationary.sum()
        self.num_symbols = len(self.transition)

    @property
    def bigrams(self) -> np.ndarray:
        """p(x_i, x_i+1)."""
        return self.stationary[:, None] * self.transition

    def entropy(self, length: int) -> float:
        """Bits per symbol of a text of this length."""
        first = -(self.stationary * np.log2(self.stationary)).sum()
        later = -(self.bigrams * np.log2(self.transition)).sum()
        return (first + (length - 1) * later) / length

    def draw(self, num: int, length: int, seed: int = 0) -> Tensor:
        """As many texts, symbol by symbol."""
        generator = np.random.default_rng(seed)
        texts = np.empty((num, length), dtype=np.int64)
        texts[:, 0] = generator.choice(self.num_symbols, num, p=self.stationary)
        below = self.transition.cumsum(axis=1)
        for i in range(1, length):
            beyond = generator.random(num)[:, None] >= below[texts[:, i - 1]]
            texts[:, i] = np.minimum(beyond.sum(axis=1), self.num_symbols - 1)
        return torch.from_numpy(texts)

    def log_p(self, z: Tensor) -> Tensor:
        """log p(x_i | the visible symbols) at every place, by forward-backward (Rabiner 1989)."""
        state = z.numpy()
        seen = np.where((state == MASK)[..., None], 1.0, np.eye(self.num_symbols)[state])
        num, length = state.shape
        before = np.empty((num, length, self.num_symbols))
        after = np.ones((num, length, self.num_symbols))
        before[:, 0] = self.stationary
        for i in range(1, length):
            before[:, i] = (before[:, i - 1] * seen[:, i - 1]) @ self.transition
        for i in range(length - 2, -1, -1):
            after[:, i] = (after[:, i + 1] * seen[:, i + 1]) @ self.transition.T
            after[:, i] /= after[:, i].sum(axis=-1, keepdims=True)
        joint = before * after
        return torch.from_numpy(np.log(joint / joint.sum(axis=-1, keepdims=True)))


class ExactShared(nn.Module):
    """Shared modules whose raw output is what `log_p` says of a state."""

    def __init__(self, log_p: Any) -> None:
        super().__init__()
        self.log_p = log_p

    def embed(self, condition: Any, z: Tensor, level_N: Tensor) -> tuple[Tensor, Tensor]:
        assert condition == ()
        return z, level_N

    def output(self, tokens: Tensor, combine: Any, context: Tensor) -> Tensor:
        return combine(self.log_p(tokens))


def denoiser_of(log_p: Any, num_blocks: int = 1, **options: Any) -> Denoiser:
    """A denoiser that says what `log_p` says, in every block."""
    process = Masking(MaskedShares(num_blocks, **options))
    return Denoiser(ExactShared(log_p), Block({}), process)

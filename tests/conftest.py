"""Fixtures for all tests: small configurations, golden vectors, and a pool of real ranks."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# As torchrun sets it: ranks must not fight for two cores, and sums must not depend on the machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"

import pytest
import torch
from ranks import RankPool
from safetensors.torch import load_file
from torch import Tensor

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def float64() -> Iterator[None]:
    """Everything in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """`golden("a/vectors")`: tensors that the published code produced."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Real processes that talk over gloo; see `RankPool.run`."""
    pool = RankPool()
    yield pool
    pool.close()

"""Generation for tests: tiny images, the task, and a denoiser that is exact for normal data."""

import torch

from dbdist.data.images import DatasetSpec
from dbdist.processes.gaussian import NoiseSchedule
from dbdist.tasks.generation import Generation
from dbdist.tasks.options import GenerationOptions

SPEC = DatasetSpec("digits", 2, 4, 5, (0.5, 0.5), (0.5, 0.5), None)
SCHEDULE = NoiseSchedule(3)
DATA_STD = 0.4


def task_of(spec=SPEC, schedule=SCHEDULE):
    return Generation(GenerationOptions(), spec, schedule)


def denoiser_of_normal_data(condition, z, sigma_N):
    """E[z0 | z] for pixels that are N(0, DATA_STD^2)."""
    sigma = sigma_N.reshape(-1, 1, 1, 1)
    return z * DATA_STD**2 / (DATA_STD**2 + sigma**2)


def batch(num_samples=8, spec=SPEC, dtype=None):
    generator = torch.Generator().manual_seed(5)
    shape = num_samples, spec.channels, spec.image_size, spec.image_size
    images = DATA_STD * torch.randn(shape, generator=generator, dtype=dtype)
    labels = torch.randint(spec.num_classes, (num_samples,), generator=generator)
    return {"image": images, "label": labels}

"""Samples: files on disk, datasets, and the order in which a block sees them."""

from dbdist.data.base import Batch, Dataset, Key, Spec
from dbdist.data.datasets import DatasetSpec, ImageDataset, dataset_spec, load_dataset, normalize
from dbdist.data.files import prepare
from dbdist.data.loader import BatchStream, num_test_samples, test_batches

__all__ = [
    "Batch",
    "BatchStream",
    "Dataset",
    "DatasetSpec",
    "ImageDataset",
    "Key",
    "Spec",
    "dataset_spec",
    "load_dataset",
    "normalize",
    "num_test_samples",
    "prepare",
    "test_batches",
]

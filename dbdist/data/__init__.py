"""Samples: files on disk, datasets, and the order in which a block sees them."""

from dbdist.data.base import Batch, Dataset, Key, Spec
from dbdist.data.files import prepare
from dbdist.data.found import describe_found, identity_of
from dbdist.data.images import DatasetSpec, ImageDataset, ImageFiles, ImagesInMemory, normalize
from dbdist.data.loader import BatchStream, num_test_samples, test_batches
from dbdist.data.sets import dataset_spec, load_dataset

__all__ = [
    "Batch",
    "BatchStream",
    "Dataset",
    "DatasetSpec",
    "ImageDataset",
    "ImageFiles",
    "ImagesInMemory",
    "Key",
    "Spec",
    "dataset_spec",
    "describe_found",
    "identity_of",
    "load_dataset",
    "normalize",
    "num_test_samples",
    "prepare",
    "test_batches",
]

"""Pairs of symbols in sampled text, beside those of the corpus."""

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from ranks import config_of
from safetensors.torch import save_file

from dbdist.bench.bigrams import run
from dbdist.config.yaml_files import write_yaml
from dbdist.data.sources import load_dataset
from dbdist.errors import ConfigError


@pytest.fixture
def text_run(tmp_path):
    """A run's folder with its configuration, and the ids of its training and held-out text."""
    (tmp_path / "data").mkdir()
    words = ["abc", "bca", "aab", "cc"]
    text = " ".join(words[i * i % 7 % 4] for i in range(900))
    (tmp_path / "data/text.txt").write_text(text)
    options = ("data.name=text", "data.length=10", f"data.root={tmp_path / 'data'}")
    config = config_of("task.name=masked_text", *options, f"run_dir={tmp_path / 'run'}")
    (tmp_path / "run").mkdir()
    write_yaml(config, tmp_path / "run/config.yaml")
    return tmp_path / "run", [
        split.__getitems__([*range(len(split))])["tokens"]
        for split in (load_dataset(config.data, "train"), load_dataset(config.data, "test"))
    ]


def shares(windows):
    pairs = Counter((a, b) for row in windows.tolist() for a, b in pairwise(row))
    return {pair: count / pairs.total() for pair, count in pairs.items()}


def spread(windows, num):
    num = min(num, len(windows))
    return windows[[i * len(windows) // num for i in range(num)]]


def distance(one, other):
    return sum(abs(one.get(p, 0) - other.get(p, 0)) for p in {*one, *other}) / 2


def test_distances_are_those_of_counted_pairs(text_run, tmp_path, capsys):
    run_dir, (train, test) = text_run
    samples = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:20]]
    samples = samples.roll(1, dims=1).contiguous()
    save_file({"samples": samples}, tmp_path / "samples.safetensors")
    run([str(run_dir), str(tmp_path / "samples.safetensors")])
    found = json.loads(capsys.readouterr().out)
    corpus = shares(train)
    single = {a: c / train.numel() for a, c in Counter(train.flatten().tolist()).items()}
    independent = {(a, b): single[a] * single[b] for a in single for b in single}
    assert found == {
        "num_samples": 20,
        "samples": pytest.approx(distance(shares(samples), corpus), abs=1e-4),
        "train": pytest.approx(distance(shares(spread(train, 20)), corpus), abs=1e-4),
        "held_out": pytest.approx(distance(shares(spread(test, 20)), corpus), abs=1e-4),
        "independent": pytest.approx(distance(independent, corpus), abs=1e-4),
    }


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        (torch.full((2, 10), 99), "has the id 99, but the text has 4 symbols"),
        (torch.rand(2, 10), r"holds no text, but \[2, 10\] of torch.float32"),
        (torch.zeros(3, 1, dtype=torch.int64), r"holds no text, but \[3, 1\] of torch.int64"),
        (torch.zeros(0, 10, dtype=torch.int64), r"holds no text, but \[0, 10\] of torch.int64"),
        (None, r"holds no samples .*; give a samples\.safetensors"),
    ],
)
def test_samples_of_something_else_are_refused(text_run, tmp_path, samples, match):
    path = tmp_path / "samples.safetensors"
    save_file({} if samples is None else {"samples": samples}, path)
    with pytest.raises(ConfigError, match=match):
        run([str(text_run[0]), str(path)])

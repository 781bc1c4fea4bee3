"""Random streams are named: the same name is the same stream everywhere, and no two names share one."""

import hashlib
import subprocess
import sys
from pathlib import Path

import torch

from dbdist import seeds


def test_a_seed_is_the_hash_of_its_name():
    digest = hashlib.sha256(b"7/noise/2/13").digest()
    assert seeds.at(7, "noise", 2, 13) == int.from_bytes(digest[:8], "little") >> 1


def test_seeds_are_the_same_in_every_process():
    own = [seeds.at(0, "noise", 1, 2), seeds.at(-3, "init", "layers.0.norm1.weight")]
    code = (
        "from dbdist import seeds; "
        "print(seeds.at(0, 'noise', 1, 2), seeds.at(-3, 'init', 'layers.0.norm1.weight'))"
    )
    command = [sys.executable, "-c", code]
    told = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert [int(word) for word in told.stdout.split()] == own


def test_seeds_fit_torch_and_no_two_streams_are_alike():
    names = [(s, p, b, t) for s in range(3) for p in ("noise", "sigma") for b in range(4) for t in range(50)]
    values = {seeds.at(*name) for name in names} | {seeds.at(0, "noise", 11), seeds.at(0, "noise", 1, 1)}
    assert len(values) == len(names) + 1  # (0, noise, 1, 1) is among them, (0, noise, 11) is not
    assert all(0 <= value < 2**63 for value in values)


def test_generators_start_anew_and_leave_the_global_one_alone():
    state = torch.get_rng_state()
    first = torch.randn(3, generator=seeds.generator(5, "noise", 0))
    again = torch.randn(3, generator=seeds.generator(5, "noise", 0))
    other = torch.randn(3, generator=seeds.generator(5, "noise", 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)

"""Random streams are named: one name is one stream everywhere, and no two names share one."""

import hashlib

import torch

from dbdist import seeds


def test_a_seed_is_the_hash_of_its_name():
    # SHA-256, unlike hash(), says the same in every process.
    digest = hashlib.sha256(b"7/noise/2/13").digest()
    assert seeds.at(7, "noise", 2, 13) == int.from_bytes(digest[:8], "little") >> 1


def test_seeds_fit_torch_and_no_two_streams_are_alike():
    names = [
        (s, p, b, t)
        for s in range(3)
        for p in ("noise", "sigma")
        for b in range(4)
        for t in range(50)
    ]
    values = {seeds.at(*name) for name in names} | {
        seeds.at(0, "noise", 11),
        seeds.at(0, "noise", 1, 1),
    }
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

"""What travels along the chain: a row of bytes a sample, which gives back what was put in."""

import pytest
import torch

from dbdist.sampling.micro_batches import Wire

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("carry_shape", [(0,), (5,), (2, 3)])
@pytest.mark.parametrize(
    ("state_dtype", "carry_dtype", "state_shape"),
    [
        (torch.float32, torch.float32, (12,)),
        (torch.int64, torch.float32, (7,)),
        (torch.bfloat16, torch.bfloat16, (3,)),
        (torch.float64, torch.float64, (2, 4, 4)),
        (torch.int64, torch.bfloat16, ()),
    ],
)
def test_states_and_carry_come_out_of_their_rows_as_they_went_in(
    state_dtype, carry_dtype, state_shape, carry_shape, num_draws
):
    wire = Wire((num_draws, *state_shape), state_dtype, carry_shape, carry_dtype)
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(4 * num_draws, *state_shape, generator=generator) * 1000).to(state_dtype)
    carry = torch.randn(4, *carry_shape, generator=generator).to(carry_dtype)
    rows = wire.pack(z, carry)
    assert rows.dtype == torch.uint8
    assert rows.shape == (4, wire.row_bytes)
    for found, given in zip(wire.unpack(rows), (z, carry), strict=True):
        assert found.dtype == given.dtype
        assert torch.equal(found, given)


def test_a_row_depends_on_its_own_sample_alone():
    wire = Wire((2, 3), torch.int64, (5,), torch.float32)
    z, carry = torch.arange(24).reshape(8, 3), torch.rand(4, 5)
    rows = wire.pack(z, carry)
    apart = [wire.pack(z[2 * i : 2 * i + 2], carry[i : i + 1]) for i in range(4)]
    assert torch.equal(torch.cat(apart), rows)


def test_the_first_carry_is_zero_and_of_its_type():
    carry = Wire((1, 3), torch.int64, (5,), torch.bfloat16).empty_carry(4, CPU)
    assert (carry.shape, carry.dtype) == ((4, 5), torch.bfloat16)
    assert not carry.any()

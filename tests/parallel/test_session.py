"""What ends a session in one line: memory that is out."""

import pytest
import torch
from ranks import config_of

from dbdist.errors import Fault
from dbdist.parallel.launch import Launch
from dbdist.parallel.layout import Layout
from dbdist.parallel.session import joined


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_out_of_memory_ends_in_one_line_that_says_what_to_lower(error):
    config = config_of("train.batch_size=8", "train.accumulation_steps=2")

    def run():
        with joined(config, Layout(1), Launch(0, 1, 0, 1), {}, lambda line: None) as topology:
            topology.watch.stopping.may_begin(4)
            topology.watch.at("forward")
            raise error

    with pytest.raises(Fault) as caught:
        run()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("rank 0 (block 0) at step 5, forward, is out of memory, with 4 training")
    assert "train.batch_size 8" in text
    assert "raise train.accumulation_steps" in text

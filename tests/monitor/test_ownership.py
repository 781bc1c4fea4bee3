"""The table of who owns what, and sizes as people read them."""

import pytest
import torch
from rich.console import Console

from dbdist.monitor.ownership import Ownership, human_bytes, ownership_table, peak_memory_mb


def rows_of(num_ranks=3):
    return [
        Ownership(
            rank=rank,
            block=str(rank),
            replica=0,
            layers=f"{4 * rank}-{4 * rank + 3}",
            levels=(0.933, 2.91),
            parameters=57_123_456,
            shared_parameters=1_234_567,
            optimizer_bytes=1536,
            device="cuda:0",
            owns_shared=rank == 0,
        )
        for rank in range(num_ranks)
    ]


def lines_at(width, rows, level="sigma"):
    console = Console(width=width, file=None)
    with console.capture() as captured:
        console.print(ownership_table(rows, level, width), highlight=False)
    return captured.get().splitlines()


def test_it_lists_ranks_in_order_and_marks_the_owner_of_the_shared_modules():
    common = {"replica": 0, "optimizer_bytes": 1536, "device": "cpu", "shared_parameters": 4096}
    rows = [
        Ownership(rank=1, block="0", layers="0-1", levels=(0.5, 80.0), parameters=25600,
                  owns_shared=False, **common),
        Ownership(rank=0, block="-", layers="-", levels=None, parameters=0,
                  owns_shared=True, **common),
    ]  # fmt: skip
    lines = lines_at(100, rows)
    coordinator, block_0 = (line.split() for line in lines if "cpu" in line)
    shown = [cell for cell in coordinator if cell != "│"]
    assert shown[:8] == ["0", "-", "-", "-", "-", "0", "4,096", "*"]
    assert "*" not in block_0
    assert {"0-1", "0.5", "80", "25,600", "1.5", "KiB"} <= set(block_0)


@pytest.mark.parametrize(
    ("width", "headers"),
    [
        (120, "rank block replica layers sigma parameters shared optimizer device"),
        (80, "rank block layers sigma parameters shared device"),
        (40, "rank block layers sigma"),
        (20, "rank block"),
    ],
)
def test_where_it_is_narrow_whole_columns_give_way_the_least_important_first(width, headers):
    lines = lines_at(width, rows_of())
    assert all(len(line) <= width for line in lines)
    header = next(line for line in lines if "rank" in line)
    assert header.replace("┃", " ").split() == headers.split()
    assert len(lines) <= 8
    assert ("*" in "".join(lines)) == ("shared" in headers)


def test_without_levels_there_is_no_column_of_them():
    assert "None" not in "".join(lines_at(120, rows_of(), level=""))


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**52, "4096.0 TiB")],
)
def test_human_bytes(num_bytes, text):
    assert human_bytes(num_bytes) == text


def test_peak_memory_covers_what_this_process_holds():
    before = peak_memory_mb(torch.device("cpu"))
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert held.numel() / 2**20 == 64 < before <= peak_memory_mb(torch.device("cpu")) < 2**20

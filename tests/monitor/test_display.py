"""Progress on the console."""

import io
import re

import pytest
from rich.console import Console

from dbdist.monitor import display
from dbdist.monitor.display import Display
from dbdist.monitor.levels import levels_of
from dbdist.processes.gaussian import NoiseSchedule


def shown(width=100, terminal=False, **options):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width)
    return Display(console, levels_of(NoiseSchedule(3)), (0, 1, 2), range(100), **options), out


def values(block, loss=1.0, **others):
    others = {f"train/{name}/block{block}": value for name, value in others.items()}
    speed = {f"perf/samples_per_s/block{block}": 800.0}
    return {f"train/loss/block{block}": loss, f"train/lr/block{block}": 0.1, **speed, **others}


def test_names_of_the_task_are_shown_where_they_are_other_numbers_than_the_loss():
    progress, out = shown()
    progress.update(1, values(0, 2.5, cross_entropy=2.5 + 1e-9, grad_norm=3.0))
    progress.update(1, values(1, 2.5, cross_entropy=0.5, kl=0.25))
    first, second = out.getvalue().splitlines()
    assert first.startswith("[b0 step 1/100] loss 2.5000 | 800 samples/s | ETA")
    assert second.startswith("[b1 step 1/100] loss 2.5000 | cross-entropy 0.5000 | kl 0.2500 | 800")


def test_blocks_that_step_together_are_shown_at_the_same_step(monkeypatch):
    monkeypatch.setattr(display, "PLAIN_INTERVAL_S", 0.0)
    progress, out = shown(is_in_step=True)
    for step in range(1, 101):  # block 2's records arrive late
        progress.update(step, values(0) | values(1))
        if step > 3:
            progress.update(step - 3, values(2))
    for step in (98, 99, 100):
        progress.update(step, values(2))
    found = re.findall(r"\[b(\d) step (\d+)/100]", out.getvalue())
    assert found == [(str(b), str(step)) for step in range(1, 101) for b in range(3)]


@pytest.mark.parametrize("width", [120, 80, 40])
def test_bars_keep_step_loss_and_time_left_in_whole_words(width):
    progress, out = shown(width, terminal=True)
    for block in range(3):
        progress.update(10, values(block, 2.3026, cross_entropy=0.5))
    progress.stop()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("block 2")]
    assert all(len(line) <= width for line in lines)
    assert re.search(r"block 2 .*10/100  loss 2.3026 .*ETA \d:\d\d", lines[-1])
    assert "…" not in text
    assert ("sigma" in lines[-1]) == (width > 40)

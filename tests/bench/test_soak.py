"""What the soak concludes from metrics.jsonl, from samples, and from /proc."""

import json
import os
import socket
import subprocess

import pytest

from dbdist.bench.processes import Usage, listeners_of, parent_of, usage_of, writers_to
from dbdist.bench.soak import Watch, read_metrics, usages


def test_useful_time_is_the_slowest_blocks_over_distinct_steps(tmp_path):
    tag = "perf/step_ms/block"
    lines = [
        {"step": 1, f"{tag}0": 1000.0, f"{tag}1": 2000.0},
        {"step": 5, f"{tag}0": 500.0, f"{tag}1": 250.0},
        {"step": 5, f"{tag}0": 500.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "perf/st'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_metrics(tmp_path) == (5, [5], 2.0 + 4 * 0.5)


@pytest.mark.parametrize(("later_mb", "growth"), [(100.0, 0.0), (103.0, 0.03), (90.0, -0.1)])
def test_growth_is_of_the_largest_minute_after_the_first_five(later_mb, growth):
    watch = Watch()
    levels = [80.0, 100.0, 90.0, 95.0, 95.0, 70.0, later_mb]
    for minute, memory_mb in enumerate(levels):
        watch.samples["rank 0"] += [(minute, Usage(60.0, 3, 1), False)]
        watch.samples["rank 0"] += [(minute, Usage(memory_mb, 10, 2), True)]
    memory, files, threads = usages(watch, 5)
    assert memory["growth"] == pytest.approx(growth)
    assert (files["first"], files["growth"], threads["later"]) == (10, 0.0, 2)
    assert [row["growth"] for row in usages(watch, None)] == [None] * 3


def test_proc_tells_what_this_process_holds_and_listens_on(tmp_path):
    usage = usage_of(os.getpid())
    assert usage is not None
    assert usage.memory_mb > 10
    assert parent_of(os.getpid()) == os.getppid()
    server = socket.create_server(("127.0.0.1", 0))
    place = server.getsockname()
    with server:
        assert place in {(s.address, s.port) for s in listeners_of([os.getpid()])}
    assert place not in {(s.address, s.port) for s in listeners_of([os.getpid()])}
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(["cat"], stdin=-1, stdout=out) as writer:
        assert [*writers_to(log)] == [writer.pid]
    assert writers_to(log) == {}

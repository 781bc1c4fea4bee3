"""Monitor: what it writes, in which order, and what the console shows."""

import io
import itertools
import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dbdist.monitor.display import SteadyConsole
from dbdist.monitor.histogram import LevelHistogram
from dbdist.monitor.levels import levels_of
from dbdist.monitor.monitor import Monitor
from dbdist.processes.gaussian import NoiseSchedule

LEVELS = levels_of(NoiseSchedule(2, p_mean=0.0))
assert LEVELS is not None

pytestmark = pytest.mark.usefixtures("pictures")


def build_monitor(
    run_dir: Path,
    reporters: tuple[int, ...] = (0, 1),
    start=0,
    end=100,
    terminal=False,
    levels=None,
    **options,
) -> tuple[Monitor, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system="standard")
    return Monitor(run_dir, levels, 2, set(reporters), start, end, console, **options), out


def read_lines(run_dir: Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def read_tensorboard(run_dir: Path) -> EventAccumulator:
    sizes = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(run_dir), size_guidance=sizes).Reload()


def loss(rank: int, value: float = 1.0) -> dict[str, float]:
    return {f"train/loss/block{rank}": value}


def test_a_step_is_one_line_with_the_tags_of_all_reporters_in_order(tmp_path):
    monitor, _ = build_monitor(tmp_path)
    monitor.record(1, 10, {"train/loss/block1": 2.0, "perf/step_ms/block1": 5})
    assert read_lines(tmp_path) == []
    monitor.record(0, 10, {"val/accuracy": 0.5, "train/loss/block0": 1.0})
    (line,) = read_lines(tmp_path)  # flushed before close
    assert list(line) == [
        "step", "time_s", "perf/step_ms/block1", "train/loss/block0", "train/loss/block1",
        "val/accuracy",
    ]  # fmt: skip
    assert (line["step"], line["train/loss/block0"], line["train/loss/block1"]) == (10, 1.0, 2.0)
    monitor.close()


def test_steps_ascend_although_one_rank_is_far_ahead(tmp_path):
    monitor, _ = build_monitor(tmp_path)
    with monitor:
        for step in (10, 20, 30, 40):
            monitor.record(1, step, loss(1))
        for step in (10, 20, 30):
            monitor.record(0, step, loss(0))
        assert [line["step"] for line in read_lines(tmp_path)] == [10, 20, 30]
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert "train/loss/block0" in lines[2]
    assert "train/loss/block0" not in lines[3]


def test_a_step_that_only_one_rank_reports_is_written_when_the_others_have_passed_it(tmp_path):
    monitor, _ = build_monitor(tmp_path)
    monitor.record(0, 10, loss(0))
    monitor.record(0, 15, {"val/accuracy": 0.5})
    monitor.record(0, 20, loss(0))
    monitor.record(1, 10, loss(1))
    monitor.record(1, 20, loss(1))
    assert [line["step"] for line in read_lines(tmp_path)] == [10, 15, 20]
    monitor.close()


def test_what_all_reporters_have_recorded_is_in_the_files_for_a_process_that_is_killed(tmp_path):
    monitor, _ = build_monitor(tmp_path)
    monitor.record(1, 10, loss(1))
    assert not monitor.has_recorded(10)
    monitor.record(0, 10, loss(0))
    assert monitor.has_recorded(10)
    assert not monitor.has_recorded(11)
    assert [line["step"] for line in read_lines(tmp_path)] == [10]
    (event,) = read_tensorboard(tmp_path).Scalars("train/loss/block0")
    assert event.step == 10


def test_incomplete_steps_are_written_in_order_on_close_and_close_may_repeat(tmp_path):
    monitor, _ = build_monitor(tmp_path)
    for step in (1, 2, 3):
        monitor.record(1, step, loss(1))
    assert read_lines(tmp_path) == []
    monitor.close()
    monitor.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3]


def test_an_exception_inside_with_still_writes_everything(tmp_path):
    monitor, _ = build_monitor(tmp_path)
    monitor.record(0, 1, loss(0))
    with pytest.raises(RuntimeError, match="died"), monitor:
        raise RuntimeError("died")
    assert [line["step"] for line in read_lines(tmp_path)] == [1]


def test_a_full_disk_costs_records_and_not_the_run(small_disk, capsys):
    monitor, _ = build_monitor(small_disk.path, reporters=(0,))
    monitor.record(0, 1, loss(0))
    filler = small_disk.path / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    for step in range(2, 200):
        monitor.record(0, step, loss(0))
    monitor.record(0, 200, loss(0))
    filler.unlink()
    monitor.record(0, 201, loss(0))
    monitor.close()
    steps = [line["step"] for line in read_lines(small_disk.path)]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, 201)
    warnings = capsys.readouterr().err
    assert warnings.count("training goes on") == 1
    assert "cannot be written (No space left on device)" in " ".join(warnings.split())
    assert "Traceback" not in warnings
    scalars = read_tensorboard(small_disk.path).Scalars("train/loss/block0")
    assert (scalars[0].step, scalars[-1].step) == (1, 201)


def test_what_is_added_to_a_written_step_amends_its_line(tmp_path):
    monitor, _ = build_monitor(tmp_path, reporters=(0,))
    for step in (1, 2):
        monitor.record(0, step, loss(0))
    monitor.record(0, 2, {"val/accuracy": 0.75})
    monitor.record(0, 3, loss(0))
    monitor.close()
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert ["val/accuracy" in line for line in lines] == [False, True, False]
    assert lines[1]["train/loss/block0"] == 1.0


def test_a_rank_that_goes_back_is_named(tmp_path):
    monitor, _ = build_monitor(tmp_path)
    with monitor:
        monitor.record(1, 5, loss(1))
        with pytest.raises(AssertionError, match="rank 1 recorded step 4 after step 5"):
            monitor.record(1, 4, loss(1))


def test_resume_cuts_later_steps_and_a_torn_line_and_has_no_step_twice(tmp_path, capsys):
    first, _ = build_monitor(tmp_path, reporters=(0,))
    for step in range(1, 7):
        first.record(0, step, loss(0, step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "time_s": 0.1, "train/lo')
    kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:4]

    resumed, _ = build_monitor(tmp_path, reporters=(0,), start=4)
    assert "had a line that was torn" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(kept)
    resumed.record(0, 4, {"val/accuracy": 0.5})  # amends the line of the first process
    resumed.record(0, 5, loss(0, 50))
    resumed.close()
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[3] == {**json.loads(kept[3]), "val/accuracy": 0.5}
    assert lines[4]["train/loss/block0"] == 50
    assert not list(tmp_path.glob("*.tmp"))
    scalars = read_tensorboard(tmp_path).Scalars("train/loss/block0")
    assert [(event.step, event.value) for event in scalars] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 50),
    ]


@pytest.mark.parametrize("odd", [b"{}", b"5", b'{"step": 2}', b"[" * 9000, b"\xff\xfe", b"null"])
def test_lines_that_are_none_of_ours_are_left_out_wherever_they_stand(tmp_path, odd):
    ours = [json.dumps({"step": step, "time_s": 0.1}).encode() for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([ours[0], odd, ours[1], odd, b""]))
    build_monitor(tmp_path, start=4)[0].close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join([*ours, b""])


def test_a_resume_needs_no_space(small_disk):
    first, _ = build_monitor(small_disk.path, reporters=(0,))
    for step in range(1, 7):
        first.record(0, step, loss(0, step))
    first.close()
    with suppress(OSError):
        (small_disk.path / "ballast").write_bytes(bytes(2**21))
    build_monitor(small_disk.path, start=4)[0].close()
    assert [line["step"] for line in read_lines(small_disk.path)] == [1, 2, 3, 4]


def test_a_new_run_starts_from_an_empty_file_with_step_zero_kept_out_of_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_s": 1.0}\n{"step"')
    monitor, _ = build_monitor(tmp_path)
    monitor.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_time_grows_over_steps_and_over_a_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_s": 1000.5}\n')
    monitor, _ = build_monitor(tmp_path, reporters=(0,), start=1)
    for step in (2, 3, 4):
        time.sleep(0.01)
        monitor.record(0, step, loss(0))
    monitor.close()
    times = [line["time_s"] for line in read_lines(tmp_path)]
    assert all(a < b for a, b in itertools.pairwise(times))
    assert times[-1] < 1100


def test_nan_and_infinities_are_strings_in_valid_json(tmp_path):
    monitor, _ = build_monitor(tmp_path, reporters=(0,))
    monitor.record(0, 1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float64("nan")})
    monitor.close()
    (line,) = read_lines(tmp_path)
    assert [line[tag] for tag in "abcd"] == ["nan", "inf", "-inf", "nan"]


def test_tensorboard_has_the_same_scalars_with_train_and_val_first_and_the_pictures(tmp_path):
    monitor, _ = build_monitor(tmp_path, levels=LEVELS)
    histogram = LevelHistogram.of(LEVELS, 1, torch.device("cpu"))
    histogram.add(torch.linspace(0.01, 0.5, 100), {"energy": torch.rand(100)})
    for step in (1, 2):
        scalars = {"train/loss/block0": 0.5 * step, "val/accuracy": 0.25, "comm/bytes/rank0": 7}
        monitor.record(0, step, scalars)
        # A record crosses processes as JSON or pickle.
        state = json.loads(json.dumps(histogram.to_dict()))
        monitor.record(1, step, loss(1), state if step == 2 else None)
    monitor.summary({"accuracy": 0.25}, 1.0, {})
    monitor.close()
    events = read_tensorboard(tmp_path)
    lines = read_lines(tmp_path)
    tags = {tag: tag for line in lines for tag in line if tag not in ("step", "time_s")}
    tags["work/comm/bytes/rank0"] = tags.pop("comm/bytes/rank0")
    assert set(events.Tags()["scalars"]) == set(tags)
    for shown, tag in tags.items():
        seen = [(event.step, event.value) for event in events.Scalars(shown)]
        assert seen == [(line["step"], line[tag]) for line in lines]
    assert sorted(tags, key=str.lower)[-1].startswith("work/")
    images = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert images == {"train/levels": [0], "train/sigma_energy/block1": [2]}


def test_tensorboard_has_the_configuration_and_the_final_figures(tmp_path):
    config = {"seed": 3, "train": {"lr": 0.1, "betas": [0.9, 0.95], "is_fast": True}}
    monitor, _ = build_monitor(tmp_path, reporters=(0,), config=config)
    monitor.record(0, 1, {"val/score": 0.5})
    monitor.summary({"score": 0.5, "score_after_block": [0.25, 0.5], "none": None}, 1.0, {})
    monitor.close()
    events = read_tensorboard(tmp_path)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert (
        text
        == "    seed: 3\n    train.lr: 0.1\n    train.betas: [0.9, 0.95]\n    train.is_fast: True"
    )
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    options = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (options["train.lr"].number_value, options["seed"].number_value) == (0.1, 3)
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    experiment = HParamsPluginData.FromString(content).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["val/score"]


def test_a_run_from_before_goes_on_in_its_folder_tensorboard(tmp_path):
    (tmp_path / "old" / "tensorboard").mkdir(parents=True)
    for name, folder in (("old", "tensorboard/blocks-0"), ("new", "blocks-0")):
        with build_monitor(tmp_path / name, reporters=(0,), blocks=(0,))[0] as monitor:
            monitor.record(0, 1, loss(0))
        (file,) = (tmp_path / name).rglob("*tfevents*")
        assert file.parent == tmp_path / name / folder


def test_pictures_that_cannot_be_drawn_are_one_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    monitor, _ = build_monitor(tmp_path, reporters=(0,))
    histogram = LevelHistogram.of(LEVELS, 1, torch.device("cpu"))
    histogram.add(torch.ones(1), {"a": torch.ones(1), "b": torch.ones(1)})
    for step in (1, 2, 3):
        monitor.record(0, step, loss(0), histogram.to_dict())
    monitor.close()
    warnings = " ".join(capsys.readouterr().err.split())
    assert (
        warnings.count("pictures for TensorBoard are not drawn") == warnings.count("warning") == 1
    )
    assert len(read_lines(tmp_path)) == 3


def test_plain_output_is_bounded_has_no_ansi_and_shows_first_and_last_step(tmp_path):
    monitor, out = build_monitor(tmp_path, end=200)
    started = time.monotonic()
    for step in range(1, 201):
        for rank in (0, 1):
            scalars = loss(rank) | {f"perf/samples_per_s/block{rank}": 812.3}
            monitor.record(rank, step, scalars)
    monitor.record(0, 200, {"val/accuracy": 0.875})
    monitor.close()
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert len(lines) <= 2 * (2 + (time.monotonic() - started) / 2) + 1
    for rank in (0, 1):
        assert lines[rank].startswith(f"[b{rank} step 1/200] loss 1.0000 | 812 samples/s | ETA ")
        assert sum(line.startswith(f"[b{rank} step 200/200] ") for line in lines) == 1
    assert lines[-1] == "[step 200] val/accuracy 0.8750"


def test_unknown_blocks_and_tags_are_shown_and_written(tmp_path):
    monitor, out = build_monitor(tmp_path, reporters=(7,))
    monitor.record(7, 1, {"train/loss/block5": 1.5, "anything": 2, "memory/peak_mb/rank7": 3.0})
    monitor.close()
    assert out.getvalue().startswith("[b5 step 1/100] loss 1.5000")
    assert read_lines(tmp_path)[0]["anything"] == 2


def test_live_display_has_a_line_per_block_and_is_not_torn_by_messages(tmp_path):
    monitor, out = build_monitor(tmp_path, terminal=True, end=3, levels=LEVELS)
    for step in (1, 2, 3):
        for rank in (0, 1):
            monitor.record(rank, step, loss(rank, 0.25) | {"val/accuracy": 0.5})
        monitor.message(f"saved [step] {step}")
    monitor.close()
    text = out.getvalue()
    assert "\x1b[2K" in text  # the bars were redrawn in place
    assert all(f"saved [step] {step}\n" in text for step in (1, 2, 3))
    last_frame = text[text.rindex("block 0") :]
    low, high = LEVELS.ranges[0]
    assert f"sigma {low:.3g} .. {high:.3g}" in last_frame
    assert last_frame.count("3/3") == 2
    assert last_frame.count("loss 0.2500") == 2
    assert "val/accuracy 0.5000" in text
    assert text.rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_that_is_full_or_closed_costs_nothing(tmp_path, monkeypatch, terminal):
    read, write = os.pipe()
    os.close(read)
    for number, file in enumerate((open("/dev/full", "w"), os.fdopen(write, "w"))):
        console = SteadyConsole(file=file, force_terminal=terminal, width=100)
        monkeypatch.setattr(sys, "stderr", file)
        monitor = Monitor(tmp_path / f"{number}", None, 2, {0}, 0, 100, console)
        monitor.ownership([])
        monitor.record(0, 1, loss(0) | {"val/accuracy": 0.5})
        monitor.warn("of something")
        monitor.summary({"accuracy": 0.5}, 1.0, {0: 1.0})
        monitor.close()
        assert [line["step"] for line in read_lines(tmp_path / f"{number}")] == [1]
        with suppress(OSError):
            file.close()


def test_warnings_go_to_stderr(tmp_path, capsys):
    monitor, out = build_monitor(tmp_path)
    monitor.warn("rank 1 [is] slow")
    monitor.close()
    assert capsys.readouterr().err == "warning: rank 1 [is] slow\n"
    assert out.getvalue() == ""


def test_summary_names_the_files_that_exist(tmp_path):
    monitor, out = build_monitor(tmp_path)
    for step in ("step-00000005", "step-00000010"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "checkpoints" / step / "manifest.json").touch()
    (tmp_path / "checkpoints" / "step-00000015").mkdir()  # incomplete: no manifest
    figures = {"accuracy": 0.9, "accuracy_after_block": [0.5, 0.9]}
    monitor.summary(figures, 3723.0, {0: 512.0, 1: 2048.0})
    monitor.summary({"accuracy": None, "accuracy_after_block": []}, 31.4, {})
    monitor.close()
    text = out.getvalue()
    for expected in (
        "accuracy after block",
        "0.9000",
        "0: 0.5000  1: 0.9000",
        "1:02:03",
        "0:31",
        "0: 512.0 MiB  1: 2.0 GiB",
    ):
        assert expected in text
    assert f"{tmp_path / 'checkpoints' / 'step-00000010'}\n" in text
    assert "step-00000015" not in text
    assert "evaluation.json" not in text

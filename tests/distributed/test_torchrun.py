"""The documented commands, typed as a user types them: torchrun, its ranks, their exit codes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--config", "configs/digits.yaml", "--train.max_steps", "20", "--train.log_every", "10")


def run(*words, ranks=1, timeout_s=120):
    """(exit code, stdout, stderr, seconds) of `python -m words…`, on `ranks` ranks of torchrun."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    command = [sys.executable, *(launcher if ranks > 1 else ()), "-m", *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DISTRIBUTED_DEBUG"}
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - start


def assert_refused(words, ranks, match):
    """Every rank ends with exit code 2 and one line, none with a traceback of its own."""
    code, out, err, seconds = run(*words, ranks=ranks)
    lines = [line for line in err.splitlines() if "error:" in line and "dbdist" in line]
    assert code != 0
    assert len(lines) == ranks, err
    assert all(re.search(match, line) for line in lines), lines
    if ranks > 1:
        assert len(re.findall(r"exitcode +: 2 ", err)) == ranks, err
        err = err[: err.index("torch/distributed/elastic")]  # what follows is torchrun's report
    else:
        assert code == 2
        assert len(err.splitlines()) == 1, err
    assert "Traceback" not in out + err
    assert seconds < 30  # the machine may be busy; the mistake itself costs nothing


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of the documented command."""
    folder = tmp_path_factory.mktemp("torchrun") / "digits"
    code, out, err, _ = run("dbdist.train", *SMALL, "--run_dir", folder, ranks=3)
    assert code == 0, err
    return folder, out


def test_training_shows_who_owns_what_and_ends_with_a_summary(trained):
    folder, out = trained
    assert "Who owns what" in out
    assert "[b2 step 20/20]" in out
    assert "Summary" in out
    assert "\x1b" not in out, "plain text when it is not a terminal"
    assert json.loads((folder / "evaluation.json").read_text())["step"] == 20


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_agrees_with_training(trained, ranks):
    folder, _ = trained
    before = json.loads((folder / "evaluation.json").read_text())
    code, out, err, _ = run("dbdist.evaluate", "--run_dir", folder, ranks=ranks)
    assert code == 0, err
    after = json.loads((folder / "evaluation.json").read_text())
    assert after["world_size"] == ranks
    assert after["num_samples"] == 360
    assert {k: after[k] for k in ("accuracy", "accuracy_after_block", "sampler", "step")} == {
        k: before[k] for k in ("accuracy", "accuracy_after_block", "sampler", "step")
    }
    assert f"{after['accuracy']:.4f}" in out


@pytest.mark.slow
def test_one_process_trains_the_other_modes_and_a_single_block(tmp_path):
    for name, more in {
        "sequential": ("--mode", "sequential"),
        "end_to_end": ("--mode", "end_to_end"),
        "one-block": ("--model.num_blocks", "1"),
    }.items():
        words = (*SMALL, "--train.max_steps", "3", "--run_dir", tmp_path / name, *more)
        code, _, err, _ = run("dbdist.train", *words)
        assert code == 0, err
        assert json.loads((tmp_path / name / "evaluation.json").read_text())["num_samples"] == 360
    code, _, err, _ = run("dbdist.evaluate", "--run_dir", tmp_path / "end_to_end")
    assert code == 0, err


@pytest.mark.slow
def test_end_to_end_runs_data_parallel(tmp_path):
    words = (*SMALL, "--train.max_steps", "4", "--mode", "end_to_end")
    words = (*words, "--model.dropout", "0", "--run_dir")  # replicas drop different units
    for ranks in (1, 2):
        code, _, err, _ = run("dbdist.train", *words, tmp_path / str(ranks), ranks=ranks)
        assert code == 0, err
    one, two = (
        json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in "12"
    )
    assert two["train/loss/block0"] == pytest.approx(one["train/loss/block0"], rel=1e-5)
    assert two["comm/bytes_per_step/rank1"] > 0


@pytest.mark.parametrize(
    ("words", "ranks", "match"),
    [
        (("dbdist.train", *SMALL), 2, r"need 3 processes, 2 were started; start 3"),
        (("dbdist.train", *SMALL), 1, r"need 3 processes, 1 was started"),
        (("dbdist.train", *SMALL, "--model.num_layers", "7"), 1, r"model\.num_layers 7"),
        (("dbdist.train", *SMALL, "--data.name", "digit"), 1, r"data\.name.*digits"),
        (("dbdist.train", *SMALL, "--trian.lr", "1"), 1, r"did you mean --train\.lr"),
        (("dbdist.train", *SMALL, "--noise.sigma_min", "90"), 1, r"sigma_min < sigma_max"),
        (("dbdist.train", "--config", "nowhere.yaml"), 1, r"nowhere\.yaml"),
        (("dbdist.evaluate", "--run_dir", "nowhere"), 1, r"nowhere holds no run"),
    ],
)
def test_wrong_input_ends_in_one_line_and_exit_code_2(tmp_path, words, ranks, match):
    if words[0] == "dbdist.train":
        words = (*words, "--run_dir", tmp_path / "run")
    assert_refused(words, ranks, match)
    assert not (tmp_path / "run").exists(), "nothing is half-written"


def test_missing_data_is_told_on_every_rank(tmp_path):
    more = ("--data.name", "cifar100", "--data.root", tmp_path / "data", "--model.patch_size", "4")
    words = ("dbdist.train", *SMALL, *more, "--run_dir", tmp_path / "run")
    assert_refused(words, 3, r"cifar-100-python\.tar\.gz.*" + re.escape(str(tmp_path / "data")))


def test_a_truncated_weights_file_is_told_on_every_rank(trained):
    folder, _ = trained
    weights = folder / "checkpoints/step-00000020/block-1.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    try:
        assert_refused(
            ("dbdist.evaluate", "--run_dir", folder), 3, r"block-1\.safetensors is damaged"
        )
    finally:
        weights.write_bytes(content)


def test_another_number_of_ranks_cannot_evaluate(trained):
    folder, _ = trained
    assert_refused(("dbdist.evaluate", "--run_dir", folder), 2, r"start 1, 3 or a multiple of 3")

"""The documented commands, typed as a user types them: torchrun, its ranks, their exit codes."""

import json
import re

import pytest
from machine import SMALL

from dbdist import evaluate, train
from dbdist.errors import UserError


@pytest.fixture(scope="module")
def trained(machine):
    """A short run of the documented command."""
    folder = machine.folder / "digits"
    words = ("dbdist.train", *SMALL, "--run_dir", folder)
    return folder, machine.run(*words, ranks=3, rendezvous="--rdzv-backend=loopback", is_new=True)


def test_training_shows_who_owns_what_and_ends_with_a_summary(trained):
    folder, out = trained
    assert "Who owns what" in out
    assert "[b2 step 20/20]" in out
    assert "Summary" in out
    assert "\x1b" not in out, "plain text when it is not a terminal"
    assert json.loads((folder / "evaluation.json").read_text())["step"] == 20


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_agrees_with_training(machine, trained, ranks):
    folder, _ = trained
    before = json.loads((folder / "evaluation.json").read_text())
    out = machine.run("dbdist.evaluate", "--run_dir", folder, ranks=ranks)
    after = json.loads((folder / "evaluation.json").read_text())
    assert after["world_size"] == ranks
    assert after["num_samples"] == 360
    assert {k: after[k] for k in ("accuracy", "accuracy_after_block", "sampler", "step")} == {
        k: before[k] for k in ("accuracy", "accuracy_after_block", "sampler", "step")
    }
    assert f"{after['accuracy']:.4f}" in out


@pytest.mark.slow
def test_one_process_trains_the_other_modes_and_a_single_block(machine, tmp_path):
    for name, more in {
        "sequential": ("--mode", "sequential"),
        "end_to_end": ("--mode", "end_to_end"),
        "one-block": ("--model.num_blocks", "1"),
    }.items():
        words = (*SMALL, "--train.max_steps", "3", "--run_dir", tmp_path / name, *more)
        machine.run("dbdist.train", *words, is_new=True)
        assert json.loads((tmp_path / name / "evaluation.json").read_text())["num_samples"] == 360
    machine.run("dbdist.evaluate", "--run_dir", tmp_path / "end_to_end", is_new=True)


@pytest.mark.slow
def test_end_to_end_runs_data_parallel(machine, tmp_path):
    words = (*SMALL, "--train.max_steps", "4", "--mode", "end_to_end")
    words = (*words, "--model.dropout", "0", "--run_dir")  # replicas drop different units
    for ranks in (1, 2):
        machine.run("dbdist.train", *words, tmp_path / str(ranks), ranks=ranks)
    one, two = (
        json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in "12"
    )
    assert two["train/loss/block0"] == pytest.approx(one["train/loss/block0"], rel=1e-5)
    assert two["comm/bytes_per_step/rank1"] > 0


@pytest.mark.slow
def test_another_number_of_ranks_is_refused_by_each_in_one_line(machine, tmp_path):
    words = ("dbdist.train", *SMALL, "--run_dir", tmp_path / "run")
    match = r"need 3 processes, 2 were started; start 3"
    machine.assert_refused(words, 2, match, is_new=True)
    assert not (tmp_path / "run").exists(), "nothing is half-written"


def test_a_mistake_in_one_process_is_one_line(machine, tmp_path):
    words = ("dbdist.train", *SMALL, "--trian.lr", "1", "--run_dir", tmp_path / "run")
    machine.assert_refused(words, 1, r"did you mean --train\.lr", is_new=True)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (SMALL, r"need 3 processes, 1 was started"),
        ((*SMALL, "--model.num_layers", "7"), r"model\.num_layers 7"),
        ((*SMALL, "--data.name", "digit"), r"data\.name.*digits"),
        ((*SMALL, "--noise.sigma_min", "90"), r"sigma_min < sigma_max"),
        (("--config", "nowhere.yaml"), r"nowhere\.yaml"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, words, match):
    with pytest.raises(UserError, match=match):
        train.run([*words, "--run_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_cannot_be_evaluated():
    with pytest.raises(UserError, match="nowhere holds no run"):
        evaluate.run(["--run_dir", "nowhere"])


def test_missing_data_is_reported_by_every_rank(machine, tmp_path):
    more = ("--data.name", "cifar100", "--data.root", tmp_path / "data", "--model.patch_size", "4")
    words = ("dbdist.train", *SMALL, *more, "--run_dir", tmp_path / "run")
    match = r"cifar-100-python\.tar\.gz.*" + re.escape(str(tmp_path / "data"))
    machine.assert_refused(words, 3, match)


def test_a_truncated_weights_file_is_reported_by_every_rank(machine, trained):
    folder, _ = trained
    weights = folder / "checkpoints/step-00000020/block-1.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    words = ("dbdist.evaluate", "--run_dir", folder)
    machine.assert_refused(words, 3, r"block-1\.safetensors is damaged")
    weights.write_bytes(content)


def test_another_number_of_ranks_cannot_evaluate(machine, trained):
    folder, _ = trained
    words = ("dbdist.evaluate", "--run_dir", folder)
    machine.assert_refused(words, 2, r"start 1, 3 or a multiple of 3")

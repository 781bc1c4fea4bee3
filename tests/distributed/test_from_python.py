"""dbdist.train and dbdist.evaluate as ranks of torchrun; the last line after a mistake."""

import json

import pytest

SCRIPT = """
import sys
import dbdist

small = {"train": {"max_steps": 4}, "model": {"num_blocks": 2, "hidden_size": 12, "num_heads": 2}}
run_dir = sys.argv[1]
trained = dbdist.train("digits", run_dir=run_dir, **small)
again = dbdist.evaluate(run_dir)
assert again.figures == trained.figures, (again, trained)
try:
    dbdist.train("digits", run_dir=run_dir)
except dbdist.errors.TopologyError as error:
    assert "3 blocks" in str(error), error
small["train"]["max_steps"] = 6
assert dbdist.train("digits", run_dir=run_dir, **small).step == 6
print("as ranks: done")
"""


@pytest.mark.slow
def test_a_program_trains_evaluates_and_goes_on_after_a_mistake(machine, tmp_path):
    (tmp_path / "program.py").write_text(SCRIPT)
    words = ["torchrun", "--rdzv-backend=loopback", "--nproc_per_node=2"]
    job = machine.start(*words, tmp_path / "program.py", tmp_path / "run")
    printed = machine.finish(job)
    assert printed.count("as ranks: done") == 2
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["step"] == 6


@pytest.mark.slow
def test_after_a_mistake_its_line_is_the_last_one(machine):
    words = ["torchrun", "--rdzv-backend=loopback", "--nproc_per_node=2", "-m", "dbdist.train"]
    printed = machine.finish(machine.start(*words, "digits", "--trian.lr", "1"), code=1)
    lines = printed.splitlines()
    mistake = "dbdist train: error: unknown option --trian.lr; did you mean --train.lr?"
    assert lines[-1] in (f"[r0] {mistake}", f"[r1] {mistake}")
    assert "Traceback (most recent call last):" not in lines

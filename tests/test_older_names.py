"""Scripts that import modules by the names of before still run."""

import subprocess
import sys

import dbdist.compat
import dbdist.export

from dbdist.commands import export
from dbdist.inference import published


def test_a_moved_module_is_the_same_under_its_old_name():
    assert dbdist.export.run is export.run
    assert dbdist.compat.load_published_vit is published.load_published_vit


def test_a_moved_module_runs_as_a_command_under_its_old_name():
    words = [sys.executable, "-m", "dbdist.plan", "digits", "--gpus-per-node", "4"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("3 blocks x 1 replica")

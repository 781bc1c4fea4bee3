"""What ranks import on their way to the first step: each of these takes every rank seconds."""

import subprocess
import sys

CODE = """
import sys
import dbdist.train as command

SLOW = ("torch._dynamo sympy sklearn scipy pandas mlxtend matplotlib tensorboard torchvision "
        "deepspeed accelerate").split()
announce = command.announce

def then_watch(prog):
    announce(prog)
    from dbdist.monitor.monitor import Monitor
    record = Monitor.record

    def first_record(monitor, *args, **options):
        Monitor.record = record
        print("at the first record:", [name for name in SLOW if name in sys.modules])
        record(monitor, *args, **options)

    Monitor.record = first_record

command.announce = then_watch
command.run(sys.argv[1:])
print("at the end:", [name for name in SLOW if name in sys.modules])
"""
OPTIONS = (
    "--data.name digits --mode sequential --model.num_blocks 2 --model.num_layers 2 "
    "--model.hidden_size 16 --model.num_heads 2 --model.patch_size 4 --train.max_steps 3 "
    "--train.batch_size 8 --sampler.num_steps 2 --eval.batch_size 360"
).split()


def test_a_run_imports_nothing_slow_before_its_first_record_and_then_only_tensorboard(tmp_path):
    command = [sys.executable, "-c", CODE, *OPTIONS, "--run_dir", str(tmp_path / "run")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("dbdist train: starting, importing torch\n")
    assert "at the first record: []\n" in printed
    assert printed.endswith("at the end: ['tensorboard']\n")

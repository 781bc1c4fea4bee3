"""The page and the file that measurements become."""

import json

from dbdist.bench.report import name_of, run

STEP = {
    **{"mode": "block_parallel", "precision": "bf16", "batch_size": 128, "num_workers": 4},
    **{"step_ms": 30.0, "step_ms_p10": 29.0, "step_ms_p90": 33.5, "samples_per_s": 4266.7},
    "ms": {p: 1.0 for p in ("load", "noise", "forward", "backward", "optimizer", "sync")},
    **{"peak_mb": 741.0, "command": "python -m dbdist.bench.step", "device": "NVIDIA H200"},
    **{"config": "cifar100", "tflops": 1.5, "share_of_peak": 0.002},
    **{"driver": "580.1", "torch": "2.11.0", "commit": "abc1234", "date": "2026-11-28"},
}


def test_files_are_named_by_theme_hardware_and_month():
    assert name_of("gpu", "NVIDIA H200", "2026-11-28") == "gpu_h200_202611"
    assert name_of("gpu", "NVIDIA H100 80GB HBM3", "2026-11-28") == "gpu_h100_202611"


def test_what_was_cut_off_is_left_out_and_earlier_files_stay(tmp_path):
    lines = tmp_path / "steps.jsonl"
    lines.write_text(json.dumps(STEP) + "\n" + json.dumps(STEP)[:50])
    for _ in range(2):
        run([str(tmp_path / "out"), "--steps", str(lines), "--tests", str(tmp_path / "none.xml")])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    stems = "gpu_h200_202611", "gpu_h200_202611-2"
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("json", "md")}
    page = (tmp_path / "out/gpu_h200_202611.md").read_text()
    row = "| 1 | cifar100 | block_parallel | bf16 | 128 | 4 | 30.00 | 29.00 | 33.50 | 4267 | 741 | "
    assert page.count(f"{row}1.5 | 0.2% |") == 1
    assert "driver 580.1, torch 2.11.0, commit abc1234" in page
    content = json.loads((tmp_path / "out/gpu_h200_202611.json").read_text())
    assert content["steps"] == [STEP]


def test_a_commit_that_is_given_is_that_of_every_measurement_and_cut_off_tests_cost_nothing_else(
    tmp_path,
):
    lines, tests = tmp_path / "steps.jsonl", tmp_path / "tests.xml"
    lines.write_text(json.dumps(STEP))
    tests.write_text("<testsuites><testsuite><testcase name='a'")
    run([str(tmp_path), "--steps", str(lines), "--tests", str(tests), "--commit", "def5678"])
    content = json.loads((tmp_path / "gpu_h200_202611.json").read_text())
    assert content["commit"] == content["steps"][0]["commit"] == "def5678"
    assert content["tests"] == []

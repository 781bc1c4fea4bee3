"""Writes measurements as one JSON file and one page of Markdown tables.

    python -m dbdist.bench.report OUT --theme gpu --steps steps.jsonl

Writes OUT/<theme>_<hardware>_<yyyymm>.json and .md. `--tests` takes pytest's JUnit file, `--saving`
the output of `dbdist.bench.save`; what is missing or cut off is left out.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dbdist.bench.environment import environment
from dbdist.bench.step import PHASES
from dbdist.commands.command_line import OneLineParser, guarded

FACTS = ("device", "num_devices", "driver", "torch", "commit", "date")


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist.bench.report", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    parser = OneLineParser(prog="dbdist.bench.report", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--theme", default="gpu", help="first word of the files' names")
    parser.add_argument("--steps", type=Path, help="lines of JSON from dbdist.bench.step --out")
    parser.add_argument("--saving", type=Path, help="what dbdist.bench.save printed")
    parser.add_argument("--tests", type=Path, help="pytest's --junitxml")
    parser.add_argument("--commit", help="where the measured code is no repository")
    given = parser.parse_args(argv)
    steps, saving = lines_of_json(given.steps), lines_of_json(given.saving)
    first = (steps + saving + [{}])[0]
    facts = {key: first.get(key) or value for key, value in environment("auto", []).items()}
    facts["commit"] = given.commit or facts["commit"]
    if given.commit:  # a copy's own repository may be at another commit
        steps, saving = ([{**line, "commit": given.commit} for line in x] for x in (steps, saving))
    tests = outcomes(given.tests)
    content = {**{k: facts[k] for k in FACTS}, "tests": tests, "steps": steps, "saving": saving}
    given.out.mkdir(parents=True, exist_ok=True)
    stem = free_name(given.out, name_of(given.theme, str(facts["device"]), str(facts["date"])))
    (given.out / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n")
    text = markdown(content)
    (given.out / f"{stem}.md").write_text(text)
    print(text)
    print(given.out / f"{stem}.md")


def name_of(theme: str, device: str, date: str) -> str:
    """`gpu_h200_202611` for "NVIDIA H200" in November 2026."""
    plain = re.sub(r"(?i)nvidia|graphics|geforce|80gb|hbm3?e?", " ", device)
    hardware = "-".join(re.findall(r"[a-z0-9]+", plain.lower())) or "unknown"
    return f"{theme}_{hardware}_{date.replace('-', '')[:6]}"


def free_name(folder: Path, stem: str) -> str:
    """The name, or with a number after it where a file has it already."""
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next(name for name in names if not list(folder.glob(f"{name}.*")))


def markdown(content: dict[str, Any]) -> str:
    """The whole page."""
    facts = ", ".join(f"{key.replace('_', ' ')} {content[key]}" for key in FACTS)
    sections = [f"# {content['device']}", facts]
    if content["tests"]:
        rows = [[t["name"], t["outcome"], f"{t['seconds']:.1f}"] for t in content["tests"]]
        sections += ["## Tests", table(["test", "outcome", "seconds"], rows)]
    if content["steps"]:
        text = "Training steps in milliseconds; phases are means of further steps that wait for "
        text += "the GPU after each phase."
        sections += ["## Steps", text, steps_table(content["steps"])]
        commands = "\n".join(f"{n}. `{s['command']}`" for n, s in enumerate(content["steps"], 1))
        sections += [commands]
    for saving in content["saving"]:
        numbers = {k: v for k, v in saving.items() if isinstance(v, float)}
        rows = [[key, f"{value:.2f}"] for key, value in numbers.items()]
        sections += ["## Saving", table(["", "value"], rows)]
    return "\n\n".join(sections) + "\n"


def steps_table(steps: Sequence[dict[str, Any]]) -> str:
    """One row a measurement."""
    head = [
        "",
        "data",
        "mode",
        "precision",
        "batch",
        "workers",
        "step",
        "p10",
        "p90",
        "samples/s",
        "peak MiB",
        "TFLOP/s",
        "of peak",
    ]
    rows = []
    for number, s in enumerate(steps, 1):
        words = [
            str(number),
            str(s.get("config", "")),
            s["mode"],
            s["precision"],
            str(s["batch_size"]),
            str(s["num_workers"]),
        ]
        times = [f"{s[key]:.2f}" for key in ("step_ms", "step_ms_p10", "step_ms_p90")]
        phases = [f"{s['ms'][phase]:.2f}" for phase in PHASES]
        share = s.get("share_of_peak")
        rates = [f"{s['samples_per_s']:.0f}", f"{s['peak_mb']:.0f}", f"{s.get('tflops', 0):.1f}"]
        rows.append([*words, *times, *rates, f"{share:.1%}" if share else "", *phases])
    return table([*head, *PHASES], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def lines_of_json(path: Path | None) -> list[dict[str, Any]]:
    """The objects of JSON in a file that stand on a line of their own."""
    found: list[dict[str, Any]] = []
    if path is None or not path.exists():
        return found
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:  # cut off
                continue
    return found


def outcomes(path: Path | None) -> list[dict[str, Any]]:
    """Name, outcome and seconds of every test in a JUnit file."""
    if path is None or not path.exists():
        return []
    found: list[dict[str, Any]] = []
    try:
        cases = [*ElementTree.parse(path).getroot().iter("testcase")]
    except ElementTree.ParseError:  # cut off
        return []
    for case in cases:
        bad = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = sorted(bad)[0] if bad else "passed"
        seconds = float(case.get("time", 0))
        found.append({"name": case.get("name"), "outcome": outcome, "seconds": seconds})
    return found


if __name__ == "__main__":
    main()

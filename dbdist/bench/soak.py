"""Trains under torchrun while ranks are killed and stopped at random, as long as you like.

    python -m dbdist.bench.soak --config configs/digits.yaml --minutes 30 --out soak.json

`--kill_every_s` and `--hang_every_s` are means; the times, the ranks and the moments come from
`--seed`. A kill (SIGKILL) comes at any moment, or as soon as a checkpoint is being written. A hang
is a SIGSTOP: it lasts until the others have given the rank up, and end it. Other options are
dbdist.train's (`--section.key value`). At the end torchrun gets a SIGTERM.

Prints a table, and writes it as JSON to `--out`:

- goodput: of every step in metrics.jsonl once, the slowest block's time, over the whole time. What
  is done again after a kill, set-up, evaluation and waiting for torchrun do not count.
- restart: from a kill or stop until rank 0 of the next start shows who owns what, which is the last
  thing before its first step. Those of hangs contain the waiting.
- resident memory of every rank and of torchrun, looked at each second. Ranks are new processes
  after each restart, so a rank's memory is that of whichever process had its number: the largest
  in a minute. Growth is the largest minute after the first five over the largest of those five.
- open files and threads: the median of the minutes, each with its median while it trains.

Exit code 1 if memory or open files grew by more than 2 % (judged with more than five minutes), if a
step is in metrics.jsonl twice, if torchrun ended early, or if a process or a socket was left. It
needs Linux, as it reads /proc.
"""

import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dbdist.bench.job import SIGNALS, Job, Kind, send, torchrun
from dbdist.bench.processes import Listener, Usage, listeners, listeners_of, usage_of
from dbdist.checkpoint.names import MANIFEST, step_folders
from dbdist.commands.command_line import OneLineParser, guarded
from dbdist.config.config import Config
from dbdist.config.parse import parse_config
from dbdist.errors import Fault, UserError
from dbdist.parallel.layout import layout_of

SETTLING_MINUTES = 5
MAX_GROWTH = 0.02
TICK_S = 0.1
FAST_TICK_S = 0.002
"""While a checkpoint's writing is waited for, which takes some 20 ms."""
MAX_WAIT_S = 20.0
"""For it; then the rank is killed anyway."""
ENDLESS = "1000000"
"""Steps; more than there is time for."""
STOP_S = 90.0
READY = b"Who owns what"


class Launcher(Job):
    """torchrun on this machine, which starts the ranks again and again."""

    def __init__(self, num_ranks: int, words: Iterable[str], log: Path, restarts: int) -> None:
        """words: `-m MODULE` or a script, and its options."""
        with log.open("w") as out:
            process = subprocess.Popen(
                torchrun(num_ranks, *words, restarts=restarts),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        super().__init__(process, log)
        self._printed = log.open("rb")
        self._num_starts = 0

    def num_starts(self) -> int:
        """How often rank 0 has been about to take its first step."""
        while (line := self._printed.readline()).endswith(b"\n"):
            self._num_starts += READY in line
        self._printed.seek(-len(line), os.SEEK_CUR)
        return self._num_starts


@dataclass(frozen=True, kw_only=True)
class Blow:
    """A rank was killed or stopped."""

    at_s: float
    kind: Kind
    moment: str
    rank: int
    starts: int
    """Of the ranks, before it."""


@dataclass
class Watch:
    """What was seen of the processes, in samples (minute, usage) by name: `rank 0`, `torchrun`."""

    samples: dict[str, list[tuple[int, Usage, bool]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """The last says whether training had begun again."""
    sockets: set[Listener] = field(default_factory=set)
    attempts: set[int] = field(default_factory=set)
    """Processes that were rank 0."""
    blows: list[Blow] = field(default_factory=list)
    restart_s: dict[str, list[float]] = field(default_factory=lambda: {"kill": [], "hang": []})
    """After each blow that the ranks have recovered from."""
    start: float = field(default_factory=time.monotonic)
    _starts_before: int = 0

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def is_writing(self, run_dir: Path) -> bool:
        """Whether a checkpoint is begun and not complete, which the last blow has not left so."""
        since = time.time() - self.now() + max((blow.at_s for blow in self.blows), default=0.0)
        with suppress(OSError):  # it has just been removed
            for folder in step_folders(run_dir / "checkpoints")[-1:]:
                if not (folder / MANIFEST).exists():
                    return folder.stat().st_mtime > since
        return False

    def look(self, launcher: Launcher) -> None:
        """Takes a sample."""
        minute = int(self.now() // 60)
        pids = {f"rank {rank}": pid for rank, pid in sorted(launcher.ranks().items())}
        if (first := pids.get("rank 0")) is not None and first not in self.attempts:
            self.attempts.add(first)
            self._starts_before = launcher.num_starts()
        is_training = launcher.num_starts() > self._starts_before
        for name, pid in (pids | {"torchrun": launcher.process.pid}).items():
            if (usage := usage_of(pid)) is not None:
                self.samples[name].append((minute, usage, is_training))
        self.sockets |= listeners_of({*pids.values(), launcher.process.pid})

    def levels(self, name: str, key: str) -> dict[int, float]:
        """One number for each minute."""
        is_memory = key == "memory_mb"
        values: dict[int, list[float]] = defaultdict(list)
        for minute, usage, is_training in self.samples[name]:
            if is_memory or is_training:
                values[minute].append(float(getattr(usage, key)))
        level = max if is_memory else statistics.median
        return {minute: level(of_it) for minute, of_it in sorted(values.items())}


def main(argv: list[str] | None = None) -> None:
    guarded("dbdist.bench.soak", lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> None:
    parser = OneLineParser(prog="dbdist.bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="default: %(default)s")
    parser.add_argument(
        "--kill_every_s", type=float, default=60.0, help="0: never (default: %(default)s)"
    )
    parser.add_argument(
        "--hang_every_s", type=float, default=300.0, help="0: never (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default: 0)")
    parser.add_argument("--run_dir", default="runs/soak", help="a new one (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given, rest = parser.parse_known_args(argv)
    rest += ["--run_dir", given.run_dir, "--train.max_steps", ENDLESS]
    if not any(word.split("=")[0] == "--parallel.timeout_s" for word in rest):
        rest += ["--parallel.timeout_s", "20"]
    config = parse_config("dbdist.bench.soak", "", rest)
    if config.train.schedule == "cosine":
        rest += ["--train.schedule_steps", ENDLESS]
    config = parse_config("dbdist.bench.soak", "", rest).validate()
    if config.mode != "block_parallel":
        raise UserError("mode must be block_parallel: it is ranks that are lost")
    if Path(config.run_dir).exists():
        raise UserError(f"{config.run_dir} exists already; give another --run_dir")
    result = soak(config, rest, given.minutes, given.kill_every_s, given.hang_every_s, given.seed)
    show(result)
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n")
    if result["faults"]:
        raise Fault("; ".join(result["faults"]))


def soak(
    config: Config,
    words: list[str],
    minutes: float,
    kill_every_s: float,
    hang_every_s: float,
    seed: int,
) -> dict[str, Any]:
    """Runs it; everything that was measured."""
    run_dir = Path(config.run_dir)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    num_ranks = layout_of(config, 1).world_size
    most = 1000 + int(60 * minutes)
    words = ["-m", "dbdist.train", *words]
    watch = Watch()
    launcher = Launcher(num_ranks, words, run_dir.with_name(f"{run_dir.name}.log"), most)
    try:
        every_s: dict[Kind, float] = {"kill": kill_every_s, "hang": hang_every_s}
        disturb(launcher, run_dir, 60 * minutes, every_s, random.Random(seed), watch)
        wall_s = watch.now()
        early = launcher.process.poll()
        exit_code, starts = launcher.stop(STOP_S), launcher.num_starts()
    finally:
        left = launcher.end(patience_s=5.0)
    inodes = {listener.inode for listener in listeners()}
    open_sockets = [f"{s.address}:{s.port}" for s in watch.sockets if s.inode in inodes]
    steps, repeated, useful_s = read_metrics(run_dir)
    result = {
        "minutes": minutes,
        "wall_s": wall_s,
        "seed": seed,
        "kills": sum(blow.kind == "kill" for blow in watch.blows),
        "moments": dict(Counter(blow.moment for blow in watch.blows)),
        "hangs": sum(blow.kind == "hang" for blow in watch.blows),
        "restarts": max(0, len(watch.attempts) - 1),
        "starts": starts,
        "steps": steps,
        "useful_s": useful_s,
        "goodput": useful_s / wall_s,
        "restart_s": {kind: _median(values) for kind, values in watch.restart_s.items()},
        "usage": usages(watch, SETTLING_MINUTES if minutes > SETTLING_MINUTES else None),
        "exit_code": exit_code,
        "listened_on": sorted({listener.address for listener in watch.sockets}),
        "blows": [asdict(blow) for blow in watch.blows],
        "ranks": num_ranks,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    result["faults"] = [
        *([f"torchrun ended by itself with exit code {early}"] if early is not None else []),
        *([f"torchrun did not end within {STOP_S:g} s of SIGTERM"] if exit_code is None else []),
        *([f"steps {repeated[:5]} are in metrics.jsonl twice"] if repeated else []),
        *([f"{left} processes were left"] if left else []),
        *([f"{open_sockets} were left open"] if open_sockets else []),
        *(
            f"{row['key']} of {row['name']} grew by {100 * row['growth']:.1f} %"
            for row in result["usage"]
            if row["key"] != "threads" and (row["growth"] or 0) > MAX_GROWTH
        ),
    ]
    return result


def disturb(
    launcher: Launcher,
    run_dir: Path,
    seconds: float,
    every_s: dict[Kind, float],
    draw: random.Random,
    watch: Watch,
) -> None:
    """Kills and stops ranks until the time is over, and watches them."""

    def due_after(kind: Kind) -> float:
        return watch.now() + (every_s[kind] * draw.uniform(0.5, 1.5) or float("inf"))

    due: dict[Kind, float] = {kind: due_after(kind) for kind in every_s}
    next_look, wait_until = 0.0, 0.0
    pending: Blow | None = None
    while watch.now() < seconds and launcher.process.poll() is None:
        if watch.now() >= next_look:
            next_look = watch.now() + 1
            watch.look(launcher)
        if pending is not None and launcher.num_starts() > pending.starts:
            watch.restart_s[pending.kind].append(watch.now() - pending.at_s)
            pending = None
        reached: list[Kind] = [kind for kind, at_s in due.items() if watch.now() >= at_s]
        for kind in reached:
            is_writing = wait_until > 0 and watch.is_writing(run_dir)
            if pending is not None and pending.kind == "hang":
                due[kind] = due_after(kind)  # it is to be noticed, not relieved
            elif kind == "kill" and wait_until == 0 and draw.random() < 0.5:
                wait_until = watch.now() + MAX_WAIT_S
            elif kind == "hang" or is_writing or watch.now() >= wait_until:
                due[kind] = due_after(kind)
                wait_until = 0.0 if kind == "kill" else wait_until
                starts = launcher.num_starts()
                if ranks := launcher.ranks():
                    rank = draw.choice(sorted(ranks))
                    send(ranks[rank], SIGNALS[kind])
                    pending = Blow(
                        at_s=watch.now(),
                        kind=kind,
                        moment="writing a checkpoint" if is_writing else "any moment",
                        rank=rank,
                        starts=starts,
                    )
                    watch.blows.append(pending)
        time.sleep(FAST_TICK_S if wait_until else TICK_S)


def read_metrics(run_dir: Path) -> tuple[int, list[int], float]:
    """(the last step, the steps that are there twice, the useful time) of RUN/metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("\n")]
    counts = Counter(record["step"] for record in records)
    useful_s, last = 0.0, 0
    for record in records:
        times = [v for tag, v in record.items() if tag.startswith("perf/step_ms/")]
        useful_s += 1e-3 * max(times, default=0.0) * max(0, record["step"] - last)
        last = max(last, record["step"])
    return last, sorted(step for step, count in counts.items() if count > 1), useful_s


def usages(watch: Watch, settling_minutes: int | None) -> list[dict[str, Any]]:
    """Lists the level of every minute, and the growth, of each process and kind of usage.

    The growth is None where the time was too short to judge.
    """
    rows: list[dict[str, Any]] = []
    for key in ("memory_mb", "open_files", "threads"):
        for name in sorted(watch.samples):
            levels = watch.levels(name, key)
            split = math.inf if settling_minutes is None else settling_minutes
            first = [level for minute, level in levels.items() if minute < split]
            later = [level for minute, level in levels.items() if minute >= split]
            of_minutes = max if key == "memory_mb" else statistics.median
            before = of_minutes(first) if first else None
            after = of_minutes(later) if later else None
            growth = after / before - 1 if before and after else None
            rows.append(
                {
                    "name": name,
                    "key": key,
                    "first": before,
                    "later": after,
                    "growth": growth,
                    "minutes": list(levels.values()),
                }
            )
    return rows


def show(result: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title="Soak", title_justify="left", show_header=False)
    moments = "  ".join(f"{name}: {count}" for name, count in result["moments"].items())
    kill_s, hang_s = (result["restart_s"][kind] for kind in ("kill", "hang"))
    table.add_row("wall time", f"{result['wall_s']:.0f} s")
    table.add_row("kills, hangs", f"{result['kills']}, {result['hangs']}   ({moments})")
    table.add_row("restarts", str(result["restarts"]))
    table.add_row("median restart after a kill", f"{kill_s:.1f} s" if kill_s else "-")
    table.add_row("… after a hang", f"{hang_s:.1f} s" if hang_s else "-")
    table.add_row("steps", str(result["steps"]))
    table.add_row("useful step time", f"{result['useful_s']:.0f} s")
    table.add_row("goodput", f"{100 * result['goodput']:.1f} %")
    console.print(table, highlight=False)
    table = Table(title="Resident memory, open files, threads", title_justify="left")
    for header in ("process", "", f"first {SETTLING_MINUTES} minutes", "later", "growth"):
        table.add_column(header, justify="left" if header in ("process", "") else "right")
    for row in result["usage"]:
        form = "{:.1f} MiB" if row["key"] == "memory_mb" else "{:.0f}"
        values = [form.format(v) if (v := row[k]) is not None else "-" for k in ("first", "later")]
        growth = "-" if row["growth"] is None else f"{100 * row['growth']:+.1f} %"
        table.add_row(row["name"], row["key"].replace("_mb", ""), *values, growth)
    console.print(table, highlight=False)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


if __name__ == "__main__":
    main()

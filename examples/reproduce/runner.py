"""Fills the gaps in the rows: ``python examples/reproduce/runner.py run`` until the plan is done or it is stopped.

Start as many as there are cores: each trains on one thread and claims what it runs. A stopped or killed one loses no
more than the run it was at. With ``--device cuda`` one is enough; it takes the plan's entries for a GPU, and no others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from arms import ARMS
from data import Text
from model import RUNGS
from plan import PLAN, Entry, load_plan, load_rows, next_runs, wanted
from training import Place, Run, train

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rows import claim, write_row

HERE = Path(__file__).parent


class Trainer:
    """Trains runs on a device, and writes their rows."""

    def __init__(self, rows: Path, text: Path, device: str) -> None:
        self.rows, self.folder, self.device = rows, text, device
        self._texts: dict[str, Text] = {}
        self._place = Place(device)

    def __call__(self, run: Run) -> None:
        """On the CPU in a process of its own, so that its peak memory is its own; on CUDA here, so that what is
        compiled is kept."""
        corpus = RUNGS[run.rung].corpus
        if corpus not in self._texts:
            self._texts[corpus] = Text(self.folder, run.rung)
        if self.device != "cpu":
            return self._train(run, self._texts[corpus])
        child = multiprocessing.get_context("fork").Process(
            target=self._train, args=(run, self._texts[corpus]), daemon=True
        )
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"{run.key} failed; see above")

    def _train(self, run: Run, text: Text) -> None:
        write_row(train(run, text, self._place), self.rows / f"{run.key}.json")


def fill(plan: Path, trainer: Trainer, limit: int | None, until: float | None) -> None:
    """Runs what the plan calls for, one run after the other, until nothing is left that no other process is at. The
    plan is read anew before each run."""
    rows, done = trainer.rows, 0
    while limit is None or done < limit:
        entries = [entry for entry in load_plan(plan) if entry.device == trainer.device]
        for run in next_runs(entries, load_rows(rows)):
            if until is not None and time.time() + estimated_seconds(run, load_rows(rows)) > until:
                continue
            with claim(run.key, rows) as mine:
                if not mine or (rows / f"{run.key}.json").exists():
                    continue
                began = time.time()
                trainer(run)
            final = load_rows(rows)[f"{run.key}"]["final"]
            print(f"{time.strftime('%H:%M:%S')} {run.key}: {final} in {time.time() - began:.0f} s", flush=True)
            done += 1
            break
        else:
            return


def estimated_seconds(run: Run, rows: dict) -> float:
    """What a run will take: its tokens at the speed of the rows of its rung."""
    speeds = [row["tokens_per_second"] for row in rows.values() if row["run"]["rung"] == run.rung]
    return run.steps * run.batch / (sum(speeds) / len(speeds) if speeds else MEASURED[run.rung])


# tokens per second where no row tells yet: of one core (Sapphire Rapids, 2.6 GHz), 30M of an H100
MEASURED = {"tiny": 100_000, "0.3M": 23_000, "1M": 11_200, "3M": 4_600, "10M": 1_900, "30M": 700_000}


def estimate(entries: list[Entry], rows: dict) -> list[float]:
    """Core-hours of each entry as a whole: per arm a grid of 4 learning rates, 2 between them, and the other seeds."""
    hours = []
    for entry in entries:
        runs = 4 + 2 * entry.refine + entry.seeds - 1
        seconds = sum(runs * estimated_seconds(entry.run(arm, ARMS[arm].center), rows) for arm in entry.arms)
        hours.append(round(seconds / 3600, 2))
    return hours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "command",
        choices=("run", "status", "estimate"),
        help="run what is missing; show what that is; write each entry's estimated core-hours into the plan",
    )
    parser.add_argument("--rows", type=Path, default=HERE / "rows", help="folder of the rows")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--text", type=Path, default=Path("runs/reproduce"), help="folder for the encoded text")
    parser.add_argument("--limit", type=int, help="end after so many runs")
    parser.add_argument("--hours", type=float, help="start no run that is likely to end later than this from now")
    args = parser.parse_args()
    entries = load_plan(args.plan)
    if args.command == "run":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
        args.rows.mkdir(parents=True, exist_ok=True)
        until = None if args.hours is None else time.time() + 3600 * args.hours
        fill(args.plan, Trainer(args.rows, args.text, args.device), args.limit, until)
        return
    rows = load_rows(args.rows)
    hours = estimate(entries, rows)
    if args.command == "status":
        for entry, cost in zip(entries, hours):
            left = {arm: len(wanted(entry, arm, rows)) for arm in entry.arms}
            print(
                f"{entry.cell:<16} {cost:6.2f} core-hours  "
                + "  ".join(f"{arm}: {'done' if not count else f'{count} to run now'}" for arm, count in left.items())
            )
        return
    plan = json.loads(args.plan.read_text())
    lines = [json.dumps({**entry, "core_hours": cost}) for entry, cost in zip(plan, hours)]
    args.plan.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()

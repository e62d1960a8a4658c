"""A search carried out: runs side by side, kept in an Optuna study, which a second start goes on with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ..blocks.types import BlockError
from .runs import Command, Running, run
from .search import Search, Setting

Done = Callable[[Setting, float, int], None]


@dataclass
class Study:
    """The runs of a search in a folder.

    Args:
        folder: the study's journal and a folder for each run.
        search: what is searched; the same as before, where the folder holds a study.
        command: what is run.
        halving: stop runs early by successive halving (arXiv 1810.05934): at a quarter and at half of the steps of the first
            run, those that are worse than half of the runs so far.

    Raises:
        BlockError: the folder holds a study of another search or command.
    """

    folder: Path
    search: Search
    command: Command
    halving: bool = False

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(self.folder / "study.journal")))
        self._study = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True)
        said: dict[str, Any] = {
            "command": list(self.command.words),
            "ds_config": self.command.ds_config,
            "loss": self.command.loss.pattern,
            "last": self.command.last,
            "blocks": [block.value for block in self.search.blocks],
        }
        if self.search.stated != self.search.blocks:
            said["stated"] = [block.value for block in self.search.stated]
        known = self._study.user_attrs.get("search")
        if known is not None and known != json.loads(json.dumps(said)):
            raise BlockError(f"{self.folder} holds the runs of another command or search; give another --out")
        self._study.set_user_attr("search", said)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
            self._study.tell(trial.number, state=TrialState.FAIL)  # of a search that was stopped
        self._asking = Lock()

    def losses(self) -> dict[Setting, float]:
        """Every run's final loss; infinite where it diverged or was stopped early."""
        ended = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return {self._setting(trial.params): float(trial.user_attrs.get("loss", math.inf)) for trial in ended}

    def run(self, jobs: int, done: Done = lambda *_: None) -> dict[Setting, float]:
        """Runs until the search calls for nothing more.

        Args:
            jobs: runs side by side.
            done: told of each run that has ended: its setting, its loss, and how many have ended.

        Raises:
            BlockError: a run failed; those beside it are ended.
        """
        running: dict[Future[float], Setting] = {}
        processes = Running()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while True:
                    losses = self.losses()
                    for setting in self.search.next_runs(losses):
                        if len(running) < jobs and setting not in running.values():
                            running[pool.submit(self._run, setting, processes)] = setting
                    if not running:
                        return losses
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        setting = running.pop(future)
                        done(setting, future.result(), len(self.losses()))
            except BaseException:  # one failed, or Ctrl-C: runs are in sessions of their own, which no signal reaches
                processes.end()
                raise

    def _run(self, setting: Setting, processes: Running) -> float:
        trial = self._ask(setting)
        out = self.folder / f"run-{trial.number:03}"
        out.mkdir(exist_ok=True)
        words = self.command.filled(setting.lr, self.search.ratios(setting), setting.seed, out)
        stop = self._stopper(trial) if self.halving and setting.seed == 0 else lambda step, loss: False
        try:
            loss = run(words, out, self.command.loss, stop, processes, self.command.last)
        except BaseException:
            self._study.tell(trial, state=TrialState.FAIL)
            raise
        trial.set_user_attr("loss", loss)
        if math.isfinite(loss):
            self._study.tell(trial, loss)
        else:
            self._study.tell(trial, state=TrialState.PRUNED)
        return loss

    def _ask(self, setting: Setting) -> optuna.Trial:
        with self._asking:  # or another thread would get what this one has enqueued
            params = self._params(setting)
            self._study.enqueue_trial(params)
            trial = self._study.ask()
            for name in params:
                if name == "seed":
                    trial.suggest_int(name, 0, 1_000_000)
                else:
                    trial.suggest_float(name, 1e-12, 1e12, log=True)
            return trial

    def _stopper(self, trial: optuna.Trial) -> Callable[[int, float], bool]:
        """Whether a run is to be stopped at a step."""
        ended = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        steps = max((max(other.intermediate_values, default=0) for other in ended), default=0)
        if steps:
            self._study.pruner = optuna.pruners.SuccessiveHalvingPruner(max(steps // 4, 1), reduction_factor=2)

        def stop(step: int, loss: float) -> bool:
            trial.report(loss, step)
            return steps > 0 and trial.should_prune()

        return stop

    def _params(self, setting: Setting) -> dict[str, Any]:
        ratios = {f"ratio {name}": ratio for name, ratio in self.search.ratios(setting).items()}
        return {"lr": setting.lr, **ratios, "seed": setting.seed}

    def _setting(self, params: dict[str, Any]) -> Setting:
        ratios = tuple(params[f"ratio {block.value}"] for block in self.search.stated)
        return Setting(params["lr"], ratios, params["seed"])

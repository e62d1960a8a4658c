"""The settings of a sequence length warmup by short runs: the smallest start and the largest number of steps that are calm.

The recipe of arXiv 2108.06084: a run of the first two or three warmup lengths is calm if no validation perplexity is above
1.3 times the best before it. Starts are doubled until one is; then the steps are doubled until they no longer are, and
halved between. Which run comes next is a pure function of the runs so far.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..blocks.types import BlockError
from .runs import Running, base_of, loss_pattern, placed, run

# "step 100 validation loss 3.2", "eval_loss': 3.2", "validation loss at iteration 100 | lm loss value: 3.2E+00 |"
VALIDATION = (
    r"(?:validation|valid|val|eval)\w*[ _]?loss\w*(?:\D*?iteration\D{0,3}(?P<step>\d+))?"
    r"\D{0,30}?(?P<loss>[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?|\bnan\b|\binf\b)"
)
Losses = tuple[float, ...]


@dataclass(frozen=True, order=True)
class Lengths:
    """One run: the first length in tokens, and the optimizer steps until the full one."""

    start: int
    steps: int


@dataclass(frozen=True)
class LengthSearch:
    """A search.

    Attributes:
        end: the full length.
        first: the smallest start that is tried.
        steps: at which the start is searched.
        most: of steps.
        fluctuation: the largest perplexity over the best before it that is calm.
        precision: by what share of them the steps may be too few.
    """

    end: int
    first: int
    steps: int
    most: int
    fluctuation: float = 1.3
    precision: float = 0.125

    def __post_init__(self) -> None:
        if not 1 <= self.first < self.end:
            raise BlockError(
                f"--first is {self.first} and --end is {self.end}; start below the full length, at 1 or more"
            )
        if not 1 <= self.steps <= self.most:
            raise BlockError(f"--steps is {self.steps} and --most is {self.most}; give --steps from 1 to --most")
        if not self.fluctuation > 1 or not 0 < self.precision < 1:
            raise BlockError("--fluctuation is above 1 (the paper's is 1.3), and --precision between 0 and 1")

    @property
    def starts(self) -> list[int]:
        """The starts, from the smallest."""
        return [self.first << k for k in range(self.end.bit_length()) if self.first << k < self.end]

    def worst(self, losses: Losses) -> float:
        """The largest perplexity over the best before it; infinite where a loss is none."""
        ratios, best = [1.0], losses[0]
        for loss in losses:
            ratios.append(math.exp(min(loss - best, 700)) if math.isfinite(loss) else math.inf)
            best = min(best, loss)
        return max(ratios)

    def is_calm(self, losses: Losses) -> bool:
        """Whether a run's validation losses say so."""
        return self.worst(losses) <= self.fluctuation

    def next_run(self, runs: Mapping[Lengths, Losses]) -> Lengths | None:
        """The run that the runs so far call for; None when the search is over."""
        start = None
        for number in self.starts:
            tried = Lengths(number, self.steps)
            if tried not in runs:
                return tried
            if self.is_calm(runs[tried]):
                start = number
                break
        if start is None:
            return None
        low, high = self._between(start, runs)
        if high is None:
            further = min(2 * low, self.most)
            return None if further == low else Lengths(start, further)
        return None if high - low <= max(1, self.precision * low) else Lengths(start, (low + high) // 2)

    def found(self, runs: Mapping[Lengths, Losses]) -> Lengths | None:
        """The smallest calm start and its largest calm number of steps so far; None where no run is calm."""
        calm = [lengths for lengths, losses in runs.items() if self.is_calm(losses)]
        smallest = min((lengths.start for lengths in calm), default=None)
        return max((lengths for lengths in calm if lengths.start == smallest), default=None)

    def _between(self, start: int, runs: Mapping[Lengths, Losses]) -> tuple[int, int | None]:
        """The most steps below the fewest that are not calm, and these."""
        of_start = {lengths.steps: self.is_calm(losses) for lengths, losses in runs.items() if lengths.start == start}
        high = min((steps for steps, calm in of_start.items() if not calm), default=None)
        return max(steps for steps, calm in of_start.items() if calm and (high is None or steps < high)), high


@dataclass(frozen=True)
class LengthCommand:
    """The user's command, with ``{start}``, ``{steps}``, ``{end}``, ``{out}`` or ``{ds_config}`` in it.

    Attributes:
        words: of the command.
        loss: the pattern of a validation loss that it prints, with the group loss.
        ds_config: a base, whose sequence_length_warmup is set for ``{ds_config}``.
    """

    words: Sequence[str]
    loss: re.Pattern[str]
    ds_config: Mapping[str, Any] | None = None

    @classmethod
    def checked(cls, words: Sequence[str], loss: str, ds_config: Path | None) -> LengthCommand:
        """Raises BlockError for a command that no setting would reach, or a pattern without its group."""
        text, pattern = " ".join(words), loss_pattern(loss, re.IGNORECASE)
        if "loss" not in pattern.groupindex:
            raise BlockError("--loss needs the group (?P<loss>...)")
        base = base_of(text, ds_config)
        if base is None and not ("{start}" in text and "{steps}" in text):
            raise BlockError(
                "the command has no place for what is tuned; write {start} and {steps}, or {ds_config}, into it"
            )
        return cls(tuple(words), pattern, base)

    def filled(self, lengths: Lengths, end: int, out: Path) -> list[str]:
        """The command of one run; writes its ds_config, if it takes one."""
        values = {"{start}": str(lengths.start), "{steps}": str(lengths.steps), "{end}": str(end), "{out}": str(out)}
        if self.ds_config is not None:
            file = out / "ds_config.json"
            own = {**self.ds_config.get("sequence_length_warmup", {}), "start": lengths.start, "end": end}
            config = {**self.ds_config, "sequence_length_warmup": {**own, "steps": lengths.steps}}
            file.write_text(json.dumps(config, indent=1))
            values["{ds_config}"] = str(file)
        return [placed(word, values) for word in self.words]


class LengthStudy:
    """The runs of a search in a folder, with which a second start goes on.

    Raises:
        BlockError: the folder holds runs of another command or search.
    """

    def __init__(self, folder: Path, search: LengthSearch, command: LengthCommand) -> None:
        self.folder, self.search, self.command = folder, search, command
        folder.mkdir(parents=True, exist_ok=True)
        said: dict[str, Any] = {
            "command": list(command.words),
            "ds_config": command.ds_config,
            "loss": command.loss.pattern,
        }
        said |= {"end": search.end, "fluctuation": search.fluctuation}  # the rest may change: runs stay what they are
        file = folder / "search.json"
        if file.exists() and json.loads(file.read_text()) != json.loads(json.dumps(said)):
            raise BlockError(f"{folder} holds the runs of another command or search; give another --out")
        file.write_text(json.dumps(said, indent=1))

    def runs(self) -> dict[Lengths, Losses]:
        """Validation losses of every run that has ended or was stopped early."""
        found = {}
        for file in self.folder.glob("run-*/losses.json"):
            row = json.loads(file.read_text())
            found[Lengths(row["start"], row["steps"])] = tuple(
                math.inf if loss is None else float(loss) for loss in row["losses"]
            )
        return found

    def run(self, done: Callable[[Lengths, Losses], None] = lambda *_: None) -> dict[Lengths, Losses]:
        """Runs until the search calls for nothing more.

        Raises:
            BlockError: a run failed while its losses were finite, or printed too few.
        """
        while (lengths := self.search.next_run(self.runs())) is not None:
            done(lengths, self._run(lengths))
        return self.runs()

    def _run(self, lengths: Lengths) -> Losses:
        out = self.folder / f"run-{lengths.start}-{lengths.steps}"
        out.mkdir(exist_ok=True)
        losses: list[float] = []

        def stop(_: int, loss: float) -> bool:
            losses.append(loss)
            return not self.search.is_calm(tuple(losses))

        words = self.command.filled(lengths, self.search.end, out)
        ended = run(words, out, self.command.loss, stop, Running())
        if math.isinf(ended) and (not losses or self.search.is_calm(tuple(losses))):
            losses.append(math.inf)  # diverged, by what it printed last or ended with
        if losses == [ended]:
            raise BlockError(
                f"a run printed {len(losses)} validation losses; validate several times in it: {' '.join(words)}"
            )
        kept = [loss if math.isfinite(loss) else None for loss in losses]
        row = {"start": lengths.start, "steps": lengths.steps, "losses": kept}
        (out / "losses.json").write_text(json.dumps(row) + "\n")
        return tuple(losses)

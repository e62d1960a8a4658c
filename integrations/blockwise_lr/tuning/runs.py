"""One run of the user's command: its placeholders filled, its losses read as they are printed."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

from ..blocks.types import BlockError

# "step 12 ... loss 3.21", "iteration 10/ 100 | ... | lm loss: 1.05E+01 |"
LOSS = r"(?:step|iteration)\D{0,3}(?P<step>\d+).*?loss\W{1,4}(?P<loss>[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf))"
_DIVERGED = re.compile(r"\b(?:nan|inf|infinite|diverged|not finite)\b", re.IGNORECASE)  # why a run may have failed
_SHOWN = 15  # last lines of a failed run


@dataclass(frozen=True)
class Command:
    """The user's command and how its losses are read.

    Attributes:
        words: with placeholders: ``{lr}``, ``{ratios}`` (JSON), ``{ratio_words}`` (a word of its own: embedding=10 qk=8 ..., as
            Megatron's flag takes them), ``{seed}``, ``{out}`` (the run's folder), ``{ds_config}``.
        loss: pattern with the groups step and loss, found in lines of its output.
        last: a run's loss is the mean of so many last ones.
        ds_config: a base, whose optimizer's lr and ratios are set for ``{ds_config}``.
    """

    words: Sequence[str]
    loss: re.Pattern[str]
    last: int = 1
    ds_config: Mapping[str, Any] | None = None

    @classmethod
    def checked(cls, words: Sequence[str], loss: str, last: int, ds_config: Path | None) -> Command:
        """Raises BlockError for a command that no setting would reach, or a pattern without its groups."""
        text, pattern = " ".join(words), loss_pattern(loss)
        if {"step", "loss"} - pattern.groupindex.keys():
            raise BlockError("--loss needs the groups (?P<step>...) and (?P<loss>...)")
        if last < 1:
            raise BlockError(f"--last is {last}; give at least 1")
        base = base_of(text, ds_config)
        if base is None and not ("{lr}" in text and ("{ratios}" in text or "{ratio_words}" in text)):
            raise BlockError(
                "the command has no place for what is tuned; write {lr}, and {ratios} or {ratio_words}, or {ds_config} into it"
            )
        joined = next((word for word in words if "{ratio_words}" in word and word != "{ratio_words}"), None)
        if joined is not None:
            raise BlockError(
                f"{{ratio_words}} becomes several words, and stands inside {joined!r}; write it alone, or {{ratios}} there"
            )
        if base is not None and "params" not in base.get("optimizer", {}):
            raise BlockError(f"{ds_config} has no optimizer.params; name a blockwise optimizer there, as in the README")
        return cls(tuple(words), pattern, last, base)

    @property
    def takes_seed(self) -> bool:
        """Whether a run can be repeated with another seed."""
        return any("{seed}" in word for word in self.words)

    def filled(self, lr: float, ratios: Mapping[str, float], seed: int, out: Path) -> list[str]:
        """The command of one run; writes its ds_config, if it takes one."""
        values = {"{lr}": f"{lr:.6g}", "{ratios}": json.dumps(dict(ratios)), "{seed}": str(seed), "{out}": str(out)}
        if self.ds_config is not None:
            file = out / "ds_config.json"
            file.write_text(json.dumps(self.with_rates(lr, ratios), indent=1))
            values["{ds_config}"] = str(file)
        found: list[str] = []
        for word in self.words:
            if word == "{ratio_words}":
                found += [f"{block}={ratio:g}" for block, ratio in ratios.items()]
            else:
                found.append(placed(word, values))
        return found

    def with_rates(self, lr: float, ratios: Mapping[str, float]) -> dict[str, Any]:
        """The base ds_config with a learning rate and ratios."""
        assert self.ds_config is not None
        config = json.loads(json.dumps(self.ds_config))
        params = config["optimizer"]["params"]
        params.pop("adamw_lr", None)
        params.update(lr=float(f"{lr:.6g}"), block_lr_ratios=dict(ratios))
        return config


def loss_pattern(text: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    """The pattern of a printed loss.

    Raises:
        BlockError: it is none.
    """
    try:
        return re.compile(text, flags)
    except re.error as error:
        raise BlockError(f"--loss is no regular expression: {error}") from None


def base_of(command: str, ds_config: Path | None) -> dict[str, Any] | None:
    """The base of a command's ``{ds_config}``; None where it has no such place.

    Raises:
        BlockError: place without base, or base without place.
    """
    if ("{ds_config}" in command) != (ds_config is not None):
        raise BlockError("{ds_config} in the command and --ds-config FILE, its base, go together")
    return None if ds_config is None else json.loads(ds_config.read_text())


def placed(word: str, values: Mapping[str, str]) -> str:
    """A word of a command with its places filled."""
    for place, value in values.items():
        word = word.replace(place, value)
    return word


class Running:
    """The processes of runs side by side, so that all can be ended from outside."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen[str]] = set()
        self._ended = False
        self._lock = Lock()

    def add(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._processes.add(process)
        if self._ended:
            _end(process)

    def remove(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._processes.discard(process)

    def end(self) -> None:
        """Ends all, and what is added later on."""
        self._ended = True
        with self._lock:
            processes = list(self._processes)
        for process in processes:
            _end(process)


def run(
    words: Sequence[str],
    out: Path,
    loss: re.Pattern[str],
    stop: Callable[[int, float], bool],
    running: Running,
    last: int = 1,
) -> float:
    """Runs a command to its end, its output in ``out/log``; its final loss, infinite where it diverged or was stopped.

    Args:
        loss: a pattern as :class:`Command` has; without the group step, or where it matches nothing, losses are counted.
        stop: called with each step and loss; True ends the run early.
        running: takes note of its process meanwhile.
        last: its loss is the mean of so many last ones.

    Raises:
        BlockError: it failed while its losses were finite, or printed none.
    """
    losses: list[float] = []
    with (
        (out / "log").open("w") as log,
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
        ) as process,
    ):
        running.add(process)
        try:
            if _read(process, loss, log, losses, stop):
                return math.inf
            code = process.wait()
        finally:
            _end(process)
            running.remove(process)
    tail = (out / "log").read_text().splitlines()[-_SHOWN:]
    if code and losses and _DIVERGED.search(" ".join(tail)):
        return math.inf
    if code or not losses:
        what = f"ended with exit code {code}" if code else "printed no loss that --loss matches"
        raise BlockError("\n".join([f"a run {what}: {' '.join(words)}", *tail]))
    kept = losses[-last:]
    return sum(kept) / len(kept)


def _read(
    process: subprocess.Popen[str],
    pattern: re.Pattern[str],
    log: IO[str],
    losses: list[float],
    stop: Callable[[int, float], bool],
) -> bool:
    """Reads losses as they are printed; True where the run is to be ended."""
    assert process.stdout is not None
    for text in process.stdout:
        log.write(text)
        log.flush()
        for match in pattern.finditer(text):
            losses.append(float(match["loss"]))
            step = match.groupdict().get("step")
            if not math.isfinite(losses[-1]) or stop(len(losses) if step is None else int(step), losses[-1]):
                return True
    return False


def _end(process: subprocess.Popen[str]) -> None:
    """Ends what a run has started and left, itself among it where it was stopped early."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue

"""Console logs: Megatron's, DeepSpeed's, and scripts that print steps and losses."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from ..tuning.runs import LOSS as PRINTED
from .names import (
    BLOCK_FIGURES,
    FORWARD_TIME,
    LOSS,
    LOSS_RATIOS,
    MEMORY,
    RATE,
    SAMPLES_PER_SECOND,
    SECONDS_PER_STEP,
    VALIDATION,
)
from .runs import Records

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf)"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_TIME = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[.,]?(\d*)\]")

_MEGATRON = re.compile(r"\biteration +(\d+)/ *\d+ \|(.*)")
_FIELD = re.compile(rf"([^|:][^|]*?): *({_NUMBER}) *(?=\||$)")
_BLOCKS = re.compile(
    rf"\biteration (\d+) (learning rates|{'|'.join((*BLOCK_FIGURES, FORWARD_TIME, *LOSS_RATIOS))}) \|(.*)"
)
_OF_BLOCK = re.compile(rf"([\w.-]*): *({_NUMBER})(?: and ({_NUMBER}))?")
_VALIDATION = re.compile(rf"validation loss at iteration (\d+) \| lm loss value: ({_NUMBER})")
_MEMORY = re.compile(rf"\(after (\d+) iterations\) memory \(MB\) \|.*?max allocated: ({_NUMBER})")
_ARGUMENT = re.compile(r"^ *(?:\d+:)? +([a-z]\w*) \.{3,} (.*)$")

_STEP = re.compile(rf"\bstep=(\d+), skipped=\d+, lr=\[\D*?({_NUMBER})")
_SPEED = re.compile(
    rf"global_step=(\d+), RunningAvgSamplesPerSec=({_NUMBER}), CurrSamplesPerSec=({_NUMBER})"
    rf"(?:, MemAllocated={_NUMBER}GB, MaxMemAllocated=({_NUMBER})GB)?"
)
_PIPELINE = re.compile(rf"\bsteps: (\d+) loss: ({_NUMBER})(?: iter time \(s\): ({_NUMBER}) samples/sec: ({_NUMBER}))?")
_DEEPSPEED_VERSION = re.compile(r"DeepSpeed info: version=([^,\s]+)")
_DEEPSPEED_SETTING = re.compile(r"\[config\.py:\d+:print\] +(\w+) \.{3,} (.*)$")
_PRINTED = re.compile(PRINTED, re.IGNORECASE)
_HELD_OUT = re.compile(r"\b(?:val|valid|validation|eval|dev|held)", re.IGNORECASE)


def read_log(file: Path) -> Records:
    """The figures of a log; empty for a text without any.

    Megatron's training losses are means since its last line.

    Raises:
        OSError: it cannot be read.
    """
    log = _Log()
    with file.open(errors="replace") as lines:
        for line in lines:
            log.read(line)
    if log.records:
        log.records.files.append(str(file))
    return log.records


class _Log:
    def __init__(self) -> None:
        self.records = Records()
        self.time: float | None = None
        self._forms: tuple[tuple[str, re.Pattern[str], Callable[[re.Match[str]], None]], ...] = (
            (" | ", _MEGATRON, self._megatron),
            (" | ", _BLOCKS, self._blocks),
            ("validation loss", _VALIDATION, lambda found: self._add(VALIDATION, found[1], found[2])),
            ("memory (MB)", _MEMORY, lambda found: self._memory(found[1], found[2], 2**20)),
            ("skipped=", _STEP, lambda found: self._add(RATE, found[1], found[2])),
            ("SamplesPerSec", _SPEED, self._speed),
            ("steps: ", _PIPELINE, self._pipeline),
            (" ....", _DEEPSPEED_SETTING, lambda found: self.records.fact("settings", found[1], found[2].strip())),
            (" ....", _ARGUMENT, self._argument),
            ("version=", _DEEPSPEED_VERSION, lambda found: self.records.fact("versions", "deepspeed", found[1])),
        )

    def read(self, line: str) -> None:
        line = _COLOUR.sub("", line.rstrip())
        if stamp := _TIME.search(line):
            self.time = datetime.fromisoformat(stamp[1]).timestamp() + float(f"0.{stamp[2] or 0}")
        for part, pattern, take in self._forms:
            if part in line and (found := pattern.search(line)):
                take(found)
                return
        if "oss" in line.lower() and (found := _PRINTED.search(line)):
            before = line[found.start() : found.start("loss")]
            self._add(VALIDATION if _HELD_OUT.search(before) else LOSS, found["step"], found["loss"])

    def _add(self, name: str, step: str, value: str) -> None:
        self.records.add(name, int(step), float(value), self.time)

    def _megatron(self, found: re.Match[str]) -> None:
        for name, value in _FIELD.findall(found[2]):
            if name.strip() == "elapsed time per iteration (ms)":
                self._add(SECONDS_PER_STEP, found[1], str(float(value) / 1000))
            elif "skipped" not in name and "nan iterations" not in name and "consumed" not in name:
                self._add(name.strip(), found[1], value)

    def _blocks(self, found: re.Match[str]) -> None:
        prefix = RATE if found[2] == "learning rates" else f"blocks/{found[2]}"
        for block, value, second in _OF_BLOCK.findall(found[3]):
            largest = max(float(value), float(second)) if second else float(value)
            self._add(f"{prefix}/{block}" if block else prefix, found[1], str(largest))

    def _memory(self, step: str, value: str, unit: int) -> None:
        """The largest of all ranks so far; a CPU's 0 says nothing."""
        if float(value) > 0:
            self.records.numbers[MEMORY] = max(self.records.numbers.get(MEMORY, 0.0), float(value) * unit)

    def _speed(self, found: re.Match[str]) -> None:
        self._add(SAMPLES_PER_SECOND, found[1], found[3])
        if found[4]:
            self._memory(found[1], found[4], 2**30)

    def _pipeline(self, found: re.Match[str]) -> None:
        self._add(LOSS, found[1], found[2])
        if found[3]:
            self._add(SECONDS_PER_STEP, found[1], found[3])
            self._add(SAMPLES_PER_SECOND, found[1], found[4])

    def _argument(self, found: re.Match[str]) -> None:
        """Megatron's list of its arguments."""
        self.records.fact("settings", found[1], found[2].strip())
        if found[1] == "seed":
            self.records.seed = found[2].strip()

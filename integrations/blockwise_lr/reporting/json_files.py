"""JSON: transformers' trainer_state.json, the results of our demo and of our evidence, and settings that lie beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .names import FINAL, LOSS, MEMORY, TOKENS_PER_SECOND, VALIDATION
from .runs import Records, Run

STATE_BYTES = "state_bytes"
TRAINER_STATE = "trainer_state.json"
_OF_WHOLE_RUN = ("train_runtime", "train_loss", "total_flos", "train_samples_per_second", "train_steps_per_second")


def load(file: Path) -> Any:
    """The file's contents; None where it is no JSON or more than 64 MiB."""
    try:
        return json.loads(file.read_text()) if file.stat().st_size < 2**26 else None
    except ValueError:
        return None


def read_trainer_state(file: Path, content: dict) -> Records:
    """What a Trainer has logged. Its last entry tells of the whole run, the mean of all losses too, which is no loss."""
    records = Records()
    for entry in content["log_history"]:
        step = entry.get("step")
        if step is None:
            continue
        whole = "train_runtime" in entry
        for name, value in entry.items():
            if (
                isinstance(value, (int, float))
                and name not in ("step", "epoch")
                and not (whole and name in _OF_WHOLE_RUN)
            ):
                records.add(name, step, value)
        if whole:
            records.seconds = float(entry["train_runtime"])
            records.numbers["samples_per_second"] = float(entry["train_samples_per_second"])
    for name in ("max_steps", "num_train_epochs", "train_batch_size", "global_step"):
        if name in content:
            records.fact("settings", name, content[name])
    records.files.append(str(file))
    return records


def is_trainer_state(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("log_history"), list)


def rows_of(file: Path, content: Any) -> list[Run]:
    """The runs of a file of results; none where it is another file."""
    if not isinstance(content, dict):
        return []
    if "curve" in content and "run" in content:
        return [_evidence(file, content)]
    if "runs" in content and "sweep" in content:
        return _demo(file, content)
    return []


def _demo(file: Path, content: dict) -> list[Run]:
    """The arms that were repeated, then the learning rates that were tried."""
    found: dict[tuple, Run] = {}
    for row in (*content["runs"], *content["sweep"]):
        arm = f"{row['optimizer']}, lr {row['lr']:g}"
        key = arm, row["seed"]
        if key in found:
            continue
        records = Records()
        for step, loss in zip(row["steps"], row["losses"]):
            records.add(VALIDATION, step, loss)
        records.seconds = row["seconds"]
        records.numbers[STATE_BYTES] = row["state_bytes"]
        records.fact("settings", "optimizer", row["optimizer"])
        records.fact("settings", "lr", row["lr"])
        records.files.append(str(file))
        found[key] = records.run(f"{arm}, seed {row['seed']}", arm=arm, seed=str(row["seed"]))
    return list(found.values())


def _evidence(file: Path, content: dict) -> Run:
    said, curve, records = content["run"], content["curve"], Records()
    for raw, name in (("training", LOSS), ("validation", VALIDATION)):
        for step, loss in zip(curve["step"], curve.get(raw, ())):
            records.add(name, step, loss)
    records.seconds = content.get("seconds")
    for key, name in (
        ("tokens_per_second", TOKENS_PER_SECOND),
        ("peak_memory_bytes", MEMORY),
        ("optimizer_state_bytes", STATE_BYTES),
        ("final", FINAL),  # on eight times the tokens of the curve's points
    ):
        if content.get(key) is not None:
            records.numbers[name] = float(content[key])
    for section in ("versions", "machine"):
        for name, value in content.get(section, {}).items():
            records.fact(section, name, value)
    for name, value in {
        **said,
        "lr": content["lr"],
        "steps": content["steps"],
        "commit": content.get("commit"),
    }.items():
        records.fact("settings", name, value)
    records.files.append(str(file))
    cell = f"{said['rung']}-{said['tokens_per_parameter']:g}tpp-{said['batch'] // 1024}k"
    arm = f"{said['arm']}, lr {content['lr']:g}"
    return records.run(f"{cell} {arm}, seed {said['seed']}", arm=arm, cell=cell, seed=str(said["seed"]))


def settings_of(content: Any) -> dict[str, dict[str, str]]:
    """Facts of a file that is a ds_config, or what ``inspect --format json`` wrote; empty for any other."""
    if not isinstance(content, dict):
        return {}
    if isinstance(content.get("totals"), dict) and isinstance(content.get("parameters"), list):
        return {"blocks": _blocks(content)}
    if isinstance(content.get("optimizer"), dict) and "type" in content["optimizer"]:
        return {"settings": dict(_flat(content))}
    return {}


def _blocks(content: dict) -> dict[str, str]:
    peaks: dict[str, tuple[float, float]] = {}
    for row in content["parameters"]:
        peaks.setdefault(row["block"], (row["ratio"], row["peak_lr"]))
    return {
        block: f"{numel:,} parameters, ratio {peaks[block][0]:g}, peak lr {peaks[block][1]:.3g}"
        for block, numel in content["totals"].items()
    }


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """``optimizer.params.lr`` -> its value, of nested dicts."""
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}.{key}" if name else key)]
    return [(name, value if isinstance(value, str) else json.dumps(value))]

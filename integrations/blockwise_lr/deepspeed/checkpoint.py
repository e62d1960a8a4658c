"""Saving and loading through DeepSpeed engines: complete or not at all, and never something that does not belong together.

A save marks its folder incomplete, lets DeepSpeed write, and when every rank's files are on disk writes a manifest with
their checksums; only then does ``latest`` point to it. (DeepSpeed itself writes ``latest`` while other ranks may still be
writing.) A load checks the manifest, the files and the origin of the optimizer state before it touches the engine.
"""
from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..checkpoint.errors import CheckpointError, DamageError, VersionError, is_first_rank, raise_together, together
from ..checkpoint.manifest import Manifest, begin, complete, entries, problems, refuse, survey, write_atomically
from ..checkpoint.restore import check
from ..optim.base import BlockwiseOptimizer

log = logging.getLogger("blockwise_lr")


def is_ours(engine: Any) -> bool:
    """Whether an engine's checkpoints are looked after here."""
    return isinstance(getattr(engine, "basic_optimizer", None), BlockwiseOptimizer)


# ---- saving


def save(engine: Any, upstream: Callable[..., bool], save_dir: str, tag: str | None, save_latest: bool,
         **arguments: Any) -> bool:
    """DeepSpeedEngine.save_checkpoint with a manifest, and ``latest`` written last and at once.

    The ds_config's ``"checkpoint": {"checksums": false}`` leaves file sizes as the only check.

    Raises:
        CheckpointError: a rank cannot write; all ranks raise, the folder stays incomplete and ``latest`` as it was.
    """
    tag = str(tag if tag is not None else f"global_step{engine.global_steps}")
    if not save_dir or engine.checkpoint_engine.is_decoupled() or engine.use_node_local_storage():
        if is_first_rank():
            log.warning("checkpoint %s gets no manifest: blockwise_lr does not support checkpoint engines that write in "
                        "the background, nor node-local storage", tag)
        return upstream(engine, save_dir, tag=tag, save_latest=save_latest, **arguments)
    folder = os.path.join(save_dir, tag)
    saving = f"saving {folder}"
    together(lambda: begin(folder) if dist.get_rank() == 0 else None, saving)
    with _noting_files(engine.checkpoint_engine) as (written, failures):
        upstream(engine, save_dir, tag=tag, save_latest=False, **arguments)
    raise_together(next(iter(failures), None), saving)
    checksums = bool((engine.config.get("checkpoint") or {}).get("checksums", True))
    own = together(lambda: entries(folder, written, dist.get_rank(), checksums), saving)
    gathered: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, own)

    def finish() -> None:
        complete(folder, {name: entry for found in gathered for name, entry in found.items()}, engine.global_steps,
                 engine.basic_optimizer.record().as_dict(), layout(engine))
        if save_latest:
            write_atomically(Path(save_dir) / "latest", tag)

    together(finish if dist.get_rank() == 0 else lambda: None, saving)
    return True


def layout(engine: Any) -> dict[str, Any]:
    """What two runs must share for one to load what the other saved, without conversion."""
    sharding = {"DeepSpeedZeroOptimizer": "ZeRO-1 or 2", "DeepSpeedZeroOptimizer_Stage3": "ZeRO-3",
                "BF16_Optimizer": "BF16_Optimizer"}.get(type(engine.optimizer).__name__, "ZeRO-0")
    return {"sharding": sharding, "precision": "bf16" if engine.bfloat16_enabled() else "fp32 or fp16",
            "ranks": "any number of" if sharding == "ZeRO-0" else engine.dp_world_size}


@contextlib.contextmanager
def _noting_files(checkpoint_engine: Any) -> Iterator[tuple[list[str], list[Exception]]]:
    """The paths that DeepSpeed's checkpoint engine writes meanwhile, and the errors of writes that failed.

    These are not raised in place: the other ranks would wait for this one in DeepSpeed's next barrier.
    """
    written: list[str] = []
    failures: list[Exception] = []
    write = checkpoint_engine.save

    def save_and_note(state_dict: Any, path: str) -> Any:
        try:
            result = write(state_dict, path)
        except Exception as error:
            failures.append(error)
            return None
        written.append(path)
        return result

    checkpoint_engine.save = save_and_note
    try:
        yield written, failures
    finally:
        del checkpoint_engine.save


# ---- loading


def load(engine: Any, upstream: Callable[..., tuple], load_dir: str, tag: str | None, load_optimizer_states: bool,
         load_module_only: bool, **arguments: Any) -> tuple[Any, Any]:
    """DeepSpeedEngine.load_checkpoint after a check of the folder, with errors raised on all ranks alike.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or the state in it does not fit.
        MismatchError: it contradicts the run in what the optimizer's ``accept_mismatch`` does not name.
    """
    tag = tag if tag is not None else _latest(load_dir, engine.load_universal_checkpoint())
    if tag is not None:
        with_states = load_optimizer_states and not load_module_only
        _check_folder(engine, os.path.join(load_dir, str(tag)), with_states)
    result = together(lambda: upstream(engine, load_dir, tag=tag, load_optimizer_states=load_optimizer_states,
                                       load_module_only=load_module_only, **arguments))
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False  # to the states before the load; the next step links anew
    return result


def load_newest(engine: Any, load_dir: str, **arguments: Any) -> tuple[Any, Any]:
    """``engine.load_checkpoint`` of the newest complete and intact checkpoint in a directory; all ranks call it.

    Damaged ones are passed over and logged, those of unfinished saves are passed over, nothing is deleted.

    Returns:
        As ``load_checkpoint``; (None, None) where no save was ever completed.

    Raises:
        VersionError: there is one of a newer format, which this run's saves might replace.
        CheckpointError: all complete ones are damaged, or only universal ones are there and the ds_config asks for the
            others, or the other way round.
        MismatchError: the newest contradicts this run.
    """
    gathered: list[Any] = [survey(load_dir, universal=engine.load_universal_checkpoint())
                           if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(gathered, src=0)
    found = gathered[0]
    if found.newer:
        raise VersionError("; ".join(found.newer))
    for tag, what in found.damaged.items():
        _tell_damage(load_dir, tag, what)
    for tag in found.tags:
        try:
            return engine.load_checkpoint(load_dir, tag=tag, **arguments)
        except DamageError as error:
            found.damaged[tag] = "; ".join(error.problems)
            _tell_damage(load_dir, tag, found.damaged[tag])
    if found.damaged:
        raise CheckpointError(f"every complete checkpoint in {load_dir} is damaged: "
                              + "; ".join(f"{tag}: {what}" for tag, what in found.damaged.items())
                              + "; name another folder to start anew")
    if found.others:
        raise CheckpointError(f"{load_dir} holds {', '.join(found.others)}, "
                              + ('which the ds_config\'s "checkpoint": {"load_universal": true} does not load; take it '
                                 'out or convert one' if engine.load_universal_checkpoint() else
                                 'universal; set "checkpoint": {"load_universal": true} in the ds_config'))
    return None, None


def _tell_damage(load_dir: str, tag: str, what: str) -> None:
    if is_first_rank():
        log.warning("passing over checkpoint %s, which is damaged: %s", os.path.join(load_dir, tag), what)


def _latest(load_dir: str, universal: bool) -> str | None:
    path = Path(load_dir) / ("latest_universal" if universal else "latest")
    return path.read_text().strip() if path.is_file() else None


def _check_folder(engine: Any, folder: str, with_states: bool) -> None:
    manifest, error, found = None, None, []
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as problem:
        error = problem
    raise_together(error)
    if manifest is None:
        if is_first_rank():
            log.warning("checkpoint %s has no manifest (it was saved without blockwise_lr), so its files cannot be "
                        "checked", folder)
        return
    if manifest.complete:
        found = _all_problems(folder, manifest)
    try:
        refuse(folder, manifest, found)
        if with_states:
            _check_layout(engine, folder, manifest)
        if with_states and manifest.record is not None:
            check(engine.basic_optimizer, manifest.saved_record(), f"checkpoint {folder}")
    except CheckpointError as problem:
        error = problem
    raise_together(error)


def _check_layout(engine: Any, folder: str, manifest: Manifest) -> None:
    universal, now = engine.load_universal_checkpoint(), layout(engine)
    if manifest.universal and not universal:
        raise CheckpointError(f'checkpoint {folder} is universal; set "checkpoint": {{"load_universal": true}} in the '
                              f"ds_config to load it")
    if universal and now["sharding"] == "ZeRO-0":
        raise CheckpointError(f"checkpoint {folder} is to be loaded as a universal one, which needs a ZeRO stage from 1 to "
                              f"3 and this run has 0; set another stage")
    if universal or manifest.layout is None or manifest.layout == now:
        return
    saved, here = ("{sharding} in {precision} on {ranks} data-parallel ranks".format(**found)
                   for found in (manifest.layout, now))
    remedy = "go on with the former"
    if manifest.layout["sharding"] != "ZeRO-0":
        remedy += (f", or run python -m blockwise_lr.deepspeed.universal {folder} {folder}_universal and set "
                   f'"checkpoint": {{"load_universal": true}} in the ds_config')
    raise CheckpointError(f"checkpoint {folder} was saved with {saved}, and this run has {here}; {remedy}")


def _all_problems(folder: str, manifest: Manifest) -> list[str]:
    """What is wrong with a folder's files; every rank reads its share of them and gets all answers."""
    ranks = dist.get_world_size()
    gathered: list[list[str]] = [[]] * ranks
    dist.all_gather_object(gathered, problems(folder, manifest, dist.get_rank(), ranks))
    return sorted(problem for found in gathered for problem in found)

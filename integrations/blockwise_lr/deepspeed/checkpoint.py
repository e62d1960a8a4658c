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

from ..checkpoint.errors import CheckpointError, is_first_rank, raise_together
from ..checkpoint.manifest import Manifest, begin, complete, complete_tags, entries, problems, refuse, write_atomically
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
    """
    tag = str(tag if tag is not None else f"global_step{engine.global_steps}")
    if not save_dir or engine.checkpoint_engine.is_decoupled() or engine.use_node_local_storage():
        if is_first_rank():
            log.warning("checkpoint %s gets no manifest: blockwise_lr does not support checkpoint engines that write in "
                        "the background, nor node-local storage", tag)
        return upstream(engine, save_dir, tag=tag, save_latest=save_latest, **arguments)
    folder = os.path.join(save_dir, tag)
    if dist.get_rank() == 0:
        begin(folder)
    dist.barrier()
    with _noting_files(engine.checkpoint_engine) as written:
        upstream(engine, save_dir, tag=tag, save_latest=False, **arguments)
    checksums = bool((engine.config.get("checkpoint") or {}).get("checksums", True))
    gathered: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, entries(folder, written, dist.get_rank(), checksums))
    if dist.get_rank() == 0:
        complete(folder, {name: entry for found in gathered for name, entry in found.items()}, engine.global_steps,
                 engine.basic_optimizer.record().as_dict())
        if save_latest:
            write_atomically(Path(save_dir) / "latest", tag)
    dist.barrier()
    return True


@contextlib.contextmanager
def _noting_files(checkpoint_engine: Any) -> Iterator[list[str]]:
    """The paths that DeepSpeed's checkpoint engine writes meanwhile."""
    written: list[str] = []
    write = checkpoint_engine.save

    def save_and_note(state_dict: Any, path: str) -> Any:
        result = write(state_dict, path)
        written.append(path)
        return result

    checkpoint_engine.save = save_and_note
    try:
        yield written
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
    result, error = (None, None), None
    try:
        result = upstream(engine, load_dir, tag=tag, load_optimizer_states=load_optimizer_states,
                          load_module_only=load_module_only, **arguments)
    except Exception as problem:  # whatever it is, the other ranks have to hear of it
        error = problem
    raise_together(error)
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False  # to the states before the load; the next step links anew
    return result


def load_newest(engine: Any, load_dir: str, **arguments: Any) -> tuple[Any, Any]:
    """``engine.load_checkpoint`` of the newest complete and intact checkpoint in a directory; all ranks call it.

    Damaged ones are passed over and logged. Other errors (a mismatch of settings) are raised and not passed over.

    Returns:
        As ``load_checkpoint``; (None, None) where there is no complete checkpoint.
    """
    tags: list[Any] = [complete_tags(load_dir) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(tags, src=0)
    for tag in tags[0]:
        found = _all_problems(os.path.join(load_dir, tag))
        if not found:
            return engine.load_checkpoint(load_dir, tag=tag, **arguments)
        if is_first_rank():
            log.warning("passing over checkpoint %s, which is damaged: %s", tag, "; ".join(found))
    return None, None


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
        found = _all_problems(folder)
    try:
        refuse(folder, manifest, found)
        if with_states and manifest.record is not None:
            check(engine.basic_optimizer, manifest.saved_record(), f"checkpoint {folder}")
    except CheckpointError as problem:
        error = problem
    raise_together(error)


def _all_problems(folder: str) -> list[str]:
    """What is wrong with a folder's files; every rank reads its share of them and gets all answers."""
    ranks = dist.get_world_size()
    gathered: list[list[str]] = [[]] * ranks
    dist.all_gather_object(gathered, problems(folder, Manifest.read(folder), dist.get_rank(), ranks))
    return sorted(problem for found in gathered for problem in found)

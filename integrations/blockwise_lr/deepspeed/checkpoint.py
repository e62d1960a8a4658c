"""Saving and loading through DeepSpeed engines: complete or not at all, and never what does not belong together.

A save marks its folder incomplete, makes sure that all ranks see that mark, lets DeepSpeed write, and when every rank's
files are on disk writes a manifest with their checksums; only then does ``latest`` point to it. (DeepSpeed itself
writes ``latest`` while other ranks may still be writing.) A load has all ranks agree on one checkpoint and checks the
manifest, the files, the origin of the optimizer state and the order of the parameters in it before it touches the engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..checkpoint.errors import CheckpointError, DamageError, VersionError, run_on_all_ranks
from ..checkpoint.files import is_seen, write_atomically, write_error
from ..checkpoint.manifest import Entry, Layout, Manifest, entry_of, mark_complete, mark_incomplete, name_in
from ..checkpoint.survey import scan_checkpoints
from ..collective import gathered, is_rank_zero
from ..optim.base import BlockwiseOptimizer
from ..patches.deepspeed_instances import SAVED_FILES
from ..patches.deepspeed_variants import WRITES_LATER
from ..patches.upstream_deepspeed import states_must_be_linked_anew
from .flats import KEY, contents_of, layout
from .preconditions import agreed_tag, check_folder, counters_kept
from .reading import weights_mapped

log = logging.getLogger("blockwise_lr")

# Network file systems show new files to other nodes after a while.
SECONDS_TO_APPEAR = 10.0
_SCRIPT = "zero_to_fp32.py"  # DeepSpeed puts it beside the tags; not part of a checkpoint


def is_ours(engine: Any) -> bool:
    """Whether an engine's checkpoints are looked after here."""
    return isinstance(getattr(engine, "basic_optimizer", None), BlockwiseOptimizer)


# engine -> what raises where its folder belongs to another run (see .preemption)
owners: weakref.WeakKeyDictionary[Any, Callable[[], None]] = weakref.WeakKeyDictionary()


# ---- saving


def save(
    engine: Any, upstream: Callable[..., bool], save_dir: str, tag: str | None, save_latest: bool, **arguments: Any
) -> bool:
    """DeepSpeedEngine.save_checkpoint with a manifest, and ``latest`` written last and at once.

    The ds_config's ``"checkpoint": {"checksums": false}`` leaves file sizes as the only check.

    Raises:
        CheckpointError: a rank cannot write, ranks do not see the same folder, or it belongs to another run; all ranks
            raise, the folder stays incomplete and ``latest`` as it was.
    """
    tag = str(tag if tag is not None else f"global_step{engine.global_steps}")
    if not save_dir or WRITES_LATER.here(engine.checkpoint_engine) or engine.use_node_local_storage():
        if is_rank_zero():
            log.warning(
                "checkpoint %s gets no manifest: blockwise_lr does not support checkpoint engines that write "
                "in the background, nor node-local storage",
                tag,
            )
        return upstream(engine, save_dir, tag=tag, save_latest=save_latest, **arguments)
    folder = os.path.join(save_dir, tag)
    saving = f"saving {folder}"
    refuse_if_lost = owners.get(engine, lambda: None)
    if engine in owners:
        run_on_all_ranks(refuse_if_lost, saving)
    layouts, records = zip(*gathered(run_on_all_ranks(lambda: _to_join(engine), saving)))
    joined, one_record = _joined_layouts(layouts), len(set(records)) == 1
    _begin_together(folder, saving)
    checksums = bool((engine.config.get("checkpoint") or {}).get("checksums", True))
    with _noting_files(engine, folder, checksums) as files:
        upstream(engine, save_dir, tag=tag, save_latest=False, **arguments)
    own = run_on_all_ranks(lambda: {name: file.result() for name, file in files.items()}, saving)
    found = {name: entry for entries in gathered(own) for name, entry in entries.items()}

    def finish() -> None:
        refuse_if_lost()
        record = replace(engine.basic_optimizer.record(), tensors=None)  # what lies where is in the layout
        mark_complete(
            folder,
            found,
            engine.global_steps,
            record.as_dict() if one_record else None,
            joined,
            patience=SECONDS_TO_APPEAR,
        )
        if save_latest:
            write_atomically(Path(save_dir) / "latest", tag)

    run_on_all_ranks(finish if is_rank_zero() else lambda: None, saving)
    return True


def _begin_together(folder: str, saving: str) -> None:
    """The first rank marks the folder; every rank then has to find that very mark."""
    tokens: list[Any] = [uuid.uuid4().hex if is_rank_zero() else None, folder]
    dist.broadcast_object_list(tokens, src=0)
    token, first = tokens
    run_on_all_ranks(lambda: mark_incomplete(folder, token) if is_rank_zero() else None, saving)
    run_on_all_ranks(lambda: _find_mark(folder, first, token), saving)


def _find_mark(folder: str, first: str, token: str) -> None:
    def marked() -> bool:
        manifest = Manifest.read(folder)
        return manifest is not None and manifest.token == token

    if not is_seen(marked, SECONDS_TO_APPEAR):
        raise CheckpointError(
            f"rank {dist.get_rank()} does not find in {folder} what rank 0 has written to {first}; give all ranks the same "
            f"folder and tag, on a file system that all nodes share"
        )


def _to_join(engine: Any) -> tuple[Layout, str]:
    """A rank's layout, and what tells its record from those of other pipeline stages.

    Names, which would be as many as ranks times parameters, come from the first rank alone.
    """
    mine = layout(engine)
    return (
        mine if is_rank_zero() else mine.model_copy(update={"order": []}),
        engine.basic_optimizer.record().fingerprint,
    )


def _joined_layouts(parts: Sequence[Layout]) -> Layout:
    """The first rank's layout with all ranks' digests.

    Raises:
        CheckpointError: two ranks that hold different shards write them to one file.
    """
    flats: dict[str, str] = {}
    for rank, part in enumerate(parts):
        for name, digest in (part.flats or {}).items():
            if flats.setdefault(name, digest) != digest:
                raise CheckpointError(
                    f"rank {rank} writes the state of its own shards to {name}, to which another "
                    f"rank has written that of other shards: DeepSpeed does not save this parallel "
                    f"layout whole; use one that it does (without sequence parallelism, as a rule)"
                )
    return parts[0].model_copy(update={"flats": flats})


@contextlib.contextmanager
def _noting_files(engine: Any, folder: str, checksums: bool) -> Iterator[dict[str, Future[Entry]]]:
    """The entries of the files that DeepSpeed's checkpoint engine writes meanwhile, by path below the folder.

    A file is brought to disk and read for its checksum while DeepSpeed goes on with the next. Errors of writes that
    failed come with their entries: raised in place, the other ranks would wait for this one in DeepSpeed's next barrier.
    """
    files: dict[str, Future[Entry]] = {}
    checkpoint_engine, rank = engine.checkpoint_engine, dist.get_rank()
    write, copy_script = checkpoint_engine.save, engine._copy_recovery_script
    refuse_if_lost = owners.get(engine, lambda: None)

    def save_and_note(state_dict: Any, path: str) -> Any:
        name, result = name_in(folder, path), None
        try:
            refuse_if_lost()  # before each file, for a run that is stopped for a while goes on where it was
            result = write(_described(engine, state_dict), path)
        except Exception as error:
            files[name] = Future()
            files[name].set_exception(error if isinstance(error, CheckpointError) else write_error(path, error))
        else:
            files[name] = pool.submit(entry_of, path, rank, checksums)
        return result

    def copy_script_or_note(save_path: str) -> None:
        try:
            copy_script(save_path)
        except OSError as error:
            files[_SCRIPT] = Future()
            files[_SCRIPT].set_exception(write_error(os.path.join(save_path, _SCRIPT), error))

    with (
        SAVED_FILES.during(checkpoint_engine, save=save_and_note),
        SAVED_FILES.during(engine, _copy_recovery_script=copy_script_or_note),
        ThreadPoolExecutor(2) as pool,
        _own_checksums_only(checksums),
    ):
        yield files


def _described(engine: Any, state_dict: Any) -> Any:
    """What DeepSpeed is about to write, with what this rank's flat tensors hold where it is ZeRO's optimizer state."""
    if not (isinstance(state_dict, dict) and "optimizer_state_dict" in state_dict and engine.basic_optimizer.shards):
        return state_dict
    return {**state_dict, KEY: {"flats": contents_of(engine.basic_optimizer)}}


@contextlib.contextmanager
def _own_checksums_only(checksums: bool) -> Iterator[None]:
    """Spares torch.save the CRC-32 of its archives, which takes longer than writing them and which torch.load never
    looks at, where the manifest has a checksum of the whole file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(before and not checksums)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


# ---- loading


def load(
    engine: Any,
    upstream: Callable[..., tuple],
    load_dir: str,
    tag: str | None,
    load_optimizer_states: bool,
    load_module_only: bool,
    **arguments: Any,
) -> tuple[Any, Any]:
    """DeepSpeedEngine.load_checkpoint after a check of the folder, with errors raised on all ranks alike.

    What can be refused is refused before anything is loaded; where DeepSpeed fails all the same, the engine's counters
    and its scheduler are put back.

    Raises:
        CheckpointError: the folder is not there, incomplete or damaged, ranks see different ones, or the state in it
            does not fit.
        MismatchError: it contradicts the run in what the optimizer's ``accept_mismatch`` does not name, or in the
            order of the parameters.
    """
    tag = agreed_tag(load_dir, tag, engine.load_universal_checkpoint())
    if tag is not None:
        check_folder(
            engine, load_dir, tag, load_optimizer_states and not load_module_only, load_module_only, **arguments
        )
    with counters_kept(engine), weights_mapped(engine.checkpoint_engine):
        result = run_on_all_ranks(
            lambda: upstream(
                engine,
                load_dir,
                tag=tag,
                load_optimizer_states=load_optimizer_states,
                load_module_only=load_module_only,
                **arguments,
            )
        )
    states_must_be_linked_anew(engine.optimizer)  # they are linked to the states before the load
    return result


def load_newest(engine: Any, load_dir: str, **arguments: Any) -> tuple[Any, Any]:
    """``engine.load_checkpoint`` of the newest complete and intact checkpoint in a directory; all ranks call it.

    Folders below the directory are searched too. Damaged checkpoints are passed over and logged, those of unfinished
    saves are passed over, nothing is deleted.

    Returns:
        As ``load_checkpoint``; (None, None) where no save was ever completed.

    Raises:
        VersionError: there is one of a newer format, which this run's saves might replace.
        CheckpointError: all complete ones are damaged, or of the kind (universal or not) that the ds_config does not
            ask for, or none has a manifest that tells whether it is complete.
        MismatchError: the newest contradicts this run.
    """
    found = run_on_all_ranks(
        lambda: scan_checkpoints(load_dir, universal=engine.load_universal_checkpoint()) if is_rank_zero() else None,
        f"searching {load_dir} for checkpoints",
    )
    found = gathered(found)[0]
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
        raise CheckpointError(
            f"every complete checkpoint in {load_dir} is damaged: "
            + "; ".join(f"{tag}: {what}" for tag, what in found.damaged.items())
            + "; name another folder to start anew"
        )
    if found.others:
        raise CheckpointError(
            f"{load_dir} holds {', '.join(found.others)}, "
            + (
                'which the ds_config\'s "checkpoint": {"load_universal": true} does not load; take it '
                "out or convert one"
                if engine.load_universal_checkpoint()
                else 'universal; set "checkpoint": {"load_universal": true} in the ds_config'
            )
        )
    if found.unknown:
        raise CheckpointError(
            f"{load_dir} holds {', '.join(found.unknown)} without a manifest that can be read (saved "
            f"without blockwise_lr), so whether it is complete is not known; load it with "
            f"engine.load_checkpoint(load_dir, tag={found.unknown[0]!r}), or name another folder to "
            f"start anew"
        )
    elsewhere = gathered(
        run_on_all_ranks(lambda: scan_checkpoints(load_dir, universal=engine.load_universal_checkpoint()).tags)
    )
    for rank, tags in enumerate(elsewhere):
        if tags:
            raise CheckpointError(
                f"rank {rank} finds {tags[0]!r} in {load_dir}, where rank 0 finds no checkpoint; "
                f"give all ranks the same folder, on a file system that all nodes share"
            )
    return None, None


def _tell_damage(load_dir: str, tag: str, what: str) -> None:
    if is_rank_zero():
        log.warning("passing over checkpoint %s, which is damaged: %s", os.path.join(load_dir, tag), what)

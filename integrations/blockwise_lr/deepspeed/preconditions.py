"""What is looked at before DeepSpeed loads a checkpoint, so that a refused load leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ..blocks.block_map import plain_name
from ..checkpoint.errors import CheckpointError, MismatchError, run_on_all_ranks
from ..checkpoint.manifest import Layout, Manifest, problems, raise_if_damaged, size_problems
from ..checkpoint.record import Record
from ..checkpoint.restore import check_record
from ..checkpoint.survey import looks_universal, remedy
from ..collective import gathered, is_rank_zero
from ..patches.deepspeed_variants import HAS_RANKS_FILES
from .flats import contents, difference, layout, order, order_difference, state_file
from .reading import read
from .universal_loading import check_universal

log = logging.getLogger("blockwise_lr")

_COUNTERS = (
    "global_steps",
    "global_samples",
    "micro_steps",
    "skipped_steps",
    "loaded_checkpoint_mp_world_size",
    "loaded_checkpoint_dp_world_size",
    "_curr_ckpt_path",
)
# of ZeRO's optimizers; the last three of the unfused one before DeepSpeed 0.18.6, which then keeps them in loss_scale_config
_SCALING = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "cur_scale", "cur_iter", "last_overflow_iter")


# ---- one checkpoint for all ranks


def agreed_tag(load_dir: str, tag: str | None, universal: bool) -> str | None:
    """The tag to load, the same on all ranks; None where none was given and no save has ever written ``latest``.

    Raises:
        CheckpointError: there is no such checkpoint, ``latest`` is empty or names none, or ranks see different folders.
    """
    tag, manifest = run_on_all_ranks(lambda: _view(load_dir, tag, universal))
    views = gathered((tag, manifest))
    for rank, view in enumerate(views):
        if view != views[0]:
            raise CheckpointError(
                f"rank {rank} sees another checkpoint in {load_dir} than rank 0 ({_told(view)} and "
                f"{_told(views[0])}); give all ranks the same folder and tag, on a file system that "
                f"all nodes share"
            )
    return tag


def _view(load_dir: str, tag: str | None, universal: bool) -> tuple[str | None, Any]:
    """The tag and what tells the manifest in its folder from others."""
    if tag is None:
        pointer = Path(load_dir) / ("latest_universal" if universal else "latest")
        if not os.path.lexists(pointer):
            if universal:
                raise CheckpointError(
                    f"{pointer} is not there; convert a checkpoint with python -m "
                    f"blockwise_lr.deepspeed.universal CHECKPOINT OUTPUT, or pass a universal one's tag"
                )
            return None, None
        try:
            tag = pointer.read_text().strip()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{pointer} cannot be read ({error}); {remedy(load_dir, '', universal)}") from error
        if not tag or not (Path(load_dir) / tag).is_dir():
            what = f"names {tag!r}, which is not there" if tag else "is empty"
            raise CheckpointError(f"{pointer} {what}; {remedy(load_dir, tag, universal)}")
    folder = Path(load_dir) / str(tag)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}; {remedy(load_dir, str(tag), universal)}")
    manifest = Manifest.read(folder)
    return str(tag), manifest and (manifest.complete, manifest.saved_at, manifest.token, len(manifest.files))


def _told(view: tuple[str | None, Any]) -> str:
    tag, manifest = view
    if tag is None:
        return "no latest file"
    return f"{tag!r} " + (
        "without a manifest" if manifest is None else f"saved at {manifest[1]}" if manifest[0] else "incomplete"
    )


# ---- its files, its origin


def check_folder(
    engine: Any,
    load_dir: str,
    tag: str,
    with_states: bool,
    module_only: bool,
    *,
    load_module_strict: bool,
    load_lr_scheduler_states: bool,
    custom_load_fn: Any,
) -> None:
    """Refuses what cannot or must not be loaded; changes nothing. All ranks call it with what :func:`agreed_tag` gave.

    Args:
        with_states: optimizer states are to be loaded.
        module_only: the module alone is, without counters and schedulers.
        load_module_strict, load_lr_scheduler_states, custom_load_fn: of ``load_checkpoint``.

    Raises:
        CheckpointError, DamageError, MismatchError: as ``load``.
    """
    folder = os.path.join(load_dir, tag)
    manifest = run_on_all_ranks(lambda: Manifest.read(folder))
    if manifest is not None:
        _check_files(folder, load_dir, tag, manifest)
        run_on_all_ranks(lambda: _check_layout(engine, folder, manifest.layout, manifest.universal, with_states))
        if with_states and manifest.record is not None:
            run_on_all_ranks(
                lambda: check_record(engine.basic_optimizer, manifest.saved_record(), f"checkpoint {folder}")
            )
    elif is_rank_zero():
        log.warning(
            "checkpoint %s has no manifest (it was saved without blockwise_lr), so its files cannot be checked", folder
        )
    model = run_on_all_ranks(lambda: _read(_model_file(engine, load_dir, tag)))
    if with_states and engine.load_universal_checkpoint():
        run_on_all_ranks(lambda: check_universal(engine.basic_optimizer, folder))
    elif with_states:
        if manifest is None or manifest.record is None:
            run_on_all_ranks(lambda: _check_states(engine, folder, model))
        own = run_on_all_ranks(lambda: _order_difference(engine, manifest.layout if manifest else None, model))
        _refuse_together(folder, layout(engine).sharding, gathered(own))
    if custom_load_fn is None and model is not None:
        run_on_all_ranks(lambda: _try_module(engine, folder, model.get("module"), load_module_strict))
    if load_lr_scheduler_states and not module_only and engine.lr_scheduler is not None and model is not None:
        run_on_all_ranks(lambda: _try_scheduler(engine, folder, model.get("lr_scheduler")))


def _check_files(folder: str, load_dir: str, tag: str, manifest: Manifest) -> None:
    """Every rank reads its share of the files, looks whether all are there, and gets all answers."""
    rank, ranks, found = dist.get_rank(), dist.get_world_size(), []
    if manifest.complete:
        mine = run_on_all_ranks(lambda: (size_problems(folder, manifest), problems(folder, manifest, rank, ranks)))
        found = _merged(gathered(mine))
    if manifest.complete and not found:
        return
    universal = looks_universal(folder, manifest)
    other = run_on_all_ranks(lambda: remedy(load_dir, tag, universal) if is_rank_zero() else "")
    raise_if_damaged(folder, manifest, found, gathered(other)[0])


def _merged(answers: list[tuple[list[str], list[str]]]) -> list[str]:
    """All problems; those of a file's presence that some ranks alone have, with these ranks."""
    found = {problem for _, contents_ in answers for problem in contents_}
    for problem in {problem for sizes, _ in answers for problem in sizes}:
        seen = [rank for rank, (sizes, _) in enumerate(answers) if problem in sizes]
        if len(seen) < len(answers):
            found.discard(problem)
            found.add(
                f"{problem} as rank{'s' if len(seen) > 1 else ''} {', '.join(map(str, seen))} see"
                f"{'s' if len(seen) == 1 else ''} it"
            )
        else:
            found.add(problem)
    return sorted(found)


def _check_layout(engine: Any, folder: str, saved: Layout | None, is_universal: bool, with_states: bool) -> None:
    if not with_states:
        return
    universal, now = engine.load_universal_checkpoint(), layout(engine)
    if is_universal and not universal:
        raise CheckpointError(
            f'checkpoint {folder} is universal; set "checkpoint": {{"load_universal": true}} in the '
            f"ds_config to load it"
        )
    if universal and now.sharding == "ZeRO-0":
        raise CheckpointError(
            f"checkpoint {folder} is to be loaded as a universal one, which needs a ZeRO stage from "
            f"1 to 3 and this run has 0; set another stage"
        )
    if universal or saved is None or saved.same_cut(now):
        return
    raise CheckpointError(
        f"checkpoint {folder} was saved with {saved}, and this run has {now}; go on with the former"
        + _or_convert(folder, saved.sharding)
    )


def _or_convert(folder: str, sharding: str) -> str:
    return (
        ""
        if sharding == "ZeRO-0"
        else (
            f", or run python -m blockwise_lr.deepspeed.universal {folder} {folder}_universal and set "
            f'"checkpoint": {{"load_universal": true}} in the ds_config'
        )
    )


# ---- what the files say; their tensors are mapped, not read


def _model_file(engine: Any, load_dir: str, tag: str) -> str:
    found, mine = engine._get_all_ckpt_names(load_dir, tag), engine._get_ckpt_name(load_dir, tag)
    if not found:
        raise CheckpointError(
            f"{os.path.join(load_dir, tag)} holds no {os.path.basename(mine)}; it is no checkpoint "
            f"of an engine of this kind, or files of it are missing"
        )
    return mine if mine in found else found[0]


def _read(path: str) -> Mapping[str, Any] | None:
    """What a file holds; None where it holds objects of classes that DeepSpeed alone may unpickle."""
    try:
        return read(path, mapped=True)
    except pickle.UnpicklingError:
        return None


def _check_states(engine: Any, folder: str, model: Mapping[str, Any] | None) -> None:
    """Refuses optimizer states that contradict this run, where no manifest tells of all ranks' alike."""
    states = model and model.get("optimizer")
    if HAS_RANKS_FILES.here(engine):
        ranks = model and model.get("dp_world_size")
        if ranks not in (None, engine.seq_dp_world_size):
            raise CheckpointError(
                f"checkpoint {folder} was saved on {ranks} data-parallel ranks, and this run has "
                f"{engine.seq_dp_world_size}; go on with the former" + _or_convert(folder, layout(engine).sharding)
            )
        states = (_read(os.path.join(folder, state_file(engine))) or {}).get("optimizer_state_dict")
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        states = states.get(key, states) if isinstance(states, Mapping) else states
    groups = states.get("param_groups") if isinstance(states, Mapping) else None
    if groups:
        check_record(engine.basic_optimizer, Record.of_groups(groups), f"checkpoint {folder}")


def _order_difference(engine: Any, saved: Layout | None, model: Mapping[str, Any] | None) -> str | None:
    """In what the saved flat tensors' contents differ from this run's, in words; None where they do not."""
    if contents(engine) is None:
        return None
    if saved is not None and saved.flats is not None:
        return difference(saved, layout(engine))
    shapes = model and model.get(
        "param_shapes"
    )  # DeepSpeed's own checkpoints, and ours of older versions, say this much
    return order_difference([plain_name(name) for group in shapes for name in group], order(engine)) if shapes else None


def _refuse_together(folder: str, sharding: str, answers: list[str | None]) -> None:
    """One error on all ranks where any has another order of parameters."""
    found = next((answer for answer in answers if answer is not None), None)
    if found is not None:
        raise MismatchError(
            f"checkpoint {folder} does not fit this run: {found}; go on with the former order of "
            f"definition and zero_optimization settings" + _or_convert(folder, sharding)
        )


class _NoCopies(TorchDispatchMode):
    """Tensors keep their values: what is copied into them is not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return args[0] if func is torch.ops.aten.copy_.default else func(*args, **(kwargs or {}))


def _try_module(engine: Any, folder: str, saved: Any, strict: bool) -> None:
    """Has the module load its weights without copying them, with all that it or its hooks do to names and shapes.

    Left out where DeepSpeed loads other tensors than these: universal checkpoints, ZeRO-3, experts, pipelines.
    """
    if (
        engine.load_universal_checkpoint()
        or engine.zero_optimization_partition_weights()
        or engine.has_moe_layers
        or not isinstance(saved, Mapping)
        or any(name.endswith("_extra_state") for name in saved)
    ):
        return
    try:
        with _NoCopies():
            engine.module.load_state_dict(dict(saved), strict=strict)
    except Exception as error:
        raise CheckpointError(
            f"the module's weights in checkpoint {folder} do not fit this model ({error}); go on "
            f"with the former model, or pass load_module_strict=False or a custom_load_fn"
        ) from error


def _try_scheduler(engine: Any, folder: str, state: Any) -> None:
    put_back = _snapshot(engine)
    try:
        engine.lr_scheduler.load_state_dict(copy.deepcopy(state))
    except Exception as error:
        raise CheckpointError(
            f"the scheduler's state in checkpoint {folder} is not one of a "
            f"{type(engine.lr_scheduler).__name__} ({type(error).__name__}: {error}); go on with the "
            f"former scheduler, or pass load_lr_scheduler_states=False"
        ) from error
    finally:
        put_back()


# ---- after a load that failed


@contextlib.contextmanager
def counters_kept(engine: Any) -> Iterator[None]:
    """Puts an engine's counters, scheduler, learning rates and loss scaling back where what is done meanwhile fails."""
    put_back = _snapshot(engine)
    try:
        yield
    except BaseException:
        put_back()
        log.warning(
            "the load failed under way: the engine's counters and its scheduler are as before, its weights "
            "may be the checkpoint's in part; build the engine anew before training with it"
        )
        raise


def _schedulers(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those that it goes through or wraps (SequentialLR, ChainedScheduler, Accelerate's)."""
    if hasattr(scheduler, "load_state_dict"):
        yield scheduler
        for inner in (*getattr(scheduler, "_schedulers", ()), getattr(scheduler, "scheduler", None)):
            yield from _schedulers(inner)


def _snapshot(engine: Any) -> Callable[[], None]:
    """What puts an engine's counters, scheduler, learning rates and loss scaling back as they are now."""
    groups = engine.basic_optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    owners = [
        (engine, {key: getattr(engine, key) for key in _COUNTERS if hasattr(engine, key)}),
        (engine.optimizer, {key: value for key, value in vars(engine.optimizer).items() if key in _SCALING}),
    ]
    for owner in (*_schedulers(engine.lr_scheduler), getattr(engine.optimizer, "loss_scale_config", None)):
        if owner is not None:
            owners.append(
                (
                    owner,
                    {
                        key: copy.copy(value) if isinstance(value, (list, dict)) else value
                        for key, value in vars(owner).items()
                    },
                )
            )

    def put_back() -> None:
        for owner, values in owners:
            if owner not in (engine, engine.optimizer):
                vars(owner).clear()
            vars(owner).update(values)
        for group, values in zip(engine.basic_optimizer.param_groups, settings):
            group.update(values)

    return put_back

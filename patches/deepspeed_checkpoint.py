"""DeepSpeed: checkpoints of engines with our optimizers are complete or not at all, and load at other layouts.

DeepSpeed writes ``latest`` before it knows that all ranks have written, checks no file on loading, and its universal
loaders read only folders of their own ZeRO stage. Engines with other optimizers go DeepSpeed's own way unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import Patch, Undo
from .deepspeed_variants import CHECKPOINT_NAME, ENGINE, PACKAGE, UNIVERSAL_FILES, VERSIONS
from .symbols import Symbol


@dataclass(frozen=True)
class Hooks:
    """What stands around DeepSpeed's saving and loading.

    Attributes:
        is_ours: whether an engine's checkpoints are looked after.
        save: (engine, DeepSpeed's save_checkpoint, directory, tag, save_latest, **others).
        load: (engine, DeepSpeed's load_checkpoint, directory, tag, **others).
        model_state_files: (what DeepSpeed found, the glob it used) -> the model state files of a universal folder.
    """

    is_ours: Callable[[Any], bool]
    save: Callable[..., bool]
    load: Callable[..., tuple[Any, Any]]
    model_state_files: Callable[[list[str], str], list[str]]


def _install(undo: Undo, hooks: Hooks) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    upstream_save = DeepSpeedEngine.save_checkpoint
    upstream_load = DeepSpeedEngine.load_checkpoint
    upstream_names = DeepSpeedEngine._get_all_ckpt_names

    def save_checkpoint(
        self: Any,
        save_dir: str,
        tag: str | None = None,
        client_state: dict = {},  # noqa: B006
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        arguments = dict(client_state=client_state, exclude_frozen_parameters=exclude_frozen_parameters)
        if not hooks.is_ours(self):
            return upstream_save(self, save_dir, tag=tag, save_latest=save_latest, **arguments)
        return hooks.save(self, upstream_save, save_dir, tag, save_latest, **arguments)

    def load_checkpoint(
        self: Any,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[Any, Any]:
        arguments = dict(
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )
        if not hooks.is_ours(self):
            return upstream_load(self, load_dir, tag=tag, **arguments)
        return hooks.load(self, upstream_load, load_dir, tag, **arguments)

    def _get_all_ckpt_names(self: Any, checkpoints_path: str, tag: str) -> list[str]:
        found = upstream_names(self, checkpoints_path, tag)
        if not (hooks.is_ours(self) and self.load_universal_checkpoint()):
            return found
        return hooks.model_state_files(found, UNIVERSAL_FILES.here(self, checkpoints_path, tag))

    undo.set(DeepSpeedEngine, "save_checkpoint", save_checkpoint)
    undo.set(DeepSpeedEngine, "load_checkpoint", load_checkpoint)
    undo.set(DeepSpeedEngine, "_get_all_ckpt_names", _get_all_ckpt_names)


PATCH = Patch(
    name="deepspeed-checkpoint",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol(
            ENGINE + ".save_checkpoint",
            ("self", "save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters"),
        ),
        Symbol(
            ENGINE + ".load_checkpoint",
            (
                "self",
                "load_dir",
                "tag",
                "load_module_strict",
                "load_optimizer_states",
                "load_lr_scheduler_states",
                "load_module_only",
                "custom_load_fn",
            ),
        ),
        Symbol(ENGINE + "._get_all_ckpt_names", ("self", "checkpoints_path", "tag")),
    ),
    reads=(
        *CHECKPOINT_NAME,
        Symbol(ENGINE + ".load_universal_checkpoint", ("self",)),
    ),
    why="there is no hook between a checkpoint's last file and `latest`, and none before a load",
    until="DeepSpeed writes `latest` after a barrier, checks its files, and loads universal folders in any stage",
    install=_install,
    hooks=Hooks,
)

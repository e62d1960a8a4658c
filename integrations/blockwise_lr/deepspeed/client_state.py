"""States of objects beside an engine, kept in the client state of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patches.instances import InstancePatch


def keep_in_checkpoints(
    engine: Any,
    patch: InstancePatch,
    key: str,
    state_dict: Callable[[], dict[str, Any]],
    loaded: Callable[[dict[str, Any] | None], None],
) -> None:
    """Has an engine save a state with its checkpoints, by a patch that is the caller's own.

    Args:
        key: of the client state; the user is not given it back.
        state_dict: called for what to save.
        loaded: called after each load, with what was saved; None where the checkpoint has nothing.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_checkpoint(save_dir: Any, tag: Any = None, client_state: Any = None, *rest: Any, **options: Any) -> Any:
        return save(save_dir, tag, {**(client_state or {}), key: state_dict()}, *rest, **options)

    def load_checkpoint(*arguments: Any, **options: Any) -> Any:
        path, client_state = load(*arguments, **options)
        loaded(client_state.pop(key, None) if isinstance(client_state, dict) else None)
        return path, client_state

    patch.apply(engine, save_checkpoint=save_checkpoint, load_checkpoint=load_checkpoint)

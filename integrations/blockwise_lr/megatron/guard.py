"""``--guard``: Megatron's run lowers its rates, goes back to a checkpoint, or ends, where its losses say so.

Megatron's loop cannot go back in itself: going back is a new start that loads the newest checkpoint and, as Megatron's own
``--iterations-to-skip`` has it, passes over the data of the iterations that were thrown away.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ..blocks import BlockError
from ..checkpoint import CheckpointError
from ..collective.agreement import gathered
from ..collective.errors import is_rank_zero, run_on_all_ranks
from ..measure import Alarm, Guard, Unstable
from .build import optimizers_of
from .guard_flags import are_given, check_way_back, checked_options

log = logging.getLogger("blockwise_lr")

FILE = "blockwise_lr_guard.json"  # in --save, beside the checkpoints
_NEWEST = "latest_checkpointed_iteration.txt"  # Megatron's, in --save

_guards: WeakKeyDictionary[Any, MegatronGuard] = WeakKeyDictionary()  # by Megatron's scheduler
_states: WeakKeyDictionary[Any, Mapping[str, Any]] = WeakKeyDictionary()  # loaded before there is a guard


class MegatronGuard(Guard):
    """The guard of a run of ``pretrain()``."""

    def __init__(self, arguments: Any, optimizer: Any) -> None:
        self.arguments, self.ends_saved = arguments, False
        options = checked_options(arguments)
        super().__init__(
            *optimizers_of(optimizer),
            roll_back=_no_way_back if arguments.save else None,
            save=self._save_and_end if arguments.save else None,
            **options,
        )

    def _save_and_end(self) -> None:
        """Megatron saves and ends after an iteration that --exit-interval divides."""
        self.ends_saved, self.arguments.exit_interval = True, self.steps_done

    def _rolled_back(self, reason: str) -> tuple[Alarm, str]:
        now, folder = self.steps_done, Path(self.arguments.save)
        newest, before = gathered(_seen(folder) if is_rank_zero() else None)[0]
        if newest is None:
            raise CheckpointError(
                f"guard: the loss asks to go back, and {folder} holds no complete checkpoint yet; save one before "
                f"--guard-after ({self.options.after}) iterations are done"
            )
        again = 1 + sum(alarm["back_to"] == newest for alarm in before)
        if again > self.options.attempts:
            raise self._stopped(
                f"{reason}, {again} times after the checkpoint of iteration {newest}, which was gone back to", False
            )
        alarm = Alarm(now, reason, "roll_back", newest)
        if is_rank_zero():
            (folder / FILE).write_text(json.dumps([*before, vars(alarm)], indent=1))
        raise Unstable(
            f"guard: iteration {now}: {reason}; the run ends to go back. Start it again (torchrun's --max-restarts and "
            f"requeued jobs do): it loads the checkpoint of iteration {newest} and skips the data of iterations "
            f"{newest + 1} to {now}"
        )


def start(arguments: Any) -> None:
    """Before training: checks the flags, and has Megatron skip what an earlier start has gone back from. Collective.

    Raises:
        BlockError: bad values, or flags that go with no other; on every rank.
    """
    if are_given(arguments):
        run_on_all_ranks(lambda: checked_options(arguments), "starting --guard")
    if getattr(arguments, "guard", None) != "roll_back":
        return
    run_on_all_ranks(lambda: check_way_back(arguments), "starting --guard roll_back")
    alarms = gathered(_seen(Path(arguments.load))[1] if arguments.load and is_rank_zero() else [])[0]
    skipped = {n for alarm in alarms for n in range(alarm["back_to"] + 1, alarm["step"] + 1)}
    arguments.iterations_to_skip = sorted(skipped.union(arguments.iterations_to_skip or ()))
    for alarm in alarms if is_rank_zero() else ():
        first, last = alarm["back_to"] + 1, alarm["step"]
        log.warning("guard: the data of iterations %d to %d is skipped: %s", first, last, alarm["reason"])


def before_step(arguments: Any, optimizer: Any) -> None:
    """Raises BlockError on every rank where the flag asks to guard another optimizer than ours."""
    if getattr(arguments, "guard", None) and not optimizers_of(optimizer):
        raise BlockError(
            f"--guard {arguments.guard} needs a blockwise optimizer; leave it out, or give --optimizer blockwise_adamw"
        )


def after_step(
    arguments: Any, optimizer: Any, scheduler: Any, losses: Mapping[str, Any], figures: Mapping[str, float]
) -> None:
    """Judges the step that was taken, where the flag asks for it. Collective.

    Raises:
        Unstable: the run is to end without a save; on every rank.
    """
    if not getattr(arguments, "guard", None):
        return
    guard = _guards.get(scheduler)
    if guard is None:
        guard = _guards[scheduler] = MegatronGuard(arguments, optimizer)
        state = _states.pop(scheduler, None)
        if state is not None:
            guard.load_state_dict(state)
    guard.steps_done = arguments.curr_iteration
    try:
        guard.step(sum(float(loss) for loss in losses.values()) if losses else None, figures)
    except Unstable as error:
        if not guard.ends_saved:
            raise
        if is_rank_zero():
            log.warning("%s", error)


def state(scheduler: Any) -> Mapping[str, Any] | None:
    """What a scheduler's checkpoint holds of its guard."""
    guard = _guards.get(scheduler)
    return None if guard is None else guard.state_dict()


def loaded(scheduler: Any, state: Mapping[str, Any] | None) -> None:
    """Keeps a loaded state for the guard that is made at the first step."""
    if state is not None:
        _states[scheduler] = state


def _no_way_back() -> int:
    raise AssertionError("Megatron goes back by a new start")


def _seen(folder: Path) -> tuple[int | None, list[dict[str, Any]]]:
    """The iteration of a folder's newest checkpoint, and what guards have gone back from in it."""
    newest, alarms = folder / _NEWEST, folder / FILE
    text = newest.read_text().strip() if newest.exists() else ""
    return int(text) if text.isdigit() else None, json.loads(alarms.read_text()) if alarms.exists() else []

"""A run that a cluster ends and starts again: saved whole when a signal comes, gone on with at the next start.

``blockwise_lr.deepspeed.preemption(engine, folder)`` after ``deepspeed.initialize`` is all that a training script needs. On
a signal to any rank all ranks finish the step, save, have the scheduler start the job again, and leave. Which step that is
they agree on through torch.distributed's key-value store: the rank with the signal writes the number of its next step there
before it enters that step's collectives, so no rank can have ended that step without finding it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch.distributed as dist

from ..blocks import BlockError
from ..checkpoint.errors import run_on_all_ranks
from ..checkpoint.ownership import Owner, claim, count_start, find_claim, refuse_if_lost, this_run
from ..collective import gathered, is_rank_zero, roll_call
from ..jobs.requeue import EXIT_PREEMPTED, requeue
from ..patches.deepspeed_instances import STEPS
from .after_step import after_each_step
from .checkpoint import SECONDS_TO_APPEAR, is_ours, load_newest, owners

log = logging.getLogger("blockwise_lr")

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Preemption:
    """What :func:`preemption` returns.

    Attributes:
        path, client_state: of the checkpoint that the run goes on from; None at its first start.
        asked: the signal that has come to this rank, None before.
    """

    def __init__(
        self,
        engine: Any,
        folder: str,
        mine: Owner,
        loaded: tuple[Any, Any],
        client_state: Callable[[], Mapping[str, Any]],
        exit_code: int,
    ) -> None:
        self.path, self.client_state = loaded
        self.asked: int | None = None
        self._engine, self._folder, self._mine = weakref.proxy(engine), folder, mine
        self._to_save, self._exit_code = client_state, exit_code
        self._key = f"blockwise_lr/preemption/{mine.token}"
        self._last_step: int | None = None
        self._handlers: dict[int, Any] = {}

    def watch(self, signals: Iterable[int]) -> None:
        """Takes the signals. Only the main thread may; on others only the ranks' agreement holds."""
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                self._handlers[number] = signal.signal(number, self._note)

    def close(self) -> None:
        """Gives the signals back, and the engine its own step."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        STEPS.undo(self._engine)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = number

    def after_step(self) -> None:
        """Called on every rank after each optimizer step; saves and leaves in the step that all ranks have agreed on.

        Raises:
            SystemExit: the run is saved and is to end.
        """
        assert dist.group.WORLD is not None  # DeepSpeed has made it
        store, step = dist.group.WORLD.get_group_store(), self._engine.global_steps
        if self._last_step is None and self.asked is not None:
            store.compare_set(self._key, "", str(step + 1))  # the first rank to write decides
        if self._last_step is None and store.check([self._key]):
            self._last_step = int(store.get(self._key))
        if self._last_step is not None and step >= self._last_step:
            self._leave()

    def _leave(self) -> None:
        if is_rank_zero():
            log.warning("a signal asks this run to end: saving after step %d", self._engine.global_steps)
        self._engine.save_checkpoint(self._folder, client_state=dict(self._to_save()))
        requeued = gathered(requeue() if is_rank_zero() else False)[0]
        raise SystemExit(0 if requeued else self._exit_code)


def preemption(
    engine: Any,
    folder: str | os.PathLike,
    *,
    client_state: Callable[[], Mapping[str, Any]] = dict,
    signals: Iterable[int] = _SIGNALS,
    exit_code: int = EXIT_PREEMPTED,
    attempts: int = 3,
    **load: Any,
) -> Preemption:
    """Goes on from the newest complete checkpoint of a folder, and from then on saves and leaves when a signal comes.

    An error that ends a rank from then on is told to the others, which say whose it was or which ranks are missing.

    All ranks call it after ``deepspeed.initialize``. The folder belongs to this run from then on: the processes of an older
    one that live on can no longer save there. Under Slurm the job is requeued (submit it with ``--requeue``), and ranks
    leave with 0; elsewhere they leave with ``exit_code``, which a scheduler may take as a reason to start again.

    Args:
        engine: of ``deepspeed.initialize``, with a blockwise optimizer.
        folder: of all of the run's checkpoints, seen by all nodes.
        client_state: called for what the last save is to keep beside the engine's state, as ``save_checkpoint``'s.
        signals: to take, SIGUSR1 (Slurm's ``--signal=USR1@300``) and SIGTERM (Kubernetes, or a preemption) by default.
        exit_code: where no scheduler was told.
        attempts: how often in a row a job may start from the same step before it is refused, so that a run that always
            ends in the same way does not start for ever.
        load: further arguments of ``engine.load_checkpoint``.

    Raises:
        BlockError: an engine without a blockwise optimizer.
        CheckpointError, MismatchError: as for ``load_newest``; or the folder is not shared, or too many attempts.
    """
    if not is_ours(engine):
        raise BlockError(
            "preemption looks after engines with a blockwise optimizer; give one as the ds_config's optimizer"
        )
    folder, what = os.fspath(folder), f"claiming {folder}"
    tokens, hosts = zip(*gathered((uuid.uuid4().hex, roll_call.node_name())))
    token = tokens[0]
    roll_call.remember_hosts(hosts)
    roll_call.install()
    roll_call.listen()
    mine = this_run(token)
    before = run_on_all_ranks(lambda: claim(folder, mine) if is_rank_zero() else None, what)
    run_on_all_ranks(lambda: find_claim(folder, token, SECONDS_TO_APPEAR), what)
    loaded = load_newest(engine, folder, **load)
    step = engine.global_steps if loaded[0] is not None else 0
    run_on_all_ranks(lambda: count_start(folder, mine, before, step, attempts) if is_rank_zero() else None, what)
    owners[engine] = lambda: refuse_if_lost(folder, mine)
    made = Preemption(engine, folder, mine, loaded, client_state, exit_code)
    after_each_step(engine, STEPS, made.after_step)
    made.watch(signals)
    return made

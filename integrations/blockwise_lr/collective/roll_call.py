"""Which ranks are missing when a collective fails: those that are left ask one another through the key-value store.

A collective that fails says which connection broke or how long it waited, not whose rank is gone. So a rank whose
collective has failed asks in torch.distributed's store, where a thread of every rank looks every two seconds, also of one
that still waits in a collective: who does not answer is gone. A rank that an error of its own ends writes that there, and is
named with it. NCCL's watchdog ends a process without a Python error where TORCH_NCCL_BLOCKING_WAIT is unset: such a rank
cannot ask.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch.distributed as dist

from .agreement import ranges

SECONDS = 10.0  # for which ranks wait for the others' answers
_EVERY = 2.0  # seconds between two looks
_KEY = "blockwise_lr/roll_call/"
_MARKS = ("gloo/transport/", "NCCL error", "Timed out waiting", "Connection closed by peer")
_hosts: list[str] = []  # of all ranks, where they were told
_enabled: list[bool] = []
_listening: list[Any] = []  # the process group in whose store this process answers


def is_of_a_collective(error: BaseException | None) -> bool:
    """Whether an error says that another rank did not do its part; also one that was raised from such an error."""
    while error is not None:
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)
        ):
            return True
        error = error.__cause__
    return False


def node_name() -> str:
    """What this process's node is called, by Slurm or by itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def remember_hosts(hosts: Sequence[str]) -> None:
    """Has missing ranks told with their nodes' names.

    Args:
        hosts: of every rank, in their order.
    """
    _hosts[:] = hosts


def enable() -> None:
    """Has :func:`listen` do something in this process."""
    _enabled[:] = [True]


def listen() -> None:
    """Has this process answer from now on, by a thread, where that is enabled; does nothing where it does, or is alone."""
    if not _enabled or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    group = dist.group.WORLD
    assert group is not None
    if _listening and _listening[0] is group:
        return
    _listening[:] = [group]
    ended = threading.Event()
    store = group.get_group_store()
    threading.Thread(target=_answer, args=(store, dist.get_rank(), ended), daemon=True).start()
    atexit.register(ended.set)


def _answer(store: Any, rank: int, ended: threading.Event) -> None:
    try:
        while not ended.wait(_EVERY):
            if store.check([f"{_KEY}asked"]):
                store.set(f"{_KEY}here/{rank}", node_name())
                return
    except Exception:  # the store is gone, and with it the run
        return


def tell(error: BaseException, seconds: float | None = None) -> str | None:
    """Tells the other ranks of an error that ends this one, and waits for theirs where it is a collective's.

    Args:
        seconds: to wait at most (SECONDS by default); without the store it may be twice that.

    Returns:
        A sentence that names the ranks that are missing; None where the error is this rank's own, or another rank of this node
        says it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    seconds = SECONDS if seconds is None else seconds
    answers: dict[int, dict[str, Any]] = {}
    asked, is_first, is_theirs = threading.Event(), threading.Event(), is_of_a_collective(error)

    def ask() -> None:
        try:
            if _exchange(error, is_theirs, seconds, answers):
                is_first.set()
        except Exception:  # the store is gone as well
            return
        asked.set()

    # a store whose node is gone is waited for without end, so a thread does it
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * seconds if is_theirs else min(seconds, 5.0))
    if not is_theirs:
        return None
    if not asked.is_set():
        is_speaker = os.environ.get("LOCAL_RANK", "0") == "0"
        return _without_store(error) if is_speaker else None
    if not is_first.is_set():
        return None
    return sentence(answers, dist.get_world_size(), _hosts, str(error))


def sentence(answers: Mapping[int, Mapping[str, Any]], ranks: int, hosts: Sequence[str], error: str) -> str:
    """What the ranks' answers mean.

    Args:
        answers: rank -> its host, and the text of the error that it has not from another rank, or None.
        ranks: how many there should be.
        hosts: of all ranks; empty: not known.
        error: the text of the collective's error.
    """
    missing = [rank for rank in range(ranks) if rank not in answers]
    own = {rank: answer for rank, answer in answers.items() if answer["own"] is not None}
    said = error.strip().splitlines()[0] if error.strip() else "no reason given"
    if own:
        rank, first = next(iter(sorted(own.items())))
        others = f" (and rank {ranges(sorted(own)[1:])} in the same way or another)" if len(own) > 1 else ""
        return f"rank {rank} on {first['host']} ended first, with {first['own']}{others}; the others could not go on: {said}"
    if not missing:
        return (
            f"all {ranks} ranks answer, and yet a collective failed: the connection between some of them did ({said})"
        )
    at = f" on {', '.join(dict.fromkeys(hosts[rank] for rank in missing))}" if hosts else ""
    return (
        f"rank{'s' if len(missing) > 1 else ''} {ranges(missing)}{at} of {ranks} give{'' if len(missing) > 1 else 's'} no "
        f"answer: the process has ended, its node is gone, or the network to it is ({said}); see that node's log, and "
        f"start the job again"
    )


def install() -> None:
    """Has every error that ends this process told to the other ranks, and what they answer said below its traceback."""
    enable()
    before = sys.excepthook
    if getattr(before, "calls_the_roll", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        say(error)

    hook.calls_the_roll = True  # type: ignore[attr-defined]  # an attribute of ours on a function
    sys.excepthook = hook


def say(error: BaseException, who: str = "blockwise_lr") -> None:
    """:func:`tell`, and its sentence on stderr."""
    found = tell(error)
    if found is not None:
        sys.stderr.write(f"{who}, rank {dist.get_rank()}: {found}\n")
        sys.stderr.flush()


def _exchange(error: BaseException, is_theirs: bool, seconds: float, answers: dict[int, dict[str, Any]]) -> bool:
    """Fills ``answers`` with those that come in time; whether this is the first rank of its node that knows them."""
    assert dist.group.WORLD is not None
    rank, store = dist.get_rank(), dist.group.WORLD.get_group_store()
    store = getattr(
        store, "clone", lambda: store
    )()  # on which no other thread of this process waits; new in PyTorch 2.7
    if not is_theirs:
        own = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1][:500]
        store.set(f"{_KEY}error/{rank}", json.dumps({"host": node_name(), "own": own}))
        return False
    store.set(f"{_KEY}here/{rank}", node_name())
    store.set(f"{_KEY}asked", "1")
    deadline = time.monotonic() + seconds
    while True:
        for other in range(dist.get_world_size()):
            if store.check([f"{_KEY}error/{other}"]):
                answers[other] = json.loads(store.get(f"{_KEY}error/{other}"))
            elif other not in answers and store.check([f"{_KEY}here/{other}"]):
                answers[other] = {"host": store.get(f"{_KEY}here/{other}").decode(), "own": None}
        is_told = any(answer["own"] is not None for answer in answers.values())
        if len(answers) == dist.get_world_size() or is_told or time.monotonic() > deadline:
            return store.compare_set(f"{_KEY}speaker/{node_name()}", "", str(rank)).decode() == str(rank)
        time.sleep(0.2)


def _without_store(error: BaseException) -> str:
    at = f"{os.environ.get('MASTER_ADDR', 'its host')}:{os.environ.get('MASTER_PORT', '')}"
    said = str(error).strip().splitlines()[0]
    return (
        f"the key-value store of rank 0's node ({at}) gives no answer either: that node is gone, or the network to it is "
        f"({said}); see its log, and start the job again"
    )

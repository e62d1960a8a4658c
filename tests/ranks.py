"""Persistent rank processes: DeepSpeed and Megatron are imported once per process, and many cases run on them.

``pool(2).run(case, *arguments)`` runs the module-level function ``case`` on two gloo ranks and returns what each rank
returned. A rank's exception is raised here with the rank's traceback. A pool in which a case failed or hung is replaced
by a fresh one, because its ranks may stand at different collectives; one in which a case was to fail, and every rank
answered, is kept.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from extensions import build_once

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
HERE = os.path.dirname(os.path.abspath(__file__))
_pools: dict[int, RankPool] = {}
# gloo keeps busy threads for every process group that a case leaves behind: beyond this many, new processes cost less
_MOST_THREADS = 250


class RankError(AssertionError):
    """A case failed on a rank; the message holds the ranks' tracebacks."""


def pool(world_size: int) -> RankPool:
    """The pool of that many ranks, started at the first call."""
    if world_size not in _pools:
        _pools[world_size] = RankPool(world_size)
    return _pools[world_size]


def server() -> Any:
    """The context whose processes are forked from one that has imported what the cases need, so that they start at once.

    Starts that process at the first call.
    """
    build_once()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_server"])
    kept = dict(os.environ)
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join([HERE, kept.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return context


def free_port() -> int:
    """A port for rank 0 to listen on.

    Below those that the kernel gives to whoever asks for any: gloo asks often, and by the time that rank 0 listens, it or
    the ranks of a test beside this one would have taken some of them.
    """
    draw = random.SystemRandom()  # tests seed the other one
    while True:
        with socket.socket() as free:
            port = draw.randrange(10_000, 32_000)
            try:
                free.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class RankPool:
    """``world_size`` processes that wait for cases to run."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def run(self, case: Callable[..., Any], *arguments: Any, timeout: float = 120, errors: bool = False) -> list[Any]:
        """Runs ``case(*arguments)`` on every rank.

        Args:
            case: a module-level function; arguments and results go by pickle.
            timeout: seconds until the ranks are ended and the case fails with their stacks.
            errors: return each rank's exception in place of its result, for cases that are to fail on every rank.

        Raises:
            RankError: a rank failed or did not answer in time.
        """
        self._start()
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send((case, arguments))
        answers = self._answers(time.monotonic() + timeout)
        failed = [f"rank {rank}:\n{answer[2]}" for rank, answer in enumerate(answers) if answer[0] != "result"]
        if (failed and not (errors and all(answer[0] in ("result", "error") for answer in answers))) or max(
            (answer[3] for answer in answers), default=0
        ) > _MOST_THREADS:
            self.stop()
        # gloo's threads wake 100 times a second each, whether there is anything to do or not: a pool that waits stands still
        self._signal(signal.SIGSTOP)
        if failed and not errors:
            raise RankError("\n".join(failed))
        return [answer[1] for answer in answers]

    def _signal(self, number: int) -> None:
        for process in self._processes:
            os.kill(process.pid, number)

    def stop(self) -> None:
        """Ends the processes; the next run starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []

    def _start(self) -> None:
        if self._processes:
            return
        port, context = free_port(), server()
        self._pipes, self._stacks = [], []
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            self._stacks.append(tempfile.NamedTemporaryFile("r", prefix="rank-stack-"))  # noqa: SIM115
            process = context.Process(
                target=_serve, daemon=True, args=(theirs, rank, self.world_size, port, self._stacks[-1].name)
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _answers(self, deadline: float) -> list[tuple]:
        answers: dict[int, tuple] = {}
        while len(answers) < self.world_size and time.monotonic() < deadline:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            for pipe in multiprocessing.connection.wait(list(waiting), deadline - time.monotonic()):
                try:
                    answer = pipe.recv()
                except EOFError:
                    answer = ("died", RuntimeError("the process died"), "the process died", 0)
                answers[waiting[pipe]] = answer
                if answer[0] != "result":  # the others may wait for it in a collective for ever
                    deadline = min(deadline, time.monotonic() + 5)
        return [answers.get(rank) or self._hung(rank) for rank in range(self.world_size)]

    def _hung(self, rank: int) -> tuple:
        os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        with open(self._stacks[rank].name) as stack:
            return "hung", TimeoutError(f"rank {rank} did not answer"), f"no answer in time\n{stack.read()}", 0


@atexit.register
def _stop_all() -> None:
    for started in _pools.values():
        started.stop()


def _serve(pipe: Any, rank: int, world_size: int, port: int, stack_file: str) -> None:
    """A rank: waits for cases until the parent is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the test run
    os.environ.update(
        ENVIRONMENT,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_PORT=str(port),
    )
    # as pyproject.toml has it; patches stand between the frameworks' own frames
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("error", category=category, module=r"blockwise_lr(?!\.patches)")
    faulthandler.register(signal.SIGUSR1, file=open(stack_file, "w"))  # noqa: SIM115 - open as long as the process
    while True:
        try:
            case, arguments = pipe.recv()
        except EOFError:
            return
        _join_group()
        logging.disable(logging.NOTSET)  # cases that want less of their frameworks' words say so for the whole process
        before = _process_state()
        try:
            answer = ("result", case(*arguments), "")
        except BaseException as error:
            answer = _failure(error, traceback.format_exc())
        if left := _leftovers(before):
            answer = _failure(AssertionError(left), left)
        _forget_model_parallelism()
        # what the case leaves in circles of references, process groups with their threads among it; the answer counts the rest
        gc.collect()
        try:
            pipe.send((*answer, _threads()))
        except Exception as error:  # what does not pickle
            pipe.send((*_failure(error, traceback.format_exc()), _threads()))


def _forget_model_parallelism() -> None:
    """DeepSpeed keeps the last engine's mpu and mesh, and engines without one take these for their own."""
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups.mpu = groups.mesh_device = None


def _process_state() -> dict[str, Any]:
    """What decides how the models of a process are made, and what a case could leave changed for the next one."""
    import torch

    state = {"torch.empty": torch.empty, "torch's default dtype": torch.get_default_dtype()}
    if integration := sys.modules.get("transformers.integrations.deepspeed"):
        state["transformers' ZeRO-3"] = integration.is_deepspeed_zero3_enabled()
    return state


def _leftovers(before: dict[str, Any]) -> str:
    """What a case has left changed, in words: it fails for it, for otherwise another would, in some orders only."""
    after = _process_state()
    changed = [name for name, value in before.items() if after[name] != value]
    if "transformers' ZeRO-3" not in before and after.get("transformers' ZeRO-3"):
        changed.append("transformers' ZeRO-3")
    return f"the case leaves the process changed: {', '.join(changed)}" if changed else ""


def _failure(error: BaseException, text: str) -> tuple[str, BaseException, str]:
    """The answer of a case that has failed."""
    try:
        pickle.dumps(error)
    except Exception:
        return "error", RuntimeError(f"{type(error).__name__}: {error}"), text
    return "error", error.with_traceback(None), text


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _join_group() -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")

"""Which ranks are missing when a collective fails: what ranks that end are heard to say, and what their answers mean."""

import ctypes
import os
import re
import runpy
import signal
import sys

import pytest
import torch.distributed as dist
from ranks import free_port, server

from blockwise_lr.collective import errors_in_a_sentence, roll_call
from blockwise_lr.collective.roll_call import is_of_a_collective, sentence

SAID = "Timed out waiting 20000ms"


def answer(host="a", own=None):
    return {"host": host, "own": own}


@pytest.mark.parametrize(
    "answers, hosts, words",
    [
        ({0: answer(), 1: answer()}, [], "ranks 2-3 of 4 give no answer"),
        ({0: answer(), 1: answer(), 3: answer()}, ["a", "a", "b", "b"], "rank 2 on b of 4 gives no answer"),
        (
            {0: answer(), 2: answer("b", "OutOfMemoryError: out")},
            [],
            "rank 2 on b ended first, with OutOfMemoryError: out",
        ),
        ({rank: answer() for rank in range(4)}, [], "all 4 ranks answer, and yet a collective failed"),
    ],
)
def test_the_sentence_says_whose_fault_it_is(answers, hosts, words):
    found = sentence(answers, 4, hosts, f"{SAID}\nmore")
    assert found.startswith(words) and SAID in found and "\n" not in found


def test_errors_of_collectives_are_told_from_others():
    assert is_of_a_collective(RuntimeError(f"[/gloo/transport/tcp/pair.cc:5] {SAID} for recv operation"))
    assert is_of_a_collective(dist.DistBackendError("NCCL error in: x"))
    assert not is_of_a_collective(RuntimeError("shapes differ")) and not is_of_a_collective(ValueError(SAID))
    try:
        raise ValueError("what it led to") from RuntimeError(SAID)
    except ValueError as error:
        assert is_of_a_collective(error)


SCRIPT = """
import datetime, os, signal, sys
import torch, torch.distributed as dist
from blockwise_lr.collective import roll_call
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=4))
roll_call.listen()
rank, how = dist.get_rank(), sys.argv[1]
dist.barrier()
if rank == 2:
    if how == "error":
        raise ValueError("no such data")
    os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
dist.all_reduce(torch.ones(1))
"""


def run(rank, port, folder, how):
    """A rank under a runner of ours, in a forked process, with what it prints in a file."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the test run
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    file = os.open(f"{folder}/said-{rank}", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    roll_call.SECONDS, roll_call._EVERY = 3.0, 0.3
    sys.argv = [f"{folder}/train.py", how]
    with errors_in_a_sentence("runner"):
        runpy.run_path(sys.argv[0], run_name="__main__")


def ended(folder, how):
    """(exit code, what it has printed) of each of three ranks, of which the last does not come to the all_reduce."""
    (folder / "train.py").write_text(SCRIPT)
    port = free_port()
    processes = [server().Process(target=run, args=(rank, port, str(folder), how)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes[:2]:
        process.join(100)
    for process in processes:
        process.kill()
        process.join()
    return [(process.exitcode, (folder / f"said-{rank}").read_text()) for rank, process in enumerate(processes)]


@pytest.mark.parametrize("how", ["killed", "stopped", "error"])
def test_a_rank_that_is_missing_is_named_once_on_the_node(tmp_path, how):
    first, second, third = ended(tmp_path, how)
    assert first[0] == second[0] == 1
    lines = re.findall(r"^runner, rank (\d): (.*) \(.*train\.py, line \d+\)$", first[1] + second[1], re.M)
    assert len(lines) == 1, first[1] + second[1]
    wanted = "ended first, with ValueError: no such data" if how == "error" else "rank 2 of 3 gives no answer"
    assert wanted in lines[0][1] and "Traceback" not in first[1] + second[1]
    assert ("Traceback" in third[1]) == (how == "error")  # its own


def test_an_error_of_one_process_is_left_alone(capsys):
    roll_call.say(ValueError("mine"))
    assert capsys.readouterr().err == ""

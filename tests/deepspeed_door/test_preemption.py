"""Signals, restarts and runs that live on: preemption() of the DeepSpeed door."""

import os
import signal

import pytest
import torch.distributed as dist
from deepspeed_door.engines import config, start, train, weights
from ranks import pool
from twins import make, worst_difference

from blockwise_lr.checkpoint import CheckpointError, newest_complete
from blockwise_lr.checkpoint.ownership import FILE, Owner, owner_of, this_run

TOTAL = 8
ADAMW = "BlockwiseAdamW"


def run(folder, stage, signals=None, options=None):
    """Trains to TOTAL or until it is ended: (step it started from, losses by step, exit code, step at the end, weights).

    Args:
        signals: rank -> the update before which it gets SIGUSR1.
    """
    import blockwise_lr.deepspeed as door

    engine = start(make("llama"), config(ADAMW, stage, steps=TOTAL))
    before = signal.getsignal(signal.SIGUSR1)
    watch, losses, code = door.preemption(engine, folder, **(options or {})), {}, None
    first = engine.global_steps
    try:
        for step in range(first, TOTAL):
            if (signals or {}).get(dist.get_rank()) == step:
                os.kill(os.getpid(), signal.SIGUSR1)
            losses[step] = train(engine, 1, first=step)
    except SystemExit as left:
        code = left.code
    watch.close()
    assert signal.getsignal(signal.SIGUSR1) is before
    found = first, losses, code, engine.global_steps, weights(engine), watch.client_state
    engine.destroy()
    return found


def together(answers):
    """What all ranks must say alike: where they started and ended, and how."""
    firsts, _, codes, lasts, _, _ = zip(*answers)
    assert len(set(firsts)) == len(set(codes)) == len(set(lasts)) == 1
    return firsts[0], codes[0], lasts[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_signal_to_one_rank_ends_all_in_one_step_and_the_next_start_goes_on_to_the_bit(tmp_path, stage):
    whole = pool(2).run(run, str(tmp_path / "whole"), stage)
    assert together(whole) == (0, None, TOTAL)
    folder = str(tmp_path / "cut")
    cut = pool(2).run(run, folder, stage, {1: 3})
    begin, code, end = together(cut)
    assert (begin, code) == (0, 85) and end in (4, 5)
    assert newest_complete(folder) == f"global_step{end}"
    rest = pool(2).run(run, folder, stage)
    assert together(rest) == (end, None, TOTAL)
    for one, first, second in zip(whole, cut, rest):
        # train() raises in the middle of its last update, whose losses are the uninterrupted run's all the same
        assert {**first[1], **second[1]} == {step: loss for step, loss in one[1].items() if step != end - 1}
        assert worst_difference(second[4], one[4]) == 0


def test_signals_to_both_ranks_at_different_steps_end_them_together(tmp_path):
    begin, code, end = together(pool(2).run(run, str(tmp_path), 2, {0: 2, 1: 3}))
    assert (begin, code) == (0, 85) and end in (3, 4)


def what_the_user_keeps():
    return {"epoch": 7}


def test_what_the_user_keeps_comes_back_and_a_code_of_ones_own_is_used(tmp_path):
    cut = pool(2).run(run, str(tmp_path), 1, {0: 1}, {"client_state": what_the_user_keeps, "exit_code": 3})
    assert together(cut)[1] == 3
    assert all(answer[5]["epoch"] == 7 for answer in pool(2).run(run, str(tmp_path), 1))


def overtaken(folder, within):
    """A run whose folder is taken over before a save, or within it: the error, what is there, and the complete ones."""
    import blockwise_lr.deepspeed as door

    engine = start(make("llama"), config(ADAMW, 1, steps=TOTAL))
    watch = door.preemption(engine, folder)
    train(engine, 1)
    engine.save_checkpoint(folder)
    train(engine, 1, first=1)
    if within:  # after this rank's first file
        write = engine.checkpoint_engine.save

        def write_and_lose(state, path):
            write(state, path)
            take_over(folder)

        engine.checkpoint_engine.save = write_and_lose
    else:
        take_over(folder)
        dist.barrier()
    try:
        engine.save_checkpoint(folder)
        message = None
    except CheckpointError as error:
        message = str(error)
    watch.close()
    engine.destroy()
    return message, sorted(os.listdir(folder))


def take_over(folder):
    if dist.get_rank() == 0:
        from blockwise_lr.checkpoint.ownership import claim

        claim(folder, Owner(token="newer", job="Slurm job 7", restart=1, host="elsewhere"))


@pytest.mark.parametrize("within", [False, True], ids=["before a save", "within one"])
def test_a_run_that_lives_on_cannot_save_over_the_one_that_replaced_it(tmp_path, within):
    for message, names in pool(2).run(overtaken, str(tmp_path), within):
        assert "taken over by another run (Slurm job 7, restart 1, on elsewhere)" in message
        assert "global_step1" in names and ("global_step2" in names) == within
    assert newest_complete(tmp_path) == "global_step1" == (tmp_path / "latest").read_text()


def died(folder, environment):
    """A start that ends without a save: its error, if it is refused."""
    import blockwise_lr.deepspeed as door

    os.environ.update(environment)
    engine = start(make("llama"), config(ADAMW, 1, steps=TOTAL))
    try:
        door.preemption(engine, folder).close()
        message = None
    except CheckpointError as error:
        message = str(error)
    engine.destroy()
    for name in environment:
        os.environ.pop(name)
    return message


def test_a_job_that_always_dies_at_one_step_is_refused_the_fourth_time(tmp_path):
    job = {"SLURM_JOB_ID": "12"}
    for restart in range(3):
        answers = pool(2).run(died, str(tmp_path), {**job, "SLURM_RESTART_COUNT": str(restart)})
        assert answers == [None, None]
    for message in pool(2).run(died, str(tmp_path), {**job, "SLURM_RESTART_COUNT": "3"}):
        assert "Slurm job 12 has started 3 times from step 0" in message and FILE in message
    # another job is another attempt
    assert pool(2).run(died, str(tmp_path), {"SLURM_JOB_ID": "13"}) == [None, None]
    found = owner_of(tmp_path)
    assert (found.job, found.step, found.starts) == ("Slurm job 13", 0, 1)


def test_the_owner_is_what_the_scheduler_says():
    found = this_run("t", {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "2"})
    assert (found.job, found.restart) == ("Slurm job 5", 2)
    assert this_run("t", {"JOB_NAME": "train"}).job == "job train" and this_run("t", {}).job == ""


def test_a_file_that_cannot_be_read_says_so(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        owner_of(tmp_path)

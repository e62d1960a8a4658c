"""Megatron's real pretrain() at TP=2 with the flags, beside a script that cuts its batches itself (Megatron 0.19)."""

import math
import os
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from ranks import free_port, server

pytest.importorskip("megatron.core")
if find_spec("megatron.training") is None:
    pytest.skip("this megatron-core carries no megatron.training", allow_module_level=True)

from megatron_door.test_pretrain import FLAGS, data, run_module  # noqa: F401  the fixture of a small corpus

SCRIPT = Path(__file__).with_name("megatron_script.py")
FIXED = ["--train-iters", "8", "--log-interval", "1", "--optimizer", "blockwise_adamw", "--eval-interval", "4"]
WARMUP = [f"--sequence-length-warmup-{words}" for words in ("start=8", "steps=6", "multiple=4")]
LENGTHS = [12, 16, 20, 24, 28, 32, 32, 32]


def launch(corpus, *flags, ranks=2, by_hand=""):
    """(exit codes, what each rank printed)."""
    port, files, processes = str(free_port()), [], []
    for rank in range(ranks):
        settings = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "CUT_BY_HAND": by_hand,
        }
        paths = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
        words = ["--on-cpu", str(SCRIPT), *FLAGS, *paths, "--tensor-model-parallel-size", str(ranks), *FIXED, *flags]
        files.append(tempfile.NamedTemporaryFile("r", prefix="megatron-"))  # noqa: SIM115
        processes.append(
            server().Process(target=run_module, args=("blockwise_lr.megatron", words, settings, files[-1].name))
        )
        processes[-1].start()
    for process in processes:
        process.join(200)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes], [file.read() for file in files]


def losses(logs):
    return [re.findall(r"(?:lm loss:|lm loss value:) (\S+)", log) for log in logs]


def norms(logs):
    return [re.findall(r"grad norm: (\S+)", log) for log in logs]


def lengths(log, kind):
    found = [int(length) for length in re.findall(rf"^{kind} length (\d+)", log, re.M)]
    return found[::2] if kind == "train" else found  # two micro batches a step


def test_pretrain_trains_as_on_rows_cut_by_hand(data, tmp_path):  # noqa: F811
    saved = ["--save", str(tmp_path), "--save-interval", "3", "--use-distributed-optimizer"]
    codes, logs = launch(data, *WARMUP, *saved)
    assert codes == [0, 0], logs[0][-3000:]
    for log in logs:
        assert lengths(log, "train") == LENGTHS and set(lengths(log, "evaluation")) == {32}
        assert "length at the end 32" in log
    codes, expected = launch(data, "--use-distributed-optimizer", by_hand=",".join(map(str, LENGTHS)))
    assert codes == [0, 0], expected[0][-3000:]
    assert losses(logs) == losses(expected) and norms(logs) == norms(expected)
    assert len(losses(logs)[1]) >= 8 and len(norms(logs)[1]) == 8
    tokens = 4 * sum(LENGTHS)
    assert f"iteration 8 sequence length: 32 | tokens: {tokens} |" in logs[1]
    assert "12 to 32 tokens over 6 steps, in multiples of 4; 6 distinct lengths" in logs[0]
    # the length that a checkpoint keeps is the full one, and a run goes on from it to the bit
    load = ["--load", str(tmp_path), "--ckpt-step", "3", "--use-checkpoint-args"]
    codes, resumed = launch(data, *WARMUP, "--use-distributed-optimizer", *load)
    assert codes == [0, 0], resumed[0][-3000:]
    assert lengths(resumed[0], "train") == LENGTHS[3:] and "length at the end 32" in resumed[0]
    assert losses(resumed)[1][-1] == losses(logs)[1][-1] and norms(resumed)[1] == norms(logs)[1][3:]


def test_the_rate_decays_by_tokens(data):  # noqa: F811
    """Warmup of two iterations, then by tokens; iteration n trains at the rate of n - 1 iterations."""
    codes, (log,) = launch(data, *WARMUP, "--lr-warmup-iters", "2", "--lr-decay-tokens", "600", ranks=1)
    assert codes == [0], log[-3000:]
    tokens = [4 * sum(LENGTHS[:step]) for step in range(9)]
    parts = [min((count - tokens[2]) / (600 - tokens[2]), 1) for count in tokens]
    decay = [5e-5 + (1e-3 - 5e-5) * 0.5 * (1 + math.cos(math.pi * part)) for part in parts]
    found = [float(rate) for rate in re.findall(r"learning rate: (\S+)", log)]
    wanted = [1e-3 * step / 2 if step <= 2 else decay[step] for step in range(9)]
    assert len(found) == 8 and (found == pytest.approx(wanted[1:], 1e-5) or found == pytest.approx(wanted[:-1], 1e-5))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rampup-batch-size", "2", "2", "16"], "does not go with --rampup-batch-size"),
        (["--sequence-length-warmup-start=32"], "start is 32 and end is 32; start below the full length"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(data, flags, words):  # noqa: F811
    codes, (log,) = launch(data, *WARMUP, *flags, ranks=1)
    assert codes == [1] and words in log and not re.search(r"^train length", log, re.M), log[-2000:]


def test_flags_are_in_the_help(data):  # noqa: F811
    codes, (log,) = launch(data, "--help", ranks=1)
    assert codes == [0] and "sequence length warmup:" in log and "--sequence-length-warmup-until" in log
    assert os.path.exists(SCRIPT)

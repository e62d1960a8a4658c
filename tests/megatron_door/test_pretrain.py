"""Megatron's real pretrain() through our runner (megatron-core 0.19 carries it): log, TensorBoard, flags, plain Adam."""

import ctypes
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from ranks import free_port, server

pytest.importorskip("megatron.core")
if find_spec("megatron.training") is None:
    pytest.skip("this megatron-core carries no megatron.training", allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / "examples" / "megatron" / "pretrain_gpt.py"
FLAGS = [
    "--num-layers",
    "2",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "4",
    "--seq-length",
    "32",
    "--max-position-embeddings",
    "32",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "4",
    "--train-iters",
    "20",
    "--lr",
    "1e-3",
    "--min-lr",
    "5e-5",
    "--lr-warmup-iters",
    "5",
    "--lr-decay-style",
    "cosine",
    "--weight-decay",
    "0.1",
    "--adam-beta2",
    "0.95",
    "--split",
    "90,5,5",
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "63",
    "--transformer-impl",
    "local",
    "--distributed-backend",
    "gloo",
    "--use-cpu-initialization",
    "--num-workers",
    "0",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-dropout-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm",
    "--attention-backend",
    "unfused",
    "--log-interval",
    "5",
    "--eval-iters",
    "1",
    "--eval-interval",
    "1000",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("data") / "counting"
    builder = IndexedDatasetBuilder(str(prefix) + ".bin")
    for start in range(100):
        builder.add_document(torch.arange(start, start + 64, dtype=torch.int32) % 60, [64])
    builder.finalize(str(prefix) + ".idx")
    return prefix


def launch(data, *flags, module="blockwise_lr.megatron", options=("--on-cpu",), connections="1", anew=False):
    """(exit code, what it printed) of the script: forked from a process that has imported Megatron, or ``anew`` as users
    start it."""
    settings = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": connections,
    }
    words = [
        *options,
        str(SCRIPT),
        *FLAGS,
        "--data-path",
        str(data),
        "--data-cache-path",
        str(data.parent / "cache"),
        *flags,
    ]
    if anew:
        command = [sys.executable, *(["-m", module] if module else []), *words]
        run = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=200)
        return run.returncode, run.stdout + run.stderr
    with tempfile.NamedTemporaryFile("r") as printed:
        process = server().Process(target=run_module, args=(module, words, settings, printed.name))
        process.start()
        process.join(200)
        process.kill()
        process.join()
        return process.exitcode, printed.read()


def run_module(module, words, settings, printed):
    """What ``python -m`` does, in a forked process."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the test run
    os.environ.update(settings)
    file = os.open(printed, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def losses(log):
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", log)]


def test_loss_and_block_learning_rates_are_in_the_log(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, log = launch(
        data,
        "--optimizer",
        "blockwise_adam_mini",
        "--block-lr-ratios",
        "paper",
        "ffn=3",
        "--tensorboard-dir",
        str(tmp_path),
        "--tensorboard-log-interval",
        "1",
        "--block-metrics-interval",
        "10",
    )
    assert code == 0, log[-3000:]
    assert losses(log)[-1] < losses(log)[0] - 0.5
    for name in ("variance_l1", "variance_max", "gradient_norm", "weight_rms", "update_rms", "update_to_weight"):
        lines = re.findall(rf"iteration +(\d+) {name} \| embedding: (\S+) \| .*norm: (\S+) \|", log)
        assert [int(line[0]) for line in lines] == [10, 20] and all(float(line[1]) > 0 for line in lines), lines
    assert (
        "iteration 5 learning rates | embedding: 1.000000E-02 | qk: 8.000000E-03 | vo: 4.000000E-03 | "
        "ffn: 3.000000E-03 | norm: 1.000000E-03 |" in log
    )
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in events.Scalars("learning-rate/ffn")][-1] == pytest.approx(5e-5)
    assert [e.step for e in events.Scalars("blocks/update_to_weight/ffn")] == [10, 20]


def test_logged_rates_are_those_used_under_mup(data):
    """Twice the base width: weights have half the peak and the minimum, embeddings and vectors all of it."""
    code, log = launch(
        data,
        "--optimizer",
        "blockwise_adamw",
        "--block-lr-ratios",
        "paper",
        "--use-mup",
        "--mup-base-hidden-size",
        "16",
    )
    assert code == 0, log[-3000:]
    assert (
        "iteration 5 learning rates | embedding: 1.000000E-02 | qk: 4.000000E-03 and 8.000000E-03 | "
        "vo: 2.000000E-03 and 4.000000E-03 | ffn: 3.000000E-03 and 6.000000E-03 | norm: 1.000000E-03 |" in log
    )
    assert "iteration 20 learning rates | embedding: 5.000000E-05 | qk: 2.500000E-05 and 5.000000E-05 |" in log


def test_torch_fsdp2_is_refused_before_the_first_step(data):
    code, log = launch(
        data,
        "--optimizer",
        "blockwise_adamw",
        "--use-torch-fsdp2",
        "--ckpt-format",
        "torch_dist",
        "--untie-embeddings-and-output-weights",
        connections="8",
    )
    assert code == 1 and "do not support Megatron models whose parameters are of type DTensor" in log, log[-3000:]
    assert "leave out --use-torch-fsdp2" in log and not losses(log)


def test_plain_adam_trains_as_without_our_runner(data, tmp_path):
    """The other side applies the CPU patch only."""
    alone = tmp_path / "alone.py"
    alone.write_text(
        "import runpy, sys\nfrom blockwise_lr.patches.megatron_on_cpu import PATCH\nPATCH.apply()\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    logs = [
        launch(data, "--optimizer", "adam")[1],
        launch(data, "--optimizer", "adam", module=None, options=(str(alone),), anew=True)[1],
    ]
    assert losses(logs[0]) == losses(logs[1]) and len(losses(logs[0])) == 5, logs[1][-3000:]
    assert "learning rates |" not in logs[0]


def test_a_run_resumes_to_the_bit_and_refuses_other_ratios(data, tmp_path):
    """Dropout is on, so that random states count; the last logged loss, for Megatron's first after a start is an average
    of other iterations."""
    flags = [
        "--optimizer",
        "blockwise_adam_mini",
        "--bf16",
        "--use-distributed-optimizer",
        "--save",
        str(tmp_path),
        "--save-interval",
        "10",
    ]
    code, log = launch(data, *flags)
    assert code == 0, log[-3000:]
    code, resumed = launch(data, *flags, "--load", str(tmp_path), "--ckpt-step", "10")
    assert code == 0, resumed[-3000:]
    assert losses(resumed)[-1] == losses(log)[-1] and len(losses(resumed)) == len(losses(log)) - 2
    code, refused = launch(data, *flags, "--load", str(tmp_path), "--block-lr-ratios", "qk=4")
    assert code != 0 and "block_lr_ratios: qk 1.0 -> 4.0" in refused
    assert "pass --accept-mismatch block_lr_ratios" in refused


def test_flags_are_in_megatrons_help_and_checked(data):
    code, log = launch(data, "--help", anew=True)
    assert code == 0 and "blockwise learning rates:" in log and "blockwise_adam_mini" in log
    code, log = launch(data, "--optimizer", "blockwise_adamw", "--block-lr-ratios", "embeding=10")
    assert code == 2 and "unknown block type 'embeding'" in log and "number of parameters" not in log

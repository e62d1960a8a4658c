"""A few real steps of the Megatron recipe on two gloo ranks (megatron-core 0.19 carries megatron.training)."""

import argparse
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from recipes.stand_in import ARMS, MODELS, RECIPES, ROOT, argument_words, prepared

pytest.importorskip("megatron.core")
if find_spec("megatron.training") is None:
    pytest.skip("this megatron-core carries no megatron.training", allow_module_level=True)

SHRUNK = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 3 --global-batch-size 12 --train-iters 8 --lr-decay-iters 8
    --lr-warmup-iters 2 --log-interval 2 --eval-interval 4 --eval-iters 2
"""
ON_CPU = """
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --num-workers 0 --attention-backend unfused
    --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion
    --no-persist-layer-norm
"""


def test_the_launcher_trains_on_stand_in_data(tmp_path):
    script = ROOT / "examples" / "megatron" / "pretrain_gpt.py"
    command = ["bash", str(RECIPES / "train_megatron.sh"), "--on-cpu", "--script", str(script), "--nproc_per_node", "2"]
    command += ["--arm", "blockwise-adamw", "--model", "gpt2-124m", "--lr", "3e-3"]
    command += ["--data", str(prepared(tmp_path / "data")), "--out", str(tmp_path / "out")]
    environment = {
        **{key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"},  # --on-cpu does without
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [*command, *SHRUNK.split(), *ON_CPU.split()], capture_output=True, text=True, env=environment, timeout=250
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0 and log == done.stdout, log[-4000:] + done.stderr
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", log)]
    validation = [float(loss) for loss in re.findall(r"validation loss at iteration \d+ \| lm loss value: (\S+)", log)]
    assert losses[-1] < losses[0] - 0.3 and len(validation) == 2 and validation[1] < validation[0]
    assert (
        "iteration 2 learning rates | embedding: 3.000000E-02 | qk: 2.400000E-02 | vo: 1.200000E-02 | "
        "ffn: 1.800000E-02 | norm: 3.000000E-03 |" in log
    )
    assert "iteration 8 learning rates | embedding: 1.500000E-04 | qk: 1.500000E-04 |" in log
    assert (tmp_path / "out" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "8"


@pytest.mark.parametrize("model", MODELS)
def test_megatron_parses_arms_that_differ_in_the_optimizer_alone(model):
    from megatron.training.arguments import add_megatron_arguments

    from blockwise_lr.megatron.settings import add_arguments

    parsed = {}
    for arm in ARMS:
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        if "--block-lr-ratios" not in parser._option_string_actions:  # an applied patch has added them already
            add_arguments(parser)
        parsed[arm] = vars(parser.parse_args(argument_words(model, arm)))
    assert [parsed[arm]["blockwise_optimizer"] for arm in ARMS] == [
        *(None, "blockwise_adamw", "blockwise_adam_mini", "blockwise_lion")
    ]
    for arm in ARMS:
        differ = {key for key, value in parsed[arm].items() if value != parsed["adamw"][key]}
        assert differ <= {"blockwise_optimizer", "weight_decay"}
    assert (parsed["blockwise-lion"]["lion_beta1"], parsed["blockwise-lion"]["lion_beta2"]) == (0.95, 0.98)

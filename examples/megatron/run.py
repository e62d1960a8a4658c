"""The Megatron demo: ``python examples/megatron/run.py`` trains the demo's text with TP=2 on the CPU, on Python 3.12.

Megatron's real pretrain(), argument parser, tokenizer and datasets; our runner adds the optimizer. Arguments given here
go to Megatron, for example ``--optimizer adam`` or ``--train-iters 500``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
OUT = Path("runs/demo-megatron")
sys.path.insert(0, str(HERE.parent / "demo"))

from corpus import tokens, train_tokenizer  # noqa: E402

DOCUMENT = 2048  # tokens
FLAGS = [
    "--tensor-model-parallel-size",
    "2",
    "--num-layers",
    "4",
    "--hidden-size",
    "128",
    "--num-attention-heads",
    "4",
    "--seq-length",
    "128",
    "--max-position-embeddings",
    "128",
    "--micro-batch-size",
    "8",
    "--global-batch-size",
    "16",
    "--train-iters",
    "200",
    "--lr-decay-style",
    "cosine",
    "--lr",
    "3e-4",
    "--min-lr",
    "1.5e-5",
    "--lr-warmup-fraction",
    "0.1",
    "--weight-decay",
    "0.1",
    "--adam-beta2",
    "0.95",
    "--clip-grad",
    "1.0",
    "--split",
    "95,5,0",
    "--optimizer",
    "blockwise_adamw",
    "--block-lr-ratios",
    "embedding=10",
    "qk=8",
    "ffn=6",
    "vo=4",
    "norm=1",
    "--untie-embeddings-and-output-weights",
    "--log-interval",
    "20",
    "--eval-interval",
    "100",
    "--eval-iters",
    "4",
    "--tensorboard-log-interval",
    "1",
    "--tokenizer-type",
    "SentencePieceTokenizer",
    "--transformer-impl",
    "local",
    "--distributed-backend",
    "gloo",
    "--use-cpu-initialization",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-dropout-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm",
    "--attention-backend",
    "unfused",
    "--num-workers",
    "0",
]


def indexed_dataset() -> Path:
    """The demo's training text in Megatron's format, made once; returns the path without its ending."""
    warnings.simplefilter("ignore")  # Megatron announces at import what optional packages it goes without
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = OUT / "python"
    if not prefix.with_suffix(".idx").exists():
        text = tokens(OUT, validation=False)
        builder = IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=text.dtype.type)
        for start in range(0, len(text) - DOCUMENT, DOCUMENT):
            builder.add_document(torch.from_numpy(text[start : start + DOCUMENT].astype("int32")), [DOCUMENT])
        builder.finalize(str(prefix.with_suffix(".idx")))
    return prefix


def main() -> int:
    if sys.version_info < (3, 12):
        print("this demo needs Python 3.12: only megatron-core 0.19, which needs it, carries megatron.training")
        return 1
    OUT.mkdir(parents=True, exist_ok=True)
    print(f"data and tokenizer in {OUT}; TensorBoard: tensorboard --logdir {OUT}/tensorboard", flush=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        "-m",
        "blockwise_lr.megatron",
        "--on-cpu",
        str(HERE / "pretrain_gpt.py"),
        *FLAGS,
        "--data-path",
        str(indexed_dataset()),
        "--data-cache-path",
        str(OUT / "cache"),
        "--tokenizer-model",
        str(train_tokenizer(OUT)),
        "--tensorboard-dir",
        str(OUT / "tensorboard"),
        *sys.argv[1:],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    shown = ("iteration ", "learning rates", "rror")
    with (
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run,
        (OUT / "log.txt").open("w") as log,
    ):
        for line in run.stdout:
            log.write(line)
            if any(word in line for word in shown) and "...." not in line:
                print(line, end="", flush=True)
    if run.returncode:
        print(f"the training processes failed; see {OUT / 'log.txt'}")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())

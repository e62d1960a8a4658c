"""The recipes' files, without training: what arms differ in, that both doors say the same, the launcher, the page."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from recipes.stand_in import ARMS, CONFIGS, MODELS, RECIPES, ROOT, argument_words, ds_config, shrunk

from blockwise_lr.blocks.types import PAPER_RATIOS

PAPER = {block.value: ratio for block, ratio in PAPER_RATIOS.items()}
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=os.path.dirname(sys.executable))
SCRIPT = RECIPES / "train_megatron.sh"
PAGE = (RECIPES / "README.md").read_text()


def test_arms_are_the_files_of_both_doors():
    assert {path.stem for path in (RECIPES / "ds_configs").iterdir()} == set(ARMS)
    assert {path.stem for path in (RECIPES / "megatron_args").iterdir()} == {*ARMS, "common"}


# ---- DeepSpeed


@pytest.mark.parametrize("arm", ARMS)
def test_ds_configs_differ_in_the_optimizer_alone(arm):
    config, baseline = ds_config(arm), ds_config("adamw")
    assert {key: config[key] for key in config if key != "optimizer"} == {
        key: baseline[key] for key in baseline if key != "optimizer"
    }
    changed = {"block_lr_ratios", "decay_norms_and_biases", "torch_adam"}
    changed |= {"lr", "betas", "eps", "weight_decay"} if arm == "blockwise-lion" else set()
    ours, base = config["optimizer"]["params"], baseline["optimizer"]["params"]
    assert {key for key in {*ours, *base} if ours.get(key) != base.get(key)} <= changed


@pytest.mark.parametrize("arm", ARMS)
def test_deepspeed_takes_the_official_settings(arm, tmp_path):
    """Those of the official scripts for OpenWebText (configs/README.md); AdamW decays everything by itself."""
    from deepspeed.runtime.config import DeepSpeedConfig

    import blockwise_lr
    from blockwise_lr.inspection import load_model
    from blockwise_lr.schedules import BlockwiseWarmupCosine

    parsed = DeepSpeedConfig(ds_config(arm))
    assert parsed.bfloat16_config.enabled and parsed.gradient_clipping == 1.0
    assert parsed.train_batch_size == 300 and parsed.scheduler_name == "BlockwiseWarmupCosine"
    params = dict(parsed.optimizer_params)
    lion = arm == "blockwise-lion"
    assert params["betas"] == ([0.95, 0.98] if lion else [0.9, 0.95])
    assert params["weight_decay"] == (1.0 if lion else 0.1) and params["lr"] == (6e-5 if lion else 6e-4)
    assert lion or params["eps"] == 1e-8
    if arm != "adamw":
        assert params["block_lr_ratios"] == PAPER and params["decay_norms_and_biases"] is True
        model = load_model(str(shrunk("llama-0.25b", tmp_path)))
        block_map = blockwise_lr.map_blocks(model)
        optimizer = getattr(blockwise_lr, parsed.optimizer_name)(
            model.named_parameters(), block_map=block_map, **{**params, "betas": tuple(params["betas"])}
        )
        schedule = BlockwiseWarmupCosine(optimizer, **parsed.scheduler_params)
        assert schedule.min_lrs == [pytest.approx(params["lr"] / 20)]
        assert (schedule.total_num_steps, schedule.warmup_num_steps) == (50_000, 1_000)


def test_options_replace_what_the_file_says():
    import train_deepspeed

    words = (
        "--arm blockwise-adamw --model gpt2-124m --data d --out o --lr 3e-4 --steps 5000 --batch 304 --micro-batch 19"
    )
    config = train_deepspeed.ds_config(train_deepspeed.arguments(words.split()), ranks=8)
    wanted = ds_config("blockwise-adamw")
    wanted["optimizer"]["params"]["lr"] = 3e-4
    wanted["scheduler"]["params"] = {"total_num_steps": 5000, "warmup_num_steps": 100}
    wanted.update(train_batch_size=304, train_micro_batch_size_per_gpu=19)
    assert config == wanted


@pytest.mark.parametrize(
    "words, message",
    [
        ("--arm adamw", "8 ranks with micro batches of 15 sequences cannot share 300 sequences"),
        ("--arm adam", "there is no 'adam'; name a file or one of adamw, blockwise-adam-mini, blockwise-adamw"),
    ],
)
def test_what_cannot_be_trained_is_refused(words, message):
    import train_deepspeed

    args = train_deepspeed.arguments([*words.split(), "--model", "gpt2-124m", "--data", "d", "--out", "o"])
    with pytest.raises(SystemExit, match=message):
        train_deepspeed.ds_config(args, ranks=8)


@pytest.mark.parametrize("model", MODELS)
def test_models_are_the_papers(model, tmp_path):
    import train_deepspeed

    settings = train_deepspeed.named(str(shrunk(model, tmp_path)), CONFIGS / "models")
    built = train_deepspeed.build_model(settings, 50257, seed=41)
    assert built.get_input_embeddings().weight.shape[0] == 50304
    assert not built.training or not any(m.p for m in built.modules() if type(m).__name__ == "Dropout")
    biases = {name: p for name, p in built.named_parameters() if not p.requires_grad}
    assert all(not p.any() and name.endswith("bias") for name, p in biases.items())
    assert len(biases) == (2 * 6 + 1 if model == "gpt2-124m" else 0)


# ---- Megatron


@pytest.mark.parametrize("arm", ARMS)
def test_argument_files_of_arms_name_the_optimizer_alone(arm):
    words = (RECIPES / "megatron_args" / f"{arm}.args").read_text().split()
    flags = {word for word in words if word.startswith("--")}
    assert flags <= {"--optimizer", "--weight-decay", "--block-lr-ratios"}
    assert ("--block-lr-ratios" in flags) == (arm != "adamw")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("arm", ARMS)
def test_both_doors_train_with_the_same_numbers(arm, model):
    words, config = argument_words(model, arm), ds_config(arm)
    last = {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}
    params, schedule = config["optimizer"]["params"], config["scheduler"]["params"]
    names = {"AdamW": "adam", "BlockwiseAdamW": "blockwise_adamw", "BlockwiseAdamMini": "blockwise_adam_mini"}
    assert last["--optimizer"] == names.get(config["optimizer"]["type"], "blockwise_lion")
    assert float(last["--weight-decay"]) == params["weight_decay"]
    assert int(last["--global-batch-size"]) == config["train_batch_size"]
    assert int(last["--micro-batch-size"]) == config["train_micro_batch_size_per_gpu"]
    assert int(last["--train-iters"]) == int(last["--lr-decay-iters"]) == schedule["total_num_steps"]
    assert int(last["--lr-warmup-iters"]) == schedule["warmup_num_steps"]
    assert float(last["--clip-grad"]) == config["gradient_clipping"] and int(last["--seq-length"]) == 1024
    if arm != "blockwise-lion":
        assert [float(last["--adam-beta1"]), float(last["--adam-beta2"])] == params["betas"]
        assert float(last["--adam-eps"]) == params["eps"]
    if arm != "adamw":
        start = len(words) - words[::-1].index("--block-lr-ratios")
        ratios = dict(word.split("=") for word in words[start : start + len(PAPER)])
        assert {block: float(ratio) for block, ratio in ratios.items()} == PAPER


@pytest.fixture
def launch(tmp_path):
    """Runs the launcher with a torchrun that prints its words; there are data and a clone of Megatron."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    for file in ("data/meta.json", "data/training.idx", "Megatron-LM/pretrain_gpt.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")

    def run(*words):
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
        return subprocess.run(
            ["bash", str(SCRIPT), *words], capture_output=True, text=True, env=environment, cwd=tmp_path
        )

    return run


GIVEN = ["--arm", "blockwise-lion", "--model", "llama-0.25b", "--data", "data", "--out", "out", "--lr", "6e-5"]


def test_the_launcher_gives_megatron_the_files_then_what_is_typed(launch, tmp_path):
    done = launch(*GIVEN, "--seed", "42", "--micro-batch-size", "5", "--nproc_per_node", "4")
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    start = words.index("-m")
    assert words[:start] == ["--standalone", "--nproc_per_node", "4"]
    files = argument_words("llama-0.25b", "blockwise-lion")
    assert words[start : start + 3 + len(files)] == [
        *("-m", "blockwise_lr.megatron", "Megatron-LM/pretrain_gpt.py"),
        *files,
    ]
    assert words[start + 3 + len(files) :] == [
        *("--lr", "6e-5", "--min-lr", "3e-06", "--seed", "42"),
        *("--train-data-path", "data/training", "--valid-data-path", "data/validation"),
        *("--tokenizer-model", "data/tokenizer", "--save", "out/checkpoints", "--load", "out/checkpoints"),
        *("--tensorboard-dir", "out/tensorboard", "--micro-batch-size", "5"),
    ]
    assert (tmp_path / "out" / "log.txt").read_text() == done.stdout


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--arm", "common"], "there is no arm common"),
        (["--model", "gpt5"], "there is no model gpt5"),
        (["--data", "nowhere"], "run examples/recipes/prepare.py --out nowhere"),
        (["--lr", ""], "--lr is missing; usage: train_megatron.sh"),
        (["--script", "other.py"], "set MEGATRON to a clone of Megatron-LM"),
        (["--seed"], "--seed needs a value"),
    ],
)
def test_the_launcher_says_what_is_wrong(launch, changed, message):
    done = launch(*GIVEN, *changed)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_shellcheck():
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([SHELLCHECK, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---- the page


def page_commands():
    """The commands of the page, each in one line, as words."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if not line.startswith(("pip ", "export "))]


@pytest.mark.parametrize("words", page_commands(), ids=" ".join)
def test_commands_of_the_page_are_taken(words, launch, tmp_path):
    import prepare
    import train_deepspeed

    program = next(word for word in words if word.endswith((".py", ".sh")))
    assert (ROOT / program).is_file()
    rest = words[words.index(program) + 1 :]
    if program.endswith("prepare.py"):
        prepare.arguments(rest)
    elif program.endswith("train_deepspeed.py"):
        args = train_deepspeed.arguments(rest)
        ranks = int(words[words.index("--nproc_per_node") + 1])
        train_deepspeed.ds_config(args, ranks)
        train_deepspeed.named(args.model, CONFIGS / "models")
    else:
        rest[rest.index("--data") + 1] = str(tmp_path / "data")
        done = launch(*rest)
        assert done.returncode == 0, done.stderr


def test_every_arm_has_its_commands_and_as_wide_a_grid():
    commands = [" ".join(words) for words in page_commands()]
    rows = re.findall(r"^\| ([\w-]+) \| ([\de.-]+(?:, [\de.-]+)+) \|$", PAGE, re.M)
    grids = {arm: [float(lr) for lr in lrs.split(", ")] for arm, lrs in rows}
    assert set(grids) == set(ARMS)
    for arm in ARMS:
        assert all(any(f"{door} --arm {arm} " in line for line in commands) for door in (".py", ".sh"))
        assert len(grids[arm]) == 4
        assert all(high == pytest.approx(2 * low) for low, high in zip(grids[arm], grids[arm][1:]))
        assert ds_config(arm)["optimizer"]["params"]["lr"] in grids[arm]


def test_options_of_the_launcher_are_those_of_deepspeeds_script():
    """A user learns one set of names; what Megatron has flags of its own for goes to it."""
    tree = ast.parse((RECIPES / "train_deepspeed.py").read_text())
    calls = [node for node in ast.walk(tree) if getattr(getattr(node, "func", None), "attr", "") == "add_argument"]
    flags = {call.args[0].value for call in calls}
    shared = set(re.findall(r"--(?:arm|model|data|out|lr|seed)\b", SCRIPT.read_text()))
    assert len(shared) == 6 and shared <= flags

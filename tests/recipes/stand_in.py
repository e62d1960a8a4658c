"""What the tests of both doors share: stand-in data, the recipes' files, and their models made small."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "recipes"
CONFIGS = ROOT / "configs"
sys.path.insert(0, str(RECIPES))

ARMS = ("adamw", "blockwise-adamw", "blockwise-adam-mini", "blockwise-lion")
MODELS = ("gpt2-124m", "llama-0.25b")
LENGTH, DOCUMENTS = 32, 60
SHRUNK = {
    "gpt2-124m": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH},
    "llama-0.25b": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": LENGTH,
    },
}


def prepared(folder, *options):
    """A folder of stand-in data, as prepare.py writes it."""
    import prepare

    prepare.main(["--stand-in", "--documents", str(DOCUMENTS), "--out", str(folder), *options])
    return folder


def shrunk(model, folder):
    """The file of a model of configs/models, two layers of width 32 and 32 positions of it."""
    settings = json.loads((CONFIGS / "models" / f"{model}.json").read_text())
    file = folder / f"{model}.json"
    file.write_text(json.dumps({**settings, **SHRUNK[model]}))
    return file


def ds_config(arm):
    return json.loads((RECIPES / "ds_configs" / f"{arm}.json").read_text())


def argument_words(model, arm):
    """The words that train_megatron.sh takes from files."""
    files = [CONFIGS / "megatron" / f"{model}.args"]
    files += [RECIPES / "megatron_args" / f"{name}.args" for name in ("common", arm)]
    return [word for file in files for word in file.read_text().split()]

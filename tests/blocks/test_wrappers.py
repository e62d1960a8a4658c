"""Names that PEFT's adapters and DDP make (torch.compile: test_map_blocks.py)."""

import pytest
import torch
from ranks import pool
from twins import gpt2, llama, make

from blockwise_lr import map_blocks


def blocks(block_map, part):
    return {
        name.rpartition(part)[2]: tuple(str(b) for b in layout.blocks)
        for name, layout in block_map.items()
        if part in name
    }


@pytest.mark.filterwarnings("ignore")
def test_low_rank_adapters_are_the_block_of_their_weight():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    block_map = map_blocks(peft.get_peft_model(gpt2(), config))
    assert blocks(block_map, "h.0.") == {
        "attn.c_attn.lora_A.default.weight": ("vo",),
        "attn.c_attn.lora_B.default.weight": ("qk", "vo"),
        "attn.c_proj.lora_A.default.weight": ("vo",),
        "attn.c_proj.lora_B.default.weight": ("vo",),
        "mlp.c_proj.lora_A.default.weight": ("ffn",),
        "mlp.c_proj.lora_B.default.weight": ("ffn",),
    }
    fused = next(layout for name, layout in block_map.items() if "h.0.attn.c_attn.lora_B" in name)
    assert not fused.transposed and [(a, b, p.role) for a, b, p in fused.spans()] == [
        (0, 24, "q"),
        (24, 48, "k"),
        (48, 72, "v"),
    ]
    assert {str(b) for name in block_map if "ln_f" in name for b in block_map[name].blocks} == {"norm"}


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_split_projections():
    peft = pytest.importorskip("peft")
    block_map = map_blocks(peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"])))
    units = {name: block_map[name].pieces[0].unit for name in block_map if "layers.0" in name}
    assert [unit for name, unit in units.items() if "lora_B" in name] == [8, 8]  # heads of 8 rows
    assert [unit for name, unit in units.items() if "lora_A" in name] == [1, 1]
    assert {str(b) for layout in block_map.values() for b in layout.blocks} == {"qk"}


def ddp_layouts(kind):
    """Pieces by name with and without DDP around the model; runs in a rank process."""
    model = make(kind)
    plain = {name: layout.pieces for name, layout in map_blocks(model).items()}
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    return plain, {name: layout.pieces for name, layout in map_blocks(wrapped).items()}


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "gpt_neox"])
def test_ddp_only_adds_a_prefix(kind):
    for plain, wrapped in pool(2).run(ddp_layouts, kind):
        assert {name.removeprefix("module."): pieces for name, pieces in wrapped.items()} == plain

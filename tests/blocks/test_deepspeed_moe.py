"""The block types inside DeepSpeed's own mixture of experts, built for real."""

import pytest
from torch import nn

from blockwise_lr import map_blocks

layer = pytest.importorskip("deepspeed.moe.layer")

EXPERTS = {
    "linears": lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)),
    "norm_inside": lambda: nn.ModuleDict({"norm": nn.LayerNorm(8), "out": nn.Linear(8, 8)}),
    "named": lambda: nn.ModuleDict({"dense_h_to_4h": nn.Linear(8, 16), "dense_4h_to_h": nn.Linear(16, 8)}),
}


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("attribute", ["moe", "mlp", "moe_layer", "ffn"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_every_part_has_its_block(expert, attribute, residual):
    model = nn.Module()
    model.layers = nn.ModuleList(
        [nn.ModuleDict({attribute: layer.MoE(8, EXPERTS[expert](), num_experts=2, use_residual=residual)})]
    )
    found = {name.removeprefix(f"layers.0.{attribute}."): layout for name, layout in map_blocks(model).items()}
    names = list(dict(EXPERTS[expert]().named_parameters()))
    norms = {"norm.weight", "norm.bias"} if expert == "norm_inside" else set()
    wanted = {"deepspeed_moe.gate.wg.weight": "router"}
    for place in [f"deepspeed_moe.experts.deepspeed_experts.{number}." for number in (0, 1)] + ["mlp."] * residual:
        wanted.update({place + name: "norm" if name in norms else "ffn" for name in names})
    if residual:
        wanted.update({"coefficient.weight": "router", "coefficient.bias": "router"})
    assert {name: str(layout.blocks[0]) for name, layout in found.items() if len(layout.blocks) == 1} == wanted
    assert all(layout.kind != "matrix" for name, layout in found.items() if name.endswith("bias"))

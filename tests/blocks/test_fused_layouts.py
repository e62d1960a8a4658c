"""The rows called q, k, v or gate are that and nothing else, shown on the real modules' forward passes.

What is looked at is the input of the first attention's output projection: the values mixed by the attention weights.
"""

import pytest
import torch
from blocks.fused_models import FUSED_MODELS

from blockwise_lr import map_blocks

POSITION, LENGTH = 3, 8


class Probe:
    """A model whose fused weight can be changed by role, and whose mixed values can be read."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.case = FUSED_MODELS[name]
        self.model = self.case.build().eval()
        with torch.no_grad():
            for p in self.model.parameters():  # larger than at initialization, where softmax is flat
                p.normal_(0, 0.3) if p.dim() > 1 else p.normal_(1, 0.2)
        self.block_map = map_blocks(self.model)
        self.fused = self.model.get_submodule(self.case.fused)
        self.ids = torch.arange(LENGTH)[None]
        self.edit = None
        self.fused.register_forward_hook(lambda module, args, out: self.edit(out.clone()) if self.edit else None)
        self.model.get_submodule(self.case.output).register_forward_pre_hook(
            lambda module, args: setattr(self, "seen", args[0].detach().clone())
        )

    def outputs(self, role):
        """Output units of the fused module that the map calls by that role."""
        layout = self.block_map[self.case.fused + ".weight"]
        return torch.cat([torch.arange(start, end) for start, end, piece in layout.spans() if piece.role == role])

    def change(self, role, function):
        """Applies a function to exactly the rows (or columns) of a role, of the weight and of its bias."""
        with torch.no_grad():
            for name, p in self.fused.named_parameters():
                layout = self.block_map[f"{self.case.fused}.{name}"]
                for start, end, piece in layout.spans():
                    if piece.role == role:
                        part = p[:, start:end] if layout.transposed and p.dim() > 1 else p[start:end]
                        part.copy_(function(part))

    def mixed(self):
        """The mixed values, (length, width)."""
        with torch.no_grad():
            self.model(self.ids)
        return self.seen[0].reshape(LENGTH, -1)

    def moved(self, role):
        """Positions whose mixed values move when a role's outputs are changed at one position."""
        before = self.mixed()
        columns = self.outputs(role)

        def edit(out):
            out[..., POSITION, columns] += 1.0 + torch.arange(len(columns)) % 3
            return out

        self.edit = edit
        after = self.mixed()
        self.edit = None
        return {i for i in range(LENGTH) if not torch.equal(before[i], after[i])}


def cases(role):
    return [name for name, case in FUSED_MODELS.items() if role in case.roles]


@pytest.mark.parametrize("name", FUSED_MODELS)
def test_roles_cover_the_weight(name):
    probe = Probe(name)
    found = torch.cat([probe.outputs(role) for role in probe.case.roles]).sort().values
    weight = probe.fused.weight
    outputs = weight.shape[1] if probe.block_map[probe.case.fused + ".weight"].transposed else weight.shape[0]
    assert torch.equal(found, torch.arange(outputs))


@pytest.mark.parametrize("name", cases("v"))
def test_v_rows_are_the_value_path_and_nothing_else(name):
    probe = Probe(name)
    before = probe.mixed()
    probe.change("v", lambda part: part * 2)
    assert torch.equal(probe.mixed(), before * 2)  # linear in v: no v row is used in the attention weights
    probe.change("v", torch.zeros_like)
    assert before.abs().min() > 0 and probe.mixed().abs().max() == 0  # and no value comes from another row


@pytest.mark.parametrize("name", cases("q"))
def test_q_rows_are_the_query_path_and_nothing_else(name):
    probe = Probe(name)
    assert probe.moved("q") == {POSITION}  # a query is used at its own position only
    before = probe.mixed()
    probe.change("q", torch.zeros_like)
    zeroed = probe.mixed()
    assert not torch.equal(before[1:], zeroed[1:])
    if "k" in probe.case.roles:  # without queries keys do not matter
        probe.change("k", torch.randn_like)
        torch.testing.assert_close(probe.mixed(), zeroed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", cases("k"))
def test_k_rows_are_the_key_path_and_nothing_else(name):
    probe = Probe(name)
    assert probe.moved("k") == set(range(POSITION, LENGTH))  # a key is used at its position and all later ones
    probe.change("k", torch.zeros_like)
    zeroed = probe.mixed()
    assert zeroed.abs().max() > 0
    if "q" in probe.case.roles:  # without keys queries do not matter
        probe.change("q", torch.randn_like)
        torch.testing.assert_close(probe.mixed(), zeroed, rtol=1e-5, atol=1e-6)


def test_gate_rows_only_scale_the_output():
    probe = Probe("qwen3-next")
    assert probe.moved("gate") == {POSITION}
    probe.change("gate", torch.zeros_like)  # a gate of 0 is a factor of 1/2, with which the output is linear in v
    before = probe.mixed()
    attention = probe.model.get_submodule("model.layers.0.self_attn")
    with torch.no_grad():
        attention.v_proj.weight.mul_(2)
    assert torch.equal(probe.mixed(), before * 2)
    assert probe.moved("q") == {POSITION}


def test_the_latent_rows_of_latent_attention_feed_k_and_v():
    """kv_a_proj_with_mqa: zeroing the latent rows leaves no value; zeroing the rotary rows leaves the values alone."""
    probe = Probe("deepseek-v3")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    weight = probe.model.get_parameter(name)
    spans = {piece.role: (start, end) for start, end, piece in probe.block_map[name].spans()}
    before = probe.mixed()
    with torch.no_grad():
        weight[slice(*spans["k"])] = 0
        rotary = probe.mixed()
        weight[slice(*spans["latent"])] = 0
    assert not torch.equal(rotary[1:], before[1:])
    torch.testing.assert_close(rotary[0], before[0])  # the first token attends to itself whatever k is
    assert probe.mixed().abs().max() == 0

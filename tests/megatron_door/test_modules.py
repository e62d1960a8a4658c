"""Megatron's own modules, built for real: what a change of the rows mapped as q, k, v changes, and every parameter's block.

Mamba's mixer and the legacy grouped experts are built without the packages that their forward passes need (mamba_ssm,
grouped_gemm), so nothing is trained with them here.
"""

from unittest.mock import patch

import pytest

pytest.importorskip("megatron.core")

from megatron_door.layouts import Layout, build_chunks, make_config, megatron
from ranks import pool

GATED = Layout(extra={"attention_output_gate": True})


def what_rows_change(variant, layout, weight):
    """For each span of a projection: its role, block, and which channels of which of q, k, v (and gate) its rows change."""
    import torch

    from blockwise_lr import map_blocks

    with megatron(layout):
        torch.manual_seed(0)
        (model,) = build_chunks(variant, layout)
        name = f"decoder.layers.0.self_attention.{weight}.weight"
        attention, hidden = model.decoder.layers[0].self_attention, torch.randn(5, 1, 32)
        options = {"output_gate": True} if model.config.attention_output_gate else {}

        def outputs():
            made = attention.get_query_key_value_tensors(hidden, **options)
            return [
                part.detach().unflatten(-1, (part.shape[2], -1)) if part.dim() == 3 else part.detach()
                for part in made[: 4 if options else 3]
            ]

        before, found = outputs(), []
        rows = model.get_parameter(name).data
        for start, end, piece in map_blocks(model)[name].spans():
            saved = rows[start:end].clone()
            rows[start:end] += torch.randn_like(saved)
            changed = {
                part: (new != old).flatten(0, 1).any(0).nonzero().tolist()
                for part, old, new in zip(("q", "k", "v", "gate"), before, outputs())
            }
            rows[start:end] = saved
            found.append((piece.role, piece.block.value, {part: places for part, places in changed.items() if places}))
        return found


def places(heads, channels):
    return [[head, channel] for head in heads for channel in channels]


def test_rows_of_latent_attentions_up_projection_change_the_k_or_v_of_their_head_alone():
    (found,) = pool(1).run(what_rows_change, "deepseek", Layout(), "linear_kv_up_proj")
    wanted = []
    for head in range(4):
        wanted += [("k", "qk", {"k": places([head], range(8))}), ("v", "vo", {"v": places([head], range(6))})]
    assert found == wanted


def test_rows_of_latent_attentions_down_projection_change_k_and_v_or_the_rotary_key():
    (found,) = pool(1).run(what_rows_change, "deepseek", Layout(), "linear_kv_down_proj")
    assert found == [
        ("latent", "vo", {"k": places(range(4), range(8)), "v": places(range(4), range(6))}),
        ("k", "qk", {"k": places(range(4), range(8, 12))}),
    ]


@pytest.mark.parametrize("layout", [Layout(), GATED], ids=["plain", "gated"])
def test_rows_of_fused_qkv_change_what_they_are_mapped_as(layout):
    (found,) = pool(1).run(what_rows_change, "gqa", layout, "linear_qkv")
    wanted = []
    for group in range(2):  # of two query heads, one key and one value head
        queries = places([2 * group, 2 * group + 1], range(8))
        wanted += [
            ("q", "qk", {"q": queries}),
            ("gate", "vo", {"gate": queries}),
            ("k", "qk", {"k": places([group], range(8))}),
            ("v", "vo", {"v": places([group], range(8))}),
        ]
    assert found == [span for span in wanted if layout is GATED or span[0] != "gate"]


def blocks_of(module, name):
    """{parameter: (block types, decayed)} of a module that bears a name in a layer."""
    import torch

    from blockwise_lr import map_blocks

    layer = torch.nn.ModuleDict({name: module})
    model = torch.nn.ModuleDict({"decoder": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})})
    prefix = f"decoder.layers.0.{name}."
    return {
        full.removeprefix(prefix): (*(block.value for block in layout.blocks), layout.kind == "matrix")
        for full, layout in map_blocks(model, config=module.config).items()
    }


def mamba(layout, found):
    """``found(mixer)`` of a mixer built under a layout."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm import mamba_mixer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    class Norm(torch.nn.RMSNorm):
        def __init__(self, size, eps, **_):
            super().__init__(size, eps)

    config = make_config("llama", Layout(extra=dict(mamba_state_dim=16, mamba_head_dim=8, mamba_num_groups=2)))
    with (
        megatron(layout),
        patch.object(mamba_mixer, "HAVE_MAMBA_SSM", True),
        patch.object(mamba_mixer, "ExtendedRMSNorm", Norm),
    ):
        mixer = mamba_mixer.MambaMixer(
            config,
            mamba_mixer.MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear),
            config.hidden_size,
            layer_number=1,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        return found(mixer)


def mixer_blocks(mixer):
    return blocks_of(mixer, "mixer")


def mixer_splits(mixer):
    """Which parameters' Adam-mini segments go on in other tensor-parallel ranks."""
    import torch

    from blockwise_lr import BlockwiseAdamMini, map_blocks
    from blockwise_lr.plan.shards import spans_slices

    model = torch.nn.ModuleDict({"mixer": mixer})
    optimizer = BlockwiseAdamMini(model.named_parameters(), block_map=map_blocks(model, config=mixer.config))
    return sorted(name for name, p in model.named_parameters() if spans_slices(p, optimizer.layout_of(name)))


def test_mambas_mixer_under_tensor_parallelism():
    """Slices of the norm's vector have one second moment together, as slices of the rows of out_proj have."""
    pytest.importorskip("triton")
    for found in pool(2).run(mamba, Layout(tp=2), mixer_splits):
        assert found == ["mixer.norm.weight", "mixer.out_proj.weight"]


def test_mambas_mixer():
    pytest.importorskip("triton")  # Megatron's module imports it
    (found,) = pool(1).run(mamba, Layout(), mixer_blocks)
    for name in ("conv1d", "conv1d_"):  # a module of its own in 0.16, parameters of the mixer in 0.19
        for kind in ("weight", "bias"):
            found.pop(f"{name}{kind}" if name[-1] == "_" else f"{name}.{kind}", None)
    assert found == {
        "in_proj.weight": ("ssm", True),
        "out_proj.weight": ("ssm", True),
        "A_log": ("ssm", False),
        "D": ("ssm", False),
        "dt_bias": ("ssm", False),
        "norm.weight": ("norm", False),
    }


def gated_delta_net():
    with megatron(Layout()):
        (model,) = build_chunks("delta", Layout())
        return blocks_of(model.decoder.layers[0].self_attention, "self_attention")


def test_gated_delta_net():
    (found,) = pool(1).run(gated_delta_net)
    assert found == {
        "in_proj.weight": ("ssm", True),
        "conv1d.weight": ("ssm", True),
        "out_proj.weight": ("ssm", True),
        "A_log": ("ssm", False),
        "dt_bias": ("ssm", False),
        "out_norm.weight": ("norm", False),
    }


def recorded(layout):
    from blockwise_lr.megatron.mapping import map_chunks

    with megatron(layout):
        return map_chunks(build_chunks("delta", layout)).recorded.fingerprint()


def test_what_checkpoints_record_of_a_delta_net_does_not_depend_on_tensor_parallelism():
    """Megatron 0.16 marks what the net slices without saying along which dimension."""
    assert set(pool(1).run(recorded, Layout())) == set(pool(2).run(recorded, Layout(tp=2)))


def grouped_experts():
    """One Adam-mini step on GroupedMLP's weights, and on the matrices that its own forward makes of them."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import experts

    from blockwise_lr import BlockwiseAdamMini, map_blocks

    if not hasattr(experts, "GroupedMLP"):
        return None
    used = []

    class Gemm:
        @staticmethod
        def gmm(x, weight, *_, **__):
            used.append(weight)
            return x.new_zeros(x.shape[0], weight.shape[2])

    config = make_config("moe", Layout(extra=dict(bf16=True, gated_linear_unit=True, moe_ffn_hidden_size=20)))
    with (
        megatron(Layout()),
        patch.object(experts.gg, "assert_grouped_gemm_is_available", lambda: None),
        patch.object(experts.gg, "ops", Gemm),
    ):
        torch.manual_seed(0)
        module = experts.GroupedMLP(4, config, ProcessGroupCollection.use_mpu_process_groups())
        model = torch.nn.ModuleDict({"experts": module})
        for p in module.parameters():
            p.data.normal_()
            p.grad = torch.randn_like(p)
        module(torch.randn(8, 32), torch.tensor([2, 2, 2, 2]), torch.ones(8))
        optimizer = BlockwiseAdamMini(
            model.named_parameters(),
            lr=0.01,
            weight_decay=0.0,
            eps=1e-8,
            kernel="reference",
            block_map=map_blocks(model, config=config),
        )
        wanted = []
        for matrix, p in zip(used, module.parameters()):  # an expert's column is an output unit: one second moment
            gradient = p.grad.view(matrix.shape)
            mean = gradient.square().mean(1, keepdim=True).sqrt()
            wanted.append((matrix.detach() - 0.01 * gradient / (mean + 1e-8)).view(p.shape))
        optimizer.step()
        return [matrix.shape for matrix in used], [
            float((p - w).norm() / w.norm()) for p, w in zip(module.parameters(), wanted)
        ]


def test_legacy_grouped_experts_have_a_second_moment_per_output_unit():
    (found,) = pool(1).run(grouped_experts)
    if found is None:
        pytest.skip("this megatron-core has no GroupedMLP")
    shapes, differences = found
    assert [tuple(shape) for shape in shapes] == [(4, 32, 40), (4, 20, 32)]
    assert max(differences) < 1e-6

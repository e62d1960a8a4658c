"""Muon with block rates under ZeRO: its matrices are cut anywhere, and step as in one process."""

import pytest
import torch
from deepspeed_door.muon import beside, cut_by_autotp, end_to_end, farthest, going_on, loaded, saved
from deepspeed_door.test_checkpoint import BF16_OPTIMIZER, FP16, OFFLOAD, SUB_GROUPS, pipeline_resumed, saving
from ranks import pool
from twins import make

if not hasattr(torch.optim, "Muon"):
    pytest.skip("this PyTorch has no Muon to compare with", allow_module_level=True)

MUON, MINI = "BlockwiseMuon", "BlockwiseMuonMini"
BF16 = {"dtype": "bf16"}


@pytest.mark.parametrize(
    "kind, model, stage, ranks, options",
    [
        (MUON, "llama", 1, 2, {}),
        pytest.param(MUON, "gpt_neox", 2, 3, {}, marks=pytest.mark.full),
        (MUON, "gpt2", 2, 4, {"zero": OFFLOAD}),
        (MUON, "gpt2", 3, 3, {}),
        pytest.param(MUON, "llama_tied", 3, 2, {"zero": OFFLOAD}, marks=pytest.mark.full),
        (MUON, "llama", 1, 2, BF16_OPTIMIZER),
        (MUON, "llama", 2, 2, FP16),
        pytest.param(MUON, "gpt2", 3, 4, BF16, marks=pytest.mark.full),
        pytest.param(MINI, "gpt2", 1, 3, {}, marks=pytest.mark.full),
        (MINI, "llama", 3, 4, {}),
        pytest.param(MINI, "llama", 2, 2, BF16, marks=pytest.mark.full),
    ],
)
def test_cut_matrices_step_as_whole_ones(kind, model, stage, ranks, options, record_property):
    for found in pool(ranks).run(beside, kind, model, stage, options):
        record_property("worst", found["from_torch"])
        assert found["cut"] and not found["unlike"]
        assert found["rest"] <= (1e-6 if kind == MINI else 0.0)
        assert found["from_torch"] < 1e-5


@pytest.mark.parametrize(
    "kind, model, stage, ranks, options",
    [
        (MUON, "llama", 0, 2, {}),
        pytest.param(MUON, "gpt2", 1, 1, {}, marks=pytest.mark.full),
        (MUON, "llama", 2, 3, {}),
        (MUON, "gpt2", 3, 2, {"zero": SUB_GROUPS}),
        (MINI, "gpt_neox", 3, 4, {"zero": {**SUB_GROUPS, **OFFLOAD}}),
        (MINI, "llama_tied", 1, 2, {}),
    ],
)
def test_it_trains_as_in_one_process(kind, model, stage, ranks, options, record_property):
    worst = max(pool(ranks).run(end_to_end, kind, model, stage, options))
    record_property("worst", worst)
    assert worst < 0.1


@pytest.mark.parametrize(
    "kind, model, stage, ranks, options, universal",
    [
        (MUON, "gpt2", 1, 2, {}, False),
        (MUON, "llama", 2, 3, FP16, True),
        (MUON, "gpt2", 3, 2, {"zero": {**SUB_GROUPS, **OFFLOAD}}, False),
        pytest.param(MINI, "gpt_neox", 1, 2, BF16_OPTIMIZER, False, marks=pytest.mark.full),
        (MINI, "gpt2", 3, 3, {}, True),
    ],
)
def test_a_resumed_run_goes_on_to_the_bit(kind, model, stage, ranks, options, universal, tmp_path):
    for wanted, found, equal, scales in pool(ranks).run(
        going_on, kind, model, stage, options, str(tmp_path), universal
    ):
        assert wanted == found and equal and scales[0] == scales[1]


@pytest.mark.parametrize(
    "kind, model, source, ranks, target, new_ranks",
    [
        pytest.param(MUON, "gpt2", 1, 4, 2, 3, marks=pytest.mark.full),
        (MUON, "gpt_neox", 2, 2, 3, 3),
        (MINI, "llama", 3, 3, 1, 2),
    ],
)
def test_universal_checkpoints_continue_anywhere(kind, model, source, ranks, target, new_ranks, tmp_path):
    from blockwise_lr.deepspeed.universal import convert

    wanted = pool(ranks).run(saved, kind, model, source, saving({}, ranks), str(tmp_path))[0]
    convert(str(tmp_path / "here"), str(tmp_path / "here_universal"))
    start = {name: p.detach() for name, p in make(model).named_parameters()}
    for found in pool(new_ranks).run(loaded, kind, model, target, {}, str(tmp_path)):
        apart = farthest(found, wanted, start)
        assert apart < 0.05


def test_a_pipeline_resumes_to_the_bit(tmp_path):
    assert pool(2).run(pipeline_resumed, MUON, 1, str(tmp_path)) == [True, True]


def test_slices_that_deepspeed_does_not_mark_are_refused():
    for error in pool(2).run(cut_by_autotp, errors=True):
        assert "BlockwiseMuon does not support tensor_parallel.autotp_size" in str(error)

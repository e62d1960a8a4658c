"""FSDP2: weights equal those of one process with the whole model."""

import itertools

import pytest
from kinds import KINDS
from optim import fsdp, fsdp_saving
from own_rates import RULES
from ranks import pool
from twins import worst_difference

ADAMW, MINI, LION = "BlockwiseAdamW", "BlockwiseAdamMini", "BlockwiseLion"


@pytest.mark.parametrize(
    "optimizer, kind", [*itertools.product([ADAMW, MINI], ["llama", "llama_tied", "gpt2", "gpt_neox"]), (LION, "llama")]
)
def test_sharded_parameters_train_as_whole_ones(kind, optimizer):
    wanted = pool(1).run(fsdp.train, kind, optimizer, 1)[0]
    found = pool(2).run(fsdp.train, kind, optimizer, 2)
    assert worst_difference(found[0], wanted, optimizer) < 1e-5
    assert worst_difference(found[0], found[1]) == 0


def test_other_placements_are_refused():
    for message in pool(2).run(fsdp.refuse_other_placements):
        assert "dimension 0" in message and "wte.weight" in message


def test_an_optimizer_of_parameters_that_are_sharded_later_says_so():
    (once,), of_others = pool(2).run(fsdp.shard_too_late)
    assert "build the optimizer after what replaces them (fully_shard" in once and of_others == []


def difference(found, wanted):
    return max(float((found[name] - wanted[name]).norm() / (wanted[name].norm() + 1e-30)) for name in wanted)


@pytest.mark.parametrize(
    "flat, kind, family",
    [*itertools.product([False, True], [ADAMW, MINI], ["llama", "gpt2"]), (False, LION, "llama")],
)
def test_checkpoints_resume_and_reshard(kind, family, flat, tmp_path):
    """torch.distributed.checkpoint: on the same ranks to the bit, on others with the same states to the bit."""
    folder = str(tmp_path / "saved")
    saved, end = pool(2).run(fsdp_saving.save_and_go_on, family, kind, folder, flat)[0]
    for loaded, again in pool(2).run(fsdp_saving.load_and_go_on, family, kind, folder, flat):
        assert loaded.keys() == saved.keys() and difference(loaded, saved) == 0
        assert difference(again, end) == 0
    for ranks in (1, 3):
        loaded, _ = pool(ranks).run(fsdp_saving.load_and_go_on, family, kind, folder, flat, False)[0]
        assert loaded.keys() == saved.keys() and difference(loaded, saved) == 0


def test_rates_of_rules_train_as_on_one_process_and_are_saved(tmp_path):
    folder = str(tmp_path / "saved")
    whole, _ = pool(1).run(fsdp_saving.save_and_go_on, "gpt2", ADAMW, str(tmp_path / "whole"), True, 1, RULES)[0]
    saved, end = pool(2).run(fsdp_saving.save_and_go_on, "gpt2", ADAMW, folder, True, 1, RULES)[0]
    assert whole.keys() == saved.keys()
    for loaded, again in pool(2).run(fsdp_saving.load_and_go_on, "gpt2", ADAMW, folder, True, True, 1, RULES):
        assert difference(loaded, saved) == 0 and difference(again, end) == 0
    loaded, _ = pool(1).run(fsdp_saving.load_and_go_on, "gpt2", ADAMW, folder, True, False, 1, RULES)[0]
    assert difference(loaded, saved) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_full_states_of_sharded_and_whole_models_are_exchanged(kind, tmp_path):
    for saving, loading in ((2, 1), (1, 2)):
        saved = pool(saving).run(fsdp_saving.full_states, "gpt_neox", kind, str(tmp_path))[0]
        for from_rank_0 in (False, True)[:loading]:
            loaded = pool(loading).run(fsdp_saving.load_full, "gpt_neox", kind, str(tmp_path), from_rank_0)[0]
            assert loaded.keys() == saved.keys() and difference(loaded, saved) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_hybrid_sharding_saves_and_resumes(kind, tmp_path):
    saved, end = pool(4).run(fsdp_saving.save_and_go_on, "llama", kind, str(tmp_path), False, 2)[0]
    for loaded, again in pool(4).run(fsdp_saving.load_and_go_on, "llama", kind, str(tmp_path), False, True, 2):
        assert difference(loaded, saved) == 0 and difference(again, end) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_state_dicts_come_back(kind):
    found, wanted = (pool(2).run(case, "gpt2", kind) for case in (fsdp_saving.copied, fsdp_saving.uninterrupted))
    assert difference(found[0], wanted[0]) == 0


def test_fsdp1_is_refused():
    for arguments in ((True, True), (True, False), (False, True)):
        for message in pool(2).run(fsdp_saving.fsdp1, *arguments):
            assert "FullyShardedDataParallel (FSDP1)" in message and "fully_shard" in message


@pytest.mark.parametrize(
    "what, words",
    [
        ("ratios", ["rank 0 and rank 1", "block_lr_ratios.qk: 8.0 and 4.0"]),
        ("lr", ["rank 0 and rank 1", "lr: 0.001 and 0.002"]),
        ("bad", ["failed on rank 1", "eps is -1.0"]),
        ("class", ["BlockwiseAdamW", "BlockwiseAdamMini"]),
        ("frozen", ["model.norm.weight"]),
    ],
)
def test_ranks_that_build_different_optimizers_all_hear_of_it(what, words):
    for message in pool(2).run(fsdp_saving.unlike_ranks, what):
        assert all(word in message for word in words), message

"""Megatron's checkpoints of both optimizers: resumed to the bit, resharded, refused, and continued by another optimizer."""

import tempfile
from dataclasses import replace

import pytest

pytest.importorskip("megatron.core")

import torch
from megatron_door.checkpoints import LEGACY, SAVED_AT, TOTAL, Job, loading, saving
from megatron_door.layouts import Layout
from megatron_door.training import megatron_lr
from ranks import pool
from twins import worst_difference

ADAMW, MINI, LION, PLAIN = "BlockwiseAdamW", "BlockwiseAdamMini", "BlockwiseLion", "adam"
ONE, TP, PP, DP = Layout(), Layout(tp=2), Layout(pp=2), Layout(distributed=True)
BF16_TP, BF16_DP = Layout(bf16=True, tp=2), Layout(bf16=True, distributed=True)
TP_DP, PP_DP, EP_DP = (Layout(distributed=True, **split) for split in (dict(tp=2), dict(pp=2), dict(ep=2)))
BUCKETS, MODEL = (
    "dp_reshardable",
    "fully_reshardable",
)  # megatron.training's default form, and the one for other TP and PP
EMBEDDING = "embedding.word_embeddings.weight"
ALL_ONE = dict.fromkeys(["embedding", "head", "qk", "vo", "ffn"], 1.0)
_saved = {}


@pytest.fixture(scope="module", autouse=True)
def _cleaned_up():
    yield
    while _saved:
        _saved.popitem()[1][-1].cleanup()


def saved(ranks, kind, variant, layout, form=MODEL, **more):
    """(the job, the folder it saved to, what it came to without interruption); every job runs once."""
    job, folder = Job(kind, variant, layout, form, **more), tempfile.TemporaryDirectory()
    if (ranks, repr(job)) not in _saved:
        _saved[ranks, repr(job)] = job, folder.name, pool(ranks).run(saving, job, folder.name)[0], folder
    return _saved[ranks, repr(job)][:-1]


def loaded(ranks, job, folder, **changes):
    """What every rank came to from the checkpoint."""
    return pool(ranks).run(loading, replace(job, **changes), folder)


def accepting(*names, **settings):
    return {"settings": {"accept_mismatch": names, **settings}}


@pytest.mark.parametrize(
    "kind, ranks, variant, layout, form",
    [
        (MINI, 1, "gpt", ONE, MODEL),
        (MINI, 2, "gqa", TP, MODEL),
        (MINI, 2, "gqa", BF16_TP, MODEL),
        (MINI, 2, "gpt", DP, BUCKETS),
        (ADAMW, 2, "gqa", BF16_DP, BUCKETS),
        (MINI, 2, "gqa", BF16_DP, BUCKETS),
        (MINI, 4, "gqa", TP_DP, MODEL),
        (MINI, 4, "moe", EP_DP, MODEL),
        (ADAMW, 2, "gqa", PP, LEGACY),
        (MINI, 2, "gqa", BF16_DP, LEGACY),
        (LION, 2, "gqa", BF16_DP, BUCKETS),
        (LION, 2, "gqa", TP, MODEL),
    ],
)
def test_the_same_layout_resumes_to_the_bit(kind, ranks, variant, layout, form):
    resumes(ranks, *saved(ranks, kind, variant, layout, form))


@pytest.mark.parametrize("form", [MODEL, LEGACY])
def test_norms_that_percentiles_are_of_are_saved(form):
    resumes(2, *saved(2, ADAMW, "gqa", BF16_DP, form, settings={"block_clip": "30%"}))


def resumes(ranks, job, folder, wanted):
    for found in loaded(ranks, job, folder):
        assert "error" not in found, found
        assert not [name for name, value in wanted["weights"].items() if not torch.equal(found["weights"][name], value)]
        assert found["rates"] == wanted["rates"] and found["apart"] == 0


@pytest.mark.parametrize(
    "kind, variant, ranks, layout, form, new_ranks, new_layout",
    [
        (ADAMW, "gqa", 2, TP, MODEL, 1, ONE),
        (MINI, "gqa", 2, TP, MODEL, 1, ONE),
        (ADAMW, "gqa", 2, PP, MODEL, 1, ONE),
        (MINI, "gpt", 2, DP, BUCKETS, 1, DP),
        (MINI, "gqa", 4, DP, MODEL, 2, DP),
        (ADAMW, "gqa", 4, TP_DP, MODEL, 2, PP_DP),
        (MINI, "gqa", 4, replace(TP_DP, layers=4), MODEL, 2, Layout(pp=2, vpp=2, distributed=True, layers=4)),
        (MINI, "moe", 4, EP_DP, MODEL, 2, EP_DP),
    ],
)
def test_another_layout_goes_on_as_the_first(kind, variant, ranks, layout, form, new_ranks, new_layout):
    job, folder, wanted = saved(ranks, kind, variant, layout, form)
    for found in loaded(new_ranks, job, folder, layout=new_layout):
        assert "error" not in found, found
        assert worst_difference(found["weights"], wanted["weights"]) < 1e-5
        assert found["apart"] == 0 and found["fingerprint"] == wanted["fingerprint"]


def test_steps_are_counted_on_where_fused_adam_is_installed():
    """With Transformer Engine or Apex, Megatron leaves steps to the param groups."""
    job, folder, wanted = saved(2, MINI, "gqa", DP, BUCKETS, fused=True)
    for found in loaded(2, job, folder):
        assert all(torch.equal(found["weights"][name], value) for name, value in wanted["weights"].items())


@pytest.mark.parametrize(
    "layout, form, changes, words",
    [
        (
            PP,
            MODEL,
            dict(settings={"block_lr_ratios": {"qk": 4}}),
            ["block_lr_ratios: qk 8.0 -> 4.0", "--accept-mismatch block_lr_ratios"],
        ),
        (
            PP,
            MODEL,
            dict(settings={"block_rules": [{"match": "*.linear_proj.*", "block": "ffn"}]}),
            ["block_map: decoder.layers.0.self_attention.linear_proj.weight vo -> ffn", "--accept-mismatch block_map"],
        ),
        (PP, LEGACY, dict(settings={"block_lr_ratios": {"qk": 4}}), ["block_lr_ratios: qk 8.0 -> 4.0"]),
        (
            BF16_DP,
            BUCKETS,
            dict(kind=MINI),
            ["optimizer: BlockwiseAdamW -> BlockwiseAdamMini", "--accept-mismatch optimizer"],
        ),
    ],
)
def test_contradictions_are_refused_on_every_rank(layout, form, changes, words):
    job, folder, _ = saved(2, ADAMW, "gqa", layout, form)
    answers = loaded(2, job, folder, **changes)
    assert answers[0].keys() == {"error"} and answers[0] == answers[1]
    for word in words:
        assert word in answers[0]["error"]


def test_accepted_ratios_fade_in():
    job, folder, _ = saved(2, ADAMW, "gqa", PP)
    for found in loaded(
        2,
        job,
        folder,
        **accepting("block_lr_ratios", block_lr_ratios={"preset": "paper", "qk": 4}, ratio_fade_steps=10),
    ):
        faded = 8 + (4 - 8) * (TOTAL - SAVED_AT) / 10
        assert found["rates"][0]["qk"] == pytest.approx(megatron_lr(TOTAL, faded))
        assert found["rates"][0]["vo"] == pytest.approx(megatron_lr(TOTAL, 4))


def test_adamw_goes_on_as_adam_mini_with_the_means_of_its_second_moments():
    job, folder, before = saved(2, ADAMW, "gqa", TP)
    (whole,) = loaded(1, job, folder, kind=MINI, layout=ONE, **accepting("optimizer"))
    means = before["moments"][EMBEDDING].mean(1)  # of this rank's half of the vocabulary
    assert torch.allclose(whole["moments"][EMBEDDING][: len(means)], means, rtol=1e-6, atol=0)
    job, folder, _ = saved(4, ADAMW, "gqa", TP_DP)
    for found in loaded(4, job, folder, kind=MINI, **accepting("optimizer")):
        assert worst_difference(found["weights"], whole["weights"]) < 1e-5


def test_rows_that_were_not_summed_over_tensor_parallel_ranks():
    """Each rank's part of a row has a second moment of its own, and the whole row then gets their mean."""
    local = {"row_parallel_sums": False}
    job, folder, wanted = saved(2, MINI, "gqa", TP, settings=local)
    row_parallel, parts = "decoder.layers.0.mlp.linear_fc2.weight", []
    for found in loaded(2, job, folder):
        assert all(torch.equal(found["weights"][name], value) for name, value in wanted["weights"].items())
        parts.append(found["moments"][row_parallel])
    (whole,) = loaded(1, job, folder, layout=ONE)
    assert not torch.equal(*parts)
    assert torch.allclose(whole["moments"][row_parallel], (parts[0] + parts[1]) / 2, rtol=1e-6, atol=0)


def test_adam_mini_goes_on_as_adamw_with_its_second_moments_at_every_element():
    job, folder, before = saved(1, MINI, "gpt", ONE)
    (found,) = loaded(1, job, folder, kind=ADAMW, **accepting("optimizer"))
    elements, segments = found["moments"][EMBEDDING], before["moments"][EMBEDDING]
    assert torch.equal(elements, segments.unsqueeze(1).expand_as(elements))


@pytest.mark.parametrize("layout", [ONE, DP])
def test_plain_adam_goes_on_as_blockwise_adamw(layout):
    job, folder, wanted = saved(1, PLAIN, "gpt", layout)
    (answer,) = loaded(1, job, folder, kind=ADAMW)
    assert "one without a blockwise_lr record, taken for AdamW -> BlockwiseAdamW" in answer["error"]
    (found,) = loaded(1, job, folder, kind=ADAMW, **accepting("optimizer", block_lr_ratios=ALL_ONE))
    assert worst_difference(found["weights"], wanted["weights"]) < 1e-6


def test_blockwise_adamw_goes_on_as_plain_adam():
    job, _, _ = saved(1, PLAIN, "gpt", ONE)
    with tempfile.TemporaryDirectory() as between:
        ours = replace(job, kind=ADAMW, settings={"block_lr_ratios": ALL_ONE})
        (wanted,) = pool(1).run(saving, ours, between)
        (found,) = loaded(1, job, between)
    assert worst_difference(found["weights"], wanted["weights"]) < 1e-6

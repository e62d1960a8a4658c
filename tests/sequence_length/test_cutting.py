"""What is cut of a batch, by name and by shape, beside slices written out by hand."""

import pytest
import torch

from blockwise_lr import BlockError
from blockwise_lr.sequence_length import Cutter

ROWS, FULL = 3, 20


def batch():
    ids = torch.arange(ROWS * FULL).view(ROWS, FULL)
    return {
        "input_ids": ids,
        "labels": ids + 1,
        "position_ids": torch.arange(FULL)[None],
        "token_type_ids": ids % 2,
        "loss_mask": torch.ones(ROWS, FULL),
        "attention_mask": torch.ones(ROWS, FULL),
        "use_cache": False,
        "num_items_in_batch": torch.tensor(7),
    }


def test_truncation_keeps_the_first_tokens_of_every_row():
    given = batch()
    cut, tokens = Cutter()(given, 8, FULL)
    assert tokens == ROWS * 8 and cut.keys() == given.keys()
    for name in ("input_ids", "labels", "position_ids", "token_type_ids", "loss_mask", "attention_mask"):
        assert torch.equal(cut[name], given[name][:, :8]) and cut[name].is_contiguous()
    assert cut["use_cache"] is False and cut["num_items_in_batch"] is given["num_items_in_batch"]
    assert Cutter()(given, FULL, FULL)[0]["input_ids"] is given["input_ids"]


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((ROWS, 1, FULL, FULL), (ROWS, 1, 8, 8)),
        ((1, 1, FULL, FULL), (1, 1, 8, 8)),
        ((ROWS, 1, 1, FULL), (ROWS, 1, 1, 8)),
        ((ROWS, FULL, FULL), (ROWS, 8, 8)),
    ],
)
def test_masks_are_cut_along_queries_and_keys(shape, expected):
    mask = torch.rand(shape) > 0.5
    for given in (mask, {"full_attention": mask}):
        cut, _ = Cutter()({"input_ids": batch()["input_ids"], "attention_mask": given}, 8)
        found = cut["attention_mask"] if given is mask else cut["attention_mask"]["full_attention"]
        assert torch.equal(found, mask[..., : expected[-2], : expected[-1]] if len(expected) > 2 else mask[:, :8])


def test_other_names_and_positions():
    cutter = Cutter({"bias": [2, 3], "pixels": []})
    given = {
        "inputs_embeds": torch.rand(ROWS, FULL, FULL),
        "position_ids": torch.rand(3, ROWS, FULL),  # of three axes, as Qwen2-VL has them
        "bias": torch.rand(1, 2, FULL, FULL),
        "pixels": torch.rand(FULL, 4),
    }
    cut, tokens = cutter(given, 8)
    assert {name: tuple(value.shape) for name, value in cut.items()} == {
        "inputs_embeds": (ROWS, 8, FULL),
        "position_ids": (3, ROWS, 8),
        "bias": (1, 2, 8, 8),
        "pixels": (FULL, 4),
    }
    assert tokens == ROWS * 8


def test_reshaping_loses_no_token_and_predicts_none_twice():
    given = batch()
    cut, tokens = Cutter(way="reshape")(given, 8, FULL)
    ids = given["input_ids"]
    assert torch.equal(cut["input_ids"], torch.cat([ids[:, :8], ids[:, 8:16], ids[:, 12:]])) and tokens == ROWS * FULL
    counted = cut["labels"][cut["labels"] != -100]
    assert torch.equal(counted.sort().values, given["labels"].flatten())
    assert torch.equal(cut["loss_mask"] == 0, cut["labels"] == -100)
    assert torch.equal(cut["position_ids"], torch.arange(8)[None])
    mask = torch.rand(1, 1, FULL, FULL)
    cut, _ = Cutter(way="reshape")({"input_ids": ids, "labels": ids, "attention_mask": mask}, 10)
    assert torch.equal(cut["attention_mask"][ROWS:], mask[..., 10:, 10:].expand(ROWS, 1, 10, 10))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "does not cut packed sequences (cu_seq_lens_q is given)"),
        ({"bias": torch.rand(2, FULL)}, "which dimensions of bias, of shape (2, 20), are the sequence of 20"),
        ({"labels": torch.rand(ROWS)}, "which dimensions of labels, of shape (3,)"),
        ({"past_key_values": object()}, "does not know how to cut past_key_values, a object"),
        ({"input_ids": torch.zeros(2, 40, dtype=torch.long)}, "ends at 20 tokens and a batch has rows of 40"),
        ({"input_ids": None}, "finds no token ids among"),
    ],
)
def test_what_is_not_known_stops_the_step(change, words):
    given = (
        {**batch(), **change} if "input_ids" not in change or change["input_ids"] is not None else {"x": torch.rand(3)}
    )
    with pytest.raises(BlockError) as error:
        Cutter()(given, 8, FULL)
    assert words in str(error.value)


def test_a_rest_without_labels_is_not_reshaped():
    with pytest.raises(BlockError, match="no labels to leave the rest out of"):
        Cutter(way="reshape")({"input_ids": batch()["input_ids"]}, 8)

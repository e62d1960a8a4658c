"""The recipes' data: what prepare.py writes, read as each door reads it."""

import json

import numpy as np
import pytest
from recipes.stand_in import DOCUMENTS, prepared


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("recipes") / "data")


def documents(data, side):
    """The side's documents, in text, as the flat file has them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    tokens = np.fromfile(data / f"{side}.bin", dtype=np.uint16)
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(part[:-1]) for part in np.split(tokens, ends[:-1] + 1)]


def test_documents_come_back_whole_each_on_its_side(data):
    import prepare

    wanted = list(prepare.stand_in_documents())[:DOCUMENTS]
    for side in prepare.SIDES:
        assert documents(data, side) == [text for found, text in wanted if found == side] != []


def test_meta_says_what_the_files_hold(data):
    meta = json.loads((data / "meta.json").read_text())
    tokens = {side: np.fromfile(data / f"{side}.bin", dtype=np.uint16) for side in meta["tokens"]}
    assert {side: len(found) for side, found in tokens.items()} == meta["tokens"]
    assert tokens["training"].max() < meta["vocabulary"] == 1024


def test_megatron_reads_the_same_tokens_through_its_index(data):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    indexed = IndexedDataset(str(data / "training"))
    assert len(indexed) == len(documents(data, "training"))
    assert np.array_equal(np.concatenate(list(indexed)), np.fromfile(data / "training.bin", dtype=np.uint16))


def test_without_megatron_the_flat_files_are_the_same(data, tmp_path):
    prepared(tmp_path, "--no-index")
    for name in ("training.bin", "validation.bin", "meta.json"):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes()
    assert not list(tmp_path.glob("*.idx"))


def test_about_one_document_in_2000_of_a_data_set_validates():
    import prepare

    sides = [prepare.side_of(f"text {number}") for number in range(20_000)]
    assert 3 < sides.count("validation") < 20 and {*sides} == {*prepare.SIDES}


def test_each_epoch_has_every_window_once_in_an_order_of_its_own(data):
    from sequences import Sequences

    text = Sequences(data / "validation.bin", 512)
    tokens = np.fromfile(data / "validation.bin", dtype=np.uint16)
    assert text.count == (len(tokens) - 1) // 512
    epochs = [text.batch(epoch * text.count, text.count, seed=41) for epoch in (0, 1)]
    for windows in epochs:
        assert sorted(map(tuple, windows[:, :-1].tolist())) == sorted(
            map(tuple, tokens[: 512 * text.count].reshape(-1, 512).tolist())
        )
        assert (windows[:, -1] != windows[:, -2]).any()  # the target of the last position comes from the next window
    assert not epochs[0].equal(epochs[1]) and not epochs[0].equal(text.batch(0, text.count, seed=42))


def test_a_window_has_its_number_in_every_split_over_ranks(data):
    from sequences import Sequences

    text = Sequences(data / "training.bin", 32)
    whole = text.batch(24, 12, seed=41)
    parts = [text.batch(24 + 3 * part, 3, seed=41) for part in range(4)]
    assert [row for part in parts for row in part.tolist()] == whole.tolist()


def test_data_that_is_not_there_is_named(tmp_path):
    from sequences import read_meta

    with pytest.raises(SystemExit, match=f"{tmp_path} holds no prepared data; run examples/recipes/prepare.py"):
        read_meta(tmp_path)

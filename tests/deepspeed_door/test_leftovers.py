"""Folders with more in them than one checkpoint: left by killed saves and conversions, or of the other kind."""

import shutil

import pytest
import torch
from deepspeed_door.engines import config, start, train, weights
from ranks import pool
from twins import make

from blockwise_lr.checkpoint import CheckpointError, newest_complete
from blockwise_lr.checkpoint.manifest import mark_incomplete
from blockwise_lr.deepspeed.universal import convert

KIND, TOTAL = "BlockwiseAdamMini", 10


def saved(stage, folder, options, seed=0):
    """Saves after two updates; returns the weights."""
    engine = start(make("llama", seed=seed), config(KIND, stage, steps=TOTAL, **options))
    train(engine, 2)
    engine.save_checkpoint(folder, tag="two")
    found = weights(engine)
    engine.destroy()
    return found


def loaded(stage, folder, options, universal, newest):
    """The weights after a load."""
    from blockwise_lr.deepspeed import load_newest

    engine = start(
        make("llama", seed=5),
        config(KIND, stage, steps=TOTAL, **options, **({"checkpoint": {"load_universal": True}} if universal else {})),
    )
    path, _ = load_newest(engine, folder) if newest else engine.load_checkpoint(folder)
    found = weights(engine)
    engine.destroy()
    return path, found


def same(found, wanted):
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("torn, options", [(2, {}), (3, {"dtype": "bf16"})])
def test_files_of_a_killed_save_on_more_ranks_do_no_harm(torn, options, tmp_path):
    pool(4).run(saved, torn, str(tmp_path), options, 7)
    left = {path.name for path in (tmp_path / "two").iterdir()}
    mark_incomplete(tmp_path / "two")
    wanted = pool(2).run(saved, 1, str(tmp_path), {})[0]
    assert left <= {path.name for path in (tmp_path / "two").iterdir()}
    for path, found in pool(2).run(loaded, 1, str(tmp_path), {}, False, True):
        assert "two" in path and same(found, wanted)
    convert(str(tmp_path / "two"), str(tmp_path / "universal"))
    for _, found in pool(2).run(loaded, 3, str(tmp_path), {}, True, False):
        assert same(found, wanted)


@pytest.fixture(scope="module")
def both_kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    wanted = pool(2).run(saved, 2, str(folder), {})[0]
    convert(str(folder / "two"), str(folder / "two_universal"))
    return folder, wanted


def test_the_newest_is_of_the_kind_that_the_engine_loads(both_kinds, tmp_path):
    folder, wanted = both_kinds
    for universal, tag in ((False, "two"), (True, "two_universal")):
        assert newest_complete(folder, universal=universal) == tag
        for path, found in pool(2).run(loaded, 2, str(folder), {}, universal, True):
            assert f"/{tag}/" in path and same(found, wanted)
    for universal, tag, words in ((False, "two_universal", 'set "checkpoint"'), (True, "two", "convert one")):
        shutil.copytree(folder / tag, tmp_path / str(universal) / tag)
        for error in pool(2).run(loaded, 2, str(tmp_path / str(universal)), {}, universal, True, errors=True):
            assert f"holds {tag}" in str(error) and words in str(error)


def test_a_killed_conversion_is_refused_and_not_continued(both_kinds, tmp_path):
    shutil.copytree(both_kinds[0], tmp_path / "copy")
    mark_incomplete(tmp_path / "copy" / "two_universal")
    assert newest_complete(tmp_path / "copy", universal=True) is None
    for error in pool(2).run(loaded, 2, str(tmp_path / "copy"), {}, True, False, errors=True):
        assert "two_universal is incomplete" in str(error)
    with pytest.raises(CheckpointError, match="did not finish: nothing is overwritten"):
        convert(str(tmp_path / "copy" / "two"), str(tmp_path / "copy" / "two_universal"))


@pytest.mark.parametrize(
    "stage, ranks, options, words",
    [
        (1, 2, {"dtype": "bf16"}, ["ZeRO-1 or 2 in fp32 or fp16 on 2", "ZeRO-1 or 2 in bf16 on 2"]),
        (3, 2, {}, ["this run has ZeRO-3 in"]),
        (
            1,
            3,
            {},
            ["this run has ZeRO-1 or 2 in fp32 or fp16 on 3 data-parallel ranks", "blockwise_lr.deepspeed.universal"],
        ),
        (0, 2, {}, ["this run has ZeRO-0"]),
    ],
)
def test_another_layout_is_refused_with_the_way_out(stage, ranks, options, words, both_kinds, tmp_path):
    shutil.copytree(both_kinds[0] / "two", tmp_path / "two")
    errors = pool(ranks).run(loaded, stage, str(tmp_path), options, False, True, errors=True)
    assert len({str(error) for error in errors}) == 1
    for word in ["was saved with ZeRO-1 or 2 in fp32 or fp16 on 2 data-parallel ranks", *words]:
        assert word in str(errors[0])

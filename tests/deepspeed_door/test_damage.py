"""Damaged, incomplete, exchanged and newer checkpoint files: one clear error on every rank, and nothing is touched."""

import hashlib
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed_door.engines import config, start, train, weights
from ranks import pool
from twins import make

from blockwise_lr.checkpoint import CheckpointError, newest_complete, verify

KIND, TOTAL = "BlockwiseAdamMini", 10


def saved(folder):
    engine = start(make("llama"), config(KIND, 2, steps=TOTAL))
    for number in range(2):
        train(engine, 1, first=number)
        engine.save_checkpoint(folder)
    engine.destroy()


def refusal(folder, universal, tag=None):
    """The error of a load, and whether the weights are as before."""
    options = {"checkpoint": {"load_universal": True}} if universal else {}
    engine = start(make("llama", seed=5), config(KIND, 2, steps=TOTAL, **options))
    before = weights(engine)
    message = None
    try:
        engine.load_checkpoint(folder, tag=tag)
    except CheckpointError as error:
        message = str(error)
    untouched = all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    engine.destroy()
    return message, untouched


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pool(2).run(saved, str(folder))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


def contents(folder):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


SHARD_0, SHARD_1 = (f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))
MODEL = "mp_rank_00_model_states.pt"


def truncate(tag):
    os.truncate(tag / SHARD_1, (tag / SHARD_1).stat().st_size // 2)


def flip_a_bit(tag):
    content = bytearray((tag / MODEL).read_bytes())
    content[len(content) // 2] ^= 1
    (tag / MODEL).write_bytes(content)


def exchange(tag):
    a, b = (tag / SHARD_0).read_bytes(), (tag / SHARD_1).read_bytes()
    (tag / SHARD_0).write_bytes(b)
    (tag / SHARD_1).write_bytes(a)


def take_from_another_step(tag):
    shutil.copy(tag.parent / "global_step1" / SHARD_0, tag / SHARD_0)


def remove(tag):
    (tag / SHARD_0).unlink()


def leave_incomplete(tag):
    from blockwise_lr.checkpoint.manifest import mark_incomplete

    mark_incomplete(tag)


def edit_the_manifest(tag):
    text = (tag / "blockwise_lr.json").read_text()
    (tag / "blockwise_lr.json").write_text(text.replace('"steps": 2', '"steps": 3'))


def make_newer(tag):
    content = json.loads((tag / "blockwise_lr.json").read_text())
    (tag / "blockwise_lr.json").write_text(json.dumps({**content, "format": 99}))


@pytest.mark.parametrize(
    "damage, words",
    [
        (truncate, [SHARD_1, "was saved with"]),
        (flip_a_bit, [MODEL, "other contents than were saved"]),
        (exchange, [SHARD_0]),
        (take_from_another_step, [SHARD_0, "other contents"]),
        (remove, [f"{SHARD_0} is missing"]),
        (leave_incomplete, ["is incomplete", "did not finish"]),
        (edit_the_manifest, ["blockwise_lr.json is damaged", "load another checkpoint"]),
        (make_newer, ["format 99", "install the version that wrote it"]),
    ],
)
def test_damage_is_refused_on_every_rank(damage, words, folder):
    damage(folder / "global_step2")
    before = contents(folder)
    answers = pool(2).run(refusal, str(folder), False)
    assert answers[0] == answers[1]
    message, untouched = answers[0]
    assert untouched and contents(folder) == before
    for word in words:
        assert word in message
    if "damaged (" not in message and "format" not in message:
        assert "tag='global_step1'" in message
    assert newest_complete(folder, checksums=True) == "global_step1"
    with pytest.raises(CheckpointError):
        verify(folder / "global_step2")


def saved_on_a_full_disk(folder):
    """The error of a save during which rank 1 cannot write more than 1 kB to a file; a later save succeeds."""
    engine = start(make("llama"), config(KIND, 2, steps=TOTAL))
    train(engine, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    message, tags = None, None
    try:
        engine.save_checkpoint(folder)
    except CheckpointError as error:
        message, tags = str(error), (newest_complete(folder), Path(folder, "latest").read_text())
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    engine.save_checkpoint(folder)
    engine.destroy()
    return message, tags, newest_complete(folder)


def test_one_rank_that_cannot_write_stops_all_and_the_newest_stays(folder):
    for message, before, after in pool(2).run(saved_on_a_full_disk, str(folder)):
        assert "global_step3 failed on rank 1 of 2; rank 1: " in message
        assert before == ("global_step2", "global_step2") and after == "global_step3"


def newest(folder):
    from blockwise_lr.deepspeed import load_newest

    engine = start(make("llama", seed=5), config(KIND, 2, steps=TOTAL))
    path, _ = load_newest(engine, folder)
    steps = engine.global_steps
    engine.destroy()
    return path, steps


def test_load_newest_passes_over_damage(folder):
    flip_a_bit(folder / "global_step2")
    for path, steps in pool(2).run(newest, str(folder)):
        assert "global_step1" in path and steps == 1
    flip_a_bit(folder / "global_step1")
    before = contents(folder)
    for error in pool(2).run(newest, str(folder), errors=True):
        assert "every complete checkpoint" in str(error) and "global_step1: mp_rank_00" in str(error)
    assert contents(folder) == before


def test_load_newest_stops_at_a_newer_format_and_starts_anew_after_unfinished_saves(folder):
    make_newer(folder / "global_step1")
    for error in pool(2).run(newest, str(folder), errors=True):
        assert type(error).__name__ == "VersionError" and "format 99" in str(error)
    for tag in ("global_step1", "global_step2"):
        leave_incomplete(folder / tag)
    assert pool(2).run(newest, str(folder)) == [(None, 0), (None, 0)]


def test_one_ranks_unreadable_file_stops_all_without_a_manifest_too(folder):
    truncate(folder / "global_step2")
    (folder / "global_step2" / "blockwise_lr.json").unlink()
    messages = [message for message, _ in pool(2).run(refusal, str(folder), False)]
    assert "loading failed on rank 1 of 2" in messages[0] and messages[0] == messages[1]


def version_skewed(folder):
    """Loads what a newer package has written into the state itself, its folder having no manifest."""
    engine = start(make("llama", seed=5), config(KIND, 2, steps=TOTAL))
    state = engine.optimizer.optimizer.state_dict()
    for group in state["param_groups"]:
        group["blockwise_lr"] = {"format": 99, "version": "9.0"}
    try:
        engine.basic_optimizer.load_state_dict(state)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()


def test_a_newer_format_is_refused(folder):
    for message in pool(2).run(version_skewed, str(folder)):
        assert "written by blockwise-lr 9.0 in format 99" in message and "blockwise-lr>=9.0" in message


@pytest.fixture(scope="module")
def universal(original, tmp_path_factory):
    from blockwise_lr.deepspeed.universal import convert

    folder = tmp_path_factory.mktemp("universal")
    convert(str(original / "global_step2"), str(folder / "two"))
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        convert(str(original / "global_step2"), str(folder / "two"))
    return folder


MOMENT = Path("zero", "model.layers.0.mlp.up_proj.weight", "exp_avg_sq.pt")


@pytest.mark.parametrize("with_manifest, words", [(True, ["exp_avg_sq.pt"]), (False, ["exp_avg_sq.pt cannot be read"])])
def test_damaged_universal_files_are_refused(with_manifest, words, universal, tmp_path):
    shutil.copytree(universal, tmp_path / "copy")
    tag = tmp_path / "copy" / "two"
    os.truncate(tag / MOMENT, 300)
    if not with_manifest:
        (tag / "blockwise_lr.json").unlink()
    answers = pool(2).run(refusal, str(tmp_path / "copy"), True)
    assert answers[0] == answers[1] and answers[0][1]
    for word in words:
        assert word in answers[0][0]


def test_a_damaged_checkpoint_is_not_converted(folder, tmp_path):
    from blockwise_lr.deepspeed.universal import convert

    truncate(folder / "global_step2")
    with pytest.raises(CheckpointError, match="tag='global_step1'"):
        convert(str(folder / "global_step2"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


class Code:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("file", [Path("zero", "optimizer_state.pt"), MOMENT])
def test_code_in_a_universal_file_is_not_run(file, universal, tmp_path):
    shutil.copytree(universal, tmp_path / "copy")
    tag = tmp_path / "copy" / "two"
    torch.save({"param_groups": [{"mine": Code(tmp_path / "ran")}]}, tag / file)
    (tag / "blockwise_lr.json").unlink()
    answers = pool(2).run(refusal, str(tmp_path / "copy"), True)
    assert answers[0] == answers[1] and answers[0][1] and f"{file} cannot be read" in answers[0][0]
    assert not (tmp_path / "ran").exists()


def test_code_in_an_optimizer_file_is_not_run_by_the_conversion(folder, tmp_path):
    from blockwise_lr.deepspeed.universal import convert

    tag = folder / "global_step2"
    states = torch.load(tag / SHARD_1, weights_only=False)
    torch.save({**states, "ds_config": Code(tmp_path / "ran")}, tag / SHARD_1)
    (tag / "blockwise_lr.json").unlink()
    with pytest.raises(CheckpointError, match=f"{SHARD_1} holds more than tensors"):
        convert(str(tag), str(tmp_path / "out"))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def without_checksums(folder):
    """A save and a load with file sizes as the only check."""
    engine = start(make("llama"), config(KIND, 2, steps=TOTAL, checkpoint={"checksums": False}))
    train(engine, 1)
    engine.save_checkpoint(folder, tag="one")
    engine.load_checkpoint(folder, tag="one")
    for path in Path(folder, "one").glob(f"*pp_rank_{dist.get_rank()}_*"):
        os.truncate(path, 0)  # kills who still has it mapped
    train(engine, 1)
    engine.destroy()


def test_checksums_can_be_left_out(tmp_path):
    import zipfile

    pool(2).run(without_checksums, str(tmp_path))
    files = json.loads((tmp_path / "one" / "blockwise_lr.json").read_text())["files"]
    assert len(files) == 3 and all(entry["xxh3"] is None and entry["size"] for entry in files.values())
    assert zipfile.ZipFile(tmp_path / "one" / MODEL).testzip() is None  # torch.save's own sums are there then


def test_shards_that_overwrite_each_other_are_not_saved():
    """As under DeepSpeed's sequence parallelism through ``mesh_param``, where two ranks have one file."""
    from blockwise_lr.checkpoint.manifest import Layout
    from blockwise_lr.deepspeed.checkpoint import _joined_layouts

    one, other = (
        Layout(sharding="ZeRO-1 or 2", precision="bf16", ranks=2, flats={SHARD_0: digest}) for digest in ("a", "b")
    )
    with pytest.raises(CheckpointError, match=f"rank 1 writes the state of its own shards to {SHARD_0}"):
        _joined_layouts([one, other])
    assert _joined_layouts([one, one]).flats == {SHARD_0: "a"}

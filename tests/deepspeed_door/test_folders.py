"""Ranks that see different folders, pointers that lead nowhere, broken neighbours, full disks: one clear error on every
rank, or the next intact checkpoint; never a hang, and never a new start beside a complete checkpoint."""

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

from blockwise_lr.checkpoint import CheckpointError, Manifest, newest_complete, verify

KIND, TOTAL = "BlockwiseAdamW", 10
MODEL, SHARD_1 = "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def saved(folder, tags):
    engine = start(make("llama"), config(KIND, 2, steps=TOTAL))
    for number, tag in enumerate(tags):
        train(engine, 1, first=number)
        engine.save_checkpoint(folder, tag=tag)
    engine.destroy()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pool(2).run(saved, str(folder), ["one", "two"])
    return folder


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


def state(engine):
    """What a refused load must leave as it was, but for the weights."""
    return (
        engine.global_steps,
        engine.global_samples,
        engine.micro_steps,
        engine.skipped_steps,
        engine.lr_scheduler.state_dict(),
        [group["lr"] for group in engine.basic_optimizer.param_groups],
    )


def attempt(act, folders, options=None):
    """(path or error, global steps, whether all but the weights, whether the weights are as before) after a load or a
    save of rank r in folders[r]."""
    import blockwise_lr.deepspeed.checkpoint as module

    module.SECONDS_TO_APPEAR = 0.2
    engine = start(make("llama", seed=5), config(KIND, 2, steps=TOTAL, **(options or {})))
    was, before, folder = state(engine), weights(engine), folders[dist.get_rank() % len(folders)]
    try:
        result = act(engine, folder)
    except CheckpointError as error:
        result = f"{type(error).__name__}: {error}"
    steps, kept = engine.global_steps, state(engine) == was
    same = all(torch.equal(before[name], value) for name, value in weights(engine).items())
    engine.destroy()
    module.SECONDS_TO_APPEAR = 10.0
    return result, steps, kept, same


def load(engine, folder, tag=None, **arguments):
    return engine.load_checkpoint(folder, tag=tag, **arguments)[0]


def load_newest(engine, folder):
    from blockwise_lr.deepspeed import load_newest

    return load_newest(engine, folder)[0]


def save(engine, folder):
    return engine.save_checkpoint(folder, tag="two")


def refused(act, *folders, options=None):
    """The error, the same on both ranks but for the folder that each was given, that leaves everything as it was."""
    answers = pool(2).run(attempt, act, [str(folder) for folder in folders], options)
    message, _, kept, same = answers[0]
    told = {str(answer).replace(str(folders[-1]), str(folders[0])) for answer in answers}
    assert isinstance(message, str) and len(told) == 1, answers
    assert kept and same
    return message


# ---- ranks that see different folders


@pytest.mark.parametrize("other", ["absent", "stale"])
def test_a_save_to_folders_of_their_own_is_refused(other, folder, tmp_path):
    if other == "stale":  # what a save on shared disks has left there
        shutil.copytree(folder, tmp_path / "own")
    message = refused(save, folder, tmp_path / "own")
    assert "rank 1 does not find in" in message and "file system that all nodes share" in message
    assert newest_complete(folder) == "one" and (folder / "latest").read_text() == "two"
    with pytest.raises(CheckpointError, match="incomplete.*load it with tag='one'"):
        verify(folder / "two")


def test_the_first_rank_has_to_see_all_files_as_they_were_written(folder):
    import blockwise_lr.checkpoint.manifest as manifest

    entry = manifest.entry_of(folder / "two" / MODEL, 1)
    manifest.mark_incomplete(folder / "three")
    with pytest.raises(CheckpointError, match="model_states.pt is missing: the ranks do not share that folder"):
        manifest.mark_complete(folder / "three", {MODEL: entry}, 3, None)
    assert newest_complete(folder) == "two"


@pytest.mark.parametrize(
    "other, words",
    [
        ("another save", ["rank 1 sees another checkpoint", "file system that all nodes share"]),
        ("no manifest", ["rank 1 sees another checkpoint", "'two' without a manifest"]),
        ("absent", ["rank 1 of 2", "there is no checkpoint"]),
        ("another latest", ["rank 1 sees another checkpoint", "'one' saved at"]),
        ("a file less", [f"{MODEL} is missing as rank 1 sees it"]),
    ],
)
def test_a_load_from_different_folders_is_refused(other, words, folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    tag = "two"
    if other == "another save":
        shutil.rmtree(own / "two")
        shutil.copytree(own / "one", own / "two")
    elif other == "no manifest":
        (own / "two" / "blockwise_lr.json").unlink()
    elif other == "absent":
        shutil.rmtree(own / "two")
    elif other == "a file less":
        (own / "two" / MODEL).unlink()
    else:
        (own / "latest").write_text("one")
        tag = None
    message = refused(load_two if tag else load, folder, own)
    assert all(word in message for word in words), message


def load_two(engine, folder):
    return load(engine, folder, "two")


def test_a_rank_that_finds_nothing_does_not_start_anew(folder, tmp_path):
    message = refused(load_newest, tmp_path / "nothing", folder)
    assert "rank 1 finds 'two'" in message and "where rank 0 finds no checkpoint" in message


# ---- pointers


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "is empty"),
        ("gone", "names 'gone', which is not there"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_pointer_that_leads_nowhere_says_what_there_is(content, words, folder):
    (folder / "latest").unlink()
    if content is None:
        (folder / "latest").mkdir()
    else:
        (folder / "latest").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(load, folder)
    assert words in message and "load it with tag='two'" in message


def load_gone(engine, folder):
    return load(engine, folder, "gone")


def test_a_tag_that_is_not_there_says_what_there_is(folder):
    assert "there is no checkpoint" in refused(load_gone, folder)
    assert pool(2).run(attempt, load, [str(folder / "nowhere")])[0][0] is None  # as DeepSpeed: nothing was saved yet


# ---- broken neighbours


def write_manifest(tag, **changes):
    """A manifest that differs in some values, with a checksum that fits."""
    content = json.loads((tag / "blockwise_lr.json").read_text())
    del content["sha256"]
    content.update(changes)
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (tag / "blockwise_lr.json").write_text(json.dumps(content))


def instead(make_it):
    def damage(tag):
        path = tag / "blockwise_lr.json"
        path.unlink()
        make_it(path)

    return damage


def escaping(name):
    def damage(tag):
        files = json.loads((tag / "blockwise_lr.json").read_text())["files"]
        write_manifest(tag, files={**files, name: {"size": 0, "rank": 0}})

    return damage


BROKEN = {
    "directory": instead(Path.mkdir),
    "link to itself": instead(lambda path: path.symlink_to(path.name)),
    "link to nothing": instead(lambda path: path.symlink_to("nothing")),
    "pipe": instead(os.mkfifo),
    "deep nesting": instead(lambda path: path.write_text("[" * 100_000)),
    "no text": instead(lambda path: path.write_bytes(b"\xff\x00")),
    "a list": instead(lambda path: path.write_text("[]")),
    "text for a time": lambda tag: write_manifest(tag, saved_at="yesterday"),
    "a negative step": lambda tag: write_manifest(tag, steps=-1),
    "a list of files": lambda tag: write_manifest(tag, files=[]),
    "true for a format": lambda tag: write_manifest(tag, format=True),
    "a layout of one word": lambda tag: write_manifest(tag, layout="ZeRO-2"),
    "a file above": escaping("../one/mp_rank_00_model_states.pt"),
    "a file elsewhere": escaping("/etc/hostname"),
    "a file further above": escaping("sub/../../one/mp_rank_00_model_states.pt"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_manifest_is_damage(how, folder):
    BROKEN[how](folder / "two")
    with pytest.raises(CheckpointError, match="blockwise_lr.json is damaged"):
        Manifest.read(folder / "two")
    assert newest_complete(folder) == "one"


def load_each(engine, folder):
    """The newest of every folder below."""
    return [Path(load_newest(engine, str(path))).parent.name for path in sorted(Path(folder).iterdir())]


def test_load_newest_takes_the_intact_neighbour_of_any_broken_one(folder, tmp_path):
    below = tmp_path / "all"
    for number, how in enumerate(("directory", "link to itself", "deep nesting", "text for a time", "a file above")):
        shutil.copytree(folder, below / str(number))
        BROKEN[how](below / str(number) / "two")
    (below / "0" / "loop").symlink_to(below)
    for result, steps, _, _ in pool(2).run(attempt, load_each, [str(below)]):
        assert result == ["one"] * 5 and steps == 1


def test_tags_below_folders_are_found(folder, tmp_path):
    shutil.rmtree(folder / "one")
    (folder / "run" / "a").mkdir(parents=True)
    (folder / "two").rename(folder / "run" / "a" / "b")
    assert newest_complete(folder) == "run/a/b"
    for result, steps, _, _ in pool(2).run(attempt, load_newest, [str(folder)]):
        assert "run/a/b" in result and steps == 2
    assert "load it with tag='run/a/b'" in refused(load, folder)


def test_a_folder_without_manifests_is_no_new_start(folder):
    for tag in ("one", "two"):
        (folder / tag / "blockwise_lr.json").unlink()
    message = refused(load_newest, folder)
    assert "holds one, two without a manifest" in message and "tag='one'" in message


def test_manifests_of_format_1_are_read(folder):
    content = json.loads((folder / "two" / "blockwise_lr.json").read_text())
    files = {
        name: {
            "size": entry["size"],
            "rank": entry["rank"],
            "sha256": hashlib.sha256((folder / "two" / name).read_bytes()).hexdigest(),
        }
        for name, entry in content["files"].items()
    }
    layout = {key: content["layout"][key] for key in ("sharding", "precision", "ranks")}
    for key in ("token", "sha256"):
        del content[key]
    content.update(format=1, files=files, layout=layout)
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "two" / "blockwise_lr.json").write_text(json.dumps(content))
    verify(folder / "two")
    for result, steps, _, _ in pool(2).run(attempt, load_two, [str(folder)]):
        assert "two" in result and steps == 2
    path = folder / "two" / MODEL
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="other contents than were saved"):
        verify(folder / "two")


# ---- loads that fail


def load_module(engine, folder):
    return load(engine, folder, load_module_only=True)


def load_into_another(engine, folder):
    """The module has one buffer more, and of one parameter other values than the optimizer knows of."""
    engine.module.model.norm.register_buffer("more", torch.zeros(1))
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    try:
        return load(engine, folder)
    except CheckpointError:
        assert all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())
        raise


def test_a_module_that_does_not_fit_is_refused_before_anything_is_loaded(folder):
    message = refused(load_into_another, folder)
    assert "model.norm.more" in message and "load_module_strict=False" in message
    for result, _, kept, _ in pool(2).run(attempt, load_module, [str(folder)]):
        assert "two" in result and kept


def load_other_scheduler(engine, folder):
    schedulers, optimizer = torch.optim.lr_scheduler, engine.basic_optimizer
    engine.lr_scheduler = schedulers.SequentialLR(
        optimizer, [schedulers.LinearLR(optimizer), schedulers.ConstantLR(optimizer)], [2]
    )
    before = state(engine)
    try:
        return load(engine, folder)
    except CheckpointError:
        assert state(engine) == before and not any(key.startswith("last_batch") for key in vars(engine.lr_scheduler))
        raise


def test_another_schedulers_state_is_refused_before_anything_is_loaded(folder):
    answers = pool(2).run(attempt, load_other_scheduler, [str(folder)])
    message, steps, _, same = answers[0]
    assert steps == 0 and same and answers[1][0] == message
    assert "is not one of a SequentialLR" in message and "load_lr_scheduler_states=False" in message


def test_counters_are_put_back_where_deepspeed_fails_under_way(folder):
    (folder / "two" / "blockwise_lr.json").unlink()
    path = folder / "two" / SHARD_1
    states = torch.load(path, weights_only=False)
    state = states["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    state["exp_avg"] = state["exp_avg"][:-1].clone()
    torch.save(states, path)
    answers = pool(2).run(attempt, load, [str(folder)])
    assert answers[0][0] == answers[1][0] and "exp_avg" in answers[0][0]
    assert all(kept for _, _, kept, _ in answers)


# ---- writes that fail


def save_on_a_full_disk(engine, folder):
    os.makedirs(os.path.join(folder, "three"), exist_ok=True)
    path = os.path.join(folder, "three", f"zero_pp_rank_{dist.get_rank()}_mp_rank_00_optim_states.pt")
    os.symlink("/dev/full", path)
    dist.barrier()
    return engine.save_checkpoint(folder, tag="three")


def save_with_a_limit(engine, folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    dist.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        return engine.save_checkpoint(folder, tag="three")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save_below_a_file(engine, folder):
    return engine.save_checkpoint(os.path.join(folder, "latest"), tag="three")


def save_what_does_not_pickle(engine, folder):
    return engine.save_checkpoint(folder, tag="three", client_state={"mine": lambda: None})


@pytest.mark.parametrize(
    "act, words",
    [
        (save_on_a_full_disk, ["zero_pp_rank_0_mp_rank_00_optim_states.pt: No space left on device", "bytes are free"]),
        (save_with_a_limit, ["three", "File too large", "bytes are free"]),
        (save_below_a_file, ["cannot make the folder", "latest/three: Not a directory"]),
        (save_what_does_not_pickle, ["cannot write", MODEL, "client_state"]),
    ],
)
def test_a_write_that_fails_on_all_ranks_says_where_and_why(act, words, folder):
    answers = pool(2).run(attempt, act, [str(folder)])
    assert answers[0][0] == answers[1][0] and all(word in answers[0][0] for word in words), answers[0][0]
    assert "unexpected pos" not in answers[0][0]
    assert newest_complete(folder) == "two" and (folder / "latest").read_text() == "two"

"""The examples for frameworks beside ours, run as far as a CPU allows."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from ranks import pool
from recipes import framework_runs as runs
from twins import worst_difference


@pytest.mark.parametrize(
    "kind, family", [("BlockwiseAdamW", "llama"), ("BlockwiseAdamMini", "gpt2"), ("BlockwiseLion", "llama_tied")]
)
def test_accelerate_shards_what_was_built_before(kind, family, tmp_path, record_property):
    folder = str(tmp_path / "state")
    wanted = pool(1).run(runs.whole, kind, family)[0]
    first, second = pool(2).run(runs.accelerate_fsdp2, kind, family, None, folder)
    assert first["sharded"] == len(wanted) and first["weights"].keys() == wanted.keys()
    assert worst_difference(first["weights"], second["weights"]) == 0
    worst = worst_difference(first["weights"], wanted, kind)
    record_property("worst", worst)
    assert worst < 1e-5
    resumed = pool(2).run(runs.accelerate_fsdp2, kind, family, folder)[0]
    assert resumed["losses"] == first["losses"][runs.SAVE_AT :]
    assert worst_difference(resumed["weights"], first["weights"]) == 0


def test_torchtitans_container_splits_its_fused_weights(record_property):
    pytest.importorskip("torchtitan", reason="torchtitan is not installed")
    found = pool(2).run(runs.titan, "BlockwiseAdamW")
    wanted = pool(1).run(runs.titan_by_hand, found[0]["start"])[0]
    worst = worst_difference(found[0]["end"], wanted)
    record_property("worst", worst)
    assert worst < 1e-5
    assert worst_difference(found[0]["end"], found[1]["end"]) == 0
    assert worst_difference(found[0]["resumed"], found[0]["end"]) == 0


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning_goes_on_from_its_checkpoint(tmp_path):
    def losses(*words):
        """Of each rank, by rank."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(runs.FOLDER / "lightning_fsdp2.py"), "--accelerator", "cpu", "--devices", "2", "--steps", "8"]
        settings = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *words], capture_output=True, text=True, env=settings, timeout=250)
        assert done.returncode == 0, done.stderr[-4000:]
        found = re.findall(r"rank (\d) losses \[(.*)\]", done.stdout)
        return [[float(loss) for loss in text.split(", ")] for _, text in sorted(found)]

    whole = losses()
    first = losses("--until", "4", "--save", str(tmp_path / "state"))
    resumed = losses("--resume", str(tmp_path / "state"))
    for rank in range(2):
        assert len(whole[rank]) == 8 and whole[rank][:4] == first[rank]
        assert whole[rank][4:] == resumed[rank]
        assert sum(whole[rank][4:]) < sum(whole[rank][:4])  # the same tokens at every step

"""The examples for frameworks beside ours, run as far as a CPU allows."""

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

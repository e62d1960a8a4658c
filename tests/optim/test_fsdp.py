"""FSDP2: weights equal those of one process with the whole model."""
import pytest
from optim import fsdp

from ranks import pool
from twins import worst_difference


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("optimizer", ["BlockwiseAdamW", "BlockwiseAdamMini"])
def test_sharded_parameters_train_as_whole_ones(kind, optimizer):
    wanted = pool(1).run(fsdp.train, kind, optimizer, 1)[0]
    found = pool(2).run(fsdp.train, kind, optimizer, 2)
    assert worst_difference(found[0], wanted) < 1e-5
    assert worst_difference(found[0], found[1]) == 0


def test_other_placements_are_refused():
    for message in pool(2).run(fsdp.refuse_other_placements):
        assert "dimension 0" in message and "wte.weight" in message

"""States that earlier versions saved are loaded and go on to the end they had there."""

from pathlib import Path

import pytest
import torch
from checkpoint import old_states

SAVED = sorted((Path(__file__).parent / "saved").glob("*.pt"))


@pytest.mark.parametrize("file", SAVED, ids=lambda file: file.stem)
@pytest.mark.parametrize("kind", old_states.KINDS)
def test_states_of_earlier_versions_go_on_to_the_same_end(file, kind):
    saved = torch.load(file, weights_only=True)[kind]
    model, optimizer, schedule = old_states.build(kind)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    old_states.train(model, optimizer, schedule, range(old_states.MIDDLE, old_states.END))
    for name, value in model.state_dict().items():  # the end is that of another machine, whose additions may be fused
        assert torch.allclose(value, saved["end"][name], rtol=1e-5, atol=1e-7), name

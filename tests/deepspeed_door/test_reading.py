"""Files of DeepSpeed are read without running code that lies in them, whichever Python wrote them."""

import pickle

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from blockwise_lr.deepspeed.reading import read


class ByName:
    """Pickles as early releases of Python 3.11 (3.11.2 on Debian 12) pickle members of enums: ``getattr(owner, name)``."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_stages_saved_by_any_python(tmp_path):
    file = tmp_path / "states.pt"
    torch.save({"zero_stage": ByName(ZeroStageEnum, "optimizer_states")}, file)
    assert read(file) == {"zero_stage": ZeroStageEnum.optimizer_states}


@pytest.mark.parametrize("owner, name", [(ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro"), (dict, "fromkeys")])
def test_no_other_attribute_is_read(owner, name, tmp_path):
    file = tmp_path / "states.pt"
    torch.save({"zero_stage": ByName(owner, name)}, file)
    with pytest.raises(pickle.UnpicklingError):
        read(file)

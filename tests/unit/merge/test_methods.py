"""Methods refuse what they cannot do, in one line; formulas and determinism are tested in tests/parity."""

import pytest
import torch

from model_fusion.errors import InputError
from model_fusion.merge.methods import get, merge_state_dicts
from model_fusion.merge.methods.ties import Trimmed


def test_bad_input_is_refused():
    a = torch.ones(3)
    with pytest.raises(InputError, match="sum to 0"):
        merge_state_dicts("linear", [{"w": a}, {"w": a}], model_params=[{"weight": 0.5}, {"weight": -0.5}])
    with pytest.raises(InputError, match=r"density must lie in \[0, 1\]"):
        Trimmed(density=50)
    with pytest.raises(InputError, match="did you mean 'density'"):
        merge_state_dicts("ties", [{"w": a}], {"w": a}, model_params=[{"densty": 0.5}])
    with pytest.raises(InputError, match="did you mean 'ties'"):
        get("tie")


def test_global_trim_keeps_a_share_of_the_model():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    model = {"a": torch.tensor([4.0, 3, 2, 1]), "b": torch.full((4,), 0.5)}
    out = merge_state_dicts("ties", [model], base, [{"density": 0.5}], trim="global")
    assert torch.equal(out["a"], model["a"])
    assert not out["b"].any()

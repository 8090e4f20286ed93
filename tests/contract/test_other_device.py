"""Every method on tensors of another device gives the CPU's result, and mixes nothing of the two."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from elsewhere import DEVICE, Elsewhere
from model_fusion.merge.methods import Key, build, get, model_stock
from parity import reference
from parity.cases import CASES, Case, draw

SHAPES = ((30, 40), (600,))


def merged(case: Case, shape: tuple[int, ...], move: Callable[[Tensor], Tensor]) -> Tensor:
    models, base, each, masks = draw(case, shape, 3)
    method = get(case.method)
    known = {"fisher", "gram"} & set(case.each) and masks[0] is not None

    def tensor(values: object) -> Tensor:
        return move(torch.as_tensor(values).to(torch.bfloat16))

    data = [move(torch.as_tensor(mask).float()) for mask in masks] if known else None
    parts = method.stream(
        [tensor(m) for m in models],
        None if base is None else tensor(base),
        [build(method.model_params, values, case.method) for values in each],
        build(method.params, case.params, case.method),
        Key(name="x", depth=reference.DEPTH, data=data),
        torch.bfloat16,
    )
    return torch.cat([part.cpu().clone() for part in parts])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_method_stays_on_its_inputs_device(case: Case, shape: tuple[int, ...]) -> None:
    plain = merged(case, shape, lambda tensor: tensor)
    with Elsewhere() as place:
        other = merged(case, shape, lambda tensor: tensor.to(DEVICE))
    assert place.moved > 0
    assert torch.equal(plain, other)


def test_a_ratio_left_on_the_cpu_turns_the_test_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """What model_stock did: its one-element ratio was made on the CPU."""
    made = model_stock._ratio
    monkeypatch.setattr(model_stock, "_ratio", lambda *given: made(*given).cpu())
    case = next(case for case in CASES if case.method == "model_stock")
    with Elsewhere(), pytest.raises(RuntimeError, match="two devices"):
        merged(case, (600,), lambda tensor: tensor.to(DEVICE))

"""Training goes on after an interrupt as if nothing had happened."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model_fusion.errors import IntegrityError
from model_fusion.training.loop import History, Measure, TrainSettings, train

STEPS = 12


class Line(nn.Module):
    """Least squares on 16 points; at step `at` something happens."""

    def __init__(self, at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.x, self.y = torch.randn(16, 3), torch.randn(16)
        self.weight = nn.Parameter(torch.zeros(3))
        self.at, self.calls = at, 0

    def forward(self, indices: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return (self.x[indices] @ self.weight - self.y[indices]).pow(2).mean()


def run(model: Line, state: Path, *, fingerprint: str = "one", keep: bool = False) -> History:
    return train(
        model,
        [model.weight],
        16,
        lambda: Measure(float(model(torch.arange(16)).detach()), 0.0),
        TrainSettings(steps=STEPS, batch_size=4, validate_every=3, learning_rate=0.1),
        resume=state,
        keep=keep,
        fingerprint=fingerprint,
        progress=False,
    )


@pytest.fixture
def whole(tmp_path: Path) -> Line:
    model = Line()
    run(model, tmp_path / "whole.pt")
    assert not list(tmp_path.iterdir())
    return model


def test_ctrl_c_keeps_the_state_and_resuming_ends_where_an_undisturbed_run_does(whole: Line, tmp_path: Path) -> None:
    state, model, before = tmp_path / "state.pt", Line(at=6), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(model, state)
    assert signal.getsignal(signal.SIGINT) is before
    assert state.is_file()
    resumed = Line()
    history = run(resumed, state)
    assert len(history.losses) == STEPS
    assert resumed.calls < whole.calls
    assert torch.equal(resumed.weight, whole.weight)
    assert not state.exists()


def test_the_check_is_red_when_the_optimizers_state_is_lost(whole: Line, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        run(Line(at=6), state)
    data = torch.load(state, weights_only=True)
    data["optimizer"]["state"] = {}
    torch.save(data, state)
    resumed = Line()
    run(resumed, state)
    assert not torch.equal(resumed.weight, whole.weight)


def test_a_complete_state_can_be_kept_for_a_caller_that_has_yet_to_save(whole: Line, tmp_path: Path) -> None:
    state, first, again = tmp_path / "state.pt", Line(), Line()
    run(first, state, keep=True)
    history = run(again, state, keep=True)
    assert torch.equal(again.weight, whole.weight)
    assert again.calls == 0
    assert len(history.losses) == STEPS


def test_a_state_of_other_data_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    run(Line(), state, keep=True)
    with pytest.raises(IntegrityError, match="delete it to start afresh"):
        run(Line(), state, fingerprint="two")

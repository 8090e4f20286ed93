"""The router: learns separable tasks, and what is kept is what was validated."""

from dataclasses import replace

import pytest
import torch

from model_fusion.dynamic import router as router_module
from model_fusion.dynamic.router import Labelled, Routed, Router, measure, train_router
from model_fusion.errors import InputError
from model_fusion.training.loop import TrainSettings

SETTINGS = TrainSettings(steps=120, batch_size=16, learning_rate=1e-2, validate_every=20, seed=3)


def rows(seed: int, count: int = 40) -> Labelled:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return Labelled(torch.randn(count, 5, generator=generator) + 3 * torch.eye(5)[labels], labels)


def trained() -> Routed:
    return train_router(rows(0), rows(1), 3, settings=SETTINGS, progress=False)


def test_learns_and_repeats() -> None:
    first, second = trained(), trained()
    assert first.validation > 0.85
    assert measure(first.router, rows(2)).score > 0.8
    state = second.router.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.router.state_dict().items())


def kept_is_validated(found: Routed) -> bool:
    best = next(v for v in found.history.validations if v[0] == found.history.best_step)
    return measure(found.router, rows(1)).loss == best[1] and found.validation == best[2]


def test_the_kept_router_is_the_validated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_is_validated(trained())

    def running(self: Router, features: torch.Tensor) -> None:  # torch's own averages, which each call moves on
        self.train()(features)
        self.eval()

    monkeypatch.setattr(router_module.Router, "settle", running)
    assert not kept_is_validated(trained())


def test_settled_statistics_are_those_of_the_rows() -> None:
    torch.manual_seed(0)
    router, data = Router(5, 3, dropout=0.0), rows(0).features
    router.settle(data)
    settled = router(data)
    torch.testing.assert_close(router.train()(data), settled, atol=1e-4, rtol=1e-4)


def softened_as_divided() -> bool:
    router, data = trained().router, rows(2).features
    want = (router(data) / 2.5).softmax(-1)
    router.soften(2.5)
    return torch.allclose(router(data).softmax(-1), want, atol=1e-6)


def test_a_softened_router_divides_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert softened_as_divided()

    def weights_alone(self: Router, temperature: float) -> None:
        self.layers[-1].weight.data.div_(temperature)

    monkeypatch.setattr(router_module.Router, "soften", weights_alone)
    assert not softened_as_divided()


def test_a_last_batch_of_one_row_does_not_stop_it() -> None:
    assert train_router(rows(0, 33), rows(1), 3, settings=SETTINGS, progress=False).validation > 0.8
    with pytest.raises(InputError, match="at least 2 rows"):
        train_router(rows(0), rows(1), 3, settings=replace(SETTINGS, batch_size=1), progress=False)


def test_an_expert_without_rows_is_refused() -> None:
    with pytest.raises(InputError, match="no training rows of expert 3"):
        train_router(rows(0), rows(1), 4, settings=SETTINGS, progress=False)

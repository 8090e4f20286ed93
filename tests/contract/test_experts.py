"""Every kind of expert keeps one contract, whatever it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expert_cases import (
    CASES,
    ITEMS,
    check_contract,
    check_roundtrip,
    each,
    network,
)
from model_fusion.errors import InputError, IntegrityError
from model_fusion.fuse.experts import (
    load_expert,
    save_expert,
)
from model_fusion.fuse.experts.scored import ScoredExpert


@each
def test_contract(name: str) -> None:
    check_contract(CASES[name].build(), CASES[name].shape)


@each
def test_roundtrip(name: str, tmp_path: Path) -> None:
    check_roundtrip(CASES[name].build(), tmp_path, CASES[name].given())


@each
def test_tampered_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config = save_expert(CASES[name].build(), tmp_path)
    for file in config["sha256"]:
        path = tmp_path / file
        original = path.read_bytes()
        path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=file):
            load_expert(tmp_path, config, given=CASES[name].given())
        path.unlink()
        with pytest.raises(IntegrityError, match="missing"):
            load_expert(tmp_path, config, given=CASES[name].given())


@each
def test_bad_inputs_name_their_row(name: str) -> None:
    expert = CASES[name].build()
    with pytest.raises(InputError, match="row 1: total"):
        expert.encode([ITEMS[0], (99, 1, False)])
    with pytest.raises(InputError, match="at least one"):
        expert.encode([])


@each
def test_nan_features_name_row_and_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expert = CASES[name].build()
    tapped = expert._tapped  # type: ignore[attr-defined]

    def broken(prepared: Any) -> torch.Tensor:
        values = tapped(prepared).clone()
        values[2] = float("nan")
        return values

    monkeypatch.setattr(expert, "_tapped", broken)
    with pytest.raises(InputError, match=f"row 2: the {expert.kind} expert"):
        expert.encode(ITEMS)


def test_contract_goes_red_when_encoding_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    expert = CASES["torch"].build()
    monkeypatch.setattr(expert, "_tapped", lambda prepared: torch.randn(len(prepared), 2))
    with pytest.raises(AssertionError):
        check_contract(expert, (1, 4))


def test_contract_goes_red_without_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScoredExpert, "_log_probs", lambda self, scores, form: scores)
    with pytest.raises(AssertionError):
        check_contract(CASES["torch"].build(), (1, 4))


def test_roundtrip_goes_red_when_weights_are_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_fusion.fuse.experts.torch_module._fill", lambda module, state, where: None)
    with pytest.raises(AssertionError):
        check_roundtrip(CASES["torch"].build(), tmp_path, network(seed=9))


def test_without_the_hash_a_changed_weight_would_go_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_fusion.fuse.experts.registry.file_sha256", lambda path: "same")
    expert = CASES["torch"].build()
    config = save_expert(expert, tmp_path)
    path = tmp_path / "weights.safetensors"
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    again = load_expert(tmp_path, config, given=network(seed=9))
    assert not torch.equal(again.encode(ITEMS).values, expert.encode(ITEMS).values)

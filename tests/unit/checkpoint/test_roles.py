"""Roles, layers and ties from names alone, for families that name things differently."""

import pytest

from model_fusion.architecture.roles import computed, main_stack, role_of, tied, with_layer
from model_fusion.architecture.stacking import stacked_config


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "attention", 3),
        ("transformer.h.11.mlp.c_fc.weight", "mlp", 11),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "expert", 0),
        ("model.layers.0.block_sparse_moe.gate.weight", "router", 0),
        ("model.language_model.layers.5.input_layernorm.weight", "norm", 5),
        ("encoder.layer.2.attention.self.query.weight", "attention", 2),
        ("model.vision_tower.blocks.4.attn.qkv.weight", "tower", 4),
        ("wte.weight", "embedding", None),
        ("lm_head.weight", "head", None),
        ("model.norm.weight", "norm", None),
    ],
)
def test_role_and_layer(name: str, role: str, layer: int | None) -> None:
    found = role_of(name)
    assert (found.role, found.layer) == (role, layer)


def test_conv1d_is_noted_for_gpt2_only() -> None:
    assert role_of("h.0.attn.c_attn.weight", {"model_type": "gpt2"}).transposed
    assert not role_of("h.0.attn.c_attn.weight", {"model_type": "llama"}).transposed


def test_main_stack_is_the_language_model_though_the_tower_is_deeper() -> None:
    names = [f"model.vision_tower.layers.{i}.w" for i in range(40)] + [f"model.layers.{i}.w" for i in range(8)]
    assert main_stack(names) == ("model.layers", 8)


def test_with_layer_changes_the_layer_and_not_the_expert() -> None:
    assert with_layer("model.layers.1.mlp.experts.1.w", 9) == "model.layers.9.mlp.experts.1.w"


def test_ties_follow_the_config() -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    assert tied({"tie_word_embeddings": True}, names) == [tuple(names)]
    assert tied({"text_config": {"tie_word_embeddings": False}}, names) == []


def test_stacked_config_reslices_lists_and_renumbers_layers() -> None:
    config = {"text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "mlp_only_layers": [1]}}
    text = stacked_config(config, [(config, i) for i in (0, 1, 1, 2)])["text_config"]
    assert text == {"num_hidden_layers": 4, "layer_types": ["a", "b", "b", "c"], "mlp_only_layers": [1, 2]}
    assert config["text_config"]["num_hidden_layers"] == 3


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.3.self_attn.rotary_emb.inv_freq", (64,), True),
        ("h.0.attn.bias", (1, 1, 1024, 1024), True),
        ("gpt_neox.layers.0.attention.masked_bias", (), True),
        ("bert.embeddings.position_ids", (1, 512), True),
        ("h.0.attn.c_attn.bias", (2304,), False),
        ("layer.0.attn.bias", (768,), False),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (64,), False),
    ],
)
def test_buffers_that_loaders_compute(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert computed(name, shape) is expected

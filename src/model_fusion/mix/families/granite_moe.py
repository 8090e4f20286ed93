"""Granite → GraniteMoe, whose experts are stacked on disk: [E, 2I, H] and [E, H, I]."""

from model_fusion.mix.families.base import Family

GRANITE_MOE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    accepts=("granite",),
    experts={
        "block_sparse_moe.input_linear.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "block_sparse_moe.output_linear.weight": ("mlp.down_proj.weight",),
    },
    gate="block_sparse_moe.router.layer.weight",
    routers=("block_sparse_moe.router", "block_sparse_moe.router.layer"),
    count="num_local_experts",
    biases=frozenset(f"self_attn.{name}_proj.bias" for name in "qkvo"),
    bias_key="attention_bias",
    keeps=("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"),
    sets={"router_aux_loss_coef": 0.001, "output_router_logits": False},
    own_head_dim=False,  # not a field of GraniteMoeConfig
)

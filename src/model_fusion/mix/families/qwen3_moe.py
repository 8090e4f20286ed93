"""Qwen3 → Qwen3Moe."""

from model_fusion.mix.families.base import Family

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    accepts=("qwen3",),
    experts={
        "mlp.experts.{expert}.gate_proj.weight": ("mlp.gate_proj.weight",),
        "mlp.experts.{expert}.up_proj.weight": ("mlp.up_proj.weight",),
        "mlp.experts.{expert}.down_proj.weight": ("mlp.down_proj.weight",),
    },
    gate="mlp.gate.weight",
    routers=("mlp.gate",),
    count="num_experts",
    biases=frozenset(f"self_attn.{name}_proj.bias" for name in "qkvo"),
    bias_key="attention_bias",
    sets={
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
    },
    width="moe_intermediate_size",
    widens=True,
    dense_layers="mlp_only_layers",
)

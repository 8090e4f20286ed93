"""OLMo 2 → FlexOlmo."""

from model_fusion.mix.families.base import Family

FLEX_OLMO = Family(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    accepts=("olmo2",),
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
    sets={"norm_topk_prob": True, "router_aux_loss_coef": 0.01, "output_router_logits": False},
)

"""Llama and Mistral → Mixtral."""

from model_fusion.mix.families.base import Family

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    accepts=("llama", "mistral"),
    experts={
        "block_sparse_moe.experts.{expert}.w1.weight": ("mlp.gate_proj.weight",),
        "block_sparse_moe.experts.{expert}.w3.weight": ("mlp.up_proj.weight",),
        "block_sparse_moe.experts.{expert}.w2.weight": ("mlp.down_proj.weight",),
    },
    gate="block_sparse_moe.gate.weight",
    routers=("mlp.gate", "block_sparse_moe.gate"),
    count="num_local_experts",
    keeps=("sliding_window",),
    widens=True,
    sets={"router_jitter_noise": 0.0, "router_aux_loss_coef": 0.001, "output_router_logits": False},
)

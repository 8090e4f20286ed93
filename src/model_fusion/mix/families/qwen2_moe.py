"""Qwen2, and Llama with biases on q, k and v → Qwen2Moe. Also the family for shared experts and for chosen layers."""

from model_fusion.mix.families.base import Family, Shared

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    accepts=("qwen2", "llama"),
    experts={
        "mlp.experts.{expert}.gate_proj.weight": ("mlp.gate_proj.weight",),
        "mlp.experts.{expert}.up_proj.weight": ("mlp.up_proj.weight",),
        "mlp.experts.{expert}.down_proj.weight": ("mlp.down_proj.weight",),
    },
    gate="mlp.gate.weight",
    routers=("mlp.gate",),
    count="num_experts",
    biases=frozenset({"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}),
    bias_key="qkv_bias",
    sets={
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
    },
    width="moe_intermediate_size",
    own_head_dim=False,  # the class of transformers 4.57 derives it from the hidden size
    dense_layers="mlp_only_layers",
    shared=Shared(
        tensors={f"mlp.{name}.weight": f"mlp.shared_expert.{name}.weight" for name in
                 ("gate_proj", "up_proj", "down_proj")},
        gate="mlp.shared_expert_gate.weight",
        width="shared_expert_intermediate_size",
    ),
)  # fmt: skip

"""Llama → a mixture of query projections: no stock class has one, so this family's class is our own (mix/query.py)."""

from model_fusion.mix.families.base import Family

QUERY_MIXTURE = Family(
    model_type="query_mixture",
    architecture="QueryMixtureForCausalLM",
    accepts=("llama",),
    experts={"self_attn.q_proj.experts.weight": ("self_attn.q_proj.weight",)},
    gate="self_attn.q_proj.gate.weight",
    routers=("self_attn.q_proj.gate",),
    count="num_experts",
    sets={"attention_bias": False, "mlp_bias": False},
    mixes="q_proj",
    router_input="self_attn.q_proj",
)

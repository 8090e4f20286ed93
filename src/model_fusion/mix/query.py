"""The one mixture that no stock class holds: Llama whose query projections are experts. NOT a stock architecture:
vLLM, llama.cpp and transformers without this package cannot load it. Importing this module registers it.

q(x) = Σ_e w_e(x) W_e x, w the softmax over the top-k of a linear router on the attention's normed input. Keys and
values are shared, so the cache is that of the dense model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softmax
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class QueryMixtureConfig(LlamaConfig):
    """A Llama config with the number of experts and how many run for a token."""

    model_type = "query_mixture"
    num_experts: int = 2
    num_experts_per_tok: int = 2


class QueryRouter(nn.Module):
    """As the stock routers: inputs [N, H] → logits [N, E], weights [N, k] that sum to one, indices [N, k]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = linear(inputs, self.weight)
        best, indices = logits.float().topk(self.top_k, dim=-1)
        return logits, softmax(best, dim=-1).to(inputs.dtype), indices


class QueryExperts(nn.Module):
    """Query projections, stacked [E, heads · head_dim, H]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
        self.weight = nn.Parameter(torch.zeros(config.num_experts, width, config.hidden_size))


class MixedQuery(nn.Module):
    """Takes the place of `q_proj`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate, self.experts = QueryRouter(config), QueryExperts(config)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        _, weights, indices = self.gate(flat)
        count = self.experts.weight.shape[0]
        whole = torch.zeros(len(flat), count, dtype=weights.dtype, device=flat.device).scatter(1, indices, weights)
        parts = [whole[:, e : e + 1] * linear(flat, self.experts.weight[e]) for e in range(count)]
        return torch.stack(parts).sum(0).view(*inputs.shape[:-1], -1)


class QueryMixtureForCausalLM(LlamaForCausalLM):
    """Llama with `MixedQuery` in every layer."""

    config_class = QueryMixtureConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.q_proj = MixedQuery(config)
        self.post_init()


AutoConfig.register("query_mixture", QueryMixtureConfig, exist_ok=True)
AutoModelForCausalLM.register(QueryMixtureConfig, QueryMixtureForCausalLM, exist_ok=True)

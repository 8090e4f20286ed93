"""The registry of families: the first that can express a model is taken."""

from model_fusion.mix.families.base import Family
from model_fusion.mix.families.flex_olmo import FLEX_OLMO
from model_fusion.mix.families.granite_moe import GRANITE_MOE
from model_fusion.mix.families.mixtral import MIXTRAL
from model_fusion.mix.families.query_mixture import QUERY_MIXTURE
from model_fusion.mix.families.qwen2_moe import QWEN2_MOE
from model_fusion.mix.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    f.model_type: f for f in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, FLEX_OLMO, GRANITE_MOE, QUERY_MIXTURE)
}
"""Model type of the output → its table."""

__all__ = ["FAMILIES", "Family"]

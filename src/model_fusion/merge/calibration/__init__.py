"""What data-based merging measures on data: Gram matrices, squared gradients, coefficients of least entropy.

Works on any `nn.Module` through hooks. A merge takes the results as files or coefficients and sees neither data nor
modules.
"""

from model_fusion.merge.calibration.collect import collect_statistics
from model_fusion.merge.calibration.entropy import Coefficients, adamerging
from model_fusion.merge.calibration.propagate import collect_merged_statistics

__all__ = ["Coefficients", "adamerging", "collect_merged_statistics", "collect_statistics"]

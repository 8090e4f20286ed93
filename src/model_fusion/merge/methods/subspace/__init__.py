"""Methods that look at singular vectors (TSV-M, Iso-C, Iso-CTS, WUDI), and LiNeS, which looks at a layer's depth."""

from model_fusion.merge.methods.subspace import iso, lines, tsv, wudi

__all__ = ["iso", "lines", "tsv", "wudi"]

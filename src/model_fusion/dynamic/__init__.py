"""What must run to combine: Twin-Merging, masks that need the task's id, ensembles in output space."""

MODEL_TYPE = "model_fusion_twin"
"""What a twin's config.json says it is."""

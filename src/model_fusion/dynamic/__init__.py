"""What must run to combine: Twin-Merging, masks that need the task's id, ensembles in output space."""

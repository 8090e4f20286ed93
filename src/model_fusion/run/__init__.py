"""Carrying out what a fuse recipe asks for. Above `fuse` and `evaluate`, because a recipe may name a built-in task."""

"""What was changed, as recipes that nobody has read yet: forms of ΔW, updates, sources, storage rounding."""

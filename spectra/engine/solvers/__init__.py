"""The arithmetic: each solver takes matrices in float64 and knows nothing of deltas or results."""

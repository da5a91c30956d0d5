"""Today's way against ours, side by side in one run: `python -m benchmarks`."""

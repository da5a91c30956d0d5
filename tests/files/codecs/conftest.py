"""What makes the stored weights needs libraries that the tests do without."""

collect_ignore = ["make_weights.py"]

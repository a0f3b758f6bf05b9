"""Speed and accuracy per network evaluation: ``python -m benchmarks.NAME [--quick] [--json FILE]``."""

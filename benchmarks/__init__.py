"""Speed and accuracy per network call: ``python -m benchmarks.NAME [--quick] [--json FILE]``."""

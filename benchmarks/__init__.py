"""Measurements on GPUs: python -m benchmarks.NAME --help. docs/log.md has what they gave."""

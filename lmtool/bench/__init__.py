"""Measurement: seeded workloads, what the machine allows, what the engine does, and the two side by side.

Drives the engine's core with token ids. Knows no text, no HTTP and no kernels.
"""

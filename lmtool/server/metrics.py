"""Figures for Prometheus, under vLLM's names with ``lmtool:`` before them. Knows no routes."""

from prometheus_client import CollectorRegistry


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()

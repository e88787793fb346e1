"""The report of runs: one HTML file."""

from .page import write

__all__ = ["write"]

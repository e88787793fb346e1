"""Fused kernels for stepdistill, installed as `stepdistill_kernels`."""

from .attention_jvp import attention_jvp, merge

__version__ = "0.1.0"
__all__ = ["attention_jvp", "merge"]

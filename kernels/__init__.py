"""Fused kernels for stepdistill, installed as `stepdistill_kernels`. The first, attention_jvp, is not written yet."""

__version__ = "0.1.0"

"""Fused kernels for stepdistill, installed as `stepdistill_kernels`."""

__version__ = "0.1.0"
__all__ = ["attention_jvp", "merge"]

if __name__ == "stepdistill_kernels":  # transformers, run in a checkout, imports this folder as `kernels` to see its version;
    from .attention_jvp import attention_jvp, merge  # an operator that is defined twice is lost, and calling it crashes

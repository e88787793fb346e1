"""Fused kernels for stepdistill, installed as `stepdistill_kernels`."""

__version__ = "0.1.0"
__all__ = ["attention_jvp", "merge"]

# Where the checkout is on the path, transformers imports this folder as `kernels`, to see the version of Hugging Face's package
# of that name. An operator must not be defined again then: the first would be lost, and calling it crashes.
if __name__ == "stepdistill_kernels":
    from .attention_jvp import attention_jvp, merge

"""Packages and their data; all else is in pyproject.toml.

kernels/ must not be importable as `kernels` (diffusers imports Hugging Face's package of that name), and recipes/ stays
where people look for it; both are installed under names of their own.
"""

from setuptools import find_packages, setup

DATA = ("json", "txt", "md", "safetensors", "npz", "png", "html")

setup(
    packages=[*find_packages(include=["stepdistill", "stepdistill.*"]), "stepdistill_kernels", "stepdistill_recipes"],
    package_dir={"stepdistill_kernels": "kernels", "stepdistill_recipes": "recipes"},
    package_data={
        "stepdistill": [*(f"**/*.{kind}" for kind in DATA), "**/SHA256SUMS"],
        "stepdistill_recipes": ["*.yaml"],
    },
    include_package_data=False,
)

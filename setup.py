"""Maps the top-level folder kernels/ into the package as `der_fast.kernels`; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

PACKAGES = ["der_fast", *[f"der_fast.{name}" for name in find_packages("der_fast")]]
KERNELS = ["der_fast.kernels", *[f"der_fast.kernels.{name}" for name in find_packages("kernels")]]

setup(packages=PACKAGES + KERNELS, package_dir={"der_fast": "der_fast", "der_fast.kernels": "kernels"})

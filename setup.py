"""Builds the native module with CMake and maps kernels/ into the package as `der_fast.kernels`; the rest is in pyproject.toml.

DER_FAST_CUDA=AUTO|ON|OFF in the environment decides about CUDA: AUTO, the default, includes it if a working nvcc is found.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGES = ["der_fast", *[f"der_fast.{name}" for name in find_packages("der_fast")]]
KERNELS = ["der_fast.kernels", *[f"der_fast.kernels.{name}" for name in find_packages("kernels")]]


class CMakeBuild(build_ext):
    """Lets CMake build every extension."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        scratch = Path(self.build_temp).resolve() / "cmake"
        scratch.mkdir(parents=True, exist_ok=True)
        settings = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target),
            # A build folder outlives the environment that pip made for it, so paths into that environment must be set again.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "DER_FAST_CUDA": os.environ.get("DER_FAST_CUDA", "AUTO").upper(),
        }
        options = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(scratch), "-G", "Ninja", *options], check=True)
        subprocess.run(["cmake", "--build", str(scratch), "--target", "_C"], check=True)


setup(
    packages=PACKAGES + KERNELS,
    package_dir={"der_fast": "der_fast", "der_fast.kernels": "kernels"},
    ext_modules=[Extension("der_fast._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)

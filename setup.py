"""Compiles the search and the networks for CPUs once for each instruction set; all else is in pyproject.toml.

The modules are installed beside the package, not in it: a Ray worker imports the package from the source tree in its
working directory, which has no compiled files. Each module is optional: without a compiler PyTorch does their work.
"""

from __future__ import annotations

import os
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Never -ffast-math: loading a library built with it disables denormals in the whole process and removes tests for NaN.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-pthread"]
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]  # gcc 12 warns about its own headers
BUILDS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    BUILDS["avx2"] = ["-mavx2", "-mfma"]
    BUILDS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]


class BuildEach(build_ext):
    """Gives each module its own object file, as the builds of one source file share its name."""

    def build_extension(self, ext: Extension) -> None:
        """Build one module in a temporary directory of its name."""
        shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared


setup(
    cmdclass={"build_ext": BuildEach},
    ext_modules=[
        Extension(
            f"_clarity_{module}_{name}",
            [f"clarity/native/{source}.cpp"],
            define_macros=[("CLARITY_MODULE", f"_clarity_{module}_{name}")],
            extra_compile_args=FLAGS + flags,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for module, source in (("engine", "search"), ("maps", "maps"))
        for name, flags in BUILDS.items()
    ],
)

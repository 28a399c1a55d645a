"""The search for CPUs, compiled once for each instruction set; everything else is in pyproject.toml.

The modules lie beside the package and not in it: a Ray worker imports the package from the source tree in its working
directory, where a compiled file would be missing. Each is optional: without a compiler the search runs in PyTorch.
"""

from __future__ import annotations

import os
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Never -ffast-math: loading a library built with it switches denormals off for the whole process, and NaN goes unseen.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-pthread"]
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]  # no call crosses a file; gcc 12 warns about its own headers
SETS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    SETS["avx2"] = ["-mavx2", "-mfma"]
    SETS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]


class BuildEach(build_ext):
    """Gives each module an object file of its own: they share their one source."""

    def build_extension(self, ext: Extension) -> None:
        """Build one module under a temporary directory of its name."""
        shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared


setup(
    cmdclass={"build_ext": BuildEach},
    ext_modules=[
        Extension(
            f"_clarity_native_{name}",
            ["clarity/native/search.cpp"],
            define_macros=[("CLARITY_MODULE", f"_clarity_native_{name}")],
            extra_compile_args=FLAGS + flags,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for name, flags in SETS.items()
    ],
)

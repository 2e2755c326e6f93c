"""The one thing pyproject.toml cannot say: the C kernel. Where no compiler is at hand, torch's operators serve instead."""

import sys

from setuptools import Extension, setup

native = Extension(
    "shira.kernels._native",
    ["src/shira/kernels/native.c"],
    # no -ffast-math: linked into a shared library, it changes how the whole process rounds
    extra_compile_args=[] if sys.platform == "win32" else ["-O3", "-fopenmp-simd", "-pthread"],
    extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
    py_limited_api=True,
    optional=True,
)
setup(ext_modules=[native], options={"bdist_wheel": {"py_limited_api": "cp311"}})

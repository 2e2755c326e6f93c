"""The one thing pyproject.toml cannot say: the C kernel. Where no compiler is at hand, torch's operators serve instead."""

import platform
import sys

from setuptools import Extension, setup

# no -ffast-math: linked into a shared library, it changes how the whole process rounds
FLAGS = ["-O3", "-fopenmp-simd", "-pthread", "-fvisibility=hidden"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")  # where the processor has it: native.h has it chosen when it is loaded

native = Extension(
    "shira.kernels.cpu._native",
    [f"src/shira/kernels/cpu/{name}.c" for name in ("native", "unite", "combine")],
    depends=["src/shira/kernels/cpu/native.h"],
    extra_compile_args=[] if sys.platform == "win32" else FLAGS,
    extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
    py_limited_api=True,
    optional=True,
)
setup(ext_modules=[native], options={"bdist_wheel": {"py_limited_api": "cp311"}})

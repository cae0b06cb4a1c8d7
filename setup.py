"""Everything but the native modules is declared in pyproject.toml.

The op library for TensorFlow is built without TensorFlow: it is linked with an empty library of the name that TensorFlow's own
has at run time. Where there is no C++ compiler the rest is installed all the same, and commlib.tensorflow says what is missing.
"""

import pathlib
import subprocess

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

STUB = "tensorflow_framework"

tensorflow_ops = Extension(
    "commlib.tensorflow._ops",
    sources=["native/tensorflow_calls.cc", "native/tensorflow_ops.cc"],
    include_dirs=["native"],
    depends=["native/commlib.h", "native/tensorflow_abi.h", "native/tensorflow_calls.h", "native/tensorflow_ops.h"],
    extra_compile_args=["-std=c++17", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-Wl,--no-as-needed", f"-l{STUB}", "-Wl,--as-needed", "-ldl", "-pthread"],
    language="c++",
    optional=True,
    py_limited_api=True,
)


class BuildExtensions(build_ext):
    """Makes the stub before the op library is linked."""

    def build_extension(self, extension):
        if extension.name == tensorflow_ops.name:
            folder = pathlib.Path(self.build_temp, "stub")
            folder.mkdir(parents=True, exist_ok=True)
            source = folder / "stub.c"
            source.write_text("/* Stands for TensorFlow's library while ours is linked. */\n")
            subprocess.run([*self.compiler.compiler, "-shared", "-fPIC", f"-Wl,-soname,lib{STUB}.so.2", "-o",
                            str(folder / f"lib{STUB}.so"), str(source)], check=True)  # fmt: skip
            extension.library_dirs = [str(folder)]
        super().build_extension(extension)


setup(
    cffi_modules=["native/build.py:ffibuilder"],
    ext_modules=[tensorflow_ops],
    cmdclass={"build_ext": BuildExtensions},
    options={"bdist_wheel": {"py_limited_api": "cp39"}},  # one wheel for every CPython from 3.9 on
)

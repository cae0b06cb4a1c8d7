"""Everything but the native module is declared in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=["native/build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp39"}},  # one wheel for every CPython from 3.9 on
)

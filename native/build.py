"""Builds commlib._native: the C engine as a cffi API-mode module for the stable ABI (one binary for every CPython >= 3.9).

cffi reads the same header as the compiler, without its '#' lines. Nothing here depends on the machine that builds: kernels for
several instruction sets are compiled in and chosen at run time.
"""

import pathlib

import cffi

NATIVE = pathlib.Path(__file__).resolve().parent
ROOT = NATIVE.parent


def _declarations():
    lines = (NATIVE / "commlib.h").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def _sources():
    return sorted(str(path.relative_to(ROOT)) for path in NATIVE.glob("*.c"))


ffibuilder = cffi.FFI()
ffibuilder.cdef(_declarations())
ffibuilder.set_source(
    "commlib._native",
    '#include "commlib.h"',
    sources=_sources(),
    include_dirs=["native"],
    depends=sorted(str(path.relative_to(ROOT)) for path in NATIVE.glob("*.h")),
    extra_compile_args=["-std=gnu11", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
    libraries=["m"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)

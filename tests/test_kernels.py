"""Every kernel set against plain NumPy, bit by bit: each dtype, reduction, length, alignment and special value.

The reference below is slow and literal on purpose: it states the rules of native/reduce.h a second time.
"""

import itertools
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from commlib._native import ffi, lib

ROOT = Path(__file__).resolve().parent.parent
SEED = 20240607
OFFSETS = (0, 1, 2, 4, 8, 31)
LENGTHS = range(131)
MARGIN = 64

# dtype: how NumPy holds its bits, and the canonical NaN of a float
INTEGERS = {
    lib.CL_UINT8: np.uint8, lib.CL_INT8: np.int8, lib.CL_INT16: np.int16,
    lib.CL_INT32: np.int32, lib.CL_INT64: np.int64,
}
FLOATS = {
    lib.CL_FLOAT16: (np.uint16, 0x7E00), lib.CL_BFLOAT16: (np.uint16, 0x7FC0),
    lib.CL_FLOAT32: (np.uint32, 0x7FC00000), lib.CL_FLOAT64: (np.uint64, 0x7FF8000000000000),
}
STORAGE = {**INTEGERS, **{dtype: bits for dtype, (bits, _) in FLOATS.items()}, lib.CL_BOOL: np.uint8}
REDUCTIONS = {"sum": lib.CL_SUM, "min": lib.CL_MIN, "max": lib.CL_MAX, "product": lib.CL_PRODUCT}
FACTORS = (1.0, -1.0, 0.0, -0.0, 0.5, 1 / 3, -2.75, 3.0, 1e-7, 1e300, -1e30, math.inf, math.nan)


def kernel_sets():
    names = itertools.takewhile(lambda name: name != ffi.NULL, (lib.cl_kernels_name(i) for i in itertools.count()))
    return [ffi.string(name).decode() for name in names]


def dtype_name(dtype):
    return ffi.string(ffi.cast("cl_dtype", dtype))


SETS = kernel_sets()


@pytest.fixture(params=range(len(SETS)), ids=SETS)
def kernels(request):
    if not lib.cl_kernels_supported(request.param):
        pytest.skip(f"this processor does not run the {SETS[request.param]} kernels")
    return request.param


# ---- the reference ----------------------------------------------------------------------------------------------


def widened(dtype, bits):
    """The values behind the bits, in the type in which the kernels calculate."""
    if dtype == lib.CL_BFLOAT16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == lib.CL_FLOAT16:
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32 if dtype == lib.CL_FLOAT32 else np.float64)


def nearest_bfloat16(values):
    """Of the two neighbours in bfloat16 the nearer one, or the even one of two equally near: no bit tricks."""
    toward_zero = (values.view(np.uint32) >> 16).astype(np.uint16)
    away = toward_zero + np.uint16(1)
    low, high = (np.abs(widened(lib.CL_BFLOAT16, bits).astype(np.float64)) for bits in (toward_zero, away))
    high = np.where(np.isinf(high), 2.0**128, high)
    exact = np.abs(values.astype(np.float64))
    up = (exact - low > high - exact) | ((exact - low == high - exact) & (toward_zero % 2 == 1))
    return np.where(np.isinf(values), toward_zero, np.where(up, away, toward_zero)).astype(np.uint16)


def narrowed(dtype, values):
    storage, nan = FLOATS[dtype]
    if dtype == lib.CL_BFLOAT16:
        bits = nearest_bfloat16(values)
    else:
        bits = (values.astype(np.float16) if dtype == lib.CL_FLOAT16 else values).view(storage)
    return np.where(np.isnan(values), storage(nan), bits).astype(storage)


def ordered(first, second, want_less):
    """Min (or Max) with -0 below +0; NaN if either is."""
    less = (first < second) | ((first == second) & np.signbit(first))
    chosen = np.where(less == want_less, first, second)
    return np.where(np.isnan(first) | np.isnan(second), first.dtype.type(np.nan), chosen)


def reference_reduce(dtype, reduction, acc, other):
    if dtype == lib.CL_BOOL:
        both = np.logical_or if reduction in ("sum", "max") else np.logical_and
        return both(acc, other).astype(np.uint8)
    arithmetic = {"sum": np.add, "product": np.multiply}
    if dtype in INTEGERS:
        return {**arithmetic, "min": np.minimum, "max": np.maximum}[reduction](acc, other)
    first, second = widened(dtype, acc), widened(dtype, other)
    if reduction in arithmetic:
        return narrowed(dtype, arithmetic[reduction](first, second))
    return narrowed(dtype, ordered(first, second, reduction == "min"))


def reference_scale(dtype, values, factor):
    if factor == 1.0:
        return values
    if dtype == lib.CL_BOOL:
        return ((values != 0) & (factor != 0)).astype(np.uint8)
    if dtype in FLOATS:
        wide = widened(dtype, values)
        return narrowed(dtype, wide * wide.dtype.type(factor))
    limits = np.iinfo(values.dtype)
    return np.array([saturated(float(x) * factor, limits) for x in values.tolist()], values.dtype)


def saturated(x, limits):
    if math.isnan(x):
        return 0
    if math.isinf(x):
        return limits.max if x > 0 else limits.min
    return min(max(math.trunc(x), limits.min), limits.max)


# ---- inputs -----------------------------------------------------------------------------------------------------


def special_values(dtype):
    storage = STORAGE[dtype]
    if dtype == lib.CL_BOOL:
        return np.array([0, 1, 2, 255], storage)
    if dtype in INTEGERS:
        limits = np.iinfo(storage)
        return np.array([0, 1, 2, 3, limits.max, limits.max - 1, limits.min, limits.min + 1, limits.max // 2], storage)
    quiet_nan = FLOATS[dtype][1]
    sign = 1 << (np.dtype(storage).itemsize * 8 - 1)
    fraction = {lib.CL_FLOAT16: 10, lib.CL_BFLOAT16: 7, lib.CL_FLOAT32: 23, lib.CL_FLOAT64: 52}[dtype]
    infinity = quiet_nan & ~(1 << (fraction - 1))
    one = (infinity >> 1) & ~((1 << fraction) - 1)
    finite = [0, 1, 3, (1 << fraction) - 1, 1 << fraction, one, one + 1, one + 2, infinity - 1]
    positive = [*finite, infinity, infinity + 1, quiet_nan, quiet_nan + 5]
    return np.array(positive + [bits | sign for bits in positive], storage)


def operands(dtype, seed):
    """All pairs of special values in a random order, among pairs of random bits."""
    random = np.random.default_rng(seed)
    storage = np.dtype(STORAGE[dtype])
    pairs = np.array(list(itertools.product(special_values(dtype), repeat=2)), storage)
    noise = random.integers(0, 256, (max(len(pairs), len(LENGTHS)), 2 * storage.itemsize), np.uint8).view(storage)
    mixed = random.permutation(np.concatenate([pairs, noise]))
    return mixed[:, 0].copy(), mixed[:, 1].copy()


def padded(array, offset):
    """The array's bytes at this alignment, between margins that must not change."""
    memory = np.full(array.nbytes + 2 * MARGIN, 0xA5, np.uint8)
    memory[MARGIN + offset : MARGIN + offset + array.nbytes] = array.view(np.uint8)
    return memory


def address(memory, offset):
    return ffi.cast("char *", memory.ctypes.data) + MARGIN + offset


# ---- tests ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", STORAGE, ids=dtype_name)
def test_reduce_equals_reference(kernels, dtype, reduction):
    acc, other = operands(dtype, SEED)
    expected = reference_reduce(dtype, reduction, acc, other)
    arguments = ffi.from_buffer(acc), ffi.from_buffer(other), len(acc)
    status = lib.cl_reduce_with(kernels, dtype, REDUCTIONS[reduction], *arguments)
    assert status == lib.CL_OK
    np.testing.assert_array_equal(acc, expected, f"seed {SEED}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", STORAGE, ids=dtype_name)
@pytest.mark.parametrize("in_place", [True, False])
def test_scale_equals_reference(kernels, dtype, in_place):
    values, _ = operands(dtype, SEED)
    for factor in FACTORS:
        source = values.copy()
        out = source if in_place else np.zeros_like(source)
        status = lib.cl_scale_with(kernels, dtype, ffi.from_buffer(out), ffi.from_buffer(source), len(out), factor)
        assert status == lib.CL_OK
        np.testing.assert_array_equal(out, reference_scale(dtype, values, factor), f"factor {factor}, seed {SEED}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", STORAGE, ids=dtype_name)
def test_any_length_and_alignment(kernels, dtype):
    acc, other = (array[: LENGTHS[-1]] for array in operands(dtype, SEED + 1))
    sums, halves = reference_reduce(dtype, "sum", acc, other), reference_scale(dtype, acc, 0.5)
    for length, offset in itertools.product(LENGTHS, OFFSETS):
        other_offset = 31 - offset
        memory, source = padded(acc[:length], offset), padded(other[:length], other_offset)
        places = address(memory, offset), address(source, other_offset), length
        assert lib.cl_reduce_with(kernels, dtype, lib.CL_SUM, *places) == lib.CL_OK
        assert memory.tobytes() == padded(sums[:length], offset).tobytes(), (length, offset)
        memory, source = padded(other[:length], offset), padded(acc[:length], other_offset)
        places = address(memory, offset), address(source, other_offset), length
        assert lib.cl_scale_with(kernels, dtype, *places, 0.5) == lib.CL_OK
        assert memory.tobytes() == padded(halves[:length], offset).tobytes(), (length, offset)


def test_best_set_is_the_first_supported():
    values = np.arange(1000, dtype=np.float32)
    acc = values.copy()
    assert lib.cl_reduce(lib.CL_FLOAT32, lib.CL_SUM, ffi.from_buffer(acc), ffi.from_buffer(values), 1000) == lib.CL_OK
    assert lib.cl_scale(lib.CL_FLOAT32, ffi.from_buffer(acc), ffi.from_buffer(acc), 1000, 0.5) == lib.CL_OK
    np.testing.assert_array_equal(acc, values)
    assert SETS[-1] == "plain" and lib.cl_kernels_supported(len(SETS) - 1)


def test_factor_one_changes_no_bit(kernels):
    large = np.array([2**53 + 1, -(2**63), 2**63 - 1], np.int64)
    out = np.zeros_like(large)
    assert lib.cl_scale_with(kernels, lib.CL_INT64, ffi.from_buffer(out), ffi.from_buffer(large), 3, 1.0) == lib.CL_OK
    np.testing.assert_array_equal(out, large)


def test_wrong_arguments_are_refused():
    one = ffi.new("char[8]")
    for dtype, reduction in ((-1, 0), (lib.CL_DTYPE_END, 0), (0, -1), (0, lib.CL_REDUCTION_END)):
        assert lib.cl_reduce(dtype, reduction, one, one, 1) == lib.CL_INVALID
        assert lib.cl_reduce_with(len(SETS) - 1, dtype, reduction, one, one, 1) == lib.CL_INVALID
    assert lib.cl_scale(lib.CL_DTYPE_END, one, one, 1, 2.0) == lib.CL_INVALID
    for index in (-1, len(SETS)):
        assert not lib.cl_kernels_supported(index)
        assert lib.cl_reduce_with(index, lib.CL_INT8, lib.CL_SUM, one, one, 1) == lib.CL_INVALID
        assert lib.cl_scale_with(index, lib.CL_INT8, one, one, 1, 2.0) == lib.CL_INVALID
    assert lib.cl_dtype_nbytes(lib.CL_DTYPE_END) == 0
    assert [lib.cl_dtype_nbytes(dtype) for dtype in STORAGE] == [np.dtype(s).itemsize for s in STORAGE.values()]


# ---- the same comparison as a C program, which an emulator can run ----------------------------------------------


def run_program(directory, compiler, flags, runner):
    native = ROOT / "native"
    sources = [ROOT / "tests/native/kernels_test.c", native / "reduce.c", *sorted(native.glob("kernels_*.c"))]
    program = directory / "kernels_test"
    warnings = ["-Wall", "-Wextra", "-Wshadow", "-Werror"]
    command = [compiler, "-std=c11", *warnings, *flags, f"-I{native}", "-o", program, *sources, "-lm"]
    subprocess.run(command, check=True)
    return subprocess.run([*runner, program, str(SEED)], check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.parametrize("flags", [["-O2"], ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]])
def test_sets_agree_in_c(tmp_path, flags):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    assert "plain ok" in run_program(tmp_path, compiler, flags, [])


def test_neon_agrees_under_emulation(tmp_path):
    missing = [tool for tool in ("aarch64-linux-gnu-gcc", "qemu-aarch64") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"NEON kernels not run here: {' and '.join(missing)} not installed")
    output = run_program(tmp_path, "aarch64-linux-gnu-gcc", ["-O2", "-static"], ["qemu-aarch64"])
    assert "neon ok" in output and "plain ok" in output

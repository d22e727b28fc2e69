"""CUDA C++ at run time: compile (NVRTC, or nvcc where there is none), keep on disk, load and launch. No torch headers.

NVRTC comes with torch's CUDA wheels and so has the version that torch runs with; an nvcc that happens to be installed may
be newer than the driver, hence second. Compiled code lies in $FOEM_KERNEL_CACHE, else $XDG_CACHE_HOME/foem_kernels, else
~/.cache/foem_kernels, under a name that depends on source, target, definitions and compiler; it may be deleted at any time.

Left out: Windows and other names of these libraries, PTX for GPUs newer than the compiler.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_DEPENDENT_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class CompileError(RuntimeError):
    """The compiler's log."""


@functools.cache
def nvrtc() -> ctypes.CDLL | None:
    """libnvrtc of torch's wheels (nvidia-cuda-nvrtc, -cu12), of the system, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(f) for f in (spec.submodule_search_locations or ())] if spec else []
    found = [str(file) for folder in folders for file in folder.glob("*/lib/libnvrtc.so.*")]
    # Where torch has loaded its own already, the bare name finds that one.
    for name in (*sorted(found, reverse=True), "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


@functools.cache
def compiler() -> str | None:
    """Name and version of the compiler in use, or None where there is none."""
    if library := nvrtc():
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"nvrtc {major.value}.{minor.value}"
    if tool := shutil.which("nvcc"):
        done = subprocess.run([tool, "--version"], capture_output=True, text=True)
        if version := re.search(r"V(\d+\.\d+\.\d+)", done.stdout):
            return f"nvcc {version[1]}"
    return None


def _by_nvrtc(source: str, options: list[str]) -> bytes:
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()

    def check(code: int) -> None:
        if code:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CompileError(f"nvrtc: {library.nvrtcGetErrorString(code).decode()}")
    check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        code = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options)))
        if code:
            check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            check(library.nvrtcGetProgramLog(program, log))
            raise CompileError(f"{' '.join(options)}\n{log.value.decode()}")
        check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _by_nvcc(source: str, options: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file, cubin = pathlib.Path(folder) / "kernel.cu", pathlib.Path(folder) / "kernel.cubin"
        file.write_text(source, "utf-8")
        done = subprocess.run(["nvcc", "-cubin", *options, "-o", str(cubin), str(file)], capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"{' '.join(done.args)}\n{done.stderr}{done.stdout}")
        return cubin.read_bytes()


def cache_folder() -> pathlib.Path:
    if folder := os.environ.get("FOEM_KERNEL_CACHE"):
        return pathlib.Path(folder)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "foem_kernels"


def compile(source: str, target: str, definitions: dict[str, int]) -> bytes:
    """Machine code (a cubin) of CUDA C++ `source` for `target`, such as "sm_90", with each definition as a macro.

    Raises CompileError with the compiler's log, also where no compiler is found and nothing is cached.
    """
    options = ["-std=c++17", f"-arch={target}", *(f"-D{name}={int(value)}" for name, value in sorted(definitions.items()))]
    key = hashlib.sha256("\0".join([source, *options, compiler() or ""]).encode()).hexdigest()
    file = cache_folder() / f"{key[:32]}.cubin"
    with contextlib.suppress(OSError):
        return file.read_bytes()
    if compiler() is None:
        raise CompileError("neither libnvrtc nor nvcc was found; install nvidia-cuda-nvrtc of torch's CUDA version")
    cubin = (_by_nvrtc if nvrtc() else _by_nvcc)(source, options)
    with contextlib.suppress(OSError):  # a read-only home costs only time
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            part.write(cubin)
        os.replace(part.name, file)  # other processes see all of it or nothing
    return cubin


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Launch(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint)]


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({code})")


class Function:
    """A kernel in the context that is current (torch's, of the current device), with `shared` bytes of dynamic memory.

    Stays loaded for the life of the process.
    """

    def __init__(self, cubin: bytes, name: str, shared: int, threads: int, dependent: bool):
        """dependent: launch programmatically, before the kernel ahead in the stream has ended (sm_90; the kernel waits)."""
        driver, module, self.function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver.cuModuleLoadData(ctypes.byref(module), cubin))
        _check(driver.cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()))
        _check(driver.cuFuncSetAttribute(self.function, _SHARED_MEMORY, shared))
        self.attribute = _Attribute(id=_DEPENDENT_LAUNCH, value=1)
        self.shared, self.threads, self.dependent = shared, threads, dependent

    def launch(self, grid: int, arguments: ctypes.Structure, stream: int) -> None:
        """`arguments` is the kernel's only parameter, by value; `stream` a CUstream."""
        c = _Launch((grid, 1, 1), (self.threads, 1, 1), self.shared, stream, ctypes.pointer(self.attribute), self.dependent)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(c), self.function, parameters, None))

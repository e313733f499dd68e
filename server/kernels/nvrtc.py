"""CUDA C++ compiled at run time: NVRTC makes a cubin, the driver loads and launches it.

NVRTC comes with torch's own CUDA wheels, so no toolkit is needed. A cubin is kept on disk under the
hash of all that went into it; launches go to torch's current stream and can be captured in a graph.
"""

import ctypes
import hashlib
import importlib.util
import os
import struct
import tempfile
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock

import torch

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
_MAX_SHARED_PER_BLOCK_OPTIN = 97  # CUdevice_attribute

_TENSOR_MAP_BFLOAT16 = 9  # CUtensorMapDataType
_TENSOR_MAP_SWIZZLE_128B = 3
_TENSOR_MAP_L2_PROMOTION_128B = 2


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Kernel:
    """One `__global__` function of a module, with a single struct by value as its parameter.

    `params_format` is that struct in the `struct` module's native notation ("PPqii"): pointers are
    passed as integers. With `is_dependent` the kernel may start before the one in front of it in
    the stream has ended (compute capability 9.0 on); it must then call griddepcontrol.wait before
    it touches what that one writes.
    """

    def __init__(
        self,
        function: ctypes.c_void_p,
        params_format: str,
        *,
        threads: int,
        shared_bytes: int = 0,
        is_dependent: bool = False,
    ) -> None:
        if shared_bytes > 48 * 1024:
            _check(
                _driver().cuFuncSetAttribute(
                    function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, ctypes.c_int(shared_bytes)
                ),
                f"asking for {shared_bytes} bytes of shared memory",
            )
        self._function = function
        self._struct = struct.Struct("@" + params_format)
        self._params = ctypes.create_string_buffer(self._struct.size + 64)  # C pads it
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._params))
        self._attribute = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1
        self._config = _LaunchConfig(
            block=(threads, 1, 1),
            shared_bytes=shared_bytes,
            attributes=ctypes.pointer(self._attribute),
            num_attributes=int(is_dependent),
        )
        self._config_pointer = ctypes.pointer(self._config)
        self._launch = _driver().cuLaunchKernelEx
        self._lock = Lock()  # the adapter loader launches too

    def __call__(
        self, grid: tuple[int, int, int], device_index: int, *params: int | float | bytes
    ) -> None:
        """Launch on the calling thread's current stream."""
        with self._lock:
            self._struct.pack_into(self._params, 0, *params)
            self._config.grid[:] = grid
            self._config.stream = torch._C._cuda_getCurrentRawStream(device_index)
            status = self._launch(self._config_pointer, self._function, self._pointers, None)
        if status:
            _check(status, "launching a kernel")


class Module:
    """A loaded cubin. It stays loaded for as long as the process lives."""

    def __init__(self, cubin: bytes) -> None:
        torch.cuda.current_stream()  # makes torch's context current in this thread
        self._handle = ctypes.c_void_p()
        _check(
            _driver().cuModuleLoadData(ctypes.byref(self._handle), ctypes.c_char_p(cubin)),
            "loading a compiled module",
        )

    def function(self, name: str) -> ctypes.c_void_p:
        """Look up an `extern "C"` kernel."""
        function = ctypes.c_void_p()
        _check(
            _driver().cuModuleGetFunction(ctypes.byref(function), self._handle, name.encode()),
            f"looking up {name}",
        )
        return function


def architecture(device: torch.device) -> str:
    """What to compile for to run on this device: "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block may have on this device, static and dynamic."""
    value = ctypes.c_int()
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    _check(
        _driver().cuDeviceGetAttribute(ctypes.byref(value), _MAX_SHARED_PER_BLOCK_OPTIN, ordinal),
        "asking for the shared memory limit",
    )
    return value.value


@lru_cache(maxsize=1024)  # the same buffers come again and again
def tensor_map(address: int, shape: tuple[int, int], stride: int, box: tuple[int, int]) -> bytes:
    """Describe a bf16 matrix to the copy engine (compute capability 9.0 on), for boxes of it.

    In shared memory a box's rows of 128 bytes have their 16-byte pieces swizzled (piece ^ row % 8);
    what is outside the matrix arrives as zeros.

    shape   rows and columns; stride: elements from row to row
    box     rows and columns; 64 columns
    """
    storage = ctypes.create_string_buffer(128 + 64)
    aligned = -(-ctypes.addressof(storage) // 64) * 64
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        _TENSOR_MAP_BFLOAT16,
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(shape[1], shape[0]),
        (ctypes.c_uint64 * 1)(stride * 2),
        (ctypes.c_uint32 * 2)(box[1], box[0]),
        (ctypes.c_uint32 * 2)(1, 1),
        0,  # not interleaved
        _TENSOR_MAP_SWIZZLE_128B,
        _TENSOR_MAP_L2_PROMOTION_128B,
        0,  # zeros outside
    )
    _check(status, f"describing a matrix of {shape} for the copy engine")
    return ctypes.string_at(aligned, 128)


def compiled(source: str, arch: str, options: tuple[str, ...] = ()) -> bytes:
    """Compile to a cubin, or take it from the disk; RuntimeError with NVRTC's log if it fails."""
    arguments = (f"--gpu-architecture={arch}", "--std=c++17", *options)
    identity = "\0".join((source, *arguments, *map(str, _nvrtc_version())))
    path = _cache_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = _compile(source, arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(cubin)
        file.flush()
        os.fsync(file.fileno())  # an empty one, after the power failed, would never load
    Path(file.name).replace(path)  # whole or not at all, whoever else compiles it too
    return cubin


def is_available() -> bool:
    """Whether this machine has NVRTC, with which kernels can be compiled (a GPU is not needed)."""
    try:
        _nvrtc()
    except RuntimeError:
        return False
    return True


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "turnout" / "kernels"


def _compile(source: str, arguments: tuple[str, ...]) -> bytes:
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    code = source.encode()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"kernel.cu", 0, None, None):
        raise RuntimeError("NVRTC could not make a program")
    try:
        encoded = (ctypes.c_char_p * len(arguments))(*(text.encode() for text in arguments))
        if nvrtc.nvrtcCompileProgram(program, len(arguments), encoded):
            raise RuntimeError(f"NVRTC failed ({' '.join(arguments)}):\n{_log(nvrtc, program)}")
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _log(nvrtc: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.value.decode(errors="replace")


@cache
def _nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@cache
def _nvrtc() -> ctypes.CDLL:
    for name in _nvrtc_candidates():
        try:
            for builtins in Path(name).parent.glob("libnvrtc-builtins.so.[0-9]*"):
                ctypes.CDLL(str(builtins))  # NVRTC asks for it by its bare name
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(
        "libnvrtc was not found: install nvidia-cuda-nvrtc, which torch's CUDA wheels depend on"
    )


def _nvrtc_candidates() -> Iterator[str]:
    """Where libnvrtc may be: torch's CUDA wheels first, then the system."""
    for package, folder in (("nvidia", "*/lib"), ("torch", "lib")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            yield from sorted(map(str, Path(root).glob(f"{folder}/libnvrtc.so.[0-9]*")))
    if torch.version.cuda:
        yield f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    yield "libnvrtc.so"


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, doing: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA error {status} while {doing}: {(text.value or b'?').decode()}")

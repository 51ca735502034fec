# /// script
# requires-python = ">=3.10"
# dependencies = ["nvidia-cuda-nvrtc-cu12==12.2.140"]
# ///
"""Make tp_rs.ptx from tp_rs.cu, byte for byte the same everywhere, without a GPU and without nvcc.

    uv run --no-project cuda/build.py            # write cuda/tp_rs.ptx
    uv run --no-project cuda/build.py --check    # fail if it is not what the sources give

NVRTC 12.2 writes a text that drivers of CUDA 12.2 and later load; compute_70 lets every card since Volta
run it.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
OPTIONS = ("--gpu-architecture=compute_70", "--std=c++17", "--device-as-default-execution-space")


def nvrtc() -> ctypes.CDLL:
    """The compiler's library, with the part that it loads by itself loaded first."""
    spec = find_spec("nvidia.cuda_nvrtc")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("nvidia-cuda-nvrtc-cu12 is missing; run this file with: uv run --no-project cuda/build.py")
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    ctypes.CDLL(str(next(folder.glob("libnvrtc-builtins.so.*"))), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "libnvrtc.so.12"))


def compile_text() -> bytes:
    """The PTX of tp_rs.cu."""
    library = nvrtc()
    headers = sorted(HERE.glob("*.cuh"))
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(header.read_bytes() for header in headers))
    names = (ctypes.c_char_p * len(headers))(*(header.name.encode() for header in headers))
    source = (HERE / "tp_rs.cu").read_bytes()
    made = library.nvrtcCreateProgram(ctypes.byref(program), source, b"tp_rs.cu", len(headers), texts, names)
    if made:
        sys.exit(f"nvrtcCreateProgram failed with {made}")
    options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
    failed = library.nvrtcCompileProgram(program, len(OPTIONS), options)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    if log.value.strip():
        sys.stderr.write(log.value.decode())
    if failed:
        sys.exit(f"nvrtcCompileProgram failed with {failed}")
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(program, text)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return text.value


def main() -> None:
    """Write the text, or compare it."""
    parser = argparse.ArgumentParser(description="Make cuda/tp_rs.ptx.")
    parser.add_argument("--check", action="store_true", help="fail if the file is not what the sources give")
    arguments = parser.parse_args()
    text, place = compile_text(), HERE / "tp_rs.ptx"
    if not arguments.check:
        place.write_bytes(text)
    elif not place.exists() or place.read_bytes() != text:
        sys.exit("cuda/tp_rs.ptx is not what cuda/*.cu and *.cuh give: make it again with cuda/build.py")


if __name__ == "__main__":
    main()

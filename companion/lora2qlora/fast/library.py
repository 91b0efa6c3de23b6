"""The C++ of fast.cpp, compiled for this processor and loaded. Chapter 14."""

import ctypes
import os
import shlex
import shutil
import subprocess
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

# No flag that relaxes arithmetic: a product and a sum are rounded one by one, and small numbers stay.
FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=off -fno-math-errno -fopenmp -shared -fPIC".split()
SOURCE = Path(__file__).with_name("fast.cpp")
CPP = SOURCE.read_text(encoding="utf-8")


@cache
def load_library() -> ctypes.CDLL | None:
    """The C++ functions, compiled now and for this processor; None, and one warning, where that fails."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++")), None)
    reason = "no C++ compiler is on PATH (g++ or c++; CXX names another)"
    if compiler:
        try:
            with TemporaryDirectory() as directory:
                target = str(Path(directory, "fast.so"))
                command = [*shlex.split(compiler), *FLAGS, str(SOURCE), "-o", target]
                subprocess.run(command, check=True, capture_output=True, text=True)
                return declare(ctypes.CDLL(target))
        except (OSError, ValueError, subprocess.CalledProcessError) as error:  # ValueError: quotes in CXX
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            reason = f"{compiler} could not compile it: {said[0] if said else 'it said nothing'}"
    warnings.warn(f"lora2qlora.fast takes the plain path on the CPU: {reason}", stacklevel=3)
    return None


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The types of the C++ functions' arguments: p a pointer, n a 64-bit integer, i an int."""
    types = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int}
    for name, letters in {
        "dequantize_nf4": "pppppnppinni",
        "quantize_nf4": "pipppnni",
        "adam": "pppppnni",
    }.items():
        getattr(library, name).argtypes = [types[letter] for letter in letters]
    library.quantize_nf4.restype = ctypes.c_int
    library.dequantize_nf4.restype = library.adam.restype = None
    return library

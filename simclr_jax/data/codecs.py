"""Keeps what libjpeg and libpng say of every damaged file, in every epoch, from the console."""

import atexit
import ctypes
import functools
import os
import re

# How the messages of libjpeg (its jerror.h) and libpng begin.
_CHATTER = re.compile(
    rb"\s*(libpng |Bogus |Unsupported |Invalid |Corrupt |Quantization table |Huffman |Arithmetic table |"
    rb"Premature end |Empty input|Empty JPEG|Input file read|Not a JPEG|Unknown Adobe|Maximum supported|"
    rb"Sampling factors|CCIR601|Requested feature|Missing |Cannot |Too many |Inconsistent progression|"
    rb"Warning: unknown|Application transferred|Insufficient memory|Image (width|height)|Improper call|"
    rb"Fractional sampling|Component index|DCT |IDCT |Wrong JPEG|Caution: |.*JPEG)"
)


class _Functions(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("read", "write", "seek", "close")]


@functools.cache
def hush() -> None:
    """Filters C's `stderr`, which these libraries print on; does nothing where the C library is not glibc.

    File descriptor 2 stays as it is: Python, TensorFlow's log and crashes write there and are not touched.
    """
    try:
        libc = ctypes.CDLL(None)
        stream = ctypes.c_void_p.in_dll(libc, "stderr")
        libc.fopencookie.restype = ctypes.c_void_p
    except (OSError, ValueError, AttributeError):
        return
    libc.fopencookie.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _Functions]
    libc.setvbuf.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t]

    @ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    def write(_, text, size):
        line = ctypes.string_at(text, size)
        if not _CHATTER.match(line):
            os.write(2, line)
        return size

    functions = _Functions(write=ctypes.cast(write, ctypes.c_void_p))
    filtered = libc.fopencookie(None, b"w", functions)
    if not filtered:
        return
    libc.setvbuf(filtered, None, 2, 0)  # 2: unbuffered, so that a line comes in one piece
    before, stream.value = stream.value, filtered

    def restore(_kept=(write, libc)):
        stream.value = before

    atexit.register(restore)

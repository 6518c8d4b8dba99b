"""Memory that is freed is kept: what `fit` asks of glibc."""

import ctypes
import subprocess
import sys

import pytest

SIZE = 100 * 2**20
SCRIPT = f"""
import ctypes
from act_lightning.memory import keep_freed_memory

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]

def mapped():
    before = libc.mallinfo2().hblkhd
    assert libc.malloc({SIZE})
    return libc.mallinfo2().hblkhd - before

print(mapped())
keep_freed_memory()
print(mapped())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_large_blocks_come_from_the_heap():
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    default, kept = map(int, ran.stdout.split())
    assert default >= SIZE
    assert kept == 0

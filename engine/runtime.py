"""Settings of the whole process that decide its speed: threads, memory allocation, TF32."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Literal

import torch

from utils import UserError

# names and numbers of glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
SETTINGS = (
    (M_MMAP_MAX, 0),
    (M_TRIM_THRESHOLD, -1),
    (M_TOP_PAD, 64 << 20),
)  # never map a block, never trim the heap


def configure(num_threads: int | None, allocator: Literal["keep", "default"]) -> None:
    """CPU threads (None: torch's choice) and what malloc does with freed memory."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if allocator == "keep":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep the memory of freed tensors for the next ones; whether it will.

    By default a large block goes back to the system when it is freed, and the kernel maps and zeroes fresh pages for the
    next one, which takes longer than most arithmetic on it. Here it stays in the heap: the process keeps what it needed at
    its peak. Nothing happens, and False is returned, where malloc is not glibc's, or where the environment already sets it
    up (MALLOC_*, GLIBC_TUNABLES).
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    chosen = chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl
        return False
    return all(libc.mallopt(option, value) == 1 for option, value in SETTINGS)


def set_products(precision: str, device: torch.device) -> None:
    """Float32 matrix products in TF32 (ten bits of mantissa, sums in float32) where ``precision`` is that, else exact."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision=tf32: there is none on {device.type}; use precision=fp32")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products in float32, whatever was chosen."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)

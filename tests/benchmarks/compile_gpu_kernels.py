"""Compiles every GPU kernel for an H100 (sm_90) at the original model's sizes, without a GPU.

    python tests/benchmarks/compile_gpu_kernels.py

Prints of each its shared memory in bytes, registers of a thread, tensor core instructions, and bytes spilt to memory.
A kernel that spills more than a few bytes, or a product without tensor core instructions, is slow.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from elmo_ray.kernels.gpu import char_cnn, dense_adagrad, dropout, highway, lstm_window, rows, softmax

ASSEMBLER = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"

BF16, FP32, UINT8, INT16, INT32, INT64 = "*bf16", "*fp32", "*u8", "*i16", "*i32", "*i64"

LSTM = {
    "gates": BF16, "recurrent": BF16, "gated": BF16, "d_gated": BF16, "output": BF16, "d_raw": BF16, "bound": "fp32",
}  # fmt: skip
FACTORS = {"a": BF16, "w": BF16}
SOFTMAX = {
    "logits": BF16, "product": BF16, "x_scaled": BF16, "rows": FP32,
    "target": INT64, "column_of_row": INT32, "order": INT32, "starts": INT32,
}  # fmt: skip
CHARACTERS = {
    "product": BF16, "d_product": BF16,
    "types": INT16, "windows": INT32, "offsets": INT32, "widths": INT32, "which": UINT8,
}  # fmt: skip
TABLES = {"addresses": INT64, "sizes": INT64, "tensor_of_block": INT32, "first_block": INT32}

SIZES = {"rows", "H", "P", "N", "K", "R", "C", "U", "F", "PER", "PADDING", "count"}
MULTIPLES_OF_16 = {"H", "P", "N", "K", "F", "PER", "count"}


class Case(NamedTuple):
    """A kernel, its constants, the types of those arguments that are neither sizes, strides nor float32 tensors, and
    how it is launched."""

    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str] = {}
    warps: int = 4
    stages: int = 3


CASES = [
    Case(lstm_window._forward_gates, {"CLIPS": True, "BLOCK": 1024}, LSTM),
    Case(lstm_window._backward_gates, {"LAST": False, "CLIPS": True, "BLOCK": 1024}, LSTM),
    Case(lstm_window._backward_gates, {"LAST": True, "CLIPS": False, "BLOCK": 1024}, LSTM),
    Case(lstm_window._forward_clip, {"SPLITS": 8, "CLIPS": True, "BLOCK": 512}, LSTM),
    Case(lstm_window._forward_clip, {"SPLITS": 0, "CLIPS": True, "BLOCK": 512}, LSTM),
    Case(lstm_window._backward_clip, {"SPLITS": 16, "CLIPS": True, "BLOCK": 512}, LSTM),
    Case(lstm_window._backward_clip, {"SPLITS": 1, "CLIPS": True, "BLOCK": 512}, LSTM | {"parts": BF16}),
    # A stride of 1 is a constant: that of the sum where the weight is transposed, else that of the columns.
    Case(lstm_window._split_product, {"SPLITS": 16, "BM": 128, "BN": 64, "BK": 64, "w_k": 1}, FACTORS, stages=4),
    Case(lstm_window._split_product, {"SPLITS": 8, "BM": 128, "BN": 64, "BK": 64, "w_n": 1}, FACTORS, stages=4),
    Case(rows._sum_rows, {"BLOCK": 512, "AT_ONCE": 16}, SOFTMAX),
    Case(softmax._softmax_forward, {"MASK_HITS": True, "BK": 8192, "BP": 512}, SOFTMAX, warps=8),
    Case(softmax._softmax_backward, {"BP": 512}, SOFTMAX),
    Case(softmax._column_sums, {"BN": 32, "BK": 128}, {"x": BF16}),
    Case(softmax._softmax_rows, {"D": 2, "BP": 512, "AT_ONCE": 16}, SOFTMAX),
    Case(char_cnn._unfold, {"E": 16, "KE": 112, "BK": 128}, CHARACTERS | {"embedding": BF16, "out": BF16}),
    Case(char_cnn._window_maximum, {"RELU": True, "BLOCK": 1024}, CHARACTERS),
    Case(char_cnn._window_gradient, {"RELU": True, "BLOCK": 1024}, CHARACTERS),
    Case(char_cnn._fold, {"E": 16, "W": 7, "BK": 128, "BE": 16, "BU": 64, "BV": 64, "V": 261}, CHARACTERS),
    Case(highway._highway_forward, {"BLOCK": 1024}, CHARACTERS),
    Case(highway._highway_backward, {"BLOCK": 1024}, CHARACTERS),
    Case(dropout._drop, {"BLOCK": 1024}, {"key": INT64, "use": "i32", "keep": "fp32"}),
    Case(dense_adagrad._dense_adagrad, {"BLOCK": 1024}, TABLES),
]


def compiled(case: Case) -> Any:
    """Return what Triton's compiler makes of a kernel for an H100 or H200."""
    types, attributes = {}, {}
    for place, name in enumerate(case.kernel.arg_names):
        is_stride = re.search("_[dbkn]$", name) is not None
        if name in case.constants:
            types[name] = "constexpr"
            continue
        types[name] = case.types.get(name) or ("i32" if name in SIZES or is_stride else FP32)
        if types[name].startswith("*") or name in MULTIPLES_OF_16 or is_stride:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, types, case.constants, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def assembled(ptx: str) -> tuple[int, int]:
    """Return the registers of a thread and the bytes that it spills, as the assembler tells."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ASSEMBLER), "-v", "--gpu-name", "sm_90a", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = [re.search(pattern, told) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
    registers, spilt = (int(match[1]) if match else -1 for match in found)
    return registers, spilt


def main() -> None:
    print(f"{'kernel':20} {'shared memory':>13} {'registers':>9} {'wgmma':>5} {'spilt bytes':>11}")
    for case in CASES:
        kernel = compiled(case)
        registers, spilt = assembled(kernel.asm["ptx"])
        products = kernel.asm["ptx"].count("wgmma.mma")
        name = case.kernel.__name__
        print(f"{name:20} {kernel.metadata.shared:13} {registers:9} {products:5} {spilt:11}", flush=True)


if __name__ == "__main__":
    main()

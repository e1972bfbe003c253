"""The GPU kernels, as far as a CPU can tell: their results in Triton's interpreter, and that they compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA, or with the gpu extra on Linux")

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.parametrize("device", ["interpreter", *(["cuda"] if torch.cuda.is_available() else [])])
def test_all_cases(device):
    env = {**os.environ, "TRITON_INTERPRET": str(int(device == "interpreter"))}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CASES)], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(("architecture", "pointer", "precision"), [(80, "fp32", "tf32x3"), (90, "bf16", "ieee")])
@pytest.mark.parametrize("name", ["_squares", "_square_sums"])
def test_compiles_for_ampere_and_hopper(name, architecture, pointer, precision, tmp_path, monkeypatch):
    """The interpreter takes what the compiler may not."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from guided_dropout.fisher import triton_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernel, name)
    config = triton_kernel.CONFIGS[0]
    constants = {"ADD": True, "PRECISION": precision, "BLOCK_K": 32, **config.kwargs}
    pointers = {"out": "*fp32", "left": f"*{pointer}", "right": f"*{pointer}", "chunks": "*i32", "bounds": "*i32"}
    types = {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in kernel.arg_names}
    source = ASTSource(kernel, types, {a: v for a, v in constants.items() if a in types})
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert "mma" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]

"""The emulation finds what a GPU would leave to chance: races, places outside an array, barriers that not all reach."""

import subprocess

import pytest

from dflash_ray.kernels import build

PROGRAM = """
#include <cstdio>
#include "cuda/simt.cuh"
using namespace dflash_ray;

DFLASH_KERNEL kernel(int* out) {{
  DFLASH_SHARED(int, values, kThreads);
  DFLASH_SHARED(int, sums, kWarps);
  const int i = threadIdx.x;
  {body}
}}

int main() {{
  int out = -1;
  try {{
    DFLASH_LAUNCH(kernel, 3, &out);
  }} catch (const std::exception& error) {{
    return std::puts(error.what()), 1;
  }}
  return std::printf("%d", out), 0;
}}
"""
BODIES = {
    "right": ("values[i] = i; __syncthreads(); int v = block_reduce(int(values[kThreads - 1 - i]), sums, TakeSum()); "
              "if (i == 0) *out = v;", 0, str(255 * 128)),
    "race": ("values[i] = i; *out = values[(i + 1) % kThreads];", 1, "by two threads without a barrier"),
    "write after read": ("values[i] = i; __syncthreads(); *out = values[0]; values[i] = 2;", 1, "by two threads"),
    "outside": ("values[i + 1] = i;", 1, "values[256] is outside the array"),
    "barrier": ("if (i < 40) __syncthreads(); *out = 1;", 1, "not all threads of block 0 reach the same barrier"),
    "shuffle": ("if (i % 32 < 7) *out = __shfl_down_sync(~0u, i, 1);", 1, "not all threads"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_the_emulation_tells_right_kernels_from_wrong_ones(tmp_path, name):
    body, code, text = BODIES[name]
    source, program = tmp_path / "kernel.cpp", tmp_path / "kernel"
    source.write_text(PROGRAM.format(body=body))
    subprocess.run(["g++", "-std=c++20", f"-I{build.SOURCES}", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and text in done.stdout

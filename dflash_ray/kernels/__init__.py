"""Operators written in C++ and CUDA, and what stands in for them.

`ops` (forward pass), `attention` (its attention on any device) and `verify_ops` (verification) are what the other
packages call; `build` compiles and loads the library once and caches it; `reference` and `reference_verify`
have every operator in plain torch: the oracle of the tests, and the fallback where no compiler is.
csrc/verify_core.cuh is the arithmetic that all devices share.
"""

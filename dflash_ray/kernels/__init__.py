"""Operators written in C++ and CUDA, and what stands in for them.

`ops` is what the other packages call; `build` compiles and loads the library once and caches it; `reference` has every
operator in plain torch: the oracle of the tests, and the fallback where no compiler is.
"""

"""`kernels build` and `kernels report`."""

from __future__ import annotations

from dflash_ray.commands.terminal import console, fail, new_table


def run_build() -> None:
    """Compiles the operators into the cache, where every process finds them."""
    from dflash_ray.core import host_code
    from dflash_ray.kernels import build

    try:
        host_code.build()
        console.out(str(build.build()))
    except RuntimeError as error:
        fail(str(error))


def run_report(write: bool) -> None:
    """Prints what each CUDA kernel needs; fails on spills and on registers over budget."""
    from dflash_ray.kernels import build, cuda_report

    try:
        report = cuda_report.compile_report()
    except RuntimeError as error:
        fail(str(error))
    if write:
        cuda_report.write_report(report)
    architectures = build.ARCHITECTURES
    table = new_table("kernel", *architectures, title=f"registers + spilled bytes, {report['compiler']}")
    for kernel in report[architectures[0]]:
        figures = (report[architecture][kernel] for architecture in architectures)
        table.add_row(kernel, *(f"{each['registers']} + {each['spill_bytes']}" for each in figures))
    console.print(table)
    if lines := cuda_report.faults(report):
        fail("\n".join(lines))

"""Reading a page of metrics."""


def total(page: str, name: str) -> float:
    """The sum of a metric over all processes and labels."""
    lines = (line for line in page.splitlines() if line.startswith((f"{name}{{", f"{name} ")))
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

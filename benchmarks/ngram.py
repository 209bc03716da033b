"""What prompt lookup costs the router's event loop: one long prompt, and many that become ready at once.

`python benchmarks/ngram.py`: random tokens, the worst case, as no n-gram repeats; processor time of one core. Prints
figures; asserts nothing.
"""

from __future__ import annotations

import random
import time
import tracemalloc

from dflash_ray.core.ngram import IndexingRoom, NgramIndex

ROOM = 2048  # as the scheduler gives in one poll
PROMPTS = {"one prompt of 100,000 tokens": (1, 100_000), "256 prompts of 1,000 tokens": (256, 1000)}


def look_up(indexes: list[NgramIndex]) -> tuple[float, int]:
    """Milliseconds of one poll's lookups, and tokens of its room that were not used."""
    room = IndexingRoom(ROOM)
    started = time.process_time()
    for index in indexes:
        index.catch_up(room)
        index.propose(4)
    return 1e3 * (time.process_time() - started), room.left


def main() -> None:
    generator = random.Random(0)
    print(f"{'':30} {'first poll':>10} {'longest':>8} {'polls':>6} {'step of 3':>9}  ms; kept MB")
    for name, (count, length) in PROMPTS.items():
        prompts = [[generator.randrange(50_000) for _ in range(length)] for _ in range(count)]
        tracemalloc.start()
        kept = [NgramIndex() for _ in prompts]
        for index, prompt in zip(kept, prompts, strict=True):
            index.extend(prompt)
            index.catch_up(IndexingRoom(length))
        megabytes = tracemalloc.get_traced_memory()[0] / 1e6
        tracemalloc.stop()
        del kept
        indexes = [NgramIndex() for _ in prompts]
        started = time.process_time()
        for index, prompt in zip(indexes, prompts, strict=True):
            index.extend(prompt)
        polls = [1e3 * (time.process_time() - started)]
        left = 0
        while not left:
            milliseconds, left = look_up(indexes)
            polls.append(milliseconds)
        first = polls.pop(0) + polls[0]
        for index in indexes:
            index.extend([1, 2, 3])
        step, _ = look_up(indexes)
        print(f"{name:30} {first:10.1f} {max(first, *polls):8.1f} {len(polls):6} {step:9.2f}  {megabytes:10.1f}")


if __name__ == "__main__":
    main()

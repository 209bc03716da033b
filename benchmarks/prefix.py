"""Time to the first token of a chat's second turn over a long history, found in the prefix cache and computed anew.

    dflash-ray serve --config deployments/local_cpu.yaml
    python benchmarks/prefix.py --history 1500 --rounds 5

The history is this repository's own guides and the server's first answer. Every second turn is sent twice, under the
first turn's cache_salt and under one that nobody had before, in turns of who comes first. Answers are greedy with
a fixed number of drafts, and must be equal. Prints figures; asserts nothing.
"""

from __future__ import annotations

import json
import statistics
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

ROOT = Path(__file__).parents[1]
_CHARS_PER_TOKEN = 3.5  # of these guides, at least


@dataclass
class Answer:
    """One streamed answer.

    Attributes:
        first_token: seconds from the request to its first text.
        acceptance_length: of its decoding passes.
    """

    text: str
    first_token: float
    acceptance_length: float
    num_prompt: int
    num_cached: int


def ask(url: str, messages: list[dict[str, str]], salt: str, new_tokens: int, draft_tokens: int) -> Answer:
    """Sends a chat and reads its answer."""
    body: dict[str, Any] = {
        "messages": messages,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": salt,
        "speculation": {"policy": "fixed", "draft_tokens": draft_tokens},
    }
    text, first_token, last = "", 0.0, {}
    started = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as response:
        if response.status_code != 200:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            last = json.loads(line.removeprefix("data: "))
            part = last["choices"][0]["delta"].get("content") or "" if last["choices"] else ""
            if part and not text:
                first_token = time.perf_counter() - started
            text += part
    usage, speculation = last["usage"], last["metrics"]["speculative_decoding"] or {}
    return Answer(
        text,
        first_token,
        speculation.get("mean_acceptance_length", 1.0),
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
    )


def main(
    url: Annotated[str, typer.Option(help="of the server")] = "http://127.0.0.1:8000",
    history: Annotated[int, typer.Option(help="tokens, roughly, of the first turn")] = 1500,
    rounds: Annotated[int, typer.Option(help="conversations")] = 5,
    new_tokens: Annotated[int, typer.Option(help="of an answer")] = 64,
    draft_tokens: Annotated[int, typer.Option(help="a step")] = 5,
) -> None:
    guides = "\n\n".join(file.read_text() for file in sorted(ROOT.glob("docs/*.md")))
    size = int(history * _CHARS_PER_TOKEN)
    ways: dict[str, list[Answer]] = {"found": [], "computed": []}
    num_equal = 0
    for number in range(rounds):
        begin = number * (len(guides) - size) // max(1, rounds)
        messages = [{"role": "user", "content": f"Summarise this.\n\n{guides[begin : begin + size]}"}]
        salt = uuid.uuid4().hex
        first = ask(url, messages, salt, new_tokens, draft_tokens)
        messages.append({"role": "assistant", "content": first.text})
        messages.append({"role": "user", "content": "What of this matters most, and why?"})
        salts = {"found": salt, "computed": uuid.uuid4().hex}
        order = list(ways) if number % 2 else list(ways)[::-1]
        for way in order:
            ways[way].append(ask(url, messages, salts[way], new_tokens, draft_tokens))
        num_equal += ways["found"][-1].text == ways["computed"][-1].text
    print("second turn   prompt  cached   first token, ms (median, all)        acceptance length")
    for way, answers in ways.items():
        times = [1000 * answer.first_token for answer in answers]
        every = " ".join(f"{value:.0f}" for value in times)
        lengths = statistics.mean(answer.acceptance_length for answer in answers)
        print(
            f"{way:12}  {statistics.mean(a.num_prompt for a in answers):6.0f}  "
            f"{statistics.mean(a.num_cached for a in answers):6.0f}   {statistics.median(times):7.0f}  ({every})"
            f"   {lengths:.2f}"
        )
    pairs = zip(ways["computed"], ways["found"], strict=True)
    ratio = statistics.median(computed.first_token / found.first_token for computed, found in pairs)
    print(f"{ratio:.1f} times shorter (median of {rounds}); texts equal: {num_equal} of {rounds}")


if __name__ == "__main__":
    typer.run(main)

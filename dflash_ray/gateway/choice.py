"""One choice of an answer: the tokens that a router sends, as text that ends where the request says.

What comes out does not depend on how the tokens were cut into chunks, so speculation cannot change it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dflash_ray.core.stats import AcceptanceStats, DecodePass, merge
from dflash_ray.gateway.detokenizer import Detokenizer, StopStrings
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.gateway.token_chunks import TokenChunk
from dflash_ray.pb import common_pb2
from dflash_ray.text.tokenizer import ChatTokenizer

STOP = common_pb2.FINISH_REASON_STOP


@dataclass(slots=True)
class ChoiceDelta:
    """New text and tokens of one choice.

    Attributes:
        token_ids: new tokens, which may be the chunk's own; the text of some of them may come later.
        prompt_logprobs: of the prompt's next tokens, from its second on, before all tokens.
        finish_reason: set on the last delta, with `stop` when a stop string or token ended it.
        stats: on the last delta.
        num_cached_tokens: of the prompt, whose rows were found computed; on the delta of the first token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: common_pb2.TokenLogprobs | None = None
    finish_reason: common_pb2.FinishReason = common_pb2.FINISH_REASON_UNSPECIFIED
    stop: str | int | None = None
    stats: AcceptanceStats | None = None
    prompt_logprobs: common_pb2.TokenLogprobs | None = None
    num_cached_tokens: int | None = None


class Choice:
    """The text of one choice so far, and how its drafts were taken."""

    def __init__(self, request: GenerationRequest, index: int, tokenizer: ChatTokenizer) -> None:
        self._request = request
        self._index = index
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(request.stop_strings, request.include_stop_strings)
        self._stats = AcceptanceStats()
        self.num_tokens = 0
        self._has_ended = False
        self._has_begun = False
        self._is_between = False  # tokens have come, and only a finish reason can end the answer
        self._num_scored = 1  # prompt tokens whose log-probabilities are known; the first has none

    def take(self, chunk: TokenChunk) -> ChoiceDelta:
        """The delta of a chunk: everything in it ends with the token that completes a stop string."""
        if self._is_between and not chunk.finish_reason and chunk.logprobs is None and chunk.prompt_logprobs is None:
            return self._go_on(chunk)
        delta = ChoiceDelta(self._index)
        if self._has_ended:  # what the router sent before it heard of the end
            return delta
        if chunk.prompt_logprobs is not None:
            self._score(delta, chunk.prompt_logprobs)
        if chunk.token_ids and not self._has_begun:
            delta.num_cached_tokens = min(chunk.num_cached_tokens, len(self._request.prompt_ids))
            self._has_begun = True
            self._is_between = not self._request.stop_strings and not self._request.is_prompt_only
        if self._request.is_prompt_only:
            if chunk.token_ids or chunk.finish_reason:
                delta.finish_reason, delta.stats = common_pb2.FINISH_REASON_LENGTH, self._stats
                self._has_ended = True
            return delta
        hides_last = chunk.finish_reason == STOP and not self._request.include_stop_strings
        shown = chunk.token_ids[:-1] if hides_last else chunk.token_ids
        if shown and not self._show_all(delta, shown):
            for token in shown:
                self._add(delta, [token], self._detokenizer.push([token]))
                if delta.finish_reason:
                    break
        if hides_last and not delta.finish_reason:
            self._add(delta, chunk.token_ids[-1:], "")
        if chunk.finish_reason and not delta.finish_reason:
            self._end(delta, chunk.finish_reason)
        num_kept = len(delta.token_ids)
        if chunk.logprobs is not None:
            delta.logprobs = _between(chunk.logprobs, 0, num_kept)
        if chunk.decode_pass is not None:
            self._count(chunk.decode_pass, num_kept)
        if delta.finish_reason:
            delta.stats = self._stats
            self._has_ended, self._is_between = True, False
        return delta

    def _go_on(self, chunk: TokenChunk) -> ChoiceDelta:
        """The delta of a chunk in the middle, which is what most are: nothing in it is looked at twice."""
        token_ids = chunk.token_ids
        self.num_tokens += len(token_ids)
        if chunk.decode_pass is not None:
            self._count(chunk.decode_pass, len(token_ids))
        return ChoiceDelta(self._index, self._detokenizer.push(token_ids), token_ids)

    def _show_all(self, delta: ChoiceDelta, token_ids: list[int]) -> bool:
        """Adds tokens and their text, unless it matters which of them completes a stop string."""
        if not self._request.stop_strings:
            self._add(delta, token_ids, self._detokenizer.push(token_ids))
            return True
        if self.num_tokens < self._request.stopping.min_new_tokens:
            return False
        ahead = self._detokenizer.copy()
        text = ahead.push(token_ids)
        if self._stops.completes(text):
            return False
        self._detokenizer = ahead
        self._add(delta, token_ids, text)
        return True

    def _add(self, delta: ChoiceDelta, token_ids: list[int], text: str) -> None:
        delta.token_ids += token_ids
        self.num_tokens += len(token_ids)
        self._show(delta, text)

    def _score(self, delta: ChoiceDelta, part: common_pb2.PromptLogprobs) -> None:
        """Adds what is new; a prompt that another router or another attempt prefills is scored again."""
        num_known = self._num_scored - part.start
        if 0 <= num_known < len(part.logprobs.chosen):
            delta.prompt_logprobs = _between(part.logprobs, num_known, len(part.logprobs.chosen))
            self._num_scored += len(delta.prompt_logprobs.chosen)

    def _show(self, delta: ChoiceDelta, text: str) -> None:
        """Adds text to the delta, up to a stop string. None may end within the first min_new_tokens tokens."""
        if not self._request.stop_strings:
            delta.text += text
            return
        match = self._stops.push(text, self.num_tokens > self._request.stopping.min_new_tokens)
        delta.text += match.text
        if match.stop is not None:
            delta.finish_reason, delta.stop = STOP, match.stop

    def _end(self, delta: ChoiceDelta, reason: common_pb2.FinishReason) -> None:
        """Adds what was held back, which may still complete a stop string."""
        self._show(delta, self._detokenizer.flush())
        if delta.finish_reason:
            return
        delta.text += self._stops.flush()
        delta.finish_reason = reason
        if reason == STOP and delta.token_ids and delta.token_ids[-1] not in self._request.eos_ids:
            delta.stop = delta.token_ids[-1]

    def _count(self, decode_pass: DecodePass, num_kept: int) -> None:
        if decode_pass.num_spec_tokens > self._stats.num_spec_tokens:
            self._stats = merge([self._stats, AcceptanceStats(decode_pass.num_spec_tokens)])
        self._stats.record(decode_pass.num_drafts, min(decode_pass.num_accepted_drafts, num_kept))


def _between(logprobs: common_pb2.TokenLogprobs, start: int, stop: int) -> common_pb2.TokenLogprobs:
    """Those of tokens start ... stop - 1."""
    n = logprobs.num_top
    return common_pb2.TokenLogprobs(
        chosen=logprobs.chosen[start:stop],
        num_top=n,
        top_token_ids=logprobs.top_token_ids[start * n : stop * n],
        top_logprobs=logprobs.top_logprobs[start * n : stop * n],
    )

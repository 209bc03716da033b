"""Text to tokens and back, without torch.

Text from outside never becomes a control token: those come from the chat template and the post-processor alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders

from dflash_ray.config import ModelConfig
from dflash_ray.core.errors import InvalidRequestError, prompt_too_long
from dflash_ray.text.chat_template import ChatTemplate, text_pattern
from dflash_ray.text.token_sizes import token_sizes
from dflash_ray.text.tokenizer_files import TokenizerFiles, load_tokenizer_files

_LONG = 4096  # tokens; decoding that many is left to a call that lets other threads run meanwhile


class ChatTokenizer:
    """Encodes prompts and renders chats; safe to use from several threads.

    Attributes:
        eos_ids: tokens that end an answer.
        vocab_size: number of token ids that the model has, too.
        sampling_defaults: what the model's files want where a request says nothing.
        context_length: tokens that the model takes, None where its files do not say.
        joins_bytes: a text is the bytes of its tokens one after the other, whatever stands before or after them.
    """

    def __init__(self, config: ModelConfig) -> None:
        files = load_tokenizer_files(config.path, config.use_generation_config)
        self._tokenizer = files.tokenizer
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._template = _choose_template(config, files, added)
        self._template_variables = config.chat_template_kwargs
        control_texts = {token.content for token in added if token.special}
        self._specials = text_pattern(control_texts)
        if self._template is not None:
            control_texts |= self._template.control_texts
        self._control_ids = {self._tokenizer.token_to_id(text) for text in control_texts}
        self._match_literally([token for token in added if token.content in control_texts and token.normalized])
        self._sizes = token_sizes(self._tokenizer)
        self._prefix, self._suffix = self._post_processing()
        self._newline = self._encode_piece("\n")
        self._texts = _TokenTexts(self.decode)
        self.joins_bytes = isinstance(self._tokenizer.decoder, decoders.ByteLevel)
        self.eos_ids = files.eos_ids
        self.vocab_size = min(self._tokenizer.get_vocab_size(), files.vocab_size or 2**32)
        self.sampling_defaults = files.sampling_defaults
        self.context_length = files.context_length

    def encode(
        self, text: str, add_special_tokens: bool = False, context: int | None = None, field: str = "prompt"
    ) -> list[int]:
        """Tokens of plain text; what looks like a special token is encoded as text.

        Args:
            add_special_tokens: BOS, or whatever else the tokenizer's post-processor puts around a text.
            context: a longer text is refused as soon as that is sure: InvalidRequestError that names `field`.
        """
        self._check_size([text], context, field)
        pieces: list[str] = []
        end = 0
        for match in self._specials.finditer(text):
            pieces += [text[end : match.start()], match[0]]
            end = match.end()
        ids = self._encode_pieces([*pieces, text[end:]], context, field)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        context: int | None = None,
    ) -> list[int]:
        """Tokens up to the assistant's turn. Raises InvalidRequestError when the template refuses the messages.

        Args:
            variables: values for the template, before those of `model.chat_template_kwargs`.
            context: a longer chat is refused as soon as that is sure.
        """
        if self._template is None:
            raise InvalidRequestError("this model has no chat template; use /v1/completions", "messages")
        pieces = self._template.render(messages, {**self._template_variables, **(variables or {})})
        self._check_size(pieces, context, "messages")
        return self._encode_pieces(pieces, context, "messages")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        ids = list(token_ids)
        if len(ids) > _LONG:
            return str(self._tokenizer.decode_batch([ids], skip_special_tokens=True)[0])
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def decode_token(self, token_id: int) -> str:
        """The same of one token."""
        return self._texts[token_id]

    def decode_each(self, token_ids: Sequence[int]) -> str:
        """The texts of tokens by themselves: what is no whole character of its own is replaced."""
        return "".join(map(self._texts.__getitem__, token_ids))

    def token_text(self, token_id: int) -> str:
        """Text of one token, special tokens included."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def _check_size(self, pieces: Sequence[str], context: int | None, field: str) -> None:
        """Refuses without tokenizing what has too many bytes for the longest tokens there are."""
        if context is not None and self._sizes is not None:
            num_tokens = self._sizes.min_tokens(pieces)
            if num_tokens >= context:
                raise prompt_too_long(f"at least {num_tokens}", context, field)

    def _encode_pieces(self, pieces: Sequence[str], context: int | None, field: str) -> list[int]:
        """Tokens of pieces in turn, of which every second one is text that must not become a control token."""
        ids = self._encode_piece(pieces[0])
        for i, piece in enumerate(pieces[1:], start=1):
            if context is not None and len(ids) >= context:
                raise prompt_too_long(f"at least {len(ids)}", context, field)
            if piece:
                encode = self._encode_literal if i % 2 else self._encode_piece
                ids += self._encode_later(piece, encode)
        return ids

    def _encode_later(self, piece: str, encode: Any) -> list[int]:
        """After a line break, because SentencePiece puts a space before what begins a text."""
        ids: list[int] = encode(f"\n{piece}")
        size = len(self._newline)
        return ids[size:] if ids[:size] == self._newline else encode(piece)

    def _encode_piece(self, text: str) -> list[int]:
        # Unlike encode, the batch variant leaves other threads running meanwhile.
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _encode_literal(self, text: str) -> list[int]:
        """Tokens of the model itself: it knows the vocabulary, but no added tokens."""
        ids = self._tokenize(text)
        if self._control_ids.isdisjoint(ids):
            return ids
        return [token for character in text for token in self._tokenize(character)]

    def _tokenize(self, text: str) -> list[int]:
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        words = [text]
        if self._tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in self._tokenizer.model.tokenize(word)]

    def _match_literally(self, tokens: Sequence[AddedToken]) -> None:
        """Control tokens match as they are written, so that no other text turns into one by normalization."""
        for token in tokens:
            flags = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
            literal = AddedToken(token.content, **flags, normalized=False, special=token.special)
            (self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens)([literal])

    def _post_processing(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text."""
        plain = list(self._tokenizer.encode("a", add_special_tokens=False).ids)
        whole = list(self._tokenizer.encode("a", add_special_tokens=True).ids)
        if not plain:  # the vocabulary lacks the letter
            return whole, []
        starts = range(len(whole) - len(plain) + 1)
        start = next((i for i in starts if whole[i : i + len(plain)] == plain), None)
        if start is None:
            raise ValueError("model.path: the post-processor in tokenizer.json changes a text's own tokens")
        return whole[:start], whole[start + len(plain) :]


class _TokenTexts(dict[int, str]):
    """Texts of single tokens, as far as they were asked for: at most the vocabulary."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode

    def __missing__(self, token_id: int) -> str:
        text = self[token_id] = self._decode([token_id])
        return text


def _choose_template(config: ModelConfig, files: TokenizerFiles, added: Any) -> ChatTemplate | None:
    """`model.chat_template` is the name of one of the tokenizer's templates or the path of a file."""
    choice = config.chat_template
    source = files.chat_templates.get("default" if choice is None else choice)
    if source is None and choice is None and files.chat_templates:
        names = ", ".join(sorted(files.chat_templates))
        raise ValueError(f"model.chat_template: the tokenizer has no default template; choose one of {names}")
    if source is None and choice is not None:
        try:
            source = Path(choice).read_text(encoding="utf-8")
        except OSError as error:
            names = ", ".join(sorted(files.chat_templates)) or "none"
            raise ValueError(
                f"model.chat_template: {choice} is no file ({error.strerror}) and none of the tokenizer's own ({names})"
            ) from None
    return None if source is None else ChatTemplate(source, added, files.special_texts)

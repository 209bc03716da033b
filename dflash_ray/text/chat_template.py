"""Chat templates, rendered by transformers' own renderer, in which no message can write a control token.

A template sees the real contents, which it may search and split. Only where a value holds the text of a control token
are private-use characters put around and between that token's characters; the rendered prompt is cut there, and what
they surrounded is encoded as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from dflash_ray.core.errors import InvalidRequestError

_PRIVATE_USE = range(0x100000, 0x10FFFE)
_SET_HERE = frozenset(
    (
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "messages",
        "return_assistant_tokens_mask",
        "tokenize",
        "tools",
    )
)


class ChatTemplate:
    """One template of a tokenizer.

    Args:
        source: the Jinja text. Raises ValueError when it is not Jinja.
        added_tokens: all that the tokenizer has, special or not.
        special_texts: bos_token and the like, which templates name.
    """

    def __init__(self, source: str, added_tokens: Iterable[AddedToken], special_texts: Mapping[str, str]) -> None:
        self._source = source
        self._special_texts = dict(special_texts)
        self.control_texts = _control_texts(source, added_tokens)
        self._controls = text_pattern(self.control_texts)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[str]:
        """The prompt up to the assistant's turn, in pieces: every second one, from the second on, is plain text.

        Raises InvalidRequestError for variables that the server sets itself, and when the template refuses its input.
        """
        for name in sorted(_SET_HERE & variables.keys()):
            raise InvalidRequestError(f"chat_template_kwargs: {name} cannot be set here", "chat_template_kwargs")
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        values = {"add_generation_prompt": True, **variables}
        try:
            texts = list(_texts([chat, values]))
            if not any(self._controls.search(text) for text in texts):
                return [self._render(chat, values)]
            fence, gap = _unused_characters([*texts, self._source])

            def cut(text: str) -> str:
                """No two characters of a control token stay neighbours, whatever the template does with the text."""
                return self._controls.sub(lambda match: f"{fence}{gap.join(match[0])}{fence}", text)

            rendered = self._render(_map_texts(chat, cut), _map_texts(values, cut))
        except Exception as error:  # a template may fail in any way on what a client sends
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", "messages") from None
        whole_or_lone = f"{fence}([^{fence}{gap}](?:{gap}[^{fence}{gap}])*){fence}|[{fence}{gap}]"
        return [(piece or "").replace(gap, "") for piece in re.split(whole_or_lone, rendered)]

    def _render(self, chat: list[dict[str, Any]], values: dict[str, Any]) -> str:
        prompts: Any = render_jinja_template([chat], chat_template=self._source, **{**self._special_texts, **values})
        return str(prompts[0][0])


def text_pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the texts, the longest first."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _control_texts(source: str, added_tokens: Iterable[AddedToken]) -> frozenset[str]:
    """Special tokens, and other added tokens that only the template writes, such as DeepSeek's `<｜User｜>`.

    Tags that enclose a part of an answer (`<think>`, `</think>`) and texts that the template looks for in contents are
    the messages' own.
    """
    tokens = list(added_tokens)
    others = {token.content for token in tokens if not token.special}
    ends = {text for text in others if text.startswith("</")}
    tags = {tag for end in ends for tag in (end, f"<{end[2:]}")}
    written, sought = _literals(source)
    own = {text for text in others - tags if _is_in(text, written) and not _is_in(text, sought)}
    return frozenset(token.content for token in tokens if token.special) | own


def _is_in(text: str, literals: Iterable[str]) -> bool:
    return any(text in literal for literal in literals)


def _literals(source: str) -> tuple[list[str], list[str]]:
    """Strings that a template writes, and those that it compares with or gives to methods and filters."""
    environment = Environment(extensions=[_GenerationBlock, loopcontrols])  # parses only, so no sandbox is needed
    try:
        tree = environment.parse(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not Jinja: line {error.lineno}: {error.message}") from None
    searches: list[nodes.Node] = [*tree.find_all((nodes.Compare, nodes.Test))]
    searches += [call for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Getattr)]
    searches += [argument for filtered in tree.find_all(nodes.Filter) for argument in filtered.args]
    constants = [constant for search in searches for constant in _constants(search)]
    sought_ids = {id(constant) for constant in constants}
    written = [data.data for data in tree.find_all(nodes.TemplateData)]
    written += [str(constant.value) for constant in tree.find_all(nodes.Const) if id(constant) not in sought_ids]
    return written, [str(constant.value) for constant in constants]


def _constants(node: nodes.Node) -> list[nodes.Const]:
    return [node] if isinstance(node, nodes.Const) else list(node.find_all(nodes.Const))


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _texts(value: Any) -> Iterator[str]:
    """Every string in a tree of plain values, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_texts(key, change): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return value


def _unused_characters(texts: Sequence[str]) -> tuple[str, str]:
    """Two private-use characters that none of the texts has."""
    unused = (mark for mark in map(chr, _PRIVATE_USE) if not any(mark in text for text in texts))
    return next(unused), next(unused)

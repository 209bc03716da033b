"""From the bytes of a body to a checked model of it. What is wrong is an InvalidRequestError that names the field.

The rules of every model: null means not given, a field that nobody knows is passed over, and a field that would change
the answer is refused.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from dflash_ray.core.errors import InvalidRequestError

logger = logging.getLogger(__name__)

_MAX_DIGITS = 40  # far below what Python refuses to read
_OUT_OF_RANGE = 10**40  # of every field
_MAX_LOGGED = 100
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_OF_PYDANTIC = re.compile(r"^Value error, | or instance of \w+$")  # says nothing to a client
_UNSUPPORTED = "unsupported_parameter"
_CODES = {_UNSUPPORTED: _UNSUPPORTED, "missing": "missing_required_parameter"}

Model = TypeVar("Model", bound=BaseModel)


class Body(BaseModel):
    """Base of request bodies and of the objects in them.

    Attributes:
        refused: fields that cannot be honoured, with the values that change nothing; empty values never do.
    """

    model_config = ConfigDict(extra="ignore")
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        """The fields that are given."""
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        for name in given.keys() & cls.refused.keys():
            if given[name] not in ("", [], *cls.refused[name]):
                raise PydanticCustomError(_UNSUPPORTED, "is not supported here; leave it out", {"field": name})
        return given


def parse_json(data: bytes) -> Any:
    """The values of a JSON document, all of whose text can be encoded and none of whose numbers is too long."""
    try:
        text = data.decode()
        values = json.loads(text, parse_int=_read_int)
    except UnicodeDecodeError:
        raise InvalidRequestError("the body is not valid UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if _SURROGATE_ESCAPE.search(text):
        _check_text(values)
    return values


def _read_int(digits: str) -> int:
    """The integer, or where it has more digits than any field takes one that is as far out of every range."""
    if len(digits) <= _MAX_DIGITS:
        return int(digits)
    return -_OUT_OF_RANGE if digits.startswith("-") else _OUT_OF_RANGE


def _check_text(values: Any) -> None:
    """Refuses halves of surrogate pairs, which no encoding of text has."""
    left: list[tuple[tuple[str, ...], Any]] = [((), values)]
    while left:
        path, value = left.pop()
        if isinstance(value, dict):
            left += [((*path, "a field's name"), name) for name in value]
            left += [((*path, name), item) for name, item in value.items()]
        elif isinstance(value, list):
            left += [((*path, str(i)), item) for i, item in enumerate(value)]
        elif isinstance(value, str) and _SURROGATE.search(value):
            name = ".".join(path).encode(errors="replace").decode()
            raise InvalidRequestError("has half of a surrogate pair (\\ud800 to \\udfff), which is no text", name)


def check(model: type[Model], values: Any) -> Model:
    """A model of plain values."""
    if not isinstance(values, dict):
        raise InvalidRequestError("the body must be a JSON object")
    try:
        return model.model_validate(values, strict=False)
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> InvalidRequestError:
    """The first fault, in words."""
    item = error.errors(include_url=False, include_input=False)[0]
    path = [str(part) for part in item["loc"]]
    if "field" in item.get("ctx", ()):  # a model's own check
        path.append(item["ctx"]["field"])
    # Members of unions are named after their types.
    name = ".".join(part for part in path if part not in ("str", "[key]") and not part.startswith("list["))
    return InvalidRequestError(_OF_PYDANTIC.sub("", item["msg"]), name or None, _CODES.get(item["type"]))


class UnknownFields:
    """Logs each field that no model knows once, up to a bounded number of names."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def log(self, values: Mapping[str, Any], model: type[BaseModel], known: frozenset[str]) -> None:
        for name in values.keys() - model.model_fields.keys() - known - self._logged:
            if len(self._logged) < _MAX_LOGGED:
                self._logged.add(name)
                logger.info("requests have a field that is not used here: %.80r", name)

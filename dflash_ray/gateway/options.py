"""How to generate, as both APIs take it: one model, one set of checks. HTTP names its fields as they are named here."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import Field, field_validator

from dflash_ray.gateway.bodies import Body

Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0)]
Item = TypeVar("Item")
Entries = Annotated[
    list[Item], Field(fail_fast=True)
]  # the first fault is reported; a million would be collected for seconds

_MAX_INT32 = 2**31 - 1


class SpeculationOptions(Body):
    """How to speculate for one request; it changes the speed, never the text."""

    model_config = {"extra": "forbid"}

    policy: Literal["adaptive", "fixed", "off"] | None = None
    draft_tokens: int | None = Field(None, ge=0, le=31)


class GenerationOptions(Body):
    """Sampling, stopping and speculation of one request."""

    max_tokens: int | None = Field(None, ge=1, le=_MAX_INT32)
    min_tokens: int = Field(0, ge=0, le=_MAX_INT32)
    temperature: Finite = Field(1.0, ge=0, le=10)
    top_p: Finite = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=_MAX_INT32)
    min_p: Finite = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    n: int = Field(1, ge=1, le=_MAX_INT32)
    presence_penalty: Finite = Field(0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(0.0, ge=-2, le=2)
    repetition_penalty: Finite = Field(1.0, gt=0, le=10)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] = {}
    stop: Entries[str] = []
    stop_token_ids: Entries[TokenId] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    speculation: SpeculationOptions = SpeculationOptions()
    verify_mode: Literal["coupled", "rejection"] = "coupled"
    cache_salt: str = Field("", max_length=256)

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("stop", mode="after")
    @classmethod
    def _no_empty_stop(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("stop strings must not be empty")
        return value

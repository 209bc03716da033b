"""The whole configuration as one typed tree: read from YAML, changed by `--set key=value`, passed to every process.

Unknown keys and bad values raise a ConfigError whose text names the key. Values that follow from others are properties.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dflash_ray.core.drafter_kinds import DRAFTER_KINDS

BUILTIN_MODEL = "builtin:smollm2"
BUILTIN_DRAFTER = "builtin:smollm2-135m-dflash"
_BYTES_PER_NUMBER = 4  # of a token id or log-probability in a message
_DRAWN_CANDIDATES = 16  # a slot, of a draft distribution
_PASS_ROWS = (16, 64, 128, 256, 512)
_MESSAGE_BASE_BYTES = 320 * 1024  # a piece of context features, or what else comes along

_Tree = TypeVar("_Tree", bound=BaseModel)


class ConfigError(ValueError):
    """The configuration cannot be used; the text names the key and the fix."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_host(host: str) -> str:
    if not host or "[" in host or "]" in host:
        raise ValueError("give a host name or an IP address, an IPv6 one without brackets, e.g. ::1")
    return host


_Host = Annotated[str, AfterValidator(_check_host)]


class ModelConfig(_Section):
    path: str = Field(BUILTIN_MODEL, description="Hugging Face directory (safetensors or one GGUF file) or a builtin:")
    served_name: str = Field("smollm2-135m-instruct", description="the name that answers give")
    aliases: tuple[str, ...] = Field((), description="further names that requests may use")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_model_len: int = Field(
        8192, ge=16, description="tokens of a sequence; at most the model's own context and the KV cache"
    )
    chat_template: str | None = Field(
        None, description="name of one of the tokenizer's templates, or path of a Jinja file in their place"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="values for the chat template, e.g. {enable_thinking: false}; requests may differ",
    )
    use_generation_config: bool = Field(
        True, description="generation_config.json gives the sampling values that a request leaves out"
    )

    @property
    def served_names(self) -> tuple[str, ...]:
        return (self.served_name, *self.aliases)


class PlacementConfig(_Section):
    """Where a process may run in the Ray cluster."""

    num_cpus: float = Field(0.1, ge=0)
    num_gpus: float | None = Field(
        None, ge=0, description="GPUs of a process, or a fraction of one; null: 1 where its device is cuda, else none"
    )
    resources: dict[str, float] = Field(default_factory=dict, description="custom Ray resources, e.g. {drafter: 1}")


class TargetConfig(_Section):
    num_replicas: int = Field(1, ge=1)
    tp_size: int = Field(1, ge=1, le=16, description="tensor-parallel ranks of one group, a Ray actor each")
    placement: PlacementConfig = PlacementConfig(num_cpus=0.5)
    placement_strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int = Field(0, ge=0, description="torch threads of a rank; 0 shares the machine's cores")
    page_size: int = Field(16, ge=1, description="tokens of a KV page")
    kv_cache_tokens: Annotated[int, Field(ge=64)] | Literal["auto"] = Field(
        32768, description="tokens that the paged KV cache of a group holds; auto: what fits into the memory left"
    )
    prefix_cache: bool = Field(
        True, description="prompts begin behind the pages that an earlier one with the same beginning has computed"
    )
    max_batch_tokens: int = Field(512, ge=16, description="rows of a step")
    exact: bool = Field(
        True,
        description="on a GPU every pass has exact_rows rows, so that no token depends on what else is in a batch; "
        "false: a step is one pass of the smallest of 16, 64, 128, 256 or 512 rows that hold it. A CPU is exact anyway",
    )
    exact_rows: int = Field(256, ge=16, description="rows of a pass on a GPU, at most max_batch_tokens")
    init_timeout_s: float = Field(300.0, gt=0)
    step_timeout_s: float = Field(
        120.0, gt=0, description="a pass that takes longer, or a rank that is silent as long, ends the group"
    )

    @property
    def num_gpus(self) -> float:
        """GPUs of a rank, or the fraction of one."""
        return _num_gpus(self.placement, self.device)

    @property
    def pass_rows(self) -> tuple[int, ...]:
        """Numbers of rows that a pass on a GPU may have, ascending."""
        if self.exact:
            return (min(self.exact_rows, self.max_batch_tokens),)
        most = max(rows for rows in _PASS_ROWS if rows <= self.max_batch_tokens)
        return tuple(rows for rows in _PASS_ROWS if rows <= most)

    @property
    def num_pages(self) -> int:
        """Raises ConfigError for auto, which only a rank that has loaded makes a number of."""
        if self.kv_cache_tokens == "auto":
            raise ConfigError("target.kv_cache_tokens: auto is decided where a rank starts; give a number here")
        return -(-self.kv_cache_tokens // self.page_size)

    @property
    def kv_cache_rows(self) -> int:
        """Rows of the cache: its tokens in whole pages."""
        return self.num_pages * self.page_size


class DrafterAutoscaling(_Section):
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(3, ge=1)
    target_busy_fraction: float = Field(0.6, gt=0, le=1)
    look_back_period_s: float = Field(5.0, gt=0)
    upscale_delay_s: float = Field(3.0, ge=0)
    downscale_delay_s: float = Field(60.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> DrafterAutoscaling:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        return self


def _num_gpus(placement: PlacementConfig, device: str) -> float:
    if placement.num_gpus is not None:
        return placement.num_gpus
    return 1.0 if device == "cuda" else 0.0


def _check_gpus(section: str, num_gpus: float, device: str, num_ranks: int = 1) -> None:
    """Raises ValueError for a number of GPUs that a process on this device cannot have."""
    key = f"{section}.placement.num_gpus"
    if device == "cpu" and num_gpus:
        raise ValueError(f"{key}: {section}.device is cpu, which uses no GPU; set it to cuda, or leave {key} out")
    if device == "cuda" and not num_gpus:
        raise ValueError(f"{key}: {section}.device is cuda; give 1, a fraction as 0.5 to share a GPU, or leave it out")
    if num_gpus > 1:
        raise ValueError(f"{key}: a process computes on one GPU; give at most 1, and target.tp_size for more of them")
    if device == "cuda" and num_ranks > 1 and num_gpus <= 0.5:
        raise ValueError(f"{key}: NCCL takes no two ranks of a group on one GPU; give more than 0.5, e.g. 0.6")


def _check_method(method: str) -> str:
    if method not in (*DRAFTER_KINDS, "none"):
        raise ValueError(f"there is no drafter of that kind; give one of {', '.join(DRAFTER_KINDS)}, or none")
    return method


class DrafterConfig(_Section):
    method: Annotated[str, AfterValidator(_check_method)] = Field(
        "dflash", description="dflash and dflash2 read drafter.path, whose architecture says which of the two runs"
    )
    path: str = Field(BUILTIN_DRAFTER, description="drafter checkpoint directory (layout of z-lab or speculators)")
    placement_mode: Literal["remote", "colocated"] = Field(
        "remote", description="remote: replicas of their own; colocated: inside the target's rank 0"
    )
    num_replicas: int = Field(1, ge=1)
    autoscaling: DrafterAutoscaling | None = None
    placement: PlacementConfig = PlacementConfig(num_cpus=0.25)
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_threads: int = Field(0, ge=0, description="torch threads of a replica; 0 shares the machine's cores")
    step_timeout_s: float = Field(30.0, gt=0, description="a draft pass that takes longer ends the replica")
    max_context_tokens: int | None = Field(
        None,
        ge=64,
        description="context rows that a replica holds over all sequences; sequences that find no room are decoded "
        "without its drafts. null: as many as all target groups' KV caches can ask for",
    )

    @property
    def num_gpus(self) -> float:
        """GPUs of a replica, or the fraction of one."""
        return _num_gpus(self.placement, self.device)

    @property
    def fewest_replicas(self) -> int:
        """Replicas that can be counted on."""
        return max(1, self.num_replicas if self.autoscaling is None else self.autoscaling.min_replicas)


def _off_of_yaml(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class RouterConfig(_Section):
    num_replicas: int = Field(1, ge=1)
    placement: PlacementConfig = PlacementConfig()
    policy: Annotated[Literal["adaptive", "fixed", "off"], BeforeValidator(_off_of_yaml)] = Field(
        "adaptive",
        description="adaptive: as many drafts as pay, none where none do; fixed: draft_tokens; requests may choose",
    )
    draft_tokens: int = Field(
        4, ge=0, le=31, description="drafts a step of the fixed policy, unless the request says otherwise"
    )
    prefer_ngram: bool = Field(
        True, description="draft from an earlier occurrence of the text's end where that is right more often"
    )
    tree_width: int = Field(
        1, ge=1, le=16, description="drafts that may follow the same one: 1 for chains, more for trees"
    )
    cohorts: Literal[1, 2] = Field(1, description="2: one cohort is verified while the other is drafted")
    steps_in_flight: Literal[1, 2] | None = Field(
        None,
        description="2: the next step is sent while one runs; unless set, as many as cohorts, and a plain one more",
    )
    draft_timeout_ms: float = Field(100.0, gt=0, description="a slower draft is replaced by an n-gram or none")
    max_missed_drafts: int = Field(3, ge=1, description="late drafts in a row before a drafter is left for a while")
    prefill_chunk_tokens: int = Field(256, ge=1)
    max_running: int = Field(64, ge=1, description="sequences decoded at a time, per target group")
    max_waiting: int = Field(256, ge=0, description="requests queued before new ones are refused")
    lease_ttl_s: float = Field(5.0, gt=0)
    target_wait_s: float = Field(
        180.0, gt=0, description="requests wait this long for a target group while no router leads one"
    )

    @property
    def num_steps_in_flight(self) -> int:
        """Steps of different sequences that a target group is sent ahead of their results."""
        return self.steps_in_flight or self.cohorts

    @property
    def runs_ahead(self) -> bool:
        """Whether a plain step is sent while another one with the same sequences runs."""
        return self.cohorts == 1 and self.steps_in_flight != 1


class TrafficConfig(_Section):
    """Prompts that users sent, as JSONL with `messages` or `prompt`, and `time` in seconds since 1970."""

    directory: Path
    retention_days: float = Field(gt=0, description="older records are not used, and files without newer ones deleted")
    redact_patterns: tuple[str, ...] = Field((), description="regular expressions whose matches are blanked out")
    redact_hook: str | None = Field(None, description="module:function, from text to text, called after the patterns")

    @property
    def retention_s(self) -> float:
        return self.retention_days * 86400.0

    @model_validator(mode="after")
    def _check(self) -> TrafficConfig:
        if not self.redact_patterns and self.redact_hook is None:
            raise ValueError("give redact_patterns or redact_hook: traffic is never used unredacted")
        for pattern in self.redact_patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"redact_patterns: {pattern!r} is no regular expression ({error})") from None
        return self


class CorsConfig(_Section):
    """Which web pages may call the HTTP API from a browser."""

    allow_origins: tuple[str, ...] = Field((), description="e.g. https://chat.example.org; * allows every page")
    allow_headers: tuple[str, ...] = ("Authorization", "Content-Type", "X-Request-Id")
    allow_credentials: bool = Field(False, description="whether browsers may send cookies along")


class GatewayConfig(_Section):
    num_replicas: int = Field(1, ge=1)
    placement: PlacementConfig = PlacementConfig()
    http_host: _Host = "127.0.0.1"
    http_port: int = Field(8000, ge=0, le=65535)
    grpc_host: _Host = "127.0.0.1"
    grpc_port: int = Field(9000, ge=0, le=65535)
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    max_stop_strings: int = Field(16, ge=1)
    max_choices: int = Field(16, ge=1, description="largest n of a request")
    max_logprobs: int = Field(20, ge=0)
    max_prompts: int = Field(1024, ge=1, description="prompts of one completion request")
    parallel_prompts: int = Field(32, ge=1, description="prompts of one request that run at a time")
    keepalive_s: float = Field(15.0, gt=0, description="a stream that is silent this long sends a comment")
    cors: CorsConfig = CorsConfig()
    request_timeout_s: float = Field(600.0, gt=0)
    drain_timeout_s: float = Field(30.0, ge=0, description="a gateway that stops lets its answers go on for so long")
    grpc_connection_age_s: float | None = Field(
        None, gt=0, description="clients connect anew after this time, and so spread over gateways; answers go on"
    )
    traffic: TrafficConfig | None = Field(None, description="where chat prompts are recorded; null records none")


class NetworkConfig(_Section):
    bind_host: _Host = Field(
        "127.0.0.1", description="interface of the inner gRPC servers; `node` is the Ray node's IP"
    )
    entry_ttl_s: float = Field(5.0, gt=0, description="a process that is silent this long leaves the directory")
    max_message_bytes: int = Field(
        64 * 1024 * 1024,
        ge=1024 * 1024,
        description="largest message between the inner processes; context features travel in pieces of 512 KiB",
    )
    shared_memory: bool = Field(
        True, description="a drafter on the target's machine reads context features where the target keeps them"
    )


class ObservabilityConfig(_Section):
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "text"] = "json"


class DflashRayConfig(_Section):
    """Root of the tree."""

    model: ModelConfig = ModelConfig()
    target: TargetConfig = TargetConfig()
    drafter: DrafterConfig = DrafterConfig()
    router: RouterConfig = RouterConfig()
    gateway: GatewayConfig = GatewayConfig()
    network: NetworkConfig = NetworkConfig()
    observability: ObservabilityConfig = ObservabilityConfig()

    @property
    def uses_features(self) -> bool:
        """Whether the target runs the drafter's fc and keeps context features."""
        return self.drafter.method != "none" and DRAFTER_KINDS[self.drafter.method].reads_features

    def sequence_limit(self, model_context: int | None) -> int:
        """Tokens that a sequence may have: at most what the model takes, and what the KV cache of a group holds.

        A cache of automatic size is not counted; the group says what fits.
        """
        limits = [self.model.max_model_len]
        if self.target.kv_cache_tokens != "auto":
            limits.append(self.target.kv_cache_rows)
        return min(limits if model_context is None else [*limits, model_context])

    def with_kv_cache_tokens(self, tokens: int) -> DflashRayConfig:
        """The same with a cache of so many tokens."""
        return self.model_copy(update={"target": self.target.model_copy(update={"kv_cache_tokens": tokens})})

    @property
    def drafts_remotely(self) -> bool:
        """Whether drafters are processes of their own."""
        return self.drafter.method != "none" and self.drafter.placement_mode == "remote"

    @property
    def num_drafter_replicas(self) -> int:
        """Replicas that a fixed-size deployment starts; 0 when nothing drafts remotely."""
        return self.drafter.num_replicas if self.drafts_remotely else 0

    @property
    def drafter_context_tokens(self) -> int:
        """Context rows that a drafter holds over all sequences."""
        return self.drafter.max_context_tokens or self._contexts_asked_for

    @property
    def _contexts_asked_for(self) -> int:
        """Context rows of all sequences that the drafters' targets can run at a time."""
        return self.target.kv_cache_rows * (self.target.num_replicas if self.drafts_remotely else 1)

    @model_validator(mode="after")
    def _check(self) -> DflashRayConfig:
        self._check_rows()
        self._check_contexts()
        self._check_messages()
        self._check_devices()
        return self

    def _check_devices(self) -> None:
        _check_gpus("target", self.target.num_gpus, self.target.device, self.target.tp_size)
        if self.drafts_remotely:
            _check_gpus("drafter", self.drafter.num_gpus, self.drafter.device)
        elif self.drafter.method != "none" and self.drafter.device == "cuda" and self.target.device == "cpu":
            raise ValueError(
                "drafter.device: a colocated drafter lives in the target's process, and target.device is cpu; set "
                "both to cuda, or drafter.placement_mode to remote"
            )

    def _check_rows(self) -> None:
        """A pass must hold the drafts of all sequences that decode at a time."""
        rows = self.router.max_running * (1 + (self.router.draft_tokens if self.drafter.method != "none" else 0))
        if self.target.max_batch_tokens < rows:
            raise ValueError(
                f"target.max_batch_tokens: router.max_running {self.router.max_running} sequences of 1 + "
                f"router.draft_tokens {self.router.draft_tokens} rows need {rows}, and {self.target.max_batch_tokens} "
                "are allowed; raise it, or lower one of the others"
            )

    def _check_contexts(self) -> None:
        """Every sequence that a target can run must find room at a drafter."""
        if self.target.kv_cache_tokens == "auto":
            if self.drafts_remotely and self.drafter.max_context_tokens is None:
                raise ValueError(
                    "drafter.max_context_tokens: with target.kv_cache_tokens auto, drafters' replicas do not know how "
                    "many sequences there may be; give the context rows that one may hold"
                )
            return
        num_drafters = self.drafter.fewest_replicas if self.drafts_remotely else 1
        held, wanted = num_drafters * self.drafter_context_tokens, self._contexts_asked_for
        if self.drafter.method != "none" and held < wanted:
            raise ValueError(
                f"drafter.max_context_tokens: {num_drafters} drafters hold {held} context rows, but the targets' KV "
                f"caches hold {wanted}; leave it null, give at least {-(-wanted // num_drafters)}, or lower "
                "target.kv_cache_tokens"
            )

    def _check_messages(self) -> None:
        """The largest messages that the settings allow must pass."""
        target, router = self.target, self.router
        opened = (-(-target.max_batch_tokens // router.prefill_chunk_tokens) + 1) * self.model.max_model_len
        logprobs = 2 * target.max_batch_tokens * (1 + self.gateway.max_logprobs)
        drafts = 2 * router.max_running * 32 * _DRAWN_CANDIDATES
        needed = _MESSAGE_BASE_BYTES + _BYTES_PER_NUMBER * max(opened, logprobs + drafts)
        if self.network.max_message_bytes < needed:
            raise ValueError(
                f"network.max_message_bytes: {self.network.max_message_bytes} is too little for model.max_model_len "
                f"{self.model.max_model_len}, target.max_batch_tokens {target.max_batch_tokens}, gateway.max_logprobs "
                f"and router.max_running; it takes {needed}"
            )


def parse_config(values: dict[str, Any], source: str = "config") -> DflashRayConfig:
    """Validates a plain tree of values. Raises ConfigError that names every key at fault."""
    return validate(DflashRayConfig, values, source)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> DflashRayConfig:
    """Reads a YAML file (None: the defaults) and applies `key.sub=value` overrides, whose values are YAML too."""
    return validate(DflashRayConfig, read_values(path, overrides), str(path or "config"))


def validate(model: type[_Tree], values: dict[str, Any], source: str) -> _Tree:
    """A typed tree from plain values. Raises ConfigError that names every key at fault."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def read_values(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a YAML file after `key.sub=value` overrides. Raises ConfigError."""
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"config file {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path}: the top level must be a mapping of sections")
    for override in overrides:
        _apply_override(values, override)
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: write it as key.sub=value")
    *parents, leaf = key.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from None

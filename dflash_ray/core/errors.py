"""The errors a client can meet, each with its HTTP status, its gRPC code and OpenAI's words for it."""

from __future__ import annotations


class RequestError(Exception):
    """Base of the errors that a client sees. `str()` names the field at fault.

    Attributes:
        message: what is wrong and how to put it right.
        param: the request's field at fault, as the client wrote it, or None.
        code: what went wrong, for programs.
        retry_after_s: when it is worth trying again, or None.
    """

    http_status = 500
    grpc_code = "INTERNAL"
    kind = "server_error"
    code = "internal_error"
    retry_after_s: int | None = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code

    def __str__(self) -> str:
        return self.message if self.param is None else f"{self.param}: {self.message}"


class InvalidRequestError(RequestError):
    """A field has a value that cannot be served."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"
    kind = "invalid_request_error"
    code = "invalid_value"


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""

    http_status = 404
    grpc_code = "NOT_FOUND"
    kind = "invalid_request_error"
    code = "model_not_found"


class TooLargeError(RequestError):
    """The request's body is over the accepted size."""

    http_status = 413
    grpc_code = "INVALID_ARGUMENT"
    kind = "invalid_request_error"
    code = "request_too_large"


class OverloadedError(RequestError):
    """The queue is full; try again later."""

    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"
    kind = "rate_limit_error"
    code = "overloaded"
    retry_after_s = 1


class UnavailableError(RequestError):
    """No router or no target group can serve right now; try again."""

    http_status = 503
    grpc_code = "UNAVAILABLE"
    code = "unavailable"
    retry_after_s = 5


class HandedOverError(UnavailableError):
    """A router ends a request that is to go on elsewhere.

    Attributes:
        num_losses: groups that were lost while they ran it, which whoever runs it next must know.
    """

    def __init__(self, message: str, num_losses: int) -> None:
        super().__init__(message)
        self.num_losses = num_losses


class OtherModelError(RequestError):
    """The groups here serve another model than the one that began the answer."""

    http_status = 503
    grpc_code = "FAILED_PRECONDITION"
    code = "unavailable"
    retry_after_s = 5


class DeadlineExceededError(RequestError):
    """The request's own deadline passed."""

    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"
    code = "deadline_exceeded"


_BY_GRPC_CODE: dict[str, type[RequestError]] = {
    error.grpc_code: error
    for error in (
        InvalidRequestError,
        UnknownModelError,
        OverloadedError,
        UnavailableError,
        OtherModelError,
        DeadlineExceededError,
        RequestError,
    )
}


def error_of_call(code_name: str, message: str, param: str | None, num_losses: int) -> RequestError:
    """The error with which a router ended a call; unknown codes become internal errors."""
    if num_losses:
        return HandedOverError(message, num_losses)
    return _BY_GRPC_CODE.get(code_name, RequestError)(message, param)


def prompt_too_long(num_tokens: int | str, context: int, field: str) -> InvalidRequestError:
    """The refusal of a prompt that leaves no room for an answer."""
    # Client libraries know this error by OpenAI's words for the limit.
    message = f"has {num_tokens} tokens, but this model's maximum context length is {context} tokens; shorten it"
    return InvalidRequestError(message, field, "context_length_exceeded")

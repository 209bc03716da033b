"""The Target service as it is registered and called: responses of its Features method stay bytes on both sides.

`models/context_features.py` makes and reads them, with fewer copies of their rows than protobuf would.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from dflash_ray.pb import target_pb2, target_pb2_grpc

_SERVICE = target_pb2.DESCRIPTOR.services_by_name["Target"].full_name


def add_target_service(servicer: target_pb2_grpc.TargetServicer, server: grpc.aio.Server) -> None:
    """Adds a servicer whose `Features` yields encoded FeaturesResponses."""
    handlers = {
        "Verify": grpc.stream_stream_rpc_method_handler(
            servicer.Verify,
            request_deserializer=target_pb2.TargetRequest.FromString,
            response_serializer=target_pb2.TargetResponse.SerializeToString,
        ),
        "Features": grpc.stream_stream_rpc_method_handler(
            servicer.Features, request_deserializer=target_pb2.FeaturesRequest.FromString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))


def call_features(
    channel: grpc.aio.Channel, requests: AsyncIterator[target_pb2.FeaturesRequest] | None = None
) -> grpc.aio.StreamStreamCall:
    """Calls Target.Features, whose responses come encoded."""
    method = channel.stream_stream(
        f"/{_SERVICE}/Features", request_serializer=target_pb2.FeaturesRequest.SerializeToString
    )
    return method(requests)

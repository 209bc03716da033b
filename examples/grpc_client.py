"""Streams one answer over gRPC: `python examples/grpc_client.py "Why is the sky blue?"`."""

import argparse

import grpc

from dflash_ray.pb import generation_pb2, generation_pb2_grpc


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt")
    parser.add_argument("--grpc", default="127.0.0.1:9000")
    arguments = parser.parse_args()
    request = generation_pb2.GenerateRequest(temperature=0.0)
    request.chat.messages.add(role="user", content=arguments.prompt)
    # The prompt is not encrypted: it goes straight to the server, whatever $http_proxy says.
    with grpc.insecure_channel(arguments.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel:
        for response in generation_pb2_grpc.GenerationStub(channel).GenerateStream(request):
            for output in response.outputs:
                print(output.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()

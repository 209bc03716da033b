"""The gateway: OpenAI-compatible HTTP and the Generation gRPC service, text to tokens and back. CPU only, no torch.

http_api.py and grpc_api.py take requests, openai_types.py and requests.py check them and turn both into one
GenerationRequest, generation.py gets tokens from a router, detokenizer.py makes text of them, openai_responses.py and
grpc_api.py give them their shape on the wire. traffic.py records prompts where that is configured. replica.py is the
Serve replica.
"""

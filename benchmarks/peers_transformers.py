"""transformers' own generate behind the endpoint that peers.py asks: python peers_transformers.py FOLDER PORT."""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(os.cpu_count() or 1)
MODEL: Any = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = torch.tensor([body["prompt"]])
        options = {name: body[name] for name in ("prompt_lookup_num_tokens",) if name in body}
        with torch.inference_mode():
            output = MODEL.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=body["max_tokens"], **options
            )
        self._answer({"choices": [{"token_ids": output[0, ids.shape[1] :].tolist()}]})

    def _answer(self, values: dict[str, Any]) -> None:
        text = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()

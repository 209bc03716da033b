"""What operators see: structured logs with request ids, and metrics under vLLM's names where they mean the same."""

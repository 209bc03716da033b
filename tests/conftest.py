"""Settings of every test process, fixed before anything imports torch or ray."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "2")
# Threads that wait asleep: the cores are shared with the processes of an application and with other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DS_ACCELERATOR"] = "cpu"
# The clients of users that tests run (openai, curl) reach the server under test past a proxy of the machine.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"

# A machine that other work shares must not fail a test by its slowness.
settings.register_profile("default", deadline=None)
# What chance finds rarely: HYPOTHESIS_PROFILE=nightly pytest tests/property
settings.register_profile("nightly", deadline=None, max_examples=4000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prompts", type=int, help="prompts that every setup answers in the slow tests; all 64 without")

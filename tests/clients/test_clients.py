"""Client programs that people use run unchanged against the application, as their users install them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.applications import Application
from tests.clients.conftest import Run

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
DATA = HERE.parent / "data/lm_eval"


@pytest.mark.parametrize("program", ["openai_client", "langchain_client", "litellm_client"])
def test_a_client_library_gets_its_answers(app: Application, run: Run, program: str) -> None:
    path = HERE / "programs" / f"{program}.py"
    assert run("python", path, app.http_url, app.config.model.served_name).strip()


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The served model's tokenizer, for programs that count tokens themselves."""
    from dflash_ray.models.target_checkpoint import resolve_target

    directory = tmp_path_factory.mktemp("tokenizer")
    resolve_target("builtin:smollm2").load_tokenizer().save_pretrained(directory)
    return directory


def task_files(directory: Path) -> Path:
    """lm-eval's tasks, with the place of their data."""
    tasks = directory / "tasks"
    tasks.mkdir()
    for file in (HERE / "lm_eval_tasks").glob("*.yaml"):
        (tasks / file.name).write_text(file.read_text().replace("DATA", str(DATA)))
    return tasks


def lm_eval(app: Application, run: Run, tmp_path: Path, model: str, task: str, url: str, *args: str) -> dict:
    model_args = f"model={app.config.model.served_name},base_url={app.http_url}{url},max_retries=1,{args[0]}"
    run(
        "lm-eval", "run", "--model", model, "--model_args", model_args, "--tasks", task, "--include_path",
        task_files(tmp_path), "--output_path", tmp_path / "results", "--log_samples", *args[1:],
    )  # fmt: skip
    (results,) = (tmp_path / "results").rglob("results_*.json")
    return json.loads(results.read_text())["results"][task]


def test_lm_eval_measures_log_likelihoods(
    app: Application, run: Run, tmp_path: Path, tokenizer_directory: Path
) -> None:
    arguments = f"tokenizer={tokenizer_directory},tokenizer_backend=huggingface,num_concurrent=4"
    result = lm_eval(app, run, tmp_path, "local-completions", "local_choice", "/v1/completions", arguments)
    assert result["acc,none"] == 1.0


def test_lm_eval_reads_generated_answers(app: Application, run: Run, tmp_path: Path) -> None:
    result = lm_eval(
        app, run, tmp_path, "local-chat-completions", "local_generate", "/v1/chat/completions", "num_concurrent=2",
        "--apply_chat_template",
    )  # fmt: skip
    assert 0 <= result["exact_match,none"] <= 1
    (samples,) = (tmp_path / "results").rglob("samples_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(answers) == 3 and all(answers)


def test_guidellm_measures_streams(app: Application, run: Run, tmp_path: Path, tokenizer_directory: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    # Without a number of tokens it asks for none, and an answer that repeats itself goes on to the end of the context.
    rows = [{"prompt": f"Name {n} animals.", "output_tokens_count": 24} for n in range(3, 9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("chat/completions", "completions"):
        report = tmp_path / f"{kind.replace('/', '_')}.json"
        run(
            "guidellm", "run", "--backend", f"kind=openai_http,target={app.http_url},request_format=/v1/{kind}",
            "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6",
            "--data", f"kind=json_file,path={data}", "--tokenizer", f"kind=hf_auto,model={tokenizer_directory}",
            "--output", f"kind=json,path={report}", "--disable-console",
        )  # fmt: skip
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        # It may end before it has counted its last answers.
        assert totals["errored"] == totals["incomplete"] == 0 and totals["successful"] >= 4
        assert all(request["output_metrics"]["text_tokens"] for request in benchmark["requests"]["successful"])

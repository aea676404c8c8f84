"""lm-eval, as its users run it, on a real model and a task of our own; no hub is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashlite.artifact.read import load_texts, load_weights
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.pull import pull
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.evaluate.choices import option_excerpts
from flashlite.evaluate.items import Question
from flashlite.evaluate.scoring import compare
from flashlite.evaluate.suites import draw_items, find_suite
from flashlite.model.families import describe
from flashlite.runtime.engine import Engine
from flashlite.runtime.library import load_library
from flashlite.runtime.prepare import compile_artifact, find_artifact

pytestmark = pytest.mark.accept

MODEL = "smollm2-135m-instruct"
TASK = """
task: flashlite_common_sense
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def test_lm_eval_scores_as_we_do(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    drawn, _ = draw_items(find_suite("benchmark_v3.1"), "standard", 0)
    items = next(one.items for one in drawn if one.task.name == "common sense")
    asked = [q for q in items if isinstance(q, Question) and q.language in ("en", "es")]
    data = tmp_path / "questions.json"
    rows = [{"prompt": q.prompt, "options": q.options, "answer": q.answer} for q in asked]
    data.write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "task.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    artifact = find_artifact(MODEL)
    found = _lm_eval(artifact.path, tmp_path)

    source = describe(open_checkpoint(pull(MODEL, offline=True).path))
    tokenizer = Tokenizer(load_texts(artifact))
    groups = [option_excerpts(tokenizer, [], q, 256) for q in asked]
    assert all(len(group) == 3 or group[0].rivals for group in groups)
    flat = [excerpt for group in groups for excerpt in group]
    library = load_library(compile_artifact(artifact))
    with Engine(library, load_weights(artifact), max_tokens=256, exact_head=True) as engine:
        scored = iter(compare(source.spec, source.tensor, engine, flat))
    ours, right = [], []
    for question, group in zip(asked, groups, strict=True):
        parts = [next(scored) for _ in group]
        losses = (
            parts[0].model_rivals
            if group[0].rivals
            else np.array([part.model_loss.sum() for part in parts])
        )
        ours.append(-losses)
        right.append(int(losses.argmin()) == question.answer)

    samples = sorted(_samples(tmp_path), key=lambda sample: int(sample["doc_id"]))
    theirs = [[float(r[0]) for r in sample["filtered_resps"]] for sample in samples]
    worst = max(float(np.abs(a - b).max()) for a, b in zip(ours, np.array(theirs), strict=True))
    accuracy = found["results"]["flashlite_common_sense"]["acc,none"]
    print(
        f"\n{len(asked)} questions: accuracy {accuracy:.4f} by lm-eval, {np.mean(right):.4f} by "
        f"us; log-likelihoods differ by {worst:.1e} nats at most"
    )
    assert worst < 1e-3
    assert accuracy == pytest.approx(np.mean(right))


def _lm_eval(artifact: Path, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    command = [
        sys.executable, "-m", "flashlite.evaluate.lm_eval_model", "run",
        "--model", "flashlite", "--model_args", f"path={artifact}",
        "--tasks", "flashlite_common_sense", "--include_path", str(folder),
        "--output_path", str(folder / "out"), "--log_samples",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "out").rglob("results_*.json")
    results: dict[str, dict[str, dict[str, float]]] = json.loads(path.read_text())
    return results


def _samples(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "out").rglob("samples_*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

"""OpenVINO GenAI as a peer, reading the same GGUF file on the CPU; see worker.py.

It converts the file to its own INT8 or INT4 graph when it opens. Times are those of its own
metrics, which leave out the cost of its Python interface.
"""

from __future__ import annotations

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]

__all__ = ["Model"]


class Model:
    """A GGUF file open in OpenVINO GenAI."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        del context  # its cache grows as needed
        self._pipeline = openvino_genai.LLMPipeline(
            path,
            "CPU",
            INFERENCE_NUM_THREADS=threads,
            PERFORMANCE_HINT="LATENCY",
        )

    def prefill(self, ids: list[int]) -> float:
        """Seconds to the first token. Prompts must never repeat: it caches prefixes."""
        return float(self._generate(ids, 1).get_ttft().mean) / 1e3

    def decode(self, ids: list[int], n: int) -> float:
        """Seconds of `n` greedy steps after the first token."""
        metrics = self._generate(ids, n + 1)
        if metrics.get_num_generated_tokens() != n + 1:
            raise RuntimeError(
                f"generated {metrics.get_num_generated_tokens()} tokens, not {n + 1}"
            )
        return float(metrics.get_tpot().mean) / 1e3 * n

    def close(self) -> None:
        """Free everything."""
        del self._pipeline

    def _generate(self, ids: list[int], n: int) -> openvino_genai.PerfMetrics:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = n
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        row = np.array([ids], np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(row), openvino.Tensor(np.ones_like(row))
        )
        return self._pipeline.generate(inputs, config).perf_metrics

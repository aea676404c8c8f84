"""What a model's head reads while the model writes: hidden states of text sampled from itself.

    openings in 14 languages and code -> sampled on, many at once -> states after the final norm

A split head is fitted to them (`compress/split_head.py`). They come from no data set, so that none
leaks into a model, and from the model's own text, since that is what it will be used on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts, load_weights
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import TemplateError
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.library import MAX_BATCH, load_library
from flashlite.runtime.prepare import compile_artifact
from flashlite.runtime.sampler import Sampler
from flashlite.runtime.sampling import SamplingParams

__all__ = ["OPENINGS", "Opening", "sample_states"]


@dataclass(frozen=True)
class Opening:
    """Two beginnings of texts, and two questions to a chat model: of each one to fit to, and one to
    measure on.
    """

    language: str
    texts: tuple[str, str]
    questions: tuple[str, str]


OPENINGS = (
    Opening(
        "en",
        ("The history of the city began", "Yesterday the government said"),
        ("What makes a good teacher?", "How do I plant a small garden?"),
    ),
    Opening(
        "es",
        ("La historia de la ciudad comenzó", "Ayer el gobierno anunció"),
        ("¿Qué comida es típica de México?", "¿Cómo puedo ahorrar dinero?"),
    ),
    Opening(
        "fr",
        ("L'histoire de la ville commence", "Hier, le gouvernement a annoncé"),
        ("Comment se forment les nuages ?", "Que visiter à Paris en un jour ?"),
    ),
    Opening(
        "de",
        ("Die Geschichte der Stadt begann", "Gestern teilte die Regierung mit"),
        ("Warum ist der Himmel blau?", "Wie backe ich einen Apfelkuchen?"),
    ),
    Opening(
        "it",
        ("La storia della città iniziò", "Ieri il governo ha annunciato"),
        ("Come si prepara il pane?", "Quali sport fanno bene alla schiena?"),
    ),
    Opening(
        "pt",
        ("A história da cidade começou", "Ontem o governo anunciou"),
        ("Como funciona um motor elétrico?", "O que devo levar para a praia?"),
    ),
    Opening(
        "ru",
        ("История города началась", "Вчера правительство сообщило"),
        ("Почему листья осенью желтеют?", "Как выбрать хорошую книгу?"),
    ),
    Opening(
        "tr",
        ("Şehrin tarihi", "Dün hükümet açıkladı"),
        ("Sağlıklı yaşamak için ne yapmalıyım?", "İyi bir çay nasıl demlenir?"),
    ),
    Opening(
        "vi",
        ("Lịch sử của thành phố bắt đầu", "Hôm qua chính phủ cho biết"),
        ("Làm thế nào để học một ngôn ngữ mới?", "Món ăn nào nấu nhanh nhất?"),
    ),
    Opening(
        "zh",
        ("这座城市的历史始于", "昨天政府宣布"),
        ("怎样才能睡得更好？", "春天适合去哪里旅行？"),
    ),
    Opening(
        "ja",
        ("この町の歴史は", "昨日、政府は"),
        ("日本の四季について教えてください。", "簡単な朝ごはんは何ですか？"),
    ),
    Opening(
        "ko",
        ("이 도시의 역사는", "어제 정부는"),
        ("건강한 아침 식사를 추천해 주세요.", "한국어를 어떻게 공부하나요?"),
    ),
    Opening(
        "ar",
        ("بدأ تاريخ المدينة", "أعلنت الحكومة أمس"),
        ("ما هي فوائد القراءة؟", "كيف أتعلم الطبخ؟"),
    ),
    Opening(
        "hi",
        ("शहर का इतिहास", "कल सरकार ने कहा"),
        ("पानी क्यों ज़रूरी है?", "अच्छी नींद कैसे आए?"),
    ),
    Opening(
        "code",
        ("def read_lines(path):\n", "#include <stdio.h>\n\nint main("),
        (
            "Write a Python function that reverses a string.",
            "Write a shell command that counts the lines of a file.",
        ),
    ),
)
_TOKENS = 200  # sampled from each beginning
_FITTED = (0.0, 0.7, 0.7, 1.0, 1.0)  # temperatures of texts to fit to
_CHECKED = (0.7, 1.0)  # and to measure on: texts at 0 repeat themselves and are screened well
_CHECKED_TOKENS = 60
_CHECKED_SEED = 1 << 20  # of the first text; those to fit to begin at 0


def sample_states(
    artifact: Artifact,
    *,
    check: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Let a model write, and keep what its head reads; the same every time.

    Args:
        artifact: the model; its head is used in full.
        check: of the beginnings that are measured on, instead of those that are fitted to.
        progress: called with (texts written, texts in all).

    Returns:
        float32 [n, d_model] after the final norm, text after text.

    Raises:
        FlashliteError: the artifact cannot be compiled or opened.
    """
    tokenizer = Tokenizer(load_texts(artifact), name=artifact.name)
    tokens = _CHECKED_TOKENS if check else _TOKENS
    seed = _CHECKED_SEED if check else 0
    jobs = [
        (ids, temperature)
        for opening in OPENINGS
        for ids in _beginnings(tokenizer, opening, int(check))
        for temperature in (_CHECKED if check else _FITTED)
    ]
    longest = max(len(ids) for ids, _ in jobs) + tokens
    batch = min(len(jobs), 32)
    ends = frozenset(artifact.tokens.eos)
    states: list[NDArray[np.float32]] = []
    with Engine(
        load_library(compile_artifact(artifact)),
        load_weights(artifact),
        max_tokens=batch * (longest + 32),
        max_sequences=batch,
        exact_head=True,
    ) as engine:
        for first in range(0, len(jobs), batch):
            if progress is not None:
                progress(first, len(jobs))
            writers = [
                _Writer(engine, ids, tokens, temperature, seed + first + i)
                for i, (ids, temperature) in enumerate(jobs[first : first + batch])
            ]
            _write(engine, writers, ends)
            for writer in writers:
                states += writer.states
    return np.array(states, np.float32)


class _Writer:
    """One text on its way."""

    def __init__(
        self, engine: Engine, ids: list[int], tokens: int, temperature: float, seed: int
    ) -> None:
        prompt = np.array(ids, np.int32)
        self.sequence = engine.new_sequence(len(ids) + tokens)
        self.next = ids
        self.left = tokens
        self.states: list[NDArray[np.float32]] = []
        params = SamplingParams(temperature=temperature, seed=seed)
        scratch = np.empty(engine.vocab_size, np.uint64)
        self._sampler = Sampler(engine.library, params, prompt, tokens, scratch)

    def take(
        self, logits: NDArray[np.float32], state: NDArray[np.float32], ends: frozenset[int]
    ) -> None:
        """Keep the state and draw the next token."""
        self.states.append(state.copy())
        token = self._sampler.draw(logits).token
        self.next, self.left = [token], 0 if token in ends else self.left - 1


def _write(engine: Engine, writers: list[_Writer], ends: frozenset[int]) -> None:
    for writer in writers:
        for at in range(0, len(writer.next) - 1, MAX_BATCH):
            engine.step([Work(writer.sequence, writer.next[at:-1][:MAX_BATCH], "none")])
        writer.next = writer.next[-1:]
    hidden = np.empty((len(writers), int(engine.info.d_model)), np.float32)
    while running := [writer for writer in writers if writer.left]:
        states = hidden[: len(running)]
        logits = engine.step([Work(w.sequence, w.next) for w in running], hidden=states)
        for writer, row, state in zip(running, logits, states, strict=True):
            writer.take(row, state, ends)
    for writer in writers:
        writer.sequence.release()


def _beginnings(tokenizer: Tokenizer, opening: Opening, which: int) -> list[list[int]]:
    found = [list(tokenizer.encode_prompt(opening.texts[which]))]
    with contextlib.suppress(TemplateError):  # a base model
        messages = [{"role": "user", "content": opening.questions[which]}]
        found.append(list(tokenizer.render_chat(messages)))
    return found

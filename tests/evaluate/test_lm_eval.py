"""flashlite behind lm-eval's interface, on a tiny model of random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.checkpoint.pull import pull
from flashlite.errors import UsageError
from flashlite.model.metrics import log_softmax
from flashlite.runtime.engine import Work
from flashlite.runtime.prepare import make_artifact

pytest.importorskip("lm_eval", reason="needs the extra `eval`")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own dependencies warn

from flashlite.evaluate.lm_eval_model import FlashliteLM  # noqa: E402

TEXT = "The small boat left the harbour early in the morning."


@pytest.fixture(scope="module")
def model(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlashliteLM]:
    folder = tmp_path_factory.mktemp("lm-eval") / "tiny.fl"
    make_artifact(pull(str(tiny_gguf)), "import", folder, head="off")
    opened = FlashliteLM(str(folder), batch_size=2, threads=1, max_length=96, device="cpu")
    yield opened
    opened.close()


def requests(*arguments: tuple[object, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in arguments]


def by_hand(model: FlashliteLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One pass over all tokens, every row of logits at once."""
    engine = model._model.scheduler.engine
    timeline = engine.new_sequence(96)
    ids = [*context, *continuation]
    rows = engine.step([Work(timeline, ids[:-1], "all")])[len(context) - 1 :]
    timeline.release()
    scores = log_softmax(rows)[np.arange(len(continuation)), continuation]
    return float(scores.sum()), bool((rows.argmax(axis=1) == continuation).all())


def test_log_likelihoods_are_those_of_one_pass(model: FlashliteLM) -> None:
    pairs = [
        (TEXT, " The gulls"),
        (TEXT, " Her father steered"),
        ("Later", " the sun"),
        (TEXT, " x"),
    ]
    found = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        ids = model.tok_encode(context)
        expected = by_hand(model, ids, model.tok_encode(context + continuation)[len(ids) :])
        assert score == pytest.approx(expected[0], rel=1e-6)
        assert greedy == expected[1]
    ids = model.tok_encode(TEXT)
    likeliest = [int(np.argmax(_last_logits(model, ids)))]
    assert model._loglikelihood_tokens([(None, ids, likeliest)], disable_tqdm=True)[0][1] is True


def _last_logits(model: FlashliteLM, ids: list[int]) -> NDArray[np.float32]:
    engine = model._model.scheduler.engine
    timeline = engine.new_sequence(96)
    row: NDArray[np.float32] = engine.step([Work(timeline, ids)])[0].copy()
    timeline.release()
    return row


def test_an_empty_context_begins_with_the_bos(model: FlashliteLM) -> None:
    ((score, _),) = model.loglikelihood(requests(("", "Later the sun")), disable_tqdm=True)
    expected, _ = by_hand(model, [1], model.tok_encode("Later the sun", add_special_tokens=False))
    assert score == pytest.approx(expected, rel=1e-6)


def test_a_long_context_loses_its_beginning_and_a_long_answer_is_refused(
    model: FlashliteLM,
) -> None:
    ids = list(np.random.default_rng(0).integers(3, 500, 300).tolist())
    ((score, _),) = model._loglikelihood_tokens([(None, ids, [7, 8])], disable_tqdm=True)
    assert score == pytest.approx(by_hand(model, ids[-94:], [7, 8])[0], rel=1e-6)
    with pytest.raises(UsageError, match="96 tokens does not fit max_length 96"):
        model._loglikelihood_tokens([(None, [1], ids[:96])], disable_tqdm=True)


def test_rolling_covers_every_token_once(model: FlashliteLM) -> None:
    text = TEXT * 6
    ids = model.tok_encode(text, add_special_tokens=False)
    assert len(ids) > 96
    (total,) = model.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    size, before, expected = 95, [1], 0.0
    for at in range(0, len(ids), size):
        part = ids[at : at + size]
        # The last window is filled up with what comes before it.
        context = before if len(part) == size else ids[len(ids) - size - 1 : at]
        expected += by_hand(model, context, part)[0]
        before = ids[at + size - 1 : at + size]
    assert total == pytest.approx(expected, rel=1e-6)


def test_answers_end_before_their_stop_and_do_not_depend_on_the_batch(model: FlashliteLM) -> None:
    prompts = [TEXT, "Later", "What is the name"]
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    answers = model.generate_until(requests(*((p, settings) for p in prompts)), disable_tqdm=True)
    alone = [model._model.generate(p, max_tokens=12).text for p in prompts]
    assert answers == alone
    stop = answers[0][3:5]
    cut = model.generate_until(
        requests((TEXT, {"until": [stop], "max_gen_toks": 12})), disable_tqdm=True
    )
    assert cut == [answers[0][: answers[0].index(stop)]]


def test_a_chat_is_rendered_as_ids_and_its_text_forges_nothing(model: FlashliteLM) -> None:
    chat = [{"role": "user", "content": "Hi <|im_end|> there"}]
    ids = model.tok_encode(model.apply_chat_template(chat))
    assert ids == model._tokenizer.render_chat(chat)
    assert ids.count(2) == 1  # <|im_end|>
    more = model.tok_encode(model.apply_chat_template(chat) + "Yes")
    assert more == [*ids, *model._tokenizer.encode("Yes")]
    assert 1 not in model.tok_encode("<|im_start|>user")


def test_an_unknown_argument_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown pretrained; known are path"):
        FlashliteLM("x", pretrained="y")

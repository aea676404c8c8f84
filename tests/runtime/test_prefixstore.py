"""Prefixes on disk: found again, and used only when every bit is as it was written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small import Small

from flashlite.codegen import toolchain
from flashlite.runtime import prefixstore
from flashlite.runtime.library import PAGE_TOKENS
from flashlite.runtime.model import Model, load
from flashlite.runtime.prefixstore import PrefixStore, fingerprint
from flashlite.runtime.prefixtree import PAGE_KEY, Prefix
from flashlite.runtime.sampler import Drawn
from flashlite.runtime.sampling import SamplingParams

PAGE = 96  # bytes of a page in these tests: files of which every byte can be turned
MARK = bytes(range(32))
KEY = b"k" * 32


def text(*tokens: int) -> bytes:
    return b"".join(np.full(PAGE_TOKENS, token, np.int32).tobytes() for token in tokens)


def page(number: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, PAGE).astype(np.uint8)


def fill(number: int, out: NDArray[np.uint8]) -> None:
    out[:] = page(number)


def opened(folder: Path, *, mark: bytes = MARK, key: bytes = KEY, **settings: int) -> PrefixStore:
    folder.mkdir(parents=True, exist_ok=True)
    return PrefixStore(folder, mark, settings.pop("page_bytes", PAGE), key, **settings)


def saved(store: PrefixStore, *tokens: int) -> int:
    """Save a text whose pages in the arena have its tokens' numbers."""
    return store.save(Prefix(text(*tokens), list(tokens)), fill)


def loaded(store: PrefixStore, *tokens: int, first: int = 0) -> list[int] | None:
    """The numbers of the pages that come back; None: nothing does."""
    found = store.find(text(*tokens))
    if found is None:
        return None
    got: list[int] = []

    def place(index: int, data: NDArray[np.uint8]) -> None:
        np.testing.assert_array_equal(data, page(tokens[index]))
        got.append(tokens[index])

    return got if store.read(found[0], first, found[1], place) else None


# Found again


def test_what_was_saved_is_found_by_the_longest_beginning(tmp_path: Path) -> None:
    store = opened(tmp_path / "m")
    assert saved(store, 1, 2, 3) == 3
    assert saved(store, 1, 5) == 2
    for other in (store, opened(tmp_path / "m")):
        assert loaded(other, 1, 2, 3, 4) == [1, 2, 3]
        assert loaded(other, 1, 2, 9) == [1, 2]
        assert loaded(other, 1, 5, 6) == [1, 5]
        assert loaded(other, 1, 2, 3, first=2) == [3]
        assert loaded(other, 2, 2, 3) is None
        assert other.find(b"") is None
        assert other.find(text(1)[:-4]) is None
    almost = bytearray(text(1, 2, 3))
    almost[PAGE_KEY + 4] ^= 1
    found = store.find(bytes(almost))
    assert found is not None
    assert found[1] == 1


def test_another_process_sees_what_this_one_saves(tmp_path: Path) -> None:
    one, other = opened(tmp_path / "m"), opened(tmp_path / "m")
    assert loaded(other, 1, 2) is None
    time.sleep(0.02)  # longer than the clock of folders
    saved(one, 1, 2)
    assert loaded(other, 1, 2) == [1, 2]


def test_a_longer_text_takes_the_place_of_its_beginning(tmp_path: Path) -> None:
    store = opened(tmp_path / "m")
    saved(store, 1, 2)
    saved(store, 1, 2, 3)
    assert saved(store, 1) == 1  # kept already
    assert [len(entry.ids) // PAGE_KEY for entry in opened(tmp_path / "m")._saved.values()] == [3]
    assert len(list((tmp_path / "m").iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_are_the_users_alone(tmp_path: Path) -> None:
    saved(opened(tmp_path / "m"), 1, 2)
    (file,) = (tmp_path / "m").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


# Never used


def test_a_file_with_any_byte_changed_is_removed_unused(tmp_path: Path) -> None:
    saved(opened(tmp_path / "m"), 1, 2)
    (file,) = (tmp_path / "m").iterdir()
    good = file.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        file.write_bytes(bad)
        store = opened(tmp_path / "m")
        assert at >= len(good) - 2 * PAGE or store.find(text(1, 2)) is None, at
        assert loaded(store, 1, 2) is None, at
        assert not file.exists(), at
        file.touch(mode=0o600)
    file.write_bytes(good)
    assert loaded(opened(tmp_path / "m"), 1, 2) == [1, 2]


def test_a_file_of_any_other_length_is_removed_unused(tmp_path: Path) -> None:
    saved(opened(tmp_path / "m"), 1, 2)
    (file,) = (tmp_path / "m").iterdir()
    good = file.read_bytes()
    for wrong in (*(good[:n] for n in range(len(good))), good + b"\0", good + good):
        file.touch(mode=0o600)
        file.write_bytes(wrong)
        assert opened(tmp_path / "m").find(text(1, 2)) is None
        assert not file.exists()


def test_a_file_cut_while_it_is_known_is_removed_unused(tmp_path: Path) -> None:
    store = opened(tmp_path / "m")
    saved(store, 1, 2)
    (file,) = (tmp_path / "m").iterdir()
    assert store.find(text(1, 2)) is not None
    os.truncate(file, file.stat().st_size - 1)
    assert loaded(store, 1, 2) is None
    assert not file.exists()


@pytest.mark.parametrize("changed", [{"mark": b"m" * 32}, {"key": b"o" * 32}, {"page_bytes": 92}])
def test_another_models_or_installations_file_is_removed_unused(
    tmp_path: Path, changed: dict[str, bytes]
) -> None:
    saved(opened(tmp_path / "m"), 1, 2)
    store = opened(tmp_path / "m", **changed)  # type: ignore[arg-type]
    assert loaded(store, 1, 2) is None
    assert list((tmp_path / "m").iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mode", [0o644, 0o620, 0o602, 0o666])
def test_a_file_that_others_could_write_is_removed_unused(tmp_path: Path, mode: int) -> None:
    saved(opened(tmp_path / "m"), 1, 2)
    (file,) = (tmp_path / "m").iterdir()
    file.chmod(mode)
    assert loaded(opened(tmp_path / "m"), 1, 2) is None
    assert not file.exists()


@pytest.mark.skipif(os.name != "posix", reason="links and pipes are POSIX's")
def test_what_is_no_plain_file_is_not_followed(tmp_path: Path) -> None:
    saved(opened(tmp_path / "m"), 1, 2)
    (file,) = (tmp_path / "m").iterdir()
    outside = tmp_path / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    os.mkfifo(tmp_path / "m/pipe.kv")  # opening it must not wait for a writer
    (tmp_path / "m/folder.kv").mkdir()
    assert loaded(opened(tmp_path / "m"), 1, 2) is None
    assert outside.exists()
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["folder.kv"]


def test_a_header_from_another_file_does_not_fit(tmp_path: Path) -> None:
    """Pages are bound to their text: those of two files cannot be exchanged."""
    saved(opened(tmp_path / "m"), 1, 2)
    saved(opened(tmp_path / "m"), 3, 4)
    one, other = sorted((tmp_path / "m").iterdir())
    pages = 2 * PAGE
    one.write_bytes(one.read_bytes()[:-pages] + other.read_bytes()[-pages:])
    store = opened(tmp_path / "m")
    assert sorted(map(bool, (loaded(store, 1, 2), loaded(store, 3, 4)))) == [False, True]


# Room


def test_the_longest_unused_files_make_room(tmp_path: Path) -> None:
    file_bytes = 80 + 2 * (PAGE_KEY + 32 + PAGE)
    store = opened(tmp_path / "m", max_bytes=3 * file_bytes)
    other = opened(tmp_path / "other", max_bytes=3 * file_bytes)
    saved(other, 7, 7)
    for i, path in enumerate((tmp_path / "other").iterdir()):
        os.utime(path, (i, i))
    for tokens in ((1, 1), (2, 2), (3, 3)):
        time.sleep(0.01)
        saved(store, *tokens)
    assert not (tmp_path / "other").exists()  # the other model's was older
    time.sleep(0.01)
    assert loaded(store, 1, 1) == [1, 1]  # used now
    time.sleep(0.01)
    saved(store, 4, 4)
    assert [bool(loaded(store, n, n)) for n in (1, 2, 3, 4)] == [True, False, True, True]


def test_a_text_longer_than_half_the_room_is_cut(tmp_path: Path) -> None:
    store = opened(tmp_path / "m", max_bytes=6 * (PAGE + 256))
    assert saved(store, 1, 2, 3, 4, 5) == 3
    assert loaded(store, 1, 2, 3, 4, 5) == [1, 2, 3]
    assert saved(opened(tmp_path / "n", max_bytes=10), 1, 2) == 0


def test_no_more_is_written_at_once_than_is_kept(tmp_path: Path) -> None:
    store = opened(tmp_path / "m", max_bytes=5 * (PAGE + 256))
    written: list[int] = []

    def read(number: int, out: NDArray[np.uint8]) -> None:
        written.append(number)
        fill(number, out)

    prefixes = [Prefix(text(*tokens), list(tokens)) for tokens in ((1, 2), (3, 4), (5, 6))]
    store.save_latest(prefixes, read)
    assert written == [1, 2, 3, 4]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    store = opened(tmp_path / "m")
    old, new = tmp_path / "m/old.partial", tmp_path / "m/new.partial"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    saved(store, 1, 2)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_disk_that_refuses_is_no_error(tmp_path: Path) -> None:
    store = opened(tmp_path / "m")
    (tmp_path / "m").rmdir()
    assert saved(store, 1, 2) == 2  # made anew
    for path in (tmp_path / "m").iterdir():
        path.unlink()
    (tmp_path / "m").rmdir()
    (tmp_path / "m").touch()
    assert saved(store, 1, 2) == 0
    assert loaded(store, 1, 2) is None


def test_a_reader_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def fail(number: int, out: NDArray[np.uint8]) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        opened(tmp_path / "m").save(Prefix(text(1, 2), [1, 2]), fail)
    assert list((tmp_path / "m").iterdir()) == []


def test_processes_that_save_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    script = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_prefixstore import loaded, opened, saved
        folder = Path({str(tmp_path / "m")!r})
        for i in range(60):
            store = opened(folder, max_bytes=6000)
            saved(store, 1, 2, i % 7)
            for n in range(7):
                loaded(store, 1, 2, n)  # compares what comes back
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=environment)
        for _ in range(3)
    ]
    assert [process.wait(timeout=60) for process in started] == [0, 0, 0]
    names = [path.name for path in (tmp_path / "m").iterdir()]
    assert all(name.endswith(".kv") for name in names)
    store = opened(tmp_path / "m")
    assert len(store._saved) == len(names) > 0
    assert any(loaded(store, 1, 2, n) == [1, 2, n] for n in range(7))


# Fingerprints


def test_a_fingerprint_names_weights_arithmetic_and_sources(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = small.artifact
    known = fingerprint(artifact, "avx512")
    assert fingerprint(artifact, "plain") == fingerprint(artifact, "avx2") == known
    assert fingerprint(artifact, "fp32") != known
    manifest = replace(artifact.manifest, digest="0" * 64)
    assert fingerprint(replace(artifact, manifest=manifest), "plain") != known
    for path in toolchain.CSRC.glob("*.[ch]"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(prefixstore, "CSRC", tmp_path)
    assert fingerprint(artifact, "plain") == known
    with (tmp_path / "fl_math.h").open("a") as file:
        file.write("\n")
    assert fingerprint(artifact, "plain") != known


# Through a model


@pytest.fixture
def make_model(own_prefixes: Path, tiny_gguf: Path) -> Callable[..., Model]:
    def make(**given: object) -> Model:
        fixed = {"threads": 2, "isa": "plain", "max_sequence_length": 512}
        return load(tiny_gguf, **fixed | given)  # type: ignore[arg-type]

    return make


def ask(model: Model, prompt: list[int]) -> tuple[int, list[Drawn | None]]:
    """How much was found, and every draw with its probabilities."""
    generation = model.submit(prompt, SamplingParams(max_tokens=6, logprobs=5))
    drawn = [piece.drawn for piece in model.follow(generation)]
    return generation.cached_tokens, drawn


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 97, 300])
def test_after_a_restart_the_answer_is_the_same(
    make_model: Callable[..., Model], own_prefixes: Path, length: int
) -> None:
    rng = np.random.default_rng(length)
    prompt = rng.integers(1, 90, length).tolist()
    with make_model() as model:
        cached, expected = ask(model, prompt)
        assert cached == 0
    with make_model() as model:
        cached, drawn = ask(model, prompt)
        # Less than 64 tokens are not worth a file.
        assert cached == ((length - 1) // 32 * 32 if length >= 64 else 0)
        assert drawn == expected
        pool = model.scheduler.engine.pool
        pool.check_integrity()
        assert pool.free == pool.n_pages
    with make_model() as model:
        other = [*prompt[: length - 1], 95, 96]
        fresh = make_model(prefix_cache=False)
        assert ask(model, other)[1] == ask(fresh, other)[1]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_the_folder_is_the_users_alone(
    make_model: Callable[..., Model], own_prefixes: Path
) -> None:
    with make_model() as model:
        ask(model, [1] * 65)
    (folder,) = own_prefixes.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".kv"]


def test_a_bad_file_costs_nothing_but_the_computation(
    make_model: Callable[..., Model], own_prefixes: Path
) -> None:
    prompt = [1 + i % 80 for i in range(200)]
    with make_model() as model:
        expected = ask(model, prompt)[1]
    (file,) = own_prefixes.glob("*/*")
    bad = bytearray(file.read_bytes())
    bad[-1] ^= 1  # in the last of six pages: five were handed over by then
    file.write_bytes(bad)
    with make_model() as model:
        assert ask(model, prompt) == (0, expected)
        assert not file.exists()
        assert ask(model, prompt) == (192, expected)
    assert file.exists()


def test_what_is_in_the_arena_is_not_read_again(
    make_model: Callable[..., Model], own_prefixes: Path
) -> None:
    trunk = [1 + i % 80 for i in range(128)]
    with make_model() as model:
        ask(model, [*trunk, *range(1, 70)])
    with make_model() as model:
        ask(model, trunk)  # 96 tokens come from the file
        cached, drawn = ask(model, [*trunk, *range(1, 70)])
        assert cached == 192
    with make_model(prefix_cache=False) as model:
        assert ask(model, [*trunk, *range(1, 70)])[1] == drawn


def test_a_prefix_can_be_saved_beforehand(
    make_model: Callable[..., Model], own_prefixes: Path
) -> None:
    system = {"role": "system", "content": "once upon a time " * 20}
    with make_model() as model:
        kept = model.save_prefix([system])
        assert kept >= 64
        assert model.save_prefix("word " * 100) >= 64
        assert model.save_prefix("x") == 0
    assert len(list(own_prefixes.glob("*/*.kv"))) == 2
    with make_model() as model:
        answer = model.chat([system, {"role": "user", "content": "who?"}], max_tokens=3)
        assert answer.cached_tokens >= kept
    with make_model(prefix_cache=False) as model:
        assert model.save_prefix([system]) == 0


def test_without_the_cache_nothing_touches_the_disk(
    make_model: Callable[..., Model], own_prefixes: Path
) -> None:
    with make_model(prefix_cache=False) as model:
        ask(model, [1] * 65)
    assert not own_prefixes.exists()


def test_a_cache_that_cannot_be_made_is_no_error(
    make_model: Callable[..., Model], own_prefixes: Path
) -> None:
    own_prefixes.touch()  # a file where the folder should be
    with make_model() as model:
        ask(model, [1] * 65)
        assert ask(model, [1] * 65)[0] == 64

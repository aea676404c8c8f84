"""Pull: from wheels through a loopback index, from a loopback hub, from a path."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import loopback
import pytest
from loopback import Hub, Index, make_wheel, serving

from flashlite.checkpoint import check, fetch, pull, wheels
from flashlite.checkpoint.check import check_base
from flashlite.checkpoint.known_models import (
    KNOWN_MODELS,
    KnownModel,
    Member,
    ModelFile,
    Wheel,
)
from flashlite.checkpoint.pull import resolve_model
from flashlite.errors import PullError

CONTENT = random.Random(1).randbytes(5000)
PARTS = (CONTENT[:2000], CONTENT[2000:])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tiny_model(index: Index, parts: tuple[bytes, ...] = PARTS) -> KnownModel:
    """A model in as many wheels as parts, put on the index."""
    fetched = []
    for i, part in enumerate(parts):
        name, content = make_wheel(f"tiny-part{i}", "1.0", {f"tiny_part{i}/data.bin": part})
        index.wheels[name] = content
        member = Member(f"tiny_part{i}/data.bin", len(part), "tiny.gguf")
        fetched.append(Wheel(f"tiny-part{i}", "1.0", sha256(content), len(content), (member,)))
    return KnownModel(
        name="tiny-model",
        summary="for tests",
        architecture="llama",
        licence="Apache-2.0",
        licence_url="https://example.org/licence",
        needs_acceptance=False,
        wheels=tuple(fetched),
        files=(ModelFile("tiny.gguf", len(CONTENT), sha256(CONTENT)),),
        main="tiny.gguf",
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHLITE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def index(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Index()
    with serving(server):
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        yield server


@pytest.fixture
def model(index: Index, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """In one wheel: each costs a second of pip."""
    known = tiny_model(index, (CONTENT,))
    know(known, monkeypatch)
    return known


@pytest.fixture
def split_model(index: Index, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    known = tiny_model(index)
    know(known, monkeypatch)
    return known


def know(model: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "KNOWN_MODELS", {**KNOWN_MODELS, model.name: model})


# ---- wheels ----


def test_parts_are_joined_in_order_checked_and_kept(
    split_model: KnownModel, index: Index, home: Path
) -> None:
    seen: list[tuple[int, int]] = []
    pulled = pull.pull("tiny-model", progress=lambda done, total: seen.append((done, total)))
    assert pulled.path == home / "models/tiny-model/tiny.gguf"
    assert pulled.path.read_bytes() == CONTENT
    assert pulled.sha256 == sha256(CONTENT)
    assert seen[-1] == (split_model.download_size, split_model.download_size)
    assert sorted(p.name for p in pulled.path.parent.iterdir()) == ["pulled.json", "tiny.gguf"]
    assert len(index.served) == 2
    assert pull.pull("tiny-model") == resolve_model("tiny-model") == pulled
    assert len(index.served) == 2


def test_a_pull_goes_on_where_the_last_one_stopped(
    split_model: KnownModel, index: Index, home: Path
) -> None:
    last = index.wheels.pop("tiny_part1-1.0-py3-none-any.whl")
    with pytest.raises(PullError, match="could not download tiny-part1 1.0 through pip"):
        pull.pull("tiny-model")
    partial = home / "models/tiny-model/tiny.gguf.partial"
    assert partial.read_bytes() == PARTS[0]
    # What a killed process leaves: half a part behind the whole one, and its stage.
    with partial.open("ab") as file:
        file.write(b"half a part")
    stale = home / "models/tiny-model/.stage-dead"
    stale.mkdir()
    (stale / "x.whl").write_bytes(b"x")
    index.wheels = {"tiny_part1-1.0-py3-none-any.whl": last}
    index.served.clear()
    assert pull.pull("tiny-model").path.read_bytes() == CONTENT
    assert index.served == ["tiny_part1-1.0-py3-none-any.whl"]
    assert not stale.exists()
    assert not partial.exists()


def test_a_wheel_with_other_bytes_is_refused(model: KnownModel, index: Index, home: Path) -> None:
    name, other = make_wheel("tiny-part0", "1.0", {"tiny_part0/data.bin": PARTS[1]})
    index.wheels[name] = other
    with pytest.raises(PullError, match="the package index served another file"):
        pull.pull("tiny-model")
    assert list((home / "models/tiny-model").iterdir()) == []


@pytest.mark.parametrize(
    ("path", "size", "message"),
    [
        ("tiny_part0/other.bin", 5000, "holds no tiny_part0/other.bin"),
        ("tiny_part0/data.bin", 4999, "has 5000 bytes, expected 4999"),
    ],
)
def test_a_wheel_must_hold_the_member_as_declared(
    model: KnownModel, monkeypatch: pytest.MonkeyPatch, path: str, size: int, message: str
) -> None:
    first = replace(model.wheels[0], members=(Member(path, size, "tiny.gguf"),))
    know(replace(model, wheels=(first, *model.wheels[1:])), monkeypatch)
    with pytest.raises(PullError, match=message):
        pull.pull("tiny-model")


def test_a_joined_file_with_other_bytes_is_removed(
    model: KnownModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(replace(model, files=(ModelFile("tiny.gguf", len(CONTENT), sha256(b"")),)), monkeypatch)
    with pytest.raises(PullError, match="removed; pull again"):
        pull.pull("tiny-model")
    assert list((home / "models/tiny-model").iterdir()) == []


def test_a_touched_file_is_kept_and_a_damaged_one_fetched_again(
    model: KnownModel, index: Index
) -> None:
    path = pull.pull("tiny-model").path
    os.utime(path, (1, 1))
    assert pull.pull("tiny-model", offline=True).path.read_bytes() == CONTENT
    assert len(index.served) == 1
    data = bytearray(CONTENT)
    data[17] ^= 1
    path.write_bytes(data)
    with pytest.raises(PullError, match="once with a network"):
        pull.pull("tiny-model", offline=True)
    assert pull.pull("tiny-model").path.read_bytes() == CONTENT


def test_several_files_come_out_of_one_wheel(
    index: Index, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {"config.json": b"{}", "sub/weights.bin": CONTENT}
    name, wheel = make_wheel("many", "2.0", {f"many/{k}": v for k, v in contents.items()})
    index.wheels[name] = wheel
    members = tuple(Member(f"many/{k}", len(v), k) for k, v in contents.items())
    know(
        KnownModel(
            name="many",
            summary="",
            architecture="bert",
            licence="MIT",
            licence_url="https://example.org",
            needs_acceptance=False,
            wheels=(Wheel("many", "2.0", sha256(wheel), len(wheel), members),),
            files=tuple(ModelFile(k, len(v), sha256(v)) for k, v in contents.items()),
        ),
        monkeypatch,
    )
    pulled = pull.pull("many")
    assert pulled.path == home / "models/many"
    assert {k: (pulled.path / k).read_bytes() for k in contents} == contents
    listing = "".join(f"{sha256(contents[k])}  {k}\n" for k in sorted(contents))
    assert pulled.sha256 == sha256(listing.encode())


def test_two_pulls_at_once_download_once(model: KnownModel, index: Index) -> None:
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(pull.pull("tiny-model").path))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in paths] == [CONTENT] * 3
    assert len(index.served) == 1


def test_terms_are_accepted_once_and_remembered(
    model: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(replace(model, needs_acceptance=True, licence="Strict Terms"), monkeypatch)
    with pytest.raises(PullError, match=r"Strict Terms \(https://example.org/licence\).*--accept"):
        pull.pull("tiny-model")
    pull.pull("tiny-model", accept_license=True)
    assert pull.pull("tiny-model").licence == "Strict Terms"


def test_without_pip_the_way_out_is_named(
    model: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(PullError, match="-m ensurepip"):
        pull.pull("tiny-model")


def test_pip_is_not_taken_from_the_users_folder(
    model: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/__init__.py").write_text("")
    (tmp_path / "pip/__main__.py").write_text("raise SystemExit('the wrong pip ran')")
    monkeypatch.chdir(tmp_path)
    assert pull.pull("tiny-model").path.read_bytes() == CONTENT


def test_too_little_space_is_said_before_the_download(
    model: KnownModel, index: Index, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(home.parent)
    full = type(usage)(usage.total, usage.total - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(PullError, match="0 MB free, the download needs .* set FLASHLITE_HOME"):
        pull.pull("tiny-model")
    assert index.served == []


def test_a_full_disk_leaves_no_finished_file(home: Path) -> None:
    """A disk of 3 MB fills while the last of four parts is written."""
    parts = tuple(random.Random(i).randbytes(1_000_000) for i in range(4))
    disk = home / "models"
    disk.mkdir(parents=True)
    script = f"""
import sys, zipfile
from pathlib import Path
from flashlite.checkpoint import wheels
folder = Path({str(disk)!r})
source = Path({str(home)!r}) / "parts.zip"
with zipfile.ZipFile(source) as archive:
    try:
        for i in range(4):
            info = archive.getinfo(str(i))
            wheels._append(archive, info, folder / "tiny.gguf.partial", i * 1_000_000)
    except OSError as error:
        print(error.errno, (folder / "tiny.gguf.partial").stat().st_size)
"""
    with zipfile.ZipFile(home / "parts.zip", "w") as archive:
        for i, part in enumerate(parts):
            archive.writestr(str(i), part)
    mount = f"mount -t tmpfs -o size=3m none {disk}"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    try:
        ran = subprocess.run(
            [*command, sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("unshare is not here")
    if "permission" in ran.stderr.lower() or "not permitted" in ran.stderr.lower():
        pytest.skip("this system lets no test mount a small disk")
    assert ran.stdout.split() == ["28", "3000000"], ran.stderr


# ---- names and paths ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2", "did you mean smollm2-135m-instruct"),
        ("nothing-alike", "known are smollm2-135m-instruct, gemma-3-270m"),
        ("SmolLM2", "no file or folder 'SmolLM2'"),
        ("./missing.gguf", "no file or folder"),
        ("missing.gguf", "no file or folder"),
        ("", "no file or folder ''"),
        ("a\0b", "no file or folder"),
        ("x" * 5000, "no file or folder"),
        ("hf:acme", "is not hf:ORG/NAME"),
        ("hf:../../etc", "is not hf:ORG/NAME"),
        ("hf:acme/tiny@..", "is not hf:ORG/NAME"),
        ("hf:acme/tiny:model.bin", "is not hf:ORG/NAME"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(home: Path, name: str, message: str) -> None:
    with pytest.raises(PullError, match=message) as caught:
        pull.pull(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_path_is_used_where_it_is(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "my model (v1).gguf"
    file.write_bytes(b"GGUF")
    pulled = resolve_model(str(file))
    assert (pulled.path, pulled.name, pulled.sha256) == (file, "my-model-v1", None)
    assert resolve_model(str(tmp_path)).path == tmp_path


def test_offline_says_what_to_run(home: Path) -> None:
    with pytest.raises(PullError, match="run `flashlite pull smollm2-135m-instruct` once"):
        resolve_model("smollm2-135m-instruct")
    with pytest.raises(PullError, match="run `flashlite pull hf:acme/tiny` once"):
        resolve_model("hf:acme/tiny")


def test_the_table_of_models_is_consistent() -> None:
    for name, model in KNOWN_MODELS.items():
        assert pull._NAME.fullmatch(name)
        assert name == model.name
        joined: dict[str, int] = {}
        for wheel in model.wheels:
            assert len(wheel.sha256) == 64
            for member in wheel.members:
                joined[member.file] = joined.get(member.file, 0) + member.size
        assert joined == {file.name: file.size for file in model.files}
        assert not model.main or model.main in joined
    assert KNOWN_MODELS["gemma-3-270m"].needs_acceptance


def test_a_real_model_is_as_the_table_says(smollm2_gguf: Path) -> None:
    file = KNOWN_MODELS["smollm2-135m-instruct"].files[0]
    assert smollm2_gguf.stat().st_size == file.size
    assert fetch.sha256_file(smollm2_gguf) == file.sha256


# ---- a hub ----

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": CONTENT * 40,
    "pytorch_model.bin": b"a pickle" * 1000,
    "modeling_tiny.py": b"raise SystemExit",
    "onnx/model.onnx": b"x" * 2000,
    "notes.md": b"hello",
}
TAKEN = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = Hub(FILES)
    with serving(server):
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_a_repository_gives_weights_and_no_code(hub: Hub, home: Path) -> None:
    pulled = pull.pull("hf:acme/tiny")
    assert pulled.path == home / "models/hf/acme/tiny"
    assert visible(pulled.path) == TAKEN
    assert (pulled.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert (pulled.name, pulled.licence) == ("acme--tiny", "apache-2.0")
    hub.requests.clear()
    assert pull.pull("hf:acme/tiny") == resolve_model("hf:acme/tiny") == pulled
    assert hub.requests == []


def test_how_an_encoder_pools_comes_with_it(hub: Hub) -> None:
    hub.files["1_Pooling/config.json"] = b'{"pooling_mode_cls_token": true}'
    hub.files["2_Dense/config.json"] = b"{}"
    folder = pull.pull("hf:acme/tiny").path
    assert visible(folder) == sorted([*TAKEN, "1_Pooling"])
    assert (folder / "1_Pooling/config.json").read_bytes() == hub.files["1_Pooling/config.json"]


def test_check_says_when_the_weights_of_a_repository_changed(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PullError, match="is not here yet: run `flashlite pull hf:acme/tiny`"):
        check_base("hf:acme/tiny")
    pull.pull("hf:acme/tiny")
    before = check_base("hf:acme/tiny")
    assert not before.newer
    assert before.here == before.there
    monkeypatch.setattr(loopback, "COMMIT", "b" * 40)
    hub.requests.clear()
    assert not check_base("hf:acme/tiny").newer  # another commit, the same weights
    hub.files["model.safetensors"] = hub.files["model.safetensors"][:-1] + b"?"
    after = check_base("hf:acme/tiny")
    assert after.newer
    assert (after.here, after.there) == (before.here, "b" * 40)
    assert not [path for _, path, _ in hub.requests if "/resolve/" in path]  # nothing is fetched


def test_check_knows_the_pinned_digest(
    model: KnownModel, index: Index, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "KNOWN_MODELS", {"tiny-model": model})
    with pytest.raises(PullError, match="is not here yet"):
        check_base("tiny-model")
    pull.pull("tiny-model")
    assert not check_base("tiny-model").newer
    newer = replace(model, files=(ModelFile("tiny.gguf", 5000, "0" * 64),))
    monkeypatch.setattr(check, "KNOWN_MODELS", {"tiny-model": newer})
    assert check_base("tiny-model").newer
    with pytest.raises(PullError, match="has no source to ask"):
        check_base(str(home))


def test_a_cut_connection_is_resumed(hub: Hub) -> None:
    content = random.Random(2).randbytes(12 << 20)
    hub.files = {"config.json": b"{}", "model.safetensors": content}
    hub.cut_after = 11 << 20
    pulled = pull.pull("hf:acme/tiny")
    assert (pulled.path / "model.safetensors").read_bytes() == content
    ranges = [given for method, path, given in hub.requests if given and method == "GET"]
    assert ranges == [f"bytes={10 << 20}-"]  # the library keeps whole blocks of 10 MiB


def test_one_gguf_among_several_must_be_named(hub: Hub) -> None:
    hub.files = {"a.gguf": b"GGUF" * 500, "b.gguf": b"GGUF" * 600, "config.json": b"{}"}
    with pytest.raises(PullError, match=r"hf:acme/tiny:FILE among a\.gguf, b\.gguf"):
        pull.pull("hf:acme/tiny")
    pulled = pull.pull("hf:acme/tiny:b.gguf")
    assert pulled.path.name == "b.gguf"
    assert pulled.sha256 == sha256(hub.files["b.gguf"])
    assert visible(pulled.path.parent) == ["b.gguf", "config.json"]
    with pytest.raises(PullError, match=r"holds no c\.gguf: it has a\.gguf, b\.gguf"):
        pull.pull("hf:acme/tiny:c.gguf")


def test_a_file_unlike_its_declared_digest_is_removed(hub: Hub, home: Path) -> None:
    hub.declared["model.safetensors"] = "0" * 64
    with pytest.raises(PullError, match="model.safetensors differs from what the hub declares"):
        pull.pull("hf:acme/tiny")
    assert not (home / "models/hf/acme/tiny/model.safetensors").exists()
    with pytest.raises(PullError, match="once with a network"):
        resolve_model("hf:acme/tiny")


def test_a_repository_without_weights_is_refused(hub: Hub) -> None:
    hub.files = {"pytorch_model.bin": b"a pickle" * 1000, "config.json": b"{}"}
    with pytest.raises(PullError, match="neither safetensors nor GGUF"):
        pull.pull("hf:acme/tiny")


def test_a_missing_or_closed_repository_says_so(hub: Hub) -> None:
    with pytest.raises(PullError, match="hf:acme/other does not exist, or is private"):
        pull.pull("hf:acme/other")
    hub.gated = True
    with pytest.raises(PullError, match="accept them on its page"):
        pull.pull("hf:acme/tiny")


def test_no_hub_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PullError, match="check the network and HF_ENDPOINT") as caught:
        pull.pull("hf:acme/tiny")
    assert "\n" not in str(caught.value)


def test_wheels_module_finishes_only_verified_files(tmp_path: Path) -> None:
    file = ModelFile("x.bin", 3, sha256(b"abc"))
    assert not wheels.verified(tmp_path, file)
    (tmp_path / "x.bin").write_bytes(b"abd")
    assert not wheels.verified(tmp_path, file)
    assert not (tmp_path / "x.bin").exists()
    (tmp_path / "x.bin").write_bytes(b"abc")
    assert wheels.verified(tmp_path, file)

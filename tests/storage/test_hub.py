"""Networks of the hub: found in the cache, downloaded once, and refused in one sentence within seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.fake_hub import CARD, COMMIT, CONVERTED_COMMIT, FakeHub, add_to_cache, fake_hub, use_hub
from semseg.config.schema import DownloadConfig
from semseg.errors import CheckpointError, ConfigError, DownloadError, SemsegError
from semseg.storage import hub as hub_module
from semseg.storage.hub import HubName, fetch_from_hub, open_local_folder, parse_hub_name, parse_licence

pytest.importorskip("huggingface_hub")
NETWORK = HubName("owner/tiny")
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "README.md": CARD}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def nothing_was_printed() -> None:
    hub_module.report_origin.cache_clear()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    with fake_hub() as server:
        use_hub(monkeypatch, cache, server.address)
        yield server


def converter_request(author: str) -> dict[str, Any]:
    return {
        "title": "Adding `safetensors` variant of this model",
        "num": 3,
        "author": {"name": author},
        "createdAt": "2023-03-16T00:00:00.000Z",
        "status": "open",
        "repo": {"name": NETWORK.name, "type": "model"},
        "isPullRequest": True,
    }


def test_a_network_is_downloaded_once_and_then_taken_from_the_cache(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(NETWORK.name, {**FILES, "pytorch_model.bin": b"code", "preprocessor_config.json": b"{}"})
    found = fetch_from_hub(NETWORK, DownloadConfig())
    assert found.origin == (NETWORK.name, "other (tiny-license)", COMMIT)
    assert {path.name for path in found.path.iterdir()} == {*FILES, "preprocessor_config.json"}
    assert not [line for line in hub.asked if "processor_config.json" in line.replace("preprocessor", "")]
    assert (found.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    asked = len(hub.asked)
    assert fetch_from_hub(NETWORK, DownloadConfig(offline=True)) == found
    assert fetch_from_hub(HubName(NETWORK.name, COMMIT), DownloadConfig()) == found
    assert len(hub.asked) == asked, "the cache answers without the hub"
    printed = capsys.readouterr()
    assert f"weights: hf:owner/tiny at {COMMIT[:12]}, licence: other (tiny-license)" in printed.out
    assert not printed.err


@pytest.mark.slow
def test_an_interrupted_download_goes_on(hub: FakeHub, cache: Path) -> None:
    hub.add(NETWORK.name, FILES)
    hub.cuts["model.safetensors"] = 100
    assert (fetch_from_hub(NETWORK, DownloadConfig()).path / "model.safetensors").stat().st_size == 7000


def test_a_download_that_was_killed_between_two_files_is_completed(hub: FakeHub, cache: Path) -> None:
    hub.add(NETWORK.name, FILES)
    add_to_cache(cache, NETWORK.name, {"config.json": FILES["config.json"]})
    assert (fetch_from_hub(NETWORK, DownloadConfig()).path / "model.safetensors").is_file()


def test_weights_in_several_files_are_all_fetched(hub: FakeHub, cache: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    parts = {"model-1.safetensors": b"1", "model-2.safetensors": b"2"}
    hub.add(NETWORK.name, {"config.json": b"{}", "model.safetensors.index.json": index, **parts})
    found = fetch_from_hub(NETWORK, DownloadConfig())
    assert {*parts} <= {path.name for path in found.path.iterdir()}
    (found.path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-2\.safetensors"):
        open_local_folder(found.path)


def test_weights_of_the_converter_are_used_where_the_owner_has_none_in_safetensors(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(NETWORK.name, {"config.json": b"{}", "pytorch_model.bin": b"code"})
    hub.add(NETWORK.name, FILES, revision="refs/pr/3", commit=CONVERTED_COMMIT)
    hub.requests[NETWORK.name] = [converter_request("a stranger")]
    with pytest.raises(CheckpointError, match=r"hf:owner/tiny: has its weights in pytorch_model\.bin only"):
        fetch_from_hub(NETWORK, DownloadConfig())
    hub.requests[NETWORK.name] = [converter_request("SFconvertbot")]
    found = fetch_from_hub(NETWORK, DownloadConfig())
    assert found.origin.revision == CONVERTED_COMMIT
    assert "@refs/pr/3" in capsys.readouterr().out
    assert fetch_from_hub(NETWORK, DownloadConfig(offline=True)) == found


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (
            {"owner/tiny": (403, "GatedRepo")},
            "only for those who have accepted its terms. Accept them at .*hf auth login",
        ),
        ({"model.safetensors": (403, "GatedRepo")}, "only for those who have accepted its terms"),
        ({"owner/tiny": (404, "RepoNotFound")}, "has no such network. Did you mean hf:owner/tiny2?"),
        ({"owner/tiny": (404, "RevisionNotFound")}, "no such branch, tag or commit"),
        ({"owner/tiny": (503, "")}, "HTTP 503. Try again"),
        ({"owner/tiny": (401, "")}, "no such network|Log in"),
    ],
)
def test_a_refusal_is_one_sentence(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, refusal: dict, message: str) -> None:
    monkeypatch.setitem(hub_module.HUB_LICENCES, "owner/tiny2", "mit")
    hub.add(NETWORK.name, FILES)
    hub.refusals = refusal
    with pytest.raises(DownloadError, match=message) as caught:
        fetch_from_hub(NETWORK, DownloadConfig())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": b""}, r"hf:owner/tiny: has no config\.json"),
        ({"config.json": b"{}"}, r"hf:owner/tiny: has no weights in model\.safetensors"),
    ],
)
def test_a_network_without_a_file_is_refused_before_anything_is_downloaded(
    hub: FakeHub, files: dict, message: str
) -> None:
    hub.add(NETWORK.name, files)
    with pytest.raises(CheckpointError, match=message):
        fetch_from_hub(NETWORK, DownloadConfig())
    assert not [line for line in hub.asked if "/resolve/" in line]


def test_a_hub_that_cannot_be_reached_is_reported_within_seconds(
    monkeypatch: pytest.MonkeyPatch, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_hub() as server:
        address = server.address  # nobody listens there any more below
    use_hub(monkeypatch, cache, address)
    start = time.monotonic()
    with pytest.raises(DownloadError, match=rf"hf:owner/tiny could not be downloaded from {address}: .*Try again"):
        fetch_from_hub(NETWORK, DownloadConfig())
    assert time.monotonic() - start < 5
    assert capsys.readouterr().err == ""


def test_offline_means_that_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, cache: Path) -> None:
    hub.add(NETWORK.name, FILES)
    with pytest.raises(DownloadError, match=f"not in the cache {cache}, and download.offline=true"):
        fetch_from_hub(NETWORK, DownloadConfig(offline=True))
    use_hub(monkeypatch, cache, hub.address, is_offline=True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE=1"):
        fetch_from_hub(NETWORK, DownloadConfig())
    assert not hub.asked


def test_what_another_program_has_left_out_of_the_cache_is_added(hub: FakeHub, cache: Path) -> None:
    small = {"processor_config.json": b"{}", "README.md": CARD}
    hub.add(NETWORK.name, {**FILES, **small})
    add_to_cache(cache, NETWORK.name, {name: FILES[name] for name in ("config.json", "model.safetensors")})
    found = fetch_from_hub(NETWORK, DownloadConfig())
    assert {*small} <= {path.name for path in found.path.iterdir()}
    assert found.origin.licence == "other (tiny-license)"
    asked = len(hub.asked)
    assert not [line for line in hub.asked if "model.safetensors" in line]
    assert fetch_from_hub(NETWORK, DownloadConfig()) == found and len(hub.asked) == asked  # all is known now


def test_a_cache_that_lacks_small_files_is_used_where_the_hub_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_hub() as server:
        address = server.address  # nobody listens there any more below
    use_hub(monkeypatch, cache, address)
    add_to_cache(cache, NETWORK.name, {name: FILES[name] for name in ("config.json", "model.safetensors")})
    for config, reason in ((DownloadConfig(), "the hub cannot be reached"), (DownloadConfig(offline=True), "offline")):
        assert (fetch_from_hub(NETWORK, config).path / "model.safetensors").is_file()
        message = f"hf:owner/tiny: preprocessor_config.json is not in the cache ({reason})"
        assert message in capsys.readouterr().out


def test_a_cache_without_a_card_has_the_licence_of_the_list(
    monkeypatch: pytest.MonkeyPatch, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use_hub(monkeypatch, cache, "http://127.0.0.1:9", is_offline=True)
    add_to_cache(cache, NETWORK.name, {name: FILES[name] for name in ("config.json", "model.safetensors")})
    assert fetch_from_hub(NETWORK, DownloadConfig()).origin.licence == ""
    monkeypatch.setitem(hub_module.HUB_LICENCES, NETWORK.name, "mit")
    assert fetch_from_hub(NETWORK, DownloadConfig()).origin.licence == "mit"
    assert "licence: not stated" in capsys.readouterr().out


def test_a_folder_is_opened_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = add_to_cache(tmp_path, NETWORK.name, FILES)
    assert open_local_folder(folder).origin == (NETWORK.name, "other (tiny-license)", COMMIT)
    assert f"weights: {NETWORK.name} at {COMMIT[:12]}, licence: other (tiny-license)" in capsys.readouterr().out
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(CheckpointError, match=r"plain: has no config\.json"):
        open_local_folder(plain)
    (plain / "config.json").write_bytes(b"{}")
    (plain / "pytorch_model.bin").write_bytes(b"code")
    with pytest.raises(CheckpointError, match="can hold code"):
        open_local_folder(plain)
    (plain / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    with pytest.raises(CheckpointError, match="is damaged"):
        open_local_folder(plain)


@pytest.mark.parametrize(
    "text", ["tiny", "owner/tiny/more", "owner/tiny@", "../tiny", "owner/t..y", "a b/c", "o/n@a/../b"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be hf:<owner>/<name>"):
        parse_hub_name(text)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_link: https://a.org/b\n---\n", "other (https://a.org/b)"),
        ("---\nlicense: 'mit'  # as agreed\n---", "mit"),
        ("# no head\nlicense: mit\n", ""),
        ("", ""),
    ],
)
def test_the_licence_stands_in_the_head_of_the_card(card: str, licence: str) -> None:
    assert parse_licence(card) == licence


def test_without_the_library_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "find_spec", lambda name: None)
    with pytest.raises(SemsegError, match=r"pip install .*\[transformers\]"):
        fetch_from_hub(NETWORK, DownloadConfig())

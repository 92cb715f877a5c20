"""Networks of the Hugging Face hub: found in the hub's cache, or downloaded into it; local folders of their layout.

    hf:<owner>/<name>[@<revision>]   the revision is a branch, a tag, a commit or refs/pr/<number>; main if not given
    <folder>                         with config.json and model.safetensors, as transformers writes it

The cache is that of the hub ($HF_HUB_CACHE, $HF_HOME/hub or ~/.cache/huggingface/hub), which other programs share.
Weights are taken from safetensors files only: the older pytorch_model.bin can hold code. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from semseg.config.origin import WeightsOrigin
from semseg.config.schema import DownloadConfig
from semseg.errors import (
    CheckpointError,
    ConfigError,
    DownloadError,
    SemsegError,
    find_nearest,
    install_command,
    one_line,
)
from semseg.storage.atomic import atomic_write
from semseg.storage.hub_list import HUB_LICENCES
from semseg.storage.ranks import print_once

CONFIG, PREPROCESSOR, CARD = "config.json", "preprocessor_config.json", "README.md"
PROCESSORS = (PREPROCESSOR, "processor_config.json")  # either may describe the preprocessing
SMALL_FILES = (*PROCESSORS, CARD)  # which not every network has
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"  # the index of weights in several files
PICKLED_WEIGHTS = "pytorch_model.bin"
MAIN = "main"
CONVERTED = "semseg/safetensors"  # the name, in the cache, of the commit with the converted weights of main
CONVERTER = "SFconvertbot"  # the hub's own converter, which offers safetensors files as pull requests
BY_HAND = "Try again, or download its files by hand and give the path of their folder."
MAX_WAIT_S = 10.0  # for the first answer of the hub
COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
REVISION = re.compile(r"[\w-][\w./+-]*", re.ASCII)


class HubName(NamedTuple):
    """A network of the hub."""

    name: str  # <owner>/<name>
    revision: str = ""  # empty: main

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


class HubFolder(NamedTuple):
    """A folder with the files of a network in transformers' layout, complete."""

    path: Path
    origin: WeightsOrigin


def parse_hub_name(text: str) -> HubName:
    """The network that `<owner>/<name>[@<revision>]` names.

    Raises:
        ConfigError: if it has another form.

    >>> parse_hub_name("nvidia/segformer-b0-finetuned-ade-512-512@refs/pr/3").revision
    'refs/pr/3'
    """
    name, at, revision = text.partition("@")
    is_valid = NAME.fullmatch(name) and ".." not in text and (REVISION.fullmatch(revision) if at else True)
    if not is_valid:
        raise ConfigError(f"hf:{text}: must be hf:<owner>/<name>, or hf:<owner>/<name>@<branch, tag or commit>.")
    return HubName(name, revision)


def is_network_folder(path: Path) -> bool:
    """Whether a folder has the description of a network in transformers' layout."""
    return os.path.isfile(path / CONFIG)  # noqa: PTH113 - Path raises an error for a name that is too long


def open_local_folder(path: Path) -> HubFolder:
    """A local folder as transformers' `save_pretrained` writes it; a folder of the hub's cache has its origin.

    Raises:
        CheckpointError: if a file is missing.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder.")
    problem = find_missing_file(path)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    name, revision = str(path), ""
    commit, repository = path.resolve().name, path.resolve().parent.parent.name
    if COMMIT.fullmatch(commit) and repository.startswith("models--"):
        name, revision = repository.removeprefix("models--").replace("--", "/"), commit
    origin = WeightsOrigin(name, read_licence(path), revision)
    report_origin(str(origin))
    return HubFolder(path, origin)


def fetch_from_hub(network: HubName, config: DownloadConfig) -> HubFolder:
    """The files of a network of the hub: from the hub's cache if they are there, otherwise downloaded into it.

    What is in the cache is used without asking the hub, a branch like a commit: the same command gives the same network
    tomorrow. Only what another program has left out there is asked for, of the same commit. With HF_HUB_OFFLINE=1 or
    download.offline=true, no connection is opened. One line says what was used.

    Raises:
        ConfigError: if the library is not installed.
        DownloadError: if there is no such network or revision, it is not open to all, or the hub cannot be reached.
        CheckpointError: if the network has no description, or no weights in safetensors.
    """
    require_hub_library()
    path = find_in_cache(network)
    if path is None and is_offline(config):
        reason = "download.offline=true" if config.offline else "HF_HUB_OFFLINE=1"
        raise DownloadError(
            f"hf:{network}: is not in the cache {cache_path()}, and {reason}. Run the command once where there is a "
            f"network, or give the path of a folder with its {CONFIG} and {WEIGHTS} instead."
        )
    if path is None:
        path = download_network(network, config)
    else:
        add_small_files(network, path, config)
    licence = read_licence(path)
    if licence in ("", "other"):  # "other" stands for a text that the card only links to
        licence = HUB_LICENCES.get(network.name, licence)
    origin = WeightsOrigin(network.name, licence, path.resolve().name)
    report_origin(f"hf:{origin}")
    return HubFolder(path, origin)


@cache
def report_origin(origin: str) -> None:
    """Print what is used and its licence, once in a process: a network may be opened for its classes first."""
    print_once(f"weights: {origin}")


def require_hub_library() -> None:
    """Raises ConfigError with the command that installs the hub's library unless it is there."""
    if find_spec("huggingface_hub") is None or find_spec("transformers") is None:
        raise ConfigError(f"Networks of the hub need the transformers package: {install_command('transformers')}")


def is_offline(config: DownloadConfig) -> bool:
    """Whether no connection may be opened."""
    from huggingface_hub import constants  # noqa: PLC0415 - a package of an extra

    return config.offline or constants.HF_HUB_OFFLINE


def cache_path() -> Path:
    """The folder of the hub's cache."""
    from huggingface_hub import constants  # noqa: PLC0415 - a package of an extra

    return Path(constants.HF_HUB_CACHE)


# ---- what is there


def find_in_cache(network: HubName) -> Path | None:
    """The folder of a network in the hub's cache; None unless all of its files are there."""
    repository = cache_path() / f"models--{network.name.replace('/', '--')}"
    revision = network.revision or MAIN
    names = [revision] if network.revision else [revision, CONVERTED]
    for name in names:
        commit = read_commit(repository / "refs" / name) or name
        folder = repository / "snapshots" / commit
        if find_missing_file(folder) is None:
            return folder
    return None


def add_small_files(network: HubName, folder: Path, config: DownloadConfig) -> None:
    """Add the small files of a network to the hub's cache, if another program has cached its weights without them.

    Otherwise the network would have the preprocessing and the class ids of its family, and no licence.
    """
    absent = find_absence_marks(folder)
    unknown = [name for name in SMALL_FILES if not (folder / name).exists() and not (absent / name).exists()]
    if not unknown:
        return
    problem = "offline" if is_offline(config) else fetch_small_files(network, folder, unknown)
    if problem and not any((folder / name).exists() for name in PROCESSORS):
        print_once(f"hf:{network}: {PREPROCESSOR} is not in the cache ({problem}); the network may need it")


def fetch_small_files(network: HubName, folder: Path, names: Collection[str]) -> str:
    """Fetch files of the commit of a folder, as far as it has them; returns why the hub cannot be asked, or ""."""
    from huggingface_hub import HfApi, hf_hub_download  # noqa: PLC0415 - a package of an extra
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: PLC0415

    for name in names:
        try:
            with limit_library_output():
                hf_hub_download(network.name, name, revision=folder.name, endpoint=HfApi().endpoint)
        except LocalEntryNotFoundError:
            return "the hub cannot be reached"
        except EntryNotFoundError:
            mark_absent(folder, name)
        except Exception as error:  # whatever it is, the network itself is there
            return describe_connection(error)
    return ""


def find_absence_marks(folder: Path) -> Path:
    """Where the cache marks files that a commit does not have, as the hub's library does."""
    return folder.parents[1] / ".no_exist" / folder.name


def mark_absent(folder: Path, name: str) -> None:
    """Note in the cache that a commit does not have a file, if the cache can be written."""
    with suppress(OSError):
        find_absence_marks(folder).mkdir(parents=True, exist_ok=True)
        (find_absence_marks(folder) / name).touch()


def read_commit(file: Path) -> str:
    """The commit that a name stands for in the cache; empty if there is none."""
    try:
        text = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    except (OSError, ValueError):
        return ""
    return text if COMMIT.fullmatch(text) else ""


def find_missing_file(folder: Path) -> str | None:
    """A sentence if a folder lacks a file of a network in transformers' layout."""
    problem = find_missing_entry({path.name for path in folder.iterdir() if path.exists()} if folder.is_dir() else ())
    if problem is None and not (folder / WEIGHTS).exists():
        missing = next((name for name in list_parts(folder / WEIGHTS_INDEX) if not (folder / name).is_file()), None)
        return f"lacks {missing}, a part of its weights." if missing else None
    return problem


def find_missing_entry(files: Collection[str]) -> str | None:
    """A sentence if a network with these files, of which an index may list more, is not in transformers' layout."""
    if CONFIG not in files:
        return f"has no {CONFIG}, so it is not a network in the layout of transformers."
    if has_weights(files):
        return None
    if PICKLED_WEIGHTS in files:
        return (
            f"has its weights in {PICKLED_WEIGHTS} only, which can hold code and is not read. If you trust it, load it "
            f"with transformers, write it with save_pretrained, which makes {WEIGHTS}, and give that folder."
        )
    return f"has no weights in {WEIGHTS}."


def list_parts(index: Path) -> list[str]:
    """The names of the files that an index of weights lists.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: is damaged. Remove it to download it again.") from None
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise CheckpointError(f"{index}: is damaged: it lists other files than .safetensors.")
    return names


def read_licence(folder: Path) -> str:
    """The licence that the model card in a folder states; empty if there is none."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return parse_licence(text)


def parse_licence(card: str) -> str:
    """The licence in the head of a model card.

    A licence without an abbreviation of its own is called "other" there, and its name or address stands beside it.

    >>> parse_licence("---\\nlicense: other\\nlicense_name: sam-license\\ntags:\\n- vision\\n---\\nlicense: mit")
    'other (sam-license)'
    """
    head = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    if head is None:
        return ""
    lines = re.findall(r"^(license\w*):[ \t]*(.+)$", head[1], re.MULTILINE)
    entries = {key: value.split(" #")[0].strip().strip("\"'") for key, value in lines}
    licence = " ".join(entries.get("license", "").split())[:80]
    name = " ".join((entries.get("license_name") or entries.get("license_link") or "").split())[:120]
    return f"{licence} ({name})" if licence == "other" and name else licence


# ---- what is not there


def download_network(network: HubName, config: DownloadConfig) -> Path:
    """Download a network into the hub's cache; returns its folder there.

    Raises:
        DownloadError, CheckpointError: see `fetch_from_hub`.
    """
    from huggingface_hub import HfApi, hf_hub_download  # noqa: PLC0415 - a package of an extra

    api = HfApi()
    with explain_hub_errors(network, api.endpoint), limit_library_output():
        revision, files = network.revision or MAIN, list_files(api, network, network.revision or MAIN, config)
        if not has_weights(files) and PICKLED_WEIGHTS in files and not network.revision:
            revision = find_converted(api, network) or revision
            files = list_files(api, network, revision, config)
        problem = find_missing_entry(files)
        if problem:
            raise CheckpointError(f"hf:{network}: {problem}")
        print_once(f"downloading hf:{network} from {api.endpoint} to {cache_path()}")
        folder = Path(hf_hub_download(network.name, CONFIG, revision=revision, endpoint=api.endpoint)).parent

        def fetch(name: str) -> None:
            hf_hub_download(network.name, name, revision=folder.name, endpoint=api.endpoint)

        for name in SMALL_FILES:
            fetch(name) if name in files else mark_absent(folder, name)
        fetch(WEIGHTS if WEIGHTS in files else WEIGHTS_INDEX)
        if WEIGHTS not in files:
            for name in list_parts(folder / WEIGHTS_INDEX):
                fetch(name)
        if revision != (network.revision or MAIN):
            mark = folder.parents[1] / "refs" / CONVERTED
            with atomic_write(mark) as temporary:
                temporary.write_text(folder.name, encoding="utf-8")
    return folder


def list_files(api: Any, network: HubName, revision: str, config: DownloadConfig) -> set[str]:
    """The names of the files of a network."""
    info = api.model_info(network.name, revision=revision, timeout=min(config.timeout_s, MAX_WAIT_S))
    return {file.rfilename for file in info.siblings or ()}


def has_weights(files: Collection[str]) -> bool:
    """Whether there are weights in safetensors among the files of a network."""
    return WEIGHTS in files or WEIGHTS_INDEX in files


def find_converted(api: Any, network: HubName) -> str | None:
    """The pull request in which the hub's converter offers the weights of `main` in safetensors, or None.

    Only of its account: anyone can open a pull request.
    """
    requests = api.get_repo_discussions(
        network.name, author=CONVERTER, discussion_type="pull_request", discussion_status="open"
    )
    for request in requests:
        if request.author == CONVERTER and "safetensors" in request.title and request.git_reference:
            print_once(
                f"hf:{network}: its weights are in {PICKLED_WEIGHTS}, which can hold code; those that the hub's "
                f"converter has made of it are used: @{request.git_reference}"
            )
            return request.git_reference
    return None


@contextmanager
def explain_hub_errors(network: HubName, endpoint: str) -> Iterator[None]:
    """Turn the errors of the hub's library into sentences.

    Raises:
        DownloadError: instead of any of them.
    """
    from huggingface_hub import errors  # noqa: PLC0415 - a package of an extra

    failed = f"hf:{network} could not be downloaded from {endpoint}"
    try:
        yield
    except SemsegError:
        raise
    except errors.GatedRepoError:
        raise DownloadError(
            f"hf:{network}: is only for those who have accepted its terms. Accept them at {endpoint}/{network.name}, "
            "then log in with `hf auth login`, or set HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"hf:{network}: the network has no such branch, tag or commit.") from None
    except errors.RepositoryNotFoundError:
        nearest = find_nearest(network.name, HUB_LICENCES)
        hint = f" Did you mean hf:{nearest}?" if nearest else " mode=models lists some."
        raise DownloadError(
            f"hf:{network}: {endpoint} has no such network.{hint} For one that is private, log in with `hf auth login`."
        ) from None
    except errors.EntryNotFoundError as error:
        raise DownloadError(f"{failed}: {describe_connection(error)}. {BY_HAND}") from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        advice = "Log in with `hf auth login`, or set HF_TOKEN." if code in (401, 403) else BY_HAND
        raise DownloadError(f"{failed}: HTTP {code}. {advice}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests"):
            raise DownloadError(f"{failed}: {describe_connection(error)}. {BY_HAND}") from None
        if isinstance(error, OSError):
            reason = error.strerror or one_line(error)
            raise DownloadError(f"{failed}: {reason}. The cache is {cache_path()}; HF_HOME moves it.") from None
        raise


def describe_connection(error: BaseException) -> str:
    """Why there is no connection, in a few words, from the error that everything began with."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:200] or type(error).__name__


@contextmanager
def limit_library_output() -> Iterator[None]:
    """Keep the hub's library from printing, apart from its progress bars on a terminal."""
    from huggingface_hub import utils  # noqa: PLC0415 - a package of an extra

    verbosity, had_bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if had_bars:
            utils.enable_progress_bars()

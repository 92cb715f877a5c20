"""mode=download: fetch a data set, unpack it to data.root, and count its images and labels; or a network. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf

from semseg.checkpoints.zoo import PublishedNetwork, find_zoo_network
from semseg.config.groups import CONFIG_DIR
from semseg.config.schema import HUB_PREFIX, ZOO_PREFIX, ArchiveConfig, Config, DataConfig, DownloadConfig
from semseg.data.sources import DataSource
from semseg.errors import ConfigError, DataError
from semseg.storage.archive import extract_archive
from semseg.storage.download import fetch_file
from semseg.storage.hub import fetch_from_hub, parse_hub_name

DATA_CACHE_FOLDER = "data"  # inside the cache


class PairCounts(NamedTuple):
    """Number of images with a label in each split."""

    train: int
    val: int

    def __str__(self) -> str:
        return f"{self.train:,} training and {self.val:,} validation images with labels"


def run(config: Config, overrides: list[str]) -> None:
    """Download the network that `ckpt` names, or the data set that `data` names, unless it exists already.

    Raises:
        SemsegError: if it cannot be downloaded, or data.root is not complete afterwards.
    """
    if config.ckpt:
        for path in fetch_network(config.ckpt, config.download):
            print(path)
        return
    data, archive = config.data, config.data.archive
    if archive is None:
        raise ConfigError(
            f"data={data.name}: there is nothing to download. mode=download works with "
            f"{', '.join(f'data={name}' for name in list_downloadable_data_sets())}."
        )
    root = Path(data.root).expanduser()
    if root.is_dir() and any(root.iterdir()):
        print(f"{root}: exists already, {require_complete_data_set(data, archive)}")
        return
    manual = f"or unpack it to {root} yourself, or set data.root to its folder"
    file = fetch_file(archive.url, config.download, folder=DATA_CACHE_FOLDER, digest=archive.digest, manual=manual)
    print(f"unpacking {file} to {root}", flush=True)
    try:
        extract_archive(file, root)
    except OSError as error:
        raise DataError(f"{root}: cannot be written ({error.strerror or error}). Set data.root.") from error
    print(f"{root}: {require_complete_data_set(data, archive)}")


def fetch_network(spec: str, download: DownloadConfig) -> list[Path]:
    """The files, or the folder, of the network that zoo:<name> or hf:<name> means, for a use without a connection.

    Raises:
        ConfigError: for any other value of `ckpt`.
        CheckpointError, DownloadError: if it cannot be had.
    """
    network = find_zoo_network(spec) if spec.startswith(ZOO_PREFIX) else None
    if isinstance(network, PublishedNetwork):
        manual = "or give ckpt=<folder with both files>"
        return [fetch_file(url, download, folder=network.folder, manual=manual) for url in network.urls()]
    if network is None and not spec.startswith(HUB_PREFIX):
        raise ConfigError(f"ckpt={spec}: there is nothing to download. Use zoo:<name> or hf:<owner>/<name>.")
    name = network.hub_name if network else spec.removeprefix(HUB_PREFIX)
    return [fetch_from_hub(parse_hub_name(name), download).path]


def list_downloadable_data_sets() -> list[str]:
    """The data sets of configs/data/ that name an archive."""
    files = sorted((CONFIG_DIR / "data").glob("*.yaml"))
    return [file.stem for file in files if OmegaConf.select(OmegaConf.load(file), "archive")]


def require_complete_data_set(data: DataConfig, archive: ArchiveConfig) -> PairCounts:
    """Count the pairs below data.root, which must be as many as in the archive.

    Raises:
        DataError: if there are more or fewer, or images without labels.
    """
    way_out = f"Remove {data.root} and run mode=download again, or set data.root to another folder."
    source = DataSource(data)
    try:
        found = PairCounts(len(source.records("train")), len(source.records("val")))
    except DataError as error:
        raise DataError(f"{data.root}: data={data.name} is incomplete there. {way_out}\n{error}") from error
    expected = PairCounts(archive.num_train, archive.num_val)
    if found != expected:
        raise DataError(f"{data.root}: has {found}, but data={data.name} has {expected}. {way_out}")
    return found

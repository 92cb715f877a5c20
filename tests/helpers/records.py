"""Records of lists and folders as training reads them: the first problem raises."""

from __future__ import annotations

from typing import Any

from semseg.data.folders import read_folder_pairs
from semseg.data.list_files import read_odgt_list
from semseg.data.records import Record, require_records


def odgt_records(*arguments: Any, **options: Any) -> list[Record]:
    return require_records(read_odgt_list(*arguments, **options))


def folder_records(*arguments: Any, **options: Any) -> list[Record]:
    return require_records(read_folder_pairs(*arguments, **options))

"""What repeats the schema is up to date, complete, and keeps what is not the schema's."""

from __future__ import annotations

from dataclasses import MISSING
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from semseg.config.compose import compose_config
from semseg.config.generate import flatten_keys, list_section_keys, read_explanations, render_files
from semseg.config.groups import COMPLETE_OPTIONS, CONFIG_DIR, list_groups, list_options
from semseg.config.schema import BUILT_IN_CLASSES, Config, get_sections, list_keys
from semseg.config.validate import iterate_leaves

FILES = render_files()
KEYS = {key.name: key for key in flatten_keys(Config, "", {})}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIG_DIR.parent).as_posix())
def test_a_file_that_repeats_the_schema_is_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == FILES[path], "run `make configs`"


def test_every_key_has_an_explanation_of_one_or_two_sentences() -> None:
    for key in KEYS.values():
        assert 5 < len(key.explanation) < 250, key.name
        assert key.explanation.endswith((".", "html")), key.name


def test_the_page_and_the_schema_have_the_same_keys() -> None:
    page = FILES[CONFIG_DIR.parent / "docs" / "configuration.md"]
    for name in [*list_keys(), "model.encoder.weights", "model.decoder.name"]:
        is_heading = name in get_sections(Config)
        assert (f"\n## {name}\n" if is_heading else f"| `{name}` |") in page, name


def test_defaults_of_the_schema_are_those_of_the_composed_configuration() -> None:
    composed = dict(iterate_leaves(OmegaConf.to_container(compose_config([]), resolve=False)))
    for name, key in KEYS.items():
        has_default = key.section is None and key.default is not MISSING
        if has_default and name in composed and not name.startswith(("data.", "model.name", "run_dir")):
            assert composed[name] == key.default, name


def test_the_explanation_of_classes_names_all_that_are_built_in() -> None:
    assert all(name in KEYS["data.classes"].explanation for name in BUILT_IN_CLASSES)


def test_options_name_the_base_that_has_all_keys() -> None:
    for group, base in COMPLETE_OPTIONS.items():
        assert group in list_groups()
        for option in list_options(group):
            text = (CONFIG_DIR / group / f"{option}.yaml").read_text(encoding="utf-8")
            assert ("defaults:\n" in text) == (option != base), f"{group}={option}"


def test_explanations_are_the_strings_below_the_fields() -> None:
    explanations = read_explanations(get_sections(Config)["ema"])
    assert set(explanations) == {"decay", "start_step"}
    assert [key.type for key in list_section_keys(get_sections(Config)["ema"])] == ["float or null", "int"]

"""Help is whole, comes from the settings' own documentation, and answers without importing anything heavy."""

import subprocess
import sys

import pytest
from crosslace.conf import SECTIONS, VERBS
from crosslace.conf.describe import closest, known_settings, presets, section_settings


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_setting_with_its_documentation_and_default(verb, crosslace) -> None:
    ended = crosslace(verb, "--help")
    assert ended.code == 0
    text = " ".join(ended.out.split())
    for setting in known_settings(verb).values():
        assert setting.doc, f"{setting.name} has no documentation"
        assert " ".join(setting.doc.split()[:3]) in text
        assert f"{setting.name} = {setting.default}" in text if setting.default else setting.name in text
    for example in VERBS[verb].examples:
        assert example in ended.out


def test_every_section_is_taken_by_a_verb_and_documented() -> None:
    taken = {section for verb in VERBS.values() for section in verb.sections}
    assert taken == set(SECTIONS)
    for section in SECTIONS:
        assert section_settings(section)


def test_overview_lists_the_verbs(crosslace) -> None:
    ended = crosslace()
    assert ended.code == 0
    assert all(f"  {verb} " in ended.out for verb in VERBS)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from crosslace.launch.cli.main import main; main(['train', '--help']);"
        "heavy = {'torch', 'transformers', 'hydra', 'rich', 'matplotlib', 'zarr'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_presets_are_the_files_of_the_group() -> None:
    assert {"demo", "gpt2_clt", "gpt2_plt", "llama32_1b_clt", "gemma2_2b_plt"} <= set(presets("experiment"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("trainer.lrr", "trainer.lr"), ("lr", "trainer.lr"), ("target_l0", "trainer.target_l0"), ("sed", "seed")],
)
def test_a_misspelt_name_finds_its_neighbour(typed: str, meant: str) -> None:
    assert closest(typed, list(known_settings("train"))) == meant

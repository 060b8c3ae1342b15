"""The folder of vectors: nothing in it is passed over."""

import re
from pathlib import Path

from parity_cases import FAMILIES, FOLDER, case_names, family_of


def test_the_folder_holds_cases():
    assert case_names(), f"no .safetensors file in {FOLDER}"


def test_every_file_belongs_to_a_known_family():
    assert [name for name in case_names() if family_of(name) is None] == []


def test_every_family_has_a_test():
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert sorted(re.findall(r"^def test_(\w+)\(case: Case\)", text, re.MULTILINE)) == sorted(FAMILIES)


def test_the_vectors_in_the_repository_cover_every_family():
    here = {family_of(path.stem) for path in (Path(__file__).parent / "vectors").glob("*.safetensors")}
    assert here == set(FAMILIES)


def test_prefixes_are_told_apart():
    names = (
        "dmd_generator_step",
        "dmd_generator_step_b2",
        "dmd_mid",
        "gan_4class",
        "gan",
        "schedule",
        "schedule2",
        "dmdx",
        "new",
    )
    expected = ["dmd_generator_step", "dmd_generator_step", "dmd", "gan", "gan", "schedule", "schedule", None, None]
    assert [family_of(name) for name in names] == expected

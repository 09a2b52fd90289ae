"""Names are found as whole words, whatever their case, number, hyphens and spelling; labels of data sets are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_gen.core.names import NAMES_FILE, Names, load_names, read_names, words
from medisee.foundation.errors import InputError

NAMES = load_names()
TABLE = yaml.safe_load(NAMES_FILE.read_text(encoding="utf-8"))
KNOWN = [(category, name) for category, fields in TABLE.items() for name in (category, *fields.get("names", []))]


def named(text: str, categories: Sequence[str] = (), names: Names = NAMES) -> set[str]:
    return {mention.category for mention in names.find(words(text), categories)}


def test_the_table_has_at_least_the_papers_number_of_categories() -> None:
    assert len(TABLE) >= 109


@pytest.mark.parametrize(
    ("label", "category"),
    [
        ("liver", "liver"),
        ("kidney_left", "left kidney"),
        ("Left Kidney", "left kidney"),
        ("left-kidney", "left kidney"),
        ("postcava", "inferior vena cava"),
        ("IVC", "inferior vena cava"),
        ("heart_ventricle_left", "left ventricle"),
        ("lung_upper_lobe_right", "right lung upper lobe"),
        ("clavicula_left", "left clavicle"),
        ("oesophagus", "esophagus"),
        ("brain tumour", "brain tumor"),
        ("nerve", "brachial plexus"),
        ("TMJ left", "left temporomandibular joint"),
        ("some_new_thing left", "left some new thing"),
    ],
)
def test_labels_of_data_sets_have_one_canonical_name(label: str, category: str) -> None:
    assert NAMES.canonical(label) == category


def test_sides_and_bases() -> None:
    assert (NAMES.side("kidney_left"), NAMES.base("kidney_left")) == ("left", "kidney")
    # The left ventricle is not the left one of a pair.
    assert (NAMES.side("left ventricle"), NAMES.base("left ventricle")) == (None, "left ventricle")
    assert NAMES.of("kidney_left")[0] == "left kidney" and "left ren" in NAMES.of("left kidney")
    assert NAMES.of("vertebrae_L1") == ("vertebrae L1",)


@given(
    st.sampled_from(KNOWN), st.sampled_from((str.upper, str.lower, str.title)), st.sampled_from((" ", "-", "  ", "\n"))
)
def test_case_and_what_joins_the_words_do_not_matter(known: tuple[str, str], case, joint: str) -> None:
    category, name = known
    assert category in named(f"See {case(joint.join(name.split()))}, please.")


@given(st.sampled_from(KNOWN))
def test_a_name_within_a_word_does_not_count(known: tuple[str, str]) -> None:
    _, name = known
    assert named(f"x{name.replace(' ', 'x')}x") == set()


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("both livers", "liver"),
        ("its arteries: the iliac arteries", "iliac artery"),
        ("vertebrae of the neck", "vertebra"),
        ("a row of teeth", "tooth"),
        ("the femora and heads of the femur", "femur"),
        ("menisci", "meniscus"),
        ("hippocampi", "hippocampus"),
        ("the liver's edge", "liver"),
        ("the liver’s edge", "liver"),
        ("Gall-Bladders", "gallbladder"),
        ("the oesophagus", "esophagus"),
        ("tumours", "tumor"),
        ("grey matter", "gray matter"),
        ("a haemorrhage of the brain: an intracranial haemorrhage", "intracranial hemorrhage"),
        ("the putamina", "putamen"),
    ],
)
def test_plurals_possessives_and_british_spelling_count(text: str, category: str) -> None:
    assert category in named(text)


def test_the_longest_name_counts_and_the_last_words_are_no_longer_than_the_text() -> None:
    assert named("the left kidney") == {"left kidney"}
    assert named("a liver tumor") == {"liver tumor"}
    assert named("to the right of the spleen") == {"spleen"}
    found = NAMES.find(words("between the spleen and the liver"))
    assert [mention.category for mention in found] == ["spleen", "liver"]


@pytest.mark.parametrize(
    ("text", "category", "found"),
    [
        ("the hepatic organ", "liver", "hepatic"),
        ("the organ above the right kidney", "kidney_left", "right kidney"),
        ("one of the kidneys", "kidney_left", "kidneys"),
        ("the organ with a kidney tumour", "kidney", "kidney"),
        ("the bony vertebra", "vertebrae_L1", "vertebra"),
        ("the big thing", "big thing", "big thing"),
        ("what is framed by the large intestine", "small bowel", None),
        ("acute pancreatitis", "pancreas", "pancreatitis"),
        ("after a splenectomy", "spleen", "splenectomy"),
        ("Prostatectomies", "prostate", "prostatectomies"),
        ("viral hepatitis", "liver", "hepatitis"),
        ("cholecystitis", "gallbladder", "cholecystitis"),
        ("gastritis", "stomach", "gastritis"),
        ("pyelonephritis", "kidney_left", "pyelonephritis"),
        ("filled by the I.V.C.", "postcava", "ivc"),
        ("filled by the I.V.C", "postcava", "ivc"),
        ("the adrenal neighbour that serenades", "kidney_left", None),
        ("the organ that makes bile", "liver", None),
        ("an organ that delivers", "liver", None),
    ],
)
def test_what_gives_a_category_away(text: str, category: str, found: str | None) -> None:
    assert NAMES.betrays(text, category) == found


def test_unknown_categories_are_found_by_their_own_label() -> None:
    assert named("two odd organs", ["odd_organ"]) == {"odd organ"}
    assert named("two odd organs") == set()


def test_further_names_add_to_the_table(tmp_path: Path) -> None:
    extra = tmp_path / "extra.yaml"
    entry = "appendix: {names: [vermiform process], hints: [appendiceal], stems: [appendec], sided: false}\n"
    extra.write_text(entry, encoding="utf-8")
    names = load_names(read_names(extra))
    assert named("a vermiform process, two appendices", names=names) == {"appendix"}
    assert names.betrays("the appendiceal wall", "appendix") == "appendiceal"
    assert names.betrays("an appendectomy", "appendix") == "appendectomy"
    assert "liver" in names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[a, b]", "holds list"),
        ("", "holds NoneType"),
        ("{", "cannot be read"),
        ("appendix: {nams: [x]}", "appendix"),
        ("appendix: {names: x}", "appendix"),
        ("appendix: {names: ['']}", "appendix"),
        ("appendix: {sided: perhaps}", "appendix"),
        ("appendix: {stems: [two words]}", "appendix"),
        ("appendix: {names: [liver]}", "'liver' stands for"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "extra.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_names(read_names(path), str(path))
    with pytest.raises(InputError, match="missing"):
        read_names(tmp_path / "missing.yaml")

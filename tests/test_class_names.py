"""A class is found as people write it, and what cannot be found is told with what was near."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchforge.class_names import NoSuchClass, knows_class, match_class
from patchforge.model.storage.import_checkpoint import IMAGENET_NAMES
from tests.docstrings import run_examples

IMAGENET = IMAGENET_NAMES.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("typed", "index"),
    [
        ("golden retriever", 207),
        ("Golden Retriever", 207),
        (" golden_retriever ", 207),
        ("golden-retr", 207),
        ("tench, Tinca tinca", 0),
        ("tinca TINCA", 0),
        ("cardigan", 474),  # all of that label, and only a part of another
        ("Cardigan Welsh", 264),
        ("panda bear", 388),
        ("missile", 657),
        ("crane (bird)", 134),
        ("crane (m", 517),
        ("toilet tissue", 999),
    ],
)
def test_a_class_is_found_by_any_of_its_names(typed: str, index: int) -> None:
    assert match_class(typed, IMAGENET) == IMAGENET[index]
    assert knows_class(typed, IMAGENET)


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("crane", r"more than one class: 'crane \(bird\), crane', 'crane \(machine\), crane'$"),
        ("golden retreiver", "no such class; the nearest: 'golden retriever'"),
        ("water", r"more than one class: .* and \d+ more"),
        ("xyzzyxyzzy", "no such class$"),
        ("", "no such class"),
        (" - ", "no such class"),
        ("x" * 200, "no such class"),
    ],
)
def test_what_is_not_one_class_is_told_with_the_nearest(typed: str, reason: str) -> None:
    with pytest.raises(NoSuchClass, match=reason) as caught:
        match_class(typed, IMAGENET)
    assert str(caught.value).count("'") <= 6  # three labels
    assert not knows_class(typed, IMAGENET)


def test_every_label_and_every_usual_name_of_imagenet_means_its_class() -> None:
    assert len(IMAGENET) == len(set(IMAGENET)) == 1000
    for label in IMAGENET:
        assert match_class(label, IMAGENET) == label
        usual = label.split(",")[0]
        whole = {"Cardigan": "cardigan", "maillot": "maillot"}  # names that are all of another label
        assert match_class(usual, IMAGENET) == whole.get(usual, label)


def test_numbers_are_themselves_before_they_begin_others() -> None:
    assert match_class("1", [str(number) for number in range(20)]) == "1"
    assert not knows_class(None, ["1"])


def test_many_classes_are_not_all_compared() -> None:
    with pytest.raises(NoSuchClass, match=r"^no such class$"):
        match_class("nothing", [f"class {number}" for number in range(20_000)])


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_examples(match_class, tmp_path, monkeypatch)

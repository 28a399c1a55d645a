"""How numbers are written."""

import math

import pytest

from clarity.report import text


@pytest.mark.parametrize(
    ("part", "whole", "written"),
    [
        (0, 9, "0 %"),
        (9, 9, "100 %"),
        (1, 2, "50 %"),
        (1, 30, "3.3 %"),
        (1, 3000, "0.03 %"),
        (13, 10, "130 %"),
        (1001, 1000, "100.10 %"),
        (8999, 9000, "99.99 %"),
        (89997, 90000, "99.9967 %"),
        (3, 90000, "0.0033 %"),
        (1, 0, "–"),
    ],
)
def test_percent_rounds_to_neither_end(part: float, whole: float, written: str) -> None:
    assert text.percent(part, whole) == written


def test_interval_does_not_show_digits_that_mean_nothing() -> None:
    assert text.interval(0.0, 1.0) == "0 % to 100 %" and text.interval(1e-7, 0.39) == "<0.01 % to 39 %"
    assert text.interval(0.5, 1 - 1e-7) == "50 % to >99.99 %"


def test_plural_takes_an_irregular_plural() -> None:
    assert [text.plural(n, "image") for n in (0, 1, 10_000)] == ["0 images", "1 image", "10,000 images"]
    assert text.plural(2, "search", "searches") == "2 searches"


def test_counted_puts_the_first_noun_in_the_singular() -> None:
    assert [text.counted(n, "files of images") for n in (0, 1, 1000)] == [
        "0 files of images",
        "1 file of images",
        "1000 files of images",
    ]
    assert text.counted(1, "faces without") == "1 face without"
    assert text.counted(1, "class folders linked to others") == "1 class folder linked to others"


def test_probability_never_rounds_to_one() -> None:
    assert [text.probability(p) for p in (0.9999, 0.5, 0.0123, 1e-9)] == [">0.999", "0.50", "0.012", "<0.001"]
    # On which side of 0.99, the usual threshold, a search ended.
    assert [text.probability(p) for p in (0.9872, 0.9904)] == ["0.987", "0.990"]
    assert [text.probability(p) for p in (None, math.nan)] == ["–", "–"]


def test_number_has_three_digits_and_no_exponent_where_it_is_large() -> None:
    values = (12345.6, 999.7, 123.4, 0.012345, -1234.0, math.nan, math.inf, None)
    assert [text.number(v) for v in values] == ["12,346", "1,000", "123", "0.0123", "-1,234", "–", "–", "–"]


def test_listed_joins_words() -> None:
    assert [text.listed("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_short_names_stay_distinct() -> None:
    assert text.short_names(["cat", "automobile_red", "automobile_blue"], 8) == ["cat", "auto…red", "auto…lue"]
    names = ["a" * 20 + letter + "z" * 20 for letter in "xyz"]
    short = text.short_names(names, 9)
    assert len(set(short)) == 3 and max(map(len, short)) <= 9

"""The census's report says what the figures say, escapes whatever came from disk, and asks nothing of any network."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from p2pcluster.examples.census import report
from p2pcluster.examples.census.store import Figures, Function, Package, Unparsed

FIGURES = Figures(
    totals={"files": 1790, "unparsed": 1, "lines": 858237, "functions": 10, "classes": 2, "documented": 3},
    duration_s=12.34,
    longest=[Function("Parser.parse", "re/_parser.py", 516, 386, 7, 5), Function("f", "a.py", 1, 2, 0, 1)],
    function_counts={1: 2, 2: 4, 7: 3, 386: 1},
    packages=[Package("", 8, 2), Package("re", 4, 1)],
    unparsed=[Unparsed("test/bad.py", "SyntaxError: invalid syntax (line 1)")],
)


def shown(figures: Figures = FIGURES, root: str = "/lib/python3") -> str:
    return report.page(figures, "3.11.7", root)


class Outline(HTMLParser):
    """What a browser would make of a page: the elements that are open, the names of all, and the text."""

    VOID = frozenset({"meta"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def drawings(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


def bar_widths(drawing: ElementTree.Element) -> list[float]:
    return [float(bar.attrib["width"]) for bar in drawing.iter("rect") if bar.attrib["class"] == "bar"]


def test_the_table_names_the_totals_and_the_time() -> None:
    assert report.table(FIGURES, "3.11.7", "/lib/python3").splitlines() == [
        "Census of the Python 3.11.7 source in /lib/python3",
        "  files            1,790",
        "  lines          858,237",
        "  functions           10",
        "  classes              2",
        "  did not parse        1",
        "  time taken      12.3 s",
    ]


def test_a_long_time_is_told_in_minutes() -> None:
    assert "2 min 5 s" in report.table(FIGURES._replace(duration_s=125.9), "3.11.7", "/lib")


def test_the_page_is_one_well_formed_document_with_three_drawings() -> None:
    page = shown()
    assert Outline(page).open == []
    assert page.startswith("<!doctype html>")
    assert len(drawings(page)) == 3


def test_the_page_shows_the_totals_the_findings_and_the_files_that_do_not_parse() -> None:
    text = Outline(shown()).text
    for finding in (
        "1,790",
        "858,237",
        "12.3 s",
        "Half of the functions have at most 2 lines",
        "Nine in ten functions have at most 7 lines",
        "The longest function has 386 lines",
        "Parser.parse",
        "re/_parser.py:516",
        "5 arguments, 7 levels deep",
        "25.0 % of the definitions have a docstring",
        "top-level modules",
        "1 file does not parse",
        "SyntaxError: invalid syntax (line 1)",
    ):
        assert finding in text


def test_lengths_fall_into_bins_that_double_and_leave_no_gap() -> None:
    assert report.binned({1: 2, 2: 4, 3: 1, 4: 1, 5: 10, 33: 7}) == [
        (1, 1, 2), (2, 2, 4), (3, 4, 2), (5, 8, 10), (9, 16, 0), (17, 32, 0), (33, 64, 7),
    ]  # fmt: skip


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    _, longest, packages = drawings(shown())
    first, second = bar_widths(longest)
    assert second / first == pytest.approx(2 / 386, rel=0.02)
    assert bar_widths(packages)[0] == pytest.approx(bar_widths(packages)[1], abs=0.1)  # 2 of 8 and 1 of 4


def test_packages_beyond_the_largest_share_one_bar() -> None:
    packages = [Package(f"p{index:03}", 1000 - index, 0) for index in range(40)]
    text = Outline(shown(FIGURES._replace(packages=packages))).text
    assert "p023" in text
    assert "p024" not in text
    assert "16 smaller" in text


def test_names_from_disk_and_source_stay_text() -> None:
    evil = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"
    figures = FIGURES._replace(
        longest=[Function(evil, evil, 1, 2, 0, 1)],
        packages=[Package(evil, 2, 1), Package("<img src=x>", 1, 1)],
        unparsed=[Unparsed(evil, evil)],
    )
    outline = Outline(shown(figures, root=evil))
    assert not outline.tags & {"script", "img"}
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert outline.open == []
    assert outline.text.count(evil) >= 4  # the root, the longest function's title, the file and its problem
    assert len(drawings(shown(figures))) == 3


def test_the_page_asks_for_nothing_and_forbids_asking() -> None:
    page = shown()
    assert not re.search(r"https?:|//|\burl\(|@import|\b(src|href)=", page)
    assert "default-src 'none'" in page


def test_the_page_is_readable_in_light_and_dark() -> None:
    assert "prefers-color-scheme: dark" in shown()


def test_a_census_without_functions_and_without_faults_is_a_page_too() -> None:
    nothing = Figures(
        totals={"files": 1, "unparsed": 0, "lines": 0, "functions": 0, "classes": 0, "documented": 0},
        duration_s=0.0,
        longest=[],
        function_counts={},
        packages=[],
        unparsed=[],
    )
    outline = Outline(shown(nothing))
    assert outline.open == []
    assert "There is no function." in outline.text
    assert "Every file parses" in outline.text

"""The report as a file: nothing in it is run or fetched, everything given is in it, the same input gives it again."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from helpsteer_assets.report import render
from helpsteer_assets.report.figures import inline_figure
from helpsteer_assets_tests.browser.report_data import HOSTILE, SCRIPT, hostile_data, report_data

VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """The elements of a page in order, their texts, and whether every one was closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.text.append(data)

    def values(self, attribute: str) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get(attribute)) is not None]


@pytest.fixture(scope="module")
def html() -> str:
    return render(report_data())


@pytest.fixture(scope="module")
def hostile() -> str:
    return render(hostile_data())


def test_every_element_is_closed_and_ids_are_unique_and_exist(html: str, hostile: str) -> None:
    for text in (html, hostile, render(report_data(weights=("0.5",)) | {"tables": []})):
        page = Page(text)
        assert page.open == []
        ids = page.values("id")
        assert len(ids) == len(set(ids)) > 20
        wanted = {name for value in page.values("aria-labelledby") for name in value.split()} | set(page.values("for"))
        wanted |= {value[1:] for value in page.values("href") if len(value) > 1 and value.startswith("#")}
        wanted |= {name for value in page.values("clip-path") for name in re.findall(r"#([^)]+)", value)}
        assert len(wanted) > 10
        assert wanted <= set(ids)


def test_the_page_allows_its_own_script_alone_and_fetches_nothing(html: str) -> None:
    page = Page(html)
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert [attributes.get("type") for attributes in scripts] == ["application/json", None]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert policy.split("; ")[:4] == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
    ]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not page.values("src")
    assert all(value.startswith(("#", "data:")) for value in page.values("href"))
    assert not re.search(r"url\((?!#)|@import", html)


def test_hostile_text_makes_no_element_and_comes_back_as_it_was(hostile: str) -> None:
    page = Page(hostile)
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert not any(tag in ("img", "b") and attributes for tag, attributes in page.elements)
    assert sum(SCRIPT in text for text in page.text) >= 6
    payload = page.scripts[0]
    assert not re.search("[<>&\u2028\u2029\x00-\x1f\ud800-\udfff]", payload), "it would end the script element"
    read = json.loads(payload, parse_constant=pytest.fail)
    assert {prompt[0]: prompt[1] for prompt in read["prompts"]} == HOSTILE
    assert [response[0] for response in read["prompts"][0][3]] == [HOSTILE["script"]] * 4
    assert read["prompts"][0][3][0][5] == [None] * 5, "missing scores"
    hostile.encode("utf-8")


def test_scores_of_a_response_stand_in_the_order_of_the_measures(html: str) -> None:
    read = json.loads(Page(html).scripts[0])
    titles = [measure["title"] for measure in read["measures"]]
    assert titles == ["rated helpfulness", "margin", "length", "KL to SFT", "capped"]
    assert read["prompts"][0][3][2][5] == [2.5, -0.16667, 40.0, None, None]
    assert render(report_data()) == html, "the same input gives the same bytes"


def test_an_svg_brings_neither_script_nor_address() -> None:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9" '
        'width="9" height="9">'
        '<script>attack()</script><foreignObject/><g onclick="attack()"><use xlink:href="https://example.org#a"/></g>'
        '<image href="https://example.org/a.png"/><path id="a" d="M 0 0"/><use xlink:href="#a"/></svg>'
    )
    kept = str(inline_figure({"id": "x y", "title": "<t>", "caption": "", "svg": svg}, [])["svg"])
    assert "attack" not in kept and "example" not in kept and "image" not in kept and "foreign" not in kept
    assert '<path id="x-y-a"' in kept and 'href="#x-y-a"' in kept
    assert "&lt;t&gt;" in kept and 'role="img"' in kept

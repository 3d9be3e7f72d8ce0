"""The report in a browser: every control, by mouse and by keyboard, on a laptop and a phone, light and dark."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from helpsteer_assets.report import render
from helpsteer_assets_tests.browser.report_data import HOSTILE, SCRIPT, hostile_data, report_data

LAPTOP = {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for name, data in (("report", report_data()), ("hostile", hostile_data())):
        (folder / f"{name}.html").write_text(render(data), encoding="utf-8")
    return folder


@pytest.fixture
def problems(page: Page) -> Iterator[list[str]]:
    """What went wrong on the page: messages of the console, errors, requests; a test that ends with any fails."""
    problems: list[str] = []
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("request", lambda request: None if request.is_navigation_request() else problems.append(request.url))
    yield problems
    assert [problem for problem in problems if not problem.startswith("data:")] == []


@pytest.fixture
def open_report(page: Page, folder: Path, problems: list[str]) -> Callable[..., Page]:
    page.set_viewport_size(LAPTOP)  # type: ignore[arg-type]

    def opened(name: str = "report", fragment: str = "") -> Page:
        page.goto(f"{(folder / name).with_suffix('.html').as_uri()}{fragment}")
        return page

    return opened


@pytest.fixture
def report(open_report: Callable[..., Page]) -> Page:
    return open_report()


def position(page: Page) -> Locator:
    return page.locator("#position")


def column(page: Page, number: int) -> list[str]:
    """What the cells of a column of the score table show, from top to bottom."""
    return page.locator(f"#score-table tbody tr > :nth-child({number}) b:visible").all_inner_texts()


def row_names(page: Page) -> list[str]:
    return page.locator("#score-table tbody th").all_inner_texts()


def cards(page: Page) -> list[str]:
    return [str(card.get_attribute("aria-label")) for card in page.locator(".response").all()]


def option(page: Page) -> Locator:
    """The selected row of the list of prompts."""
    return page.locator("#prompts [aria-selected=true]")


def test_a_point_tells_its_numbers_to_the_mouse_and_to_the_keyboard(report: Page) -> None:
    tip, point = report.locator("#tip"), report.locator("#front .point[data-policy='w=0.5']")
    point.locator("use").hover()
    expect(tip).to_contain_text("w=0.5")
    expect(tip).to_contain_text("rated helpfulness: 2.5 [2.4, 2.6]")
    report.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    point.focus()
    expect(tip).to_be_visible()
    report.keyboard.press("Tab")
    expect(tip).to_contain_text("w=0.9")
    report.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_a_heading_sorts_down_and_up_and_says_so(report: Page) -> None:
    header = report.locator("#score-table thead tr:nth-child(2) th:nth-child(2)")
    button = header.get_by_role("button")
    assert row_names(report) == ["SFT", "w=0.1", "w=0.5", "w=0.9"]
    button.click()
    expect(header).to_have_attribute("aria-sort", "descending")
    assert column(report, 2) == ["2.90", "2.50", "2.10", "2.00"]
    button.click()
    expect(header).to_have_attribute("aria-sort", "ascending")
    assert column(report, 2) == ["2.00", "2.10", "2.50", "2.90"]
    report.get_by_role("button", name="Policy").click()
    expect(header).to_have_attribute("aria-sort", "none")
    assert row_names(report) == ["SFT", "w=0.1", "w=0.5", "w=0.9"]


def test_columns_show_means_or_differences_and_groups_of_measures_can_be_put_away(report: Page) -> None:
    report.get_by_role("radio", name="difference to SFT").check()
    assert column(report, 2) == ["0", "\u22120.20", "+0.20", "+0.60"]
    report.locator("#score-table thead tr:nth-child(2) th:nth-child(2) button").click()
    assert row_names(report) == ["w=0.9", "w=0.5", "w=0.1", "SFT"]
    report.get_by_role("radio", name="mean [interval]").check()
    assert column(report, 2) == ["2.90", "2.50", "2.10", "2.00"]
    choice = report.get_by_role("checkbox", name="Diagnostics")
    choice.uncheck()
    expect(report.get_by_role("columnheader", name="Diagnostics")).to_be_hidden()
    assert column(report, 6) == []
    choice.check()
    assert len(column(report, 6)) == 4
    table = report.locator("#tables table")
    for expected in (["0.750", "0.610", "\u2013"], ["0.610", "0.750", "\u2013"]):  # what is missing comes last
        table.get_by_role("button", name="accuracy").click()
        assert table.locator("tbody td:nth-child(3)").all_inner_texts() == expected


def test_arrows_buttons_and_rows_choose_a_prompt(report: Page) -> None:
    prompts = report.get_by_role("listbox", name="Prompts")
    prompts.focus()
    for key, place in (("ArrowDown", 2), ("ArrowDown", 3), ("ArrowUp", 2), ("End", 12), ("ArrowDown", 12), ("Home", 1)):
        report.keyboard.press(key)
        expect(position(report)).to_have_text(f"{place} of 12")
        expect(option(report)).to_have_text(f"Question {place - 1}: how?")
        expect(option(report)).to_be_in_viewport()
        expect(prompts).to_have_attribute("aria-activedescendant", f"option-{place - 1}")
    report.keyboard.press("ArrowRight")
    expect(position(report)).to_have_text("2 of 12")
    expect(report.locator("#prompt")).to_contain_text("the models saw only its end")
    report.locator("#search").focus()
    report.keyboard.press("ArrowRight")
    expect(position(report)).to_have_text("2 of 12")
    report.locator("#previous").click()
    expect(report.locator("#prompt")).to_contain_text("Question 0: how?")
    expect(report.locator("#previous")).to_be_disabled()
    report.locator(".option").nth(11).click()
    expect(position(report)).to_have_text("12 of 12")
    expect(report.locator("#next")).to_be_disabled()


def test_every_policys_answer_stands_with_its_scores_and_their_difference(report: Page) -> None:
    assert cards(report) == ["SFT", "w=0.1", "w=0.5", "w=0.9"]
    rows = report.locator(".response.p2 tr").all_inner_texts()
    assert [row.split("\t") for row in rows] == [
        ["rated helpfulness", "2.50", "+0.50"],
        ["margin", "\u22120.17", "\u22120.17"],
        ["length", "40", "0"],
    ]
    assert report.locator(".response.p0 tr").first.inner_text().split("\t") == ["rated helpfulness", "2", ""]
    expect(report.locator(".response.p2 caption")).to_have_text("difference to SFT on the right")
    expect(report.locator(".response.p0 caption")).to_have_count(0)


def test_filters_show_the_prompts_they_name_with_counts(report: Page) -> None:
    def chosen(name: str) -> list[str]:
        report.get_by_role("radio", name=name).check()
        return report.locator(".option > span").all_inner_texts()

    labels = [" ".join(text.split()) for text in report.locator("label:has(input[name=filter])").all_inner_texts()]
    assert labels == ["all (12)", "capped (1)", "most changed (12)", "rater and margin disagree (3)"]
    assert chosen("capped") == ["Question 3: how?"]
    expect(report.locator(".response.p3 .flag")).to_have_text("cut at the length limit")
    assert chosen("rater and margin disagree") == [f"Question {n}: how?" for n in (0, 5, 10)]
    expect(report.locator(".response.p3 .flag")).to_have_text("rater and margin disagree")
    assert len(chosen("most changed")) == 12
    shares = [int(text.split("%")[0]) for text in report.locator(".option small").all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] > 0
    assert len(chosen("all")) == 12
    # Policies that are put away do not count; the last one stays.
    report.get_by_role("checkbox", name="w=0.9").uncheck()
    assert cards(report) == ["SFT", "w=0.1", "w=0.5"]
    expect(report.locator("label:has(input[value=capped])")).to_have_text("capped (0)")
    for label in ("SFT", "w=0.1"):
        report.get_by_role("checkbox", name=label, exact=True).uncheck()
    expect(report.get_by_role("checkbox", name="w=0.5", exact=True)).to_be_disabled()
    assert chosen("capped") == [] == cards(report)
    expect(report.locator("#found")).to_contain_text("No prompt matches")


def test_words_that_differ_are_marked_against_the_chosen_policy(report: Page) -> None:
    def texts(policy: int, tag: str) -> list[str]:
        return report.locator(f".response.p{policy} {tag}").all_inner_texts()

    assert texts(2, "ins") and not texts(2, "del") and not texts(0, "ins")
    report.get_by_role("checkbox", name="missing words").check()
    assert texts(2, "del")
    report.get_by_role("checkbox", name="new words").uncheck()
    assert not texts(2, "ins") and texts(2, "del")
    report.get_by_role("checkbox", name="missing words").uncheck()
    assert not texts(2, "ins") and not texts(2, "del")
    report.get_by_role("checkbox", name="new words").check()
    report.get_by_label("Compare with").select_option("w=0.5")
    assert texts(0, "ins") and not texts(2, "ins")


def test_the_address_follows_the_choice_and_leads_back_to_it(report: Page) -> None:
    report.get_by_role("radio", name="rater and margin disagree").check()
    report.locator("#next").click()
    report.get_by_role("checkbox", name="w=0.1").uncheck()
    address = report.url
    assert "#prompt=p5&filter=disagreement&policies=" in address
    report.goto("about:blank")
    report.goto(address)
    expect(position(report)).to_have_text("2 of 3")
    expect(report.locator("#browser-heading")).to_be_in_viewport()
    assert cards(report) == ["SFT", "w=0.5", "w=0.9"]
    report.evaluate("location.hash = '#prompt=p4&filter=capped&q=question&reference=w%3D0.5'")
    expect(report.locator("#prompt")).to_contain_text("Question 4")
    expect(report.get_by_role("radio", name="all")).to_be_checked()  # the filter would hide it
    expect(report.get_by_label("Compare with")).to_have_value("2")
    report.get_by_role("navigation").get_by_role("link").first.click()
    expect(report.locator("#prompt")).to_contain_text("Question 4")


def test_hostile_texts_are_shown_and_scripts_in_them_not_run(open_report: Callable[..., Page]) -> None:
    page = open_report("hostile")
    expect(page.locator("h1")).to_contain_text(SCRIPT)
    control = {"nul": "before\u2400after\u240bmore\x7f", "separators": "a\u2028b\u2029c\u240d\nd\u240de"}
    empty = {"empty": "(empty response)", "white space": "(only white space) \n\t "}
    for name, text in HOSTILE.items():
        page.evaluate("id => { location.hash = new URLSearchParams({ prompt: id }) }", name)
        expect(page.locator("#prompt h3")).to_contain_text(f"Prompt {name}")
        assert page.locator(".response.p1 .text").text_content() == (control | empty).get(name, text)
        assert page.evaluate("window.attacked") is None
        assert page.locator("main img, main script").count() == 0

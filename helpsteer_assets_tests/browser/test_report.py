"""The report in a browser: every control, by mouse and by keyboard, on a laptop and a phone, light and dark."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from helpsteer_assets.report import render
from helpsteer_assets_tests.browser.report_data import HOSTILE, SCRIPT, hostile_data, report_data

PHONE = {"width": 375, "height": 800}
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


def overflow(page: Page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_system_and_its_button_is_remembered(report: Page, scheme: str) -> None:
    def brightness() -> int:
        return report.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")

    report.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    light, other = scheme == "light", "Dark" if scheme == "light" else "Light"
    button = report.get_by_role("button", name=f"Change to {other.lower()} colours")
    assert (brightness() > 128) == light
    expect(button).to_have_text(other)
    fill = "getComputedStyle(document.querySelector('#front svg text')).fill"
    before = report.evaluate(fill)
    button.click()
    assert (brightness() > 128) != light
    assert report.evaluate(fill) != before, "the letters of a figure"
    report.reload()
    assert (brightness() > 128) != light
    report.get_by_role("button", name=f"Change to {scheme} colours").click()
    assert (brightness() > 128) == light


@pytest.mark.parametrize("size", [PHONE, LAPTOP], ids=["phone", "laptop"])
def test_the_page_does_not_scroll_sideways(open_report: Callable[..., Page], size: dict[str, int]) -> None:
    page = open_report("hostile")
    page.set_viewport_size(size)  # type: ignore[arg-type]
    page.locator("#removed").check()
    for _ in range(len(HOSTILE)):
        assert overflow(page) == 0
        page.keyboard.press("ArrowRight")
    box = page.locator("#scores .box")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth") == (size is PHONE)


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


def test_the_keyboard_alone_reaches_and_sorts_the_score_table(report: Page) -> None:
    report.keyboard.press("Tab")
    expect(report.get_by_role("link", name="Skip to the content")).to_be_focused()
    report.keyboard.press("Enter")
    for _ in range(40):
        report.keyboard.press("Tab")
        if report.evaluate("document.activeElement.textContent.startsWith('rated helpfulness')"):
            break
    outline = report.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    report.keyboard.press("Enter")
    assert column(report, 2) == ["2.90", "2.50", "2.10", "2.00"]


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


def test_search_finds_words_of_prompts_and_of_responses(report: Page) -> None:
    report.locator("#search").fill("QUESTION 11")
    expect(report.locator("#found")).to_have_text("1 of 12 prompts")
    expect(report.locator("#prompt")).to_contain_text("Question 11")
    word = report.locator(".response.p0 .text").inner_text().split()[0]
    report.locator("#search").fill(word)
    expect(report.locator(".option")).not_to_have_count(1)
    report.locator("#search").fill("")
    expect(report.locator(".option")).to_have_count(12)


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


MARKS = [  # reference, response, the response with its marks: {+new+} and [-missing-]
    ("a b c", "a x c", "a [-b-] {+x+} c"),
    ("", "a b", "{+a b+}"),
    ("a b", "", "(empty response)[-a b-] "),
    ("a b c d", "b d e", "[-a-] b [-c-] d {+e+}"),
    ("one, two.", "one; two.", "one [-,-]{+;+} two."),
    ("the cat", "The cat", "[-the-] {+The+} cat"),
    ("\u6211\u5011\u559d\u6c34", "\u6211\u559d\u8336", "\u6211 [-\u5011-]\u559d [-\u6c34-]{+\u8336+}"),
    ("1 2 3 4 x 5 6 7 8", "a b c d x e f g h", "[-1 2 3 4 x 5 6 7 8-] {+a b c d x e f g h+}"),
]


def test_marks_stand_where_words_differ(open_report: Callable[..., Page], folder: Path) -> None:
    data = report_data(prompts=len(MARKS), weights=("0.5",))
    for prompt, (reference, text, _) in zip(data["prompts"], MARKS, strict=True):
        for response, its_text in zip(prompt["responses"], (reference, text), strict=True):
            response["text"] = its_text
    (folder / "marks.html").write_text(render(data), encoding="utf-8")
    page = open_report("marks")
    page.get_by_role("checkbox", name="missing words").check()
    for number, (_, _, shown) in enumerate(MARKS):
        page.locator(".option").nth(number).click()
        marked = page.locator(".response.p1 .text").evaluate(
            """text => [...text.childNodes].map(node => node.nodeName === "INS" ? `{+${node.textContent}+}`
            : node.nodeName === "DEL" ? `[-${node.textContent}-]` : node.textContent).join("")"""
        )
        assert marked == shown


def test_texts_of_thousands_of_other_words_are_compared_by_their_vocabulary(
    open_report: Callable[..., Page], folder: Path
) -> None:
    data = report_data(prompts=1, weights=("0.5",))
    data["prompts"][0]["responses"][0]["text"] = " ".join(f"a{n}" for n in range(5000)) + " same"
    data["prompts"][0]["responses"][1]["text"] = "same " + " ".join(f"b{n}" for n in range(5000))
    (folder / "different.html").write_text(render(data), encoding="utf-8")
    card = open_report("different").locator(".response.p1")
    expect(card.locator(".flag").last).to_have_text("very different: words that SFT never uses are marked")
    expect(card.locator("ins")).to_have_count(1)
    assert card.locator("ins").inner_text().startswith("b0 b1 ")


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


@pytest.mark.parametrize(
    "fragment",
    ["#prompt=nobody&filter=nothing&policies=w%3D7&reference=x", "#filter=constructor", "#prompt=%E0%"],
)
def test_a_link_to_what_is_not_there_opens_the_first_prompt(open_report: Callable[..., Page], fragment: str) -> None:
    page = open_report("report", fragment)
    expect(position(page)).to_have_text("1 of 12")
    assert len(cards(page)) == 4


def test_a_card_of_a_weight_leads_to_its_answers_beside_those_of_sft(report: Page) -> None:
    report.locator(".card.p2 a").click()
    assert cards(report) == ["SFT", "w=0.5"]
    expect(report.get_by_role("listbox")).to_be_focused()
    report.keyboard.press("ArrowDown")
    expect(position(report)).to_have_text("2 of 12")


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


def test_the_page_can_be_read_without_scripts(browser: Browser, folder: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((folder / "report.html").as_uri())
    assert page.locator("#scores").inner_text().count("2.50") >= 1
    assert page.locator("#theme").is_hidden()
    context.close()


def test_print_leaves_out_what_only_a_screen_can_do(report: Page) -> None:
    report.set_viewport_size({"width": 700, "height": 1000})
    report.emulate_media(media="print", color_scheme="dark")
    assert overflow(report) == 0
    for hidden in (".bar", "#search", "#next"):
        assert report.locator(hidden).is_hidden()
    assert report.locator("#score-table").is_visible()
    assert report.evaluate("getComputedStyle(document.body).color") == "rgb(31, 41, 51)"

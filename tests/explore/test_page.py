"""The page in a browser: it opens fast, from a file, without the network, and is used with mouse and keyboard."""

import shutil

import pytest

from speechllm.explore.report import ExploreOptions, write_report
from speechllm.scoring import Transcript
from tests.explore.test_report import results, write_manifest, write_recogs

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'speechllm[test]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

MANY = 10_000


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # without a sandbox: containers have none to give
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--mute-audio"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens a page; what it complains of, or asks of the network, fails the test."""
    complaints, pages = [], []

    def open_page(folder):
        page = browser.new_page(viewport={"width": 1200, "height": 700})
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: None if request.url.startswith("file:") else complaints.append(request.url))
        # what the page's thread computes, however busy the machine is
        page.metrics = page.context.new_cdp_session(page)
        page.metrics.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto((folder / "index.html").as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert [complaint for complaint in complaints if not complaint.startswith("data:")] == []


def rows(page):
    return page.locator("#rows .row")


def test_ten_thousand_utterances_open_in_two_seconds(tmp_path, opened):
    recogs = write_recogs(tmp_path / "exp" / "recogs-x.txt", results(MANY))
    write_report([recogs], tmp_path / "page", ExploreOptions())
    page = opened(tmp_path / "page")
    page.keyboard.press("2")
    rows(page).first.wait_for()
    metrics = {m["name"]: m["value"] for m in page.metrics.send("Performance.getMetrics")["metrics"]}
    assert 0 < metrics["TaskDuration"] < 2
    assert rows(page).count() < 60
    assert page.locator("#count").inner_text() == f"{MANY} of {MANY}"
    page.keyboard.press("End")
    assert page.locator("#rows .row[aria-selected=true]").count() == 1
    assert rows(page).count() < 60


def test_sorting_filters_and_keys(tmp_path, opened):
    found = [
        Transcript("a", "one two three", "one two three"),
        Transcript("b", "one two", "<i>x</i> y z"),
        Transcript("c", "one two three four", "one too three four"),
    ]
    other = [Transcript(r.id, r.ref, r.ref) for r in found]
    write_report(
        [write_recogs(tmp_path / "first" / "recogs-x.txt", found)],
        tmp_path / "page",
        ExploreOptions(compare_with=[write_recogs(tmp_path / "second" / "recogs-x.txt", other)]),
    )
    page = opened(tmp_path / "page")
    assert "matched pairs" in page.locator("#overview pre").inner_text()
    page.keyboard.press("2")
    ids = lambda: [row.locator("span").first.inner_text() for row in rows(page).all()]  # noqa: E731
    assert ids() == ["b", "c", "a"]  # most errors first
    page.get_by_role("button", name="id").click()
    assert ids() == ["a", "b", "c"]
    page.locator("#list").focus()
    assert page.locator("#detail h2").first.inner_text() == "b"  # still the same one
    page.keyboard.press("k")
    page.keyboard.press("j")
    assert page.locator("#detail h2").first.inner_text() == "b"
    assert page.locator("#detail .pair").first.inner_text().split() == ["one", "<i>x</i>"]  # no markup
    assert page.locator("#detail i").count() == 0
    page.keyboard.press("3")
    page.locator("#errors tr.link", has_text="too").click()
    assert ids() == ["c"]
    assert page.locator("#detail .pair.sub.found").inner_text().split() == ["two", "too"]
    page.keyboard.press("Escape")
    assert len(ids()) == 3
    page.keyboard.press("/")
    page.keyboard.type("FOUR")
    assert ids() == ["c"]
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_data_of_a_manifest_and_its_audio(tmp_path, opened):
    manifest = write_manifest(tmp_path / "m.jsonl", results(5))
    write_report([manifest], tmp_path / "page", ExploreOptions())
    page = opened(tmp_path / "page")
    assert page.locator("#tabs button").all_inner_texts() == ["data", "utterances"]
    page.locator("#data tr.link", has_text="de").first.click()
    assert 0 < rows(page).count() < 5
    page.locator("#list").focus()
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('audio').currentTime > 0.05")
    page.keyboard.press("Space")
    assert page.evaluate("document.querySelector('audio').paused")

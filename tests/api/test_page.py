"""The live page in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.api.conftest import SLOW, Server, end_all, starter_of
from tests.api.test_security import key
from tests.conftest import unavailable

#: Where screenshots go, for people to look at; nowhere unless it is set.
SHOTS = os.environ.get("PROMPTMILL_SCREENSHOTS")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        if chromium is None and not Path(playwright.chromium.executable_path).exists():
            unavailable("no Chromium: install it, or run 'playwright install chromium'")
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, redis_server: str) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("site")
    starter = starter_of(folder, f"sqlite:///{folder / 'jobs.sqlite'}", redis_server)
    try:
        starter.worker("echo", SLOW)
        yield starter.server()
    finally:
        end_all(starter.started)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    made = context.new_page()
    problems: list[str] = []
    made.on("pageerror", lambda problem: problems.append(str(problem)))
    made.on("console", lambda said: problems.append(said.text) if "Content Security Policy" in said.text else None)
    yield made
    context.close()
    assert problems == []


def shot(page: Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def dataset(folder: Path, rows: int, words: int = 3) -> str:
    path = folder / "prompts.jsonl"
    text = " ".join(["word"] * words)
    path.write_text("\n".join(json.dumps({"prompt": f"{row} <b>bold</b> {text}"}) for row in range(rows)))
    return str(path)


def submit(page: Page, site: Server, file: str, **fields: str) -> None:
    page.goto(site.url)
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.set_input_files("#file", file)
    page.click("button.primary")


def test_a_dataset_is_submitted_and_watched_to_its_end(page: Page, site: Server, tmp_path: Path) -> None:
    submit(page, site, dataset(tmp_path, 400, 12), model=SLOW, name="watched")
    expect(page.locator("h1")).to_have_text("watched")
    expect(page.locator("#job .state")).to_have_text("running", timeout=30_000)
    expect(page.locator("#plot-throughput canvas")).to_be_visible(timeout=30_000)
    shot(page, "running")
    expect(page.locator("#job .state")).to_have_text("completed", timeout=90_000)
    expect(page.locator("#plot-latency canvas")).to_be_visible()
    # What a client sent is text, not HTML.
    assert page.locator("td.text b").count() == 0
    assert "<b>bold</b>" in page.locator("td.text").first.inner_text()
    page.wait_for_timeout(2500)
    shot(page, "completed")
    page.click("#to-report")
    expect(page.locator("h1")).to_be_visible()
    assert "report" in page.url
    shot(page, "report")
    page.goto(site.url)
    expect(page.locator("#jobs")).to_contain_text("watched")
    shot(page, "jobs")


def test_a_job_is_paused_resumed_and_cancelled(page: Page, site: Server, tmp_path: Path) -> None:
    submit(page, site, dataset(tmp_path, 3000, 60), model=SLOW, name="long")
    page.click("#pause")
    expect(page.locator("#job .state")).to_have_text("paused", timeout=15_000)
    page.click("#resume")
    expect(page.locator("#cancel")).to_be_visible()
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#cancel")
    expect(page.locator("#job .state")).to_have_text("cancelled", timeout=15_000)
    expect(page.locator("#cancel")).to_have_count(0)
    shot(page, "cancelled")


TASK = """\
task: dropped
prompt:
  user: "{{ input.text }}"
expected:
  label: label
output:
  extract: {label: whole}
scores:
  - exact: label
"""


def drop(page: Page, *files: Path) -> None:
    """Files from outside over the form and let go, as the browser itself is told of them."""
    page.locator("#drop").scroll_into_view_if_needed()
    box = page.locator("#drop span").bounding_box()
    assert box is not None
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(each) for each in files], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "data": data, **place})
    session.detach()


def test_a_dataset_and_its_task_are_dropped_and_scored(page: Page, site: Server, tmp_path: Path) -> None:
    data, task = tmp_path / "dropped.jsonl", tmp_path / "dropped.task.yaml"
    lines = [{"text": "ham", "label": "ham" if row < 9 else "spam"} for row in range(12)]
    data.write_text("\n".join(map(json.dumps, lines)))
    task.write_text(TASK)
    page.goto(site.url)
    page.fill("#model", "echo")
    page.fill("#name", "dropped")
    drop(page, data, task)
    expect(page.locator("#task")).to_have_value(TASK)
    assert page.evaluate("document.getElementById('file').files[0].name") == "dropped.jsonl"
    shot(page, "dropped")
    page.click("button.primary")
    expect(page.locator("h1")).to_have_text("dropped", timeout=30_000)
    expect(page.locator("#job .state")).to_have_text("completed", timeout=60_000)
    job_id = page.url.rpartition("/")[2]
    # Nine of twelve are what was expected.
    report = site.get(f"/v1/jobs/{job_id}/report")
    assert report["scores"]["label"]["value"] == 0.75
    page.click("#to-report")
    expect(page.locator("body")).to_contain_text(re.compile(r"0\.75|75(\.0+)?\s*%"))


def test_a_bad_dataset_is_told_beside_the_form_and_what_was_typed_stays(
    page: Page, site: Server, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 1}\n')
    submit(page, site, str(bad), model="echo", name="kept")
    expect(page.locator(".note.bad[role=alert]").last).to_contain_text("bad.jsonl:1")
    expect(page.locator("#name")).to_have_value("kept")
    # In words of the form, which has a place for what they advise.
    told = page.locator(".note.bad[role=alert]").last.inner_text()
    label = page.locator("label", has=page.locator("#skip_invalid")).inner_text()
    assert "tick 'Keep bad lines as errors'" in told
    assert label.startswith("Keep bad lines as errors")
    assert not re.search(r"skip_invalid|failed=true|--", told)
    shot(page, "refused")
    # The address of the answer can be loaded too.
    page.goto(f"{site.url}/jobs")
    assert page.url == f"{site.url}/"
    bad.write_text('{"prompt": 1}\n{"prompt": "fine"}\n')
    page.fill("#model", "echo")
    page.set_input_files("#file", str(bad))
    page.check("#skip_invalid")
    page.click("button.primary")
    expect(page.locator("#job .state")).to_have_text("completed", timeout=30_000)
    expect(page.locator("#job dd.bad")).to_have_text("1")


def test_words_are_whole_and_run_in_their_direction(page: Page, site: Server, tmp_path: Path) -> None:
    file = tmp_path / "turned.jsonl"
    file.write_text(json.dumps({"prompt": "left \u202e right of it all", "max_tokens": 3}))
    submit(page, site, str(file), model="echo", name="turned")
    expect(page.locator("#job .state")).to_have_text("completed", timeout=30_000)
    page.reload()
    cut = page.locator("#answers .dim", has_text="(cut off)")
    places = """node => [0, 8].map(at => {
        const range = document.createRange();
        range.setStart(node.firstChild, at);
        range.setEnd(node.firstChild, at + 1);
        return range.getBoundingClientRect().x;
    })"""
    first, last = cut.evaluate(places)
    assert first < last
    # Just wide enough for the table, where its columns are narrowest.
    page.set_viewport_size({"width": 720, "height": 900})
    page.goto(site.url)
    for state in page.locator("#jobs .state").all():
        assert state.evaluate("node => node.getClientRects().length") == 1


def test_everything_is_reached_with_the_keyboard(page: Page, site: Server, tmp_path: Path) -> None:
    page.goto(site.url)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.set_input_files("#file", dataset(tmp_path, 5))
    page.focus("#name")
    page.keyboard.type("by keyboard")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("by keyboard")
    expect(page.locator("#job .state")).to_have_text("completed", timeout=30_000)
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"to-report", "to-results"} <= reached


def test_focus_stays_while_the_page_refreshes(page: Page, site: Server) -> None:
    page.goto(site.url)
    link = page.locator("#jobs a").first
    link.focus()
    focused = link.get_attribute("id")
    with page.expect_response("**/pages/jobs"):
        pass
    page.wait_for_timeout(300)
    assert page.evaluate("document.activeElement.id") == focused


def test_a_phone_shows_everything_without_sideways_scrolling(browser: Browser, site: Server) -> None:
    context = browser.new_context(viewport={"width": 375, "height": 740}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    page.goto(site.url)
    expect(page.locator("#jobs a").first).to_be_visible()
    for step in ("jobs", "job"):
        shot(page, f"phone-{step}")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 375, step
        if step == "jobs":
            page.locator("#jobs a").first.click()
            expect(page.locator("#job")).to_be_visible()
            page.wait_for_timeout(1500)
    context.close()


def test_an_unknown_job_and_an_absent_server_are_told(page: Page, site: Server) -> None:
    page.goto(f"{site.url}/jobs/none")
    expect(page.locator("h1")).to_have_text("No such job")
    page.goto(site.url)
    page.route("**/pages/**", lambda route: route.abort())
    expect(page.locator("#offline")).to_be_visible(timeout=10_000)
    shot(page, "offline")


def test_the_api_has_a_page(browser: Browser, page: Page, site: Server) -> None:
    page.goto(site.url)
    page.click("header nav >> text=API")
    expect(page.locator("h1")).to_have_text("API")
    with urllib.request.urlopen(f"{site.url}/openapi.json", timeout=30) as answer:
        document = json.load(answer)
    expect(page.locator("details.call")).to_have_count(sum(map(len, document["paths"].values())))
    chat = page.locator("details", has_text="POST /v1/chat/completions")
    chat.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(chat.locator("td", has_text="stream_options.include_usage")).to_be_visible()
    shot(page, "api")
    phone = browser.new_context(viewport={"width": 375, "height": 740}, color_scheme="dark")
    small = phone.new_page()
    small.goto(f"{site.url}/docs")
    small.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    shot(small, "phone-api")
    assert small.evaluate("document.documentElement.scrollWidth") <= 375
    phone.close()


def test_a_person_at_a_browser_is_told_of_errors_by_a_page(page: Page, site: Server) -> None:
    answer = page.goto(f"{site.url}/no/such/page")
    assert answer is not None
    assert answer.status == 404
    expect(page.locator("h1")).to_have_text("No such page")
    expect(page.locator("main")).to_contain_text("/no/such/page")


def test_a_login_is_asked_for_where_keys_are(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory, redis_server: str
) -> None:
    folder = tmp_path_factory.mktemp("login")
    starter = starter_of(folder, f"sqlite:///{folder / 'jobs.sqlite'}", redis_server)
    context: Any = browser.new_context()
    try:
        server = starter.server("--require-key")
        page = context.new_page()
        page.goto(f"{server.url}/")
        expect(page.locator("h1")).to_have_text("Log in")
        page.fill("#key", "wrong")
        page.click("button.primary")
        expect(page.locator(".note.bad[role=alert]").last).to_contain_text("unknown")
        shot(page, "login")
        page.fill("#key", key(server, "page"))
        page.click("button.primary")
        expect(page.locator("h1")).to_have_text("Jobs")
        expect(page.locator("#jobs")).to_contain_text("No job yet")
        expect(page.locator("#workers")).to_contain_text("No worker is alive")
        shot(page, "empty")
        (cookie,) = context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        page.click("text=Log out")
        expect(page.locator("h1")).to_have_text("Log in")
    finally:
        context.close()
        end_all(starter.started)

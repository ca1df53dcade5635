"""The demo as a visitor sees it: a browser loads the page that `coadvise demo` serves, and uploads pictures."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from tiny import OPINIONS, command

from coadvise.deploy.predict import load_from_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `coadvise demo` serves; afterwards Ctrl-C ends it, and nothing of what was uploaded is left."""
    uploads = tmp_path_factory.mktemp("uploads")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    demo = subprocess.Popen(
        command("demo", finished, "--port", str(port)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(uploads), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    too_long = Timer(900, demo.kill)
    too_long.start()
    try:
        assert demo.stdout is not None
        assert demo.stdout.readline().startswith("looked at 24 training pictures in ")
        assert demo.stdout.readline() == f"http://127.0.0.1:{port} (Ctrl-C stops it)\n"
        yield f"http://127.0.0.1:{port}"
        assert [*uploads.rglob("*.png")], "there was something to remove"
        demo.send_signal(signal.SIGINT)
        assert (*demo.communicate(), demo.returncode) == ("stopped\n", "", 0)
        assert not [*uploads.iterdir()]
    finally:
        demo.kill()
        too_long.cancel()


@pytest.fixture(params=[(1400, 900), (390, 844)], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Page]:
    """The page on two screens. Whatever the test does, no other host is asked, and the console has no error."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    hosts, faults = set[str](), list[str]()
    page.on("request", lambda asked: hosts.add(urlsplit(asked.url).netloc))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
    page.close()
    assert hosts - {""} == {urlsplit(address).netloc}, "'' is what the page itself holds"
    assert faults == []


def upload(page: Page, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)


def opinions(page: Page) -> Locator:
    return page.locator(".opinions .block")


def answers(page: Page) -> dict[str, dict[str, float]]:
    """Probabilities by opinion and class, as the page's bars have them."""
    expect(opinions(page)).to_have_count(len(OPINIONS))
    expect(page.locator(".opinions meter")).to_have_count(3 * len(OPINIONS))
    return {
        block.locator("label").inner_text().strip(): {
            bar.get_attribute("aria-label") or "": float(bar.get_attribute("value") or "nan")
            for bar in block.locator("meter").all()
        }
        for block in opinions(page).all()
    }


def predicted(run: Path, path: Path) -> dict[str, dict[str, float]]:
    return {
        title: pytest.approx(load_from_run(run, part).predict(path, answer)[0].probabilities, abs=1e-6)
        for title, (part, answer) in OPINIONS.items()
    }


def test_a_picture_gets_every_opinion_maps_and_its_neighbours(page: Page, finished: Path, tiny_images: Path) -> None:
    path = tiny_images / "train" / "red" / "3.png"
    upload(page, path)
    assert answers(page) == predicted(finished, path)
    attention, nearest = page.locator(".pictures").all()
    assert attention.locator(".caption-label").all_inner_texts() == ["input", "class token", "conv token", "inv token"]
    captions = nearest.locator(".caption-label").all_inner_texts()
    assert (len(captions), captions[0]) == (8, "red, 1.00"), "a training picture is nearest to itself"
    for picture in page.locator(".pictures img").all():
        picture.scroll_into_view_if_needed()
        handle = picture.element_handle()
        page.wait_for_function("picture => picture.complete && picture.naturalWidth > 0", arg=handle)


def test_what_is_no_picture_is_named_and_the_next_picture_is_answered(
    page: Page, finished: Path, tiny_images: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.png").write_text("just words")
    upload(page, tmp_path / "notes.png")
    message = page.locator("#message")
    expect(message).to_contain_text("This picture cannot be read: 'notes.png': not an image of a known format")
    expect(opinions(page).first).to_be_hidden()
    path = tiny_images / "val" / "blue" / "1.png"
    upload(page, path)
    assert answers(page) == predicted(finished, path)
    expect(message).not_to_contain_text("cannot be read")


def test_an_example_is_answered_by_a_click(page: Page, finished: Path, tiny_images: Path) -> None:
    examples = page.locator(".gallery-item, .gallery > button")
    expect(examples).to_have_count(6)
    examples.first.click()
    assert answers(page) == predicted(finished, tiny_images / "val" / "blue" / "0.png")

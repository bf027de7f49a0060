"""The page in a real browser: click, wait, slide, turn, morph, download, upload, on a desk and on a phone.

Needs a Chromium of one's own (Debian: `apt-get install chromium`). With BYOC_SCREENSHOTS=FOLDER it leaves pictures.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_byoc.data import read_volume, write_volume


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT_MS = 240_000  # a busy machine draws WebGL without a GPU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options, timeout=TIMEOUT_MS)
        yield browser
        browser.close()


@pytest.fixture(params=[(1300, 950), (390, 844)], ids=["desk", "phone"])
def page(request, browser, page_url):
    from playwright.sync_api import expect

    context = browser.new_context(viewport=dict(zip(("width", "height"), request.param, strict=True)))
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    page.name = f"{request.param[0]}"
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(page_url)
    page.get_by_role("button", name="Sampler").click()
    steps = page.get_by_label("number input for Steps")
    expect(steps).to_have_value("5", timeout=TIMEOUT_MS)  # the pipeline has said what it can
    yield page
    context.close()


def picture(page, name):
    """A screenshot of the whole page at rest, kept if asked for."""
    from playwright.sync_api import expect

    expect(page.locator(".progress-text:visible")).to_have_count(0, timeout=TIMEOUT_MS)
    folder = os.environ.get("BYOC_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{page.name}_{name}.png", full_page=True)


def wait_until(page, is_so, what, seconds=TIMEOUT_MS // 1000):
    """Look every second until `is_so()`."""
    for _ in range(seconds):
        if is_so():
            return
        page.wait_for_timeout(1000)
    raise AssertionError(what)


def open_tab(page, name):
    tab = page.get_by_role("tab", name=name)
    if not tab.is_visible():  # on a phone, behind the three dots
        page.locator(".overflow-menu > button").click()
        tab = page.locator(".overflow-dropdown button", has_text=name)
    tab.click()


def fill(page, name, number):
    """Type until it stays: for a moment Gradio sets the fields of a new page again, over what is typed."""
    field = page.get_by_label(f"number input for {name}")
    for _ in range(20):
        field.fill(str(number))
        page.keyboard.press("Tab")
        page.wait_for_timeout(500)
        if field.input_value() == str(number):
            return
    raise AssertionError(f"{name} does not stay at {number}")


def generate(page, cells=2, steps=3):
    fill(page, "Cells", cells)
    fill(page, "Steps", steps)
    page.get_by_role("button", name="Generate").click()


def test_cells_are_made_and_looked_at_from_all_sides(page, tmp_path):
    # 1. generate
    generate(page)
    page.get_by_text("2 cells of nocodazole, 3 steps").wait_for()
    page.locator(".gallery img").nth(1).wait_for()
    slices = page.locator(".plane img")
    slices.nth(2).wait_for()
    picture(page, "slices")
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing beside the screen
    assert page.locator(".gallery").bounding_box()["width"] > 0.5 * min(width, 600)

    # 2. slide: another plane, the other two as they were but for the line
    sources = [slices.nth(index).get_attribute("src") for index in range(3)]
    slider = page.get_by_label("range slider for z, voxels")
    slider.focus()
    page.keyboard.press("Home")
    page.wait_for_function("source => document.querySelectorAll('.plane img')[0].src != source", arg=sources[0])
    assert page.get_by_label("number input for z, voxels").input_value() == "0"

    # 3. another cell
    first = slices.nth(1).get_attribute("src")
    page.locator(".gallery button img").nth(1).click()
    page.wait_for_function("source => document.querySelectorAll('.plane img')[1].src != source", arg=first)

    # 4. projections, surface: drawn, and turned by dragging
    open_tab(page, "Projections")
    page.locator(".plane:visible img").nth(2).wait_for()
    picture(page, "projections")
    open_tab(page, "Surface")
    canvas = page.locator("canvas")
    canvas.wait_for()

    def seen():
        canvas.screenshot(path=tmp_path / "seen.png")
        return np.asarray(Image.open(tmp_path / "seen.png").convert("RGB"), float)[60:]  # below label and buttons

    wait_until(page, lambda: seen().std() > 20, "the surface is not drawn")
    still, box = seen(), canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 3, steps=4)
    page.mouse.up()
    wait_until(page, lambda: np.abs(seen() - still).mean() > 1, "the surface does not turn")
    picture(page, "surface")

    # 5. numbers
    open_tab(page, "Numbers")
    page.get_by_text("24 phantoms").first.wait_for()
    page.get_by_text("cell volume, µm³").first.wait_for()
    picture(page, "numbers")

    # 6. download
    open_tab(page, "Files")
    with page.expect_download() as downloading:
        page.locator("a[download*='ome.tif']").last.click()
    path = tmp_path / downloading.value.suggested_filename
    downloading.value.save_as(path)
    volume = read_volume(path)
    assert path.name == "cell_2_seed_0.ome.tif"
    assert volume.data.shape == (2, 8, 8, 8) and volume.voxel_size_um == (1.0, 0.5, 0.5)
    picture(page, "files")
    assert page.problems == []


def test_uploads_are_shown_or_refused_with_a_message(page, tmp_path):
    cell = np.zeros((2, 6, 6, 6), np.float32)
    cell[0, 1:5, 1:5, 1:5], cell[1, 2:4, 2:4, 2:4] = 0.5, 1.0
    write_volume(tmp_path / "mine.ome.tif", cell, (1.0, 0.5, 0.5))
    (tmp_path / "broken.ome.tif").write_bytes(b"II*\0 and nothing more")

    page.get_by_role("button", name="A file of your own").click()
    chooser = page.locator("input[type=file]").first
    chooser.set_input_files(tmp_path / "broken.ome.tif")
    page.get_by_text("broken.ome.tif").or_(page.get_by_text("broken.ome")).first.wait_for()
    page.get_by_role("button", name="Show this cell").click()
    page.get_by_test_id("toast-body").wait_for()
    assert "broken.ome.tif" in page.get_by_test_id("toast-body").inner_text()
    picture(page, "refused")
    page.get_by_test_id("toast-close").click()
    page.get_by_role("button", name="Remove file").or_(page.get_by_label("Clear")).first.click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "mine.ome.tif")
    page.get_by_text("mine.ome").first.wait_for()
    page.get_by_role("button", name="Show this cell").click()
    page.get_by_text("The uploaded cell").wait_for()
    page.locator(".plane img").first.wait_for()
    picture(page, "uploaded")


def test_a_morph_goes_from_one_cell_to_another(page):
    generate(page)
    page.get_by_text("2 cells of nocodazole, 3 steps").wait_for()
    page.get_by_role("button", name="Morph").first.click()
    fill(page, "Frames", 4)
    page.get_by_role("button", name="Morph").last.click()
    page.get_by_text("4 frames from cell 1 to cell 2").wait_for()
    page.locator(".gallery img").nth(3).wait_for()
    page.locator(".plane img").first.wait_for()
    picture(page, "morph")
    assert page.problems == []


def test_an_uploaded_nucleus_gets_its_cells(page, tmp_path):
    nucleus = np.zeros((1, 6, 6, 6), np.float32)
    nucleus[0, 2:4, 2:4, 2:4] = 1.0
    write_volume(tmp_path / "nucleus.ome.tif", nucleus, (1.0, 1.0, 1.0), ("nucleus",))
    complete = page.get_by_role("button", name="Make cells for this nucleus")
    page.get_by_role("button", name="A file of your own").click()
    assert not complete.is_visible()  # the first pipeline was not trained for it
    page.get_by_label("Pipeline, or a name on the Hub").click()
    page.get_by_role("option", name="channels").click()
    complete.wait_for()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "nucleus.ome.tif")
    page.get_by_text("nucleus.ome").first.wait_for()
    fill(page, "Cells", 2)
    complete.click()
    page.get_by_text("2 cells of nocodazole for the uploaded nucleus.").wait_for()
    page.locator(".gallery img").nth(1).wait_for()
    picture(page, "nucleus")
    assert page.problems == []


def test_too_much_gets_a_message(page):
    generate(page, cells=6, steps=6)
    message = page.get_by_test_id("toast-body")
    message.wait_for()
    assert "at most 30 cells x steps, got 6 x 6" in message.inner_text()
    picture(page, "too_much")
    page.get_by_test_id("toast-close").click()
    fill(page, "Steps", 5)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("6 cells of nocodazole").wait_for()

"""The page of an evaluation in a real browser: Chromium, without a network."""

import shutil

import pytest

from tests.training.show.pages import full_page

playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium starts: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "evaluation.html"
    path.write_text(full_page(), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(chromium, address):
    """The page, which must load and be used without an error or a request."""
    wrong = []
    context = chromium.new_context(offline=True, viewport={"width": 1400, "height": 900})
    context.set_default_timeout(10_000)
    tab = context.new_page()
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on(
        "request",
        lambda request: wrong.append(request.url) if request.url[:5] not in ("file:", "data:") else None,
    )
    tab.goto(address)
    yield tab
    assert wrong == []
    context.close()


def column(tab, table, index):
    return tab.locator(f'[aria-label="{table}"] tbody tr').evaluate_all(
        "(rows, index) => rows.map(row => row.cells[index].textContent.trim())", index
    )


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_is_wider_than_the_window(opened, width):
    opened.set_viewport_size({"width": width, "height": 800})
    for kind in ("comparison", "attention", "image"):
        opened.locator(f'[name=kind][value="{kind}"]').check()
        assert opened.evaluate("document.documentElement.scrollWidth") == width
    # A wide table scrolls in its own frame, with the keyboard too.
    frame = opened.get_by_role("region", name="Confusion matrix")
    assert frame.evaluate("frame => frame.getBoundingClientRect().right") <= width
    assert frame.get_attribute("tabindex") == "0"
    assert opened.evaluate(
        "[...document.images].every(image => image.complete && image.naturalWidth && image.alt)"
    )


def test_tables_sort_by_numbers_and_names(opened):
    head = opened.get_by_role("columnheader", name="recall, %")
    assert head.get_attribute("aria-sort") is None
    head.get_by_role("button").focus()
    opened.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    rising = [f"{100 * index / 12:.1f}" for index in range(1, 12)]
    assert column(opened, "Classes", 3) == [*rising, "-"]
    opened.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column(opened, "Classes", 3) == [*reversed(rising), "-"]  # what is not defined stays last
    opened.locator('[aria-label="Classes"]').get_by_role("button", name="class", exact=True).click()
    names = [f"class {index}" for index in range(12) if index != 7]  # 10 behind 9
    assert column(opened, "Classes", 0) == [*names, "W" * 90]
    assert head.get_attribute("aria-sort") is None


def test_images_are_filtered_and_shown_in_parts(opened):
    box = opened.locator(".data").last
    assert column(opened, "Images", 0) == [f"{index:03}.png" for index in range(50)]
    box.get_by_role("button", name="show 50 more").click()
    box.get_by_role("button", name="show 20 more").click()
    assert len(column(opened, "Images", 0)) == 120
    assert not box.locator(".more").is_visible()
    box.get_by_label("Show").select_option("wrong")
    assert box.locator("output").text_content() == "40 of 120 images"
    assert column(opened, "Images", 0) == [f"{index:03}.png" for index in range(0, 120, 3)]
    box.get_by_label("Filter").fill("CLASS 10")
    assert box.locator("output").text_content() == "10 of 120 images"
    assert all("class 10" in (label, guess[2:]) for label, guess in zip(
        column(opened, "Images", 1), column(opened, "Images", 2), strict=True))  # fmt: skip
    box.get_by_label("Filter").fill("nothing of this name")
    assert column(opened, "Images", 0) == []


def test_maps_are_switched_with_the_keyboard(opened):
    def visible():
        panels = opened.locator(".panel").evaluate_all(
            "panels => panels.filter(panel => panel.checkVisibility()).map(panel => panel.dataset.kind)"
        )
        return len(panels), set(panels)

    # Two errors with two Grad-CAMs, and a right prediction with one.
    assert visible() == (11, {"image", "attention", "Grad-CAM"})
    opened.get_by_label("comparison").focus()
    for kind, count in (("attention", 3), ("Grad-CAM", 5), ("image", 3)):
        opened.keyboard.press("ArrowRight")
        assert opened.get_by_label(kind, exact=True).is_checked()
        assert visible() == (count, {kind})


def test_paper_has_all_that_is_to_read_and_no_controls(opened):
    opened.set_viewport_size({"width": 700, "height": 900})
    opened.emulate_media(media="print")
    assert not opened.get_by_role("button", name="show").is_visible()
    assert not opened.locator("fieldset").is_visible()
    assert opened.get_by_role("heading", name="Confusion matrix").is_visible()
    assert opened.pdf(format="A4").startswith(b"%PDF")


def test_light_and_dark_follow_the_system(opened):
    colours = {}
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        colours[scheme] = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}


def test_without_scripts_everything_is_there(chromium, address):
    context = chromium.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(address)
    assert tab.locator('[aria-label="Images"] tbody tr').count() == 120
    assert tab.locator("input[type=search]").first.is_hidden()
    context.close()

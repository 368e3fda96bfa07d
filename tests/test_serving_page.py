"""The server's page in a real browser, headless: what it shows, by keyboard, on a phone, and that texts stay texts."""

import shutil

import pytest

pytest.importorskip("fastapi")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser's driver is not here: pip install playwright")
from serving_client import make_engine, running  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no browser here: apt-get install chromium")]
DEMOS = "w1 w2 => w50\nw3 => w51\n\nw5 w6 w7 => w50\n" + '{"input": "w9 => w8", "output": "w51"}'
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def server(serving_models):
    with running(make_engine(serving_models)) as client:
        yield client


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser, server):
    """The page, as narrow as a phone's; what it asks for and complains of is in `asked` and `wrong`."""
    context = browser.new_context(viewport={"width": 360, "height": 740})
    made = context.new_page()
    made.asked, made.wrong = [], []
    made.on("request", lambda request: made.asked.append(request.url))
    made.on("pageerror", lambda error: made.wrong.append(str(error)))
    made.on("console", lambda message: message.type == "error" and made.wrong.append(message.text))
    made.goto(f"http://127.0.0.1:{server.port}/")
    playwright.expect(made.locator("#server")).not_to_have_text("…")
    yield made
    context.close()


def ask(page, demos=DEMOS, query="w4 w8", options="w50, w51"):
    page.fill("#demos", demos)
    page.fill("#input", query)
    page.fill("#options", options)
    page.press("#input", "Enter")
    playwright.expect(page.locator("#ask")).to_be_enabled(timeout=60_000)


def test_the_three_answers_stand_side_by_side(page, server):
    ask(page)
    objects = [
        {"input": x, "output": y}
        for x, y in (("w1 w2", "w50"), ("w3", "w51"), ("w5 w6 w7", "w50"), ("w9 => w8", "w51"))
    ]
    pack = server.post("/packs", objects)["id"]
    for place, before in {"shown": {"demonstrations": objects}, "vectors": {"pack": pack}, "nothing": {}}.items():
        found = server.post("/score", {"input": "w4 w8", "options": ["w50", "w51"]} | before)
        said, [answer] = page.inner_text(f"#{place}"), found["answers"]
        assert page.inner_text(f"#{place} .said") == answer["prediction"]
        assert f"{found['prefix_positions']} before the query, 2 of the query" in said and "ms" in said
        for option, score in answer["scores"].items():
            assert option in said and f"{score:.3f}" in said
    assert "4 positions in the place of 13: 9 tokens saved" in page.inner_text("#saved")
    boxes = [page.locator(f"#{place}").bounding_box() for place in ("shown", "vectors")]
    assert boxes[0]["x"] == boxes[1]["x"]  # one below the other on a phone
    page.set_viewport_size({"width": 1100, "height": 800})
    boxes = [page.locator(f"#{place}").bounding_box() for place in ("shown", "vectors")]
    assert boxes[0]["y"] == boxes[1]["y"] and page.wrong == []
    assert {url.split("/")[2] for url in page.asked} == {f"127.0.0.1:{server.port}"}


def test_without_options_the_llm_speaks_for_itself(page):
    page.click("#example")
    assert "=>" in page.input_value("#demos") and page.input_value("#options")
    page.fill("#most", "4")
    ask(page, options="")
    for place in ("shown", "vectors", "nothing"):
        assert page.inner_text(f"#{place} .said") and "of the answer" in page.inner_text(f"#{place}")
    assert page.wrong == []


def test_texts_are_never_html(page):
    page.on("dialog", lambda dialog: page.wrong.append(dialog.message))
    ask(page, demos=f"w1 {HOSTILE} => {HOSTILE}", query=HOSTILE, options=f"{HOSTILE}, w51")
    assert HOSTILE in page.inner_text("#vectors") and page.locator("img").count() == 0 and page.wrong == []


def test_mistakes_are_sentences_where_they_belong(page):
    ask(page, demos="w1 => w2\nw3")
    assert "Line 2" in page.inner_text("#wrong")
    ask(page, demos="")
    assert "no demonstrations" in page.inner_text("#wrong")
    ask(page, options="w1, w1")
    assert "twice" in page.inner_text("#vectors .wrong") and page.inner_text("#wrong") == ""


def test_the_keyboard_and_a_phone_suffice(page, server):
    reached = []
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert reached[:7] == ["demos", "example", "file", "input", "options", "most", "ask"]
    assert page.evaluate("[...document.querySelectorAll('input, textarea')].every(one => one.labels.length)")
    ask(page, query="w4 " * 20, options="w" * 200 + ", w51")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.goto(f"http://127.0.0.1:{server.port}/docs")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360 and "POST /score" in page.inner_text("main")


def test_a_packs_file_is_taken_in_the_place_of_vectors(page, server, tmp_path):
    made = server.post("/packs", [{"input": "w1", "output": "w2"}])
    (tmp_path / "a.safetensors").write_bytes(server.ask("GET", f"/packs/{made['id']}/file")[1])
    page.set_input_files("#file", tmp_path / "a.safetensors")
    ask(page, demos="")
    assert page.inner_text("#vectors .said") and "No demonstrations" in page.inner_text("#shown .wrong")

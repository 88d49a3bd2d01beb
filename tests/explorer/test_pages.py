"""The explorer's pages in headless Chromium.

`MXD_SCREENSHOTS=FOLDER pytest tests/explorer -k screenshots` makes the docs' pictures of a decomposition in a folder.
"""

import functools
import http.server
import os
import threading
from pathlib import Path
from urllib.parse import quote

import pytest
from explorer_cases import serving

from mxd.jobs.explore import explore
from mxd.jobs.use_options import ExploreOptions

PAGES = ["0", "2", "2/3", "2/23", "0/search/word3 <img", "2/search/" + quote("國家 word5")]
NAMED = {"button", "link", "searchbox", "textbox", "combobox", "checkbox", "spinbutton", "image", "region"}


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    """The address of an exported copy, on a static host, and its folder."""
    folder = tmp_path_factory.mktemp("export") / "site"
    assert explore(ExploreOptions(decomposition=str(made.folder), export=str(folder)), progress=False) == str(folder)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()


@pytest.mark.parametrize(("copy", "width", "dark"), [("served", 400, True), ("exported", 1200, False)])
def test_every_page_is_shown(browser, request, copy, width, dark):
    found = request.getfixturevalue(copy)
    address = found.url if copy == "served" else found[0]
    browser.size(width, dark=dark)
    browser.open(address)
    for page in PAGES:
        browser.go(page)
        assert "cannot be shown" not in browser.text("main") and len(browser.text("main")) > 100, page
        assert browser.run("document.documentElement.scrollWidth") <= width, page
        assert browser.run("window.hacked") is None
        assert browser.run("document.querySelectorAll('main :is(img, script, i, u, iframe)').length") == 0
        for node in browser.send("Accessibility.getFullAXTree")["nodes"]:
            if node.get("role", {}).get("value") in NAMED and not node.get("ignored"):
                assert node["name"]["value"].strip(), node
    assert all(url.startswith((address, "about:", "data:")) for url in browser.requests)
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark


def rows(browser, column):
    return browser.run(f"[...document.querySelectorAll('tbody tr')].map((row) => row.cells[{column}].innerText)")


def test_experts_are_sorted_and_filtered(browser, served, made):
    layer = made.collection.layers[0]
    browser.open(served.url)
    by_frequency = layer.frequency.argsort(descending=True, stable=True).tolist()
    assert rows(browser, 0) == list(map(str, by_frequency))
    browser.run("document.querySelector('[data-column=maximum]').focus()")
    browser.press("Enter")
    assert rows(browser, 0) == list(map(str, layer.maximum.argsort(descending=True).tolist()))
    assert browser.run("document.querySelector('[aria-sort=descending] button').dataset.column") == "maximum"
    browser.press("Enter")  # the focus is still there
    assert rows(browser, 0) == list(map(str, layer.maximum.argsort().tolist()))
    browser.run("document.querySelector('[data-column=promoted]').click()")
    assert rows(browser, 4) == sorted(rows(browser, 4)) or len(set(rows(browser, 4))) > 3
    browser.run("document.querySelector('main input').focus()")
    browser.type("<SCRIPT")
    shown = list(zip(rows(browser, 3), rows(browser, 4), strict=True))
    assert 0 < len(shown) < 24 and all("<script" in one or "<script" in other for one, other in shown)
    browser.run("void (document.querySelector('main input').value = '')")
    browser.run("document.querySelector('main input').dispatchEvent(new Event('input'))")
    choose = "const field = document.querySelector('main select'); field.value = '<i>plays'; "
    browser.run(f"{{ {choose} field.dispatchEvent(new Event('change')) }}")
    assert 0 < len(rows(browser, 6)) < 24 and set(rows(browser, 6)) == {"<i>plays"}
    assert f"{len(rows(browser, 6))} experts" in browser.text("#status")


def test_a_point_of_the_plot_opens_its_expert(browser, served):
    browser.open(served.url)
    place = browser.run(
        "(({x, y, width, height}) => [x, y, width, height])(document.querySelector('canvas').getBoundingClientRect())"
    )
    # The most frequent expert is at the right edge of the plot; a click near it is enough.
    x, y, width, height = place
    for down in range(20, int(height) - 40, 8):
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": x + width - 14, "y": y + down}
            browser.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)
        if browser.run("location.hash"):
            break
    browser.until("/^#.0.\\d+$/.test(location.hash)")
    browser.until("document.querySelector('.context')")


def test_a_context_is_opened_by_keyboard(browser, served, made):
    browser.open(served.url)
    browser.go("2/3")
    layer = made.collection.layers[2]
    row, position = int(layer.top_rows[3, 0]), int(layer.top_positions[3, 0])
    words = made.tokenizer.convert_ids_to_tokens(made.collection.row(row))
    assert browser.text(".context mark.peak").strip() == words[position]
    browser.run("document.querySelector('.context').focus()")
    browser.press("Enter")
    browser.until("document.querySelector('.context[aria-expanded=true]')")
    browser.until(f"document.querySelector('.context .text').textContent.trim().split(/\\s+/).length === {len(words)}")
    assert browser.text(".context .text").split() == words
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press(" ", "ArrowDown")
    assert browser.run("document.activeElement === document.querySelectorAll('.context')[1]")
    assert browser.run("document.querySelector('.context').getAttribute('aria-expanded')") == "false"
    browser.press("ArrowUp", "ArrowRight")
    browser.until("document.querySelector('h1').innerText === 'Expert 4'")
    assert browser.run("document.activeElement === document.querySelector('main')")
    browser.press("ArrowLeft")
    browser.until("document.querySelector('h1').innerText === 'Expert 3'")
    assert browser.run("document.title").startswith("Expert 3, layer 2")


def test_search_by_keyboard(browser, served):
    browser.open(served.url)
    browser.press("/")
    browser.type("word7 國家")
    browser.press("Enter")
    browser.until("document.querySelector('.piece')")
    assert browser.run("[...document.querySelectorAll('.piece')].map((one) => one.innerText.trim())") == [
        "<s>",
        "word7",
        "國家",
    ]
    everything = rows(browser, 0)
    assert len(everything) == 8 and {one.strip() for one in rows(browser, 1)} == {"word7", "國家"}  # K = 4 on each
    assert rows(browser, 4) == sorted(rows(browser, 4), key=float, reverse=True)
    browser.run("document.querySelectorAll('.piece')[2].focus()")
    browser.press("Enter")
    assert {one.strip() for one in rows(browser, 1)} == {"國家"} and len(rows(browser, 0)) == 4
    browser.press("Enter")
    assert rows(browser, 0) == everything
    browser.press("/")
    browser.run("document.querySelector('#search input').select()")
    browser.type("17")
    browser.press("Enter")
    browser.until("location.hash === '#/0/17'")


def test_steering(browser, served):
    browser.open(served.url)
    browser.go("2/3")
    browser.run("document.querySelector('#steer textarea').select()")
    browser.type("word3 word4 <img")
    set_value = "document.querySelector('#steer {}').value = '{}'"
    browser.run(f"void ({set_value.format('select', 'direction')}, {set_value.format('input', 50)})")
    browser.run("document.querySelector('#steer button').click()")
    browser.until("document.querySelectorAll('#steer .box').length === 2")
    untouched, steered = browser.run("[...document.querySelectorAll('#steer .box')].map((box) => box.innerText)")
    assert untouched.startswith("word3 word4 <img") and len(untouched.split()) > 3
    assert untouched != steered


@pytest.mark.parametrize(
    "changes",
    [
        {"layer": 1}, {"layer": [2]}, {"layer": "2"}, {"expert": 24}, {"expert": -1}, {"expert": "3"}, {"expert": None},
        {"strength": float("inf")}, {"strength": True}, {"by": "nonsense"}, {"by": None}, {"prompt": ""}, {"prompt": 3},
        {"prompt": "word3 " * 1000}, {"tokens": None},
    ],
)  # fmt: skip
def test_questions_that_make_no_sense_are_refused(served, changes):
    question = {"layer": 2, "expert": 3, "strength": 1, "by": "direction", "prompt": "word3", "tokens": 2}
    assert served.calls["steer"](question).keys() == {"untouched", "steered"}
    with pytest.raises(ValueError):
        served.calls["steer"](question | changes)
    if changes.keys() & {"layer", "prompt"}:
        with pytest.raises(ValueError):
            served.calls["inspect"]({"layer": changes.get("layer", 2), "text": changes.get("prompt", "word3")})


def test_an_error_of_steering_is_shown(browser, served):
    browser.open(served.url)
    browser.go("2/3")
    browser.run("void (document.querySelector('#steer textarea').value = 'word3 '.repeat(1000))")
    browser.run("document.querySelector('#steer button').click()")
    browser.until("document.querySelector('#steer .warning')")
    assert "prompt must be a text of at most 4000 characters" in browser.text("#steer")
    assert browser.errors and all("400" in error for error in browser.errors)
    browser.errors.clear()


def test_a_copy_needs_no_server(browser, exported, made):
    browser.open(exported[0])
    browser.go("2/search/constructor __proto__")
    shown = rows(browser, 0)
    counts = [int(one) for one in rows(browser, 1)]
    assert shown and counts == sorted(counts, reverse=True) and counts[0] == 2
    assert "mxd explore <b>demo" in browser.text("main")
    browser.go("2/search/nowhere")
    assert "None." in browser.text("main")
    browser.go("2/3")
    assert "Steering needs the model" in browser.text("main")
    browser.run("document.querySelector('.context').click()")
    browser.until("document.querySelector('.context .text').textContent.split(' ').length > 1")


@pytest.mark.parametrize("page", ["99", "2/24", "7/3", "2/search/" + "%E0%A4%A"])
def test_a_page_that_is_not_there_says_so(browser, served, page):
    browser.open(served.url)
    browser.go(page)
    assert "cannot be shown" in browser.text("main") and browser.run("document.querySelector('[role=alert]').innerText")


@pytest.mark.skipif("MXD_SCREENSHOTS" not in os.environ, reason="MXD_SCREENSHOTS names no decomposition")
def test_screenshots_of_the_docs(browser):
    folder = Path(__file__).parents[2] / "docs" / "how-to"
    with serving(os.environ["MXD_SCREENSHOTS"]) as server:
        browser.size(1200, 760)
        browser.open(server.url)
        browser.run("document.querySelector('[data-column=alignment]').click()")
        browser.screenshot(folder / "explore-list.png")
        browser.run("document.querySelectorAll('tbody a')[5].click()")
        browser.until("document.querySelector('.context')")
        browser.size(400, 760)
        browser.screenshot(folder / "explore-expert.png")

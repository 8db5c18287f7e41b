"""The command, its page in a real browser, and what a person does there."""

import json
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
from conftest import HOSTILE
from report_browser import ask_browser

from lever_grpo.cli import main
from lever_grpo.demo import DemoArguments, Session


gradio = pytest.importorskip("gradio", reason="the extra 'demo' is not installed")

METHOD = """[...document.querySelectorAll('#found .choice')].map((c) => [c.dataset.method,
  [...c.querySelectorAll('li')].map((li) => Number(li.dataset.row)), c.querySelector('.answer strong').textContent])"""
FOUND = "document.querySelector('#found h3')?.textContent.trim() ?? ''"
TITLE = "lever_grpo: try a selector"


@pytest.fixture(scope="module")
def address(task, tmp_path_factory):
    """Where `lever-grpo demo` serves, in a thread of its own, until its server is closed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config, ended = tmp_path_factory.mktemp("page") / "demo.yaml", []
    config.write_text(json.dumps(task | {"port": port}))
    command = threading.Thread(target=lambda: ended.append(main(["demo", "--config", str(config)])), daemon=True)
    command.start()
    deadline = time.monotonic() + 120
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert command.is_alive() and time.monotonic() < deadline, "the command serves nothing"
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/"
    gradio.close_all(verbose=False)
    command.join(timeout=30)
    assert ended == [0]


@pytest.fixture(scope="module")
def session(task, scorer):
    return Session(DemoArguments(**task), scorer)


def browse(address, steps):
    """What the page answers, with nothing on the console and nothing asked of any other machine."""
    answer = ask_browser(address, {"until_ready": "document.querySelector('#pick') !== null", **steps})
    assert answer["console"] == []
    asked = {urlsplit(url).hostname for url in answer["requests"] if not url.startswith(("data:", "blob:"))}
    assert asked == {"127.0.0.1"}
    return answer["steps"]


def pick(number):
    """Steps of a person who picks from the list, and waits for the answer."""
    option = "[...document.querySelectorAll('[role=option]')]"
    mine = f"{option}.find((o) => o.textContent.includes('{number}: '))"
    press = "new MouseEvent('mousedown', {bubbles: true})"
    return {
        f"open {number}": "document.querySelector('#query input').focus()",
        f"until it is listed {number}": f"{option}.length",
        f"text {number}": f"{mine}.textContent",
        f"choose {number}": f"{mine}.dispatchEvent({press})",
        f"until it is chosen {number}": f"document.querySelector('#query input').value.startsWith('{number}: ')",
        f"show {number}": "document.querySelector('#pick').click()",
    }


def expected(shown):
    return [[choice.method, [shown.pool[i].id for i in choice.picks], choice.answer] for choice in shown.choices]


def test_a_query_is_picked(address, session):
    seen = browse(
        address,
        {
            **pick(2),
            "until shown": f"{FOUND} === 'colour 2?'",
            "methods": METHOD,
            "table": "[...document.querySelectorAll('#found tbody tr')].map((tr) => Number(tr.dataset.row))",
            "font": "getComputedStyle(document.querySelector('#found h3')).fontFamily",
            "one": "document.querySelector('input[type=radio]').click()",
            "again": "document.querySelector('#pick').click()",
            "until one": "document.querySelectorAll('#found li').length === 4",
        },
    )
    shown = session.held_out(2, 2)
    assert seen["methods"] == expected(shown) and len(seen["methods"]) == 4
    assert seen["table"] == [row.id for row in shown.pool] and "system-ui" in seen["font"]


def test_hostile_texts_do_nothing(address, session):
    seen = browse(
        address,
        {
            **pick(1),
            "until shown": f"{FOUND}.startsWith('</p>')",
            "question": FOUND,
            "methods": METHOD,
            "made": "document.querySelectorAll('#found img, #found script, #found i').length",
            "title": "document.title",
        },
    )
    shown = session.held_out(1, 2)
    assert HOSTILE in [row.question for row in shown.pool]  # as a demonstration too
    assert seen["question"] == HOSTILE and HOSTILE[:50] in seen["text 1"]
    assert seen["methods"] == expected(shown) and seen["made"] == 0 and seen["title"] == TITLE


def test_a_query_is_typed(address, session):
    box = "document.querySelector('#question textarea, #question input')"
    text = "which <b>colour</b>?"
    seen = browse(
        address,
        {
            "tab": "[...document.querySelectorAll('[role=tab]')].find((t) => t.textContent.includes('Type')).click()",
            "until it is there": f"{box} !== null",
            "type": f"(b => {{ b.value = '{text}'; b.dispatchEvent(new Event('input', {{bubbles: true}})) }})({box})",
            "ask": "document.querySelector('#ask').click()",
            "until shown": f"{FOUND} === '{text}'",
            "methods": METHOD,
            "image": "document.querySelectorAll('input[type=file]').length",
        },
    )
    assert seen["methods"] == expected(session.typed(text, 2)) and seen["image"] == 0

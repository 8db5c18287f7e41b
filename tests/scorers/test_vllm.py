"""A loopback server that speaks vLLM's completions endpoint with a tiny Llama behind it, and misbehaves on request."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lever_grpo.data import Example
from lever_grpo.scorers import Prompt, PromptTemplate, ScorerError
from lever_grpo.scorers.vllm import VLLMScorer


MODEL, LIMIT, KEY = "tiny-llama", 160, "secret-key"


@pytest.fixture(scope="module")
def tokenizer():
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab=letters | {"<s>": 256, "</s>": 257}, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytewise.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


class Server(ThreadingHTTPServer):
    """`faults` are taken one a request: an HTTP status, or the name of something else that goes wrong."""

    daemon_threads = True

    def __init__(self, model, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer = model, tokenizer
        self.lock = threading.Lock()
        self.clean()

    def clean(self):
        self.faults, self.requests, self.under_way, self.most_under_way = [], [], 0, 0
        self.edit, self.forbidden, self.headers, self.pages, self.delay = None, (), {}, True, 0.0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @torch.no_grad()
    def choice(self, index, ids, body):
        with self.lock:  # torch with one thread; requests may overlap, forwards need not
            log_probs = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).tolist()
            text = self.continued(ids, body)
        positions = [None]
        for i, token in enumerate(ids[1:]):
            best = int(np.argmax(log_probs[i]))  # the likeliest stands beside the prompt's own token
            entries = {
                str(t): {"logprob": log_probs[i][t], "rank": r, "decoded_token": self.tokenizer.decode([t])}
                for t, r in ((best, 1), (token, 7))
            }
            positions.append(entries)
        choice = {"index": index, "text": text, "finish_reason": "length", "logprobs": None}
        return choice | {"prompt_logprobs": positions if body.get("prompt_logprobs") is not None else None}

    def continued(self, ids, body):
        new = []
        while len(new) < body["max_tokens"]:
            new.append(int(self.model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
            if new[-1] == self.tokenizer.eos_token_id:
                break
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        for stop in body.get("stop", []):
            text = text.split(stop)[0]
        return text


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        return

    def reply(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.fault():
            return
        pages = {
            "/v1/models": {"object": "list", "data": [{"id": MODEL, "root": "/disk/x", "max_model_len": LIMIT}]},
            "/version": {"version": "0.11.0"},
        }
        known = self.path in pages and self.server.pages
        self.reply(200 if known else 404, pages[self.path] if known else {"detail": "Not Found"})

    def fault(self):
        """Whether the request was answered wrongly."""
        server = self.server
        with server.lock:
            fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            said = {"error": {"message": f"no, {self.headers.get('Authorization')}", "code": fault}}
            self.reply(fault, said, server.headers)
        elif fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        elif fault == "sleep":
            time.sleep(1.0)
            self.close_connection = True  # nobody listens any more
        elif fault is not None:
            self.reply(200, fault)
        return fault is not None

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        time.sleep(server.delay)
        with server.lock:
            server.under_way -= 1
        if not self.fault():
            self.complete(body)

    def complete(self, body):
        server = self.server
        assert body["max_tokens"] >= 1 and body["temperature"] == 0.0
        if self.path != "/v1/completions" or body["model"] != MODEL:
            return self.reply(404, {"error": {"message": f"The model {body['model']} does not exist."}})
        longest = max(len(ids) for ids in body["prompt"])
        if longest + body["max_tokens"] > LIMIT or any(t in ids for ids in body["prompt"] for t in server.forbidden):
            return self.reply(400, {"error": {"message": f"maximum context length is {LIMIT} tokens", "code": 400}})
        choices = [server.choice(i, ids, body) for i, ids in enumerate(body["prompt"])]
        content = {"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": choices[::-1]}
        if server.edit:
            server.edit(content)
        self.reply(200, content)


@pytest.fixture(scope="module")
def running(model, tokenizer):
    server = Server(model, tokenizer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    running.clean()
    return running


def scorer_of(server, tokenizer, **options):
    options = {"backoff": 0.0, "retries": 2, "timeout": 10.0, **options}
    return VLLMScorer(server.url, MODEL, tokenizer, **options)


@pytest.fixture
def rows():
    return [Example(i, f"What is {i} plus {i}?", (f"{2 * i}", "x")) for i in range(7)]


@pytest.fixture
def prompts(rows):
    singles = [Prompt(rows[0], (row,)) for row in rows[1:5]]
    return [*map(Prompt, rows[:4]), *singles, Prompt(rows[5], (rows[1], rows[2])), Prompt(rows[5], (rows[2], rows[1]))]


@torch.no_grad()
def direct(model, tokenizer, prompt, template=None):
    """Log-probabilities by the model itself: bytes, so that pieces and the whole text have the same tokens."""
    template = template or PromptTemplate()
    start = tokenizer(template.text(list(prompt.demonstrations), prompt.query)).input_ids
    answer = tokenizer(template.of_answer(prompt.query), add_special_tokens=False).input_ids
    logits = model(input_ids=torch.tensor([start + answer])).logits[0].double().log_softmax(-1)
    return [logits[len(start) + i - 1, token].item() for i, token in enumerate(answer)]


def check(found, model, tokenizer, prompts):
    for ours, prompt in zip(found, prompts, strict=True):
        np.testing.assert_allclose(ours, direct(model, tokenizer, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch_size, concurrency", [(1, 1), (3, 4), (32, 8)])
def test_log_probs_equal_those_of_the_model(server, model, tokenizer, prompts, batch_size, concurrency):
    scorer = scorer_of(server, tokenizer, batch_size=batch_size, concurrency=concurrency)
    found = scorer.score(prompts)
    assert all(scores.dtype == np.float64 for scores in found)
    check(found, model, tokenizer, prompts)
    assert len(server.requests) == -(-len(prompts) // batch_size)


def test_what_is_sent(server, tokenizer, rows):
    template = PromptTemplate(instruction="Add.\n", score_stop=True)
    scorer_of(server, tokenizer, template=template).score([Prompt(rows[2], (rows[1],))])
    ((path, headers, body),) = server.requests
    text = "Add.\nQuestion: What is 1 plus 1?\nAnswer: 2\n\nQuestion: What is 2 plus 2?\nAnswer: 4\n"
    assert body == {
        "model": MODEL,
        "prompt": [[256, *tokenizer(text, add_special_tokens=False).input_ids]],
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
    }
    assert path == "/v1/completions" and "Authorization" not in headers


def test_the_start_token_is_left_out_where_the_tokenizer_does_not_add_it(server, tokenizer, rows):
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), bos_token="<s>", eos_token="</s>"
    )
    plain.backend_tokenizer.post_processor = processors.ByteLevel()
    scorer_of(server, plain).score([Prompt(rows[0])])
    assert 256 not in server.requests[0][2]["prompt"][0]


def test_equal_prompts_are_sent_once_and_not_shared(server, tokenizer, prompts):
    first, second = scorer_of(server, tokenizer).score([prompts[0], prompts[0]])
    assert len(server.requests[0][2]["prompt"]) == 1
    expected = second.tolist()
    first += 1
    assert second.tolist() == expected


def test_requests_run_side_by_side(server, tokenizer, prompts):
    server.delay = 0.1
    scorer_of(server, tokenizer, batch_size=1, concurrency=3).score(prompts)
    assert server.most_under_way == 3


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "drop", "cut", b"<html>", b"", "sleep"])
def test_a_passing_fault_is_tried_again(server, model, tokenizer, prompts, fault):
    server.faults = [fault, fault]
    timeout = 0.9 if fault == "sleep" else 10.0  # a busy machine needs some of it for the answer that counts
    check(scorer_of(server, tokenizer, timeout=timeout).score(prompts), model, tokenizer, prompts)
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault, told", [(500, "500"), (429, "429"), ("drop", ""), (b"{", "JSON"), ("sleep", "timed")])
def test_a_lasting_fault_names_the_queries(server, tokenizer, rows, fault, told):
    server.faults = [fault] * 3
    with pytest.raises(ScorerError, match=f"^queries 4, 6: .*failed 3 times.*{told}.*check that the server runs"):
        scorer_of(server, tokenizer, timeout=0.2 if fault == "sleep" else 10.0).score(
            [Prompt(rows[6]), Prompt(rows[4])]
        )
    assert len(server.requests) == 3


def test_waits_grow_and_obey_the_server(server, tokenizer, prompts, monkeypatch):
    waits = []
    monkeypatch.setattr("lever_grpo.scorers.vllm.time.sleep", waits.append)
    server.faults = [500] * 4
    scorer_of(server, tokenizer, backoff=0.5, retries=4).score(prompts[:1])
    assert [wait for wait in waits if wait] == [0.5, 1.0, 2.0, 4.0]
    waits.clear()
    server.faults, server.headers = [429, 429], {"Retry-After": "7"}
    scorer_of(server, tokenizer, backoff=0.5).score(prompts[:1])
    server.faults, server.headers = [429], {"Retry-After": "99999"}
    scorer_of(server, tokenizer, backoff=0.5).score(prompts[:1])
    assert [wait for wait in waits if wait] == [7.0, 7.0, 60.0]


def test_no_server(server, tokenizer, rows):
    gone = Server(server.model, tokenizer)
    gone.server_close()
    with pytest.raises(ScorerError, match="queries 3: .*ConnectionRefused|queries 3: .*refused"):
        scorer_of(gone, tokenizer).score([Prompt(rows[3])])
    with pytest.raises(ScorerError, match="describe"):
        scorer_of(gone, tokenizer).describe()


def test_a_prompt_that_is_too_long_costs_only_itself(server, model, tokenizer, prompts, rows, caplog):
    long = Prompt(rows[6], tuple(rows[1:6]))
    asked = [*prompts[:5], long, *prompts[5:]]
    with caplog.at_level(logging.WARNING):
        scorer = scorer_of(server, tokenizer)
        found = scorer.score(asked)
    assert [scores is None for scores in found] == [prompt is long for prompt in asked]
    check(found[:5] + found[6:], model, tokenizer, prompts)
    (record,) = caplog.records
    assert list(scorer.problems) == [long] and "maximum context length" in scorer.problems[long]
    assert "query 6 was not asked" in record.getMessage() and "maximum context length" in record.getMessage()
    assert len(server.requests) <= 2 * 5  # halves of halves, not one by one


def test_max_length_is_checked_before_anything_is_sent(server, tokenizer, rows, caplog):
    short = Prompt(rows[1])
    length = 1 + len("Question: What is 1 plus 1?\nAnswer: 2")
    for max_length, fits in ((length, True), (length - 1, False)):
        scorer = scorer_of(server, tokenizer, max_length=max_length)
        found = scorer.score([short, Prompt(rows[1], (rows[2],))])
        assert found[1] is None and (found[0] is not None) == fits
    assert len(server.requests) == 1
    assert f"query 1 was not asked: {length} tokens with the answer, more than max_length={length - 1}" in caplog.text


@pytest.mark.parametrize("status", [401, 403, 404, 302, 307])
def test_a_refusal_of_every_request_is_an_error(server, tokenizer, prompts, status):
    elsewhere = Server(server.model, tokenizer)
    thread = threading.Thread(target=elsewhere.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        server.faults, server.headers = [status], {"Location": elsewhere.url + "/v1/completions"}
        with pytest.raises(ScorerError, match=f"answers {status}.*check the URL") as caught:
            scorer_of(server, tokenizer, api_key=KEY).score(prompts)
        assert KEY not in str(caught.value) and "***" in str(caught.value)
        assert len(server.requests) == 1 and not elsewhere.requests
    finally:
        elsewhere.shutdown()
        elsewhere.server_close()
        thread.join()


def test_an_unknown_model_is_an_error(server, tokenizer, prompts):
    with pytest.raises(ScorerError, match="404.*does not exist"):
        VLLMScorer(server.url, "other", tokenizer, retries=0).score(prompts)


@pytest.mark.parametrize("written", [float("nan"), None])
def test_nan_is_passed_on(server, tokenizer, rows, written):
    def edit(content):
        for entry in content["choices"][0]["prompt_logprobs"][-1].values():
            entry["logprob"] = written

    server.edit = edit
    (scores,) = scorer_of(server, tokenizer).score([Prompt(rows[6])])  # " 12": three tokens
    assert np.isnan(scores).tolist() == [False, False, True]


def test_minus_infinity_is_not_a_number_of_the_log(server, tokenizer, rows):
    def edit(content):
        for entry in content["choices"][0]["prompt_logprobs"][-1].values():
            entry["logprob"] = -9999.0

    server.edit = edit
    assert scorer_of(server, tokenizer).score([Prompt(rows[1])])[0][-1] == -np.inf


def drop_last(content):
    content["choices"].pop()


def drop_position(content):
    content["choices"][0]["prompt_logprobs"].pop()


def drop_all(content):
    content["choices"][0]["prompt_logprobs"] = None


def drop_token(content):
    content["choices"][0]["prompt_logprobs"][-1] = {"999": {"logprob": -1.0}}


def repeat_index(content):
    content["choices"][0]["index"] = content["choices"][-1]["index"]


def drop_choices(content):
    del content["choices"]


@pytest.mark.parametrize("edit", [drop_last, drop_position, drop_all, drop_token, repeat_index, drop_choices])
def test_a_reply_that_is_not_what_was_asked_for(server, tokenizer, rows, edit):
    server.edit = edit
    with pytest.raises(ScorerError, match="queries 1, 2: the reply .* is not what was asked for"):
        scorer_of(server, tokenizer).score([Prompt(rows[1]), Prompt(rows[2])])


@pytest.mark.parametrize("reply", [b"[]", b"null", b'"yes"'])
def test_a_reply_that_is_json_of_something_else(server, tokenizer, rows, reply):
    server.faults = [reply]
    with pytest.raises(ScorerError, match="queries 1: the reply"):
        scorer_of(server, tokenizer).score([Prompt(rows[1])])


def test_after_an_error_no_more_is_sent(server, tokenizer, rows):
    server.faults = [401]
    many = [Prompt(Example(i, f"{i}?", ("1",))) for i in range(40)]
    with pytest.raises(ScorerError):
        scorer_of(server, tokenizer, batch_size=1, concurrency=1).score(many)
    assert len(server.requests) < 10


def test_answers(server, model, tokenizer, prompts):
    def greedy(prompt):
        ids = tokenizer(PromptTemplate().text(list(prompt.demonstrations), prompt.query)).input_ids
        inputs = torch.tensor([ids])
        new = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=5, do_sample=False)
        return tokenizer.decode(new[0, len(ids) :], skip_special_tokens=True).split("\n")[0].strip()

    expected = [greedy(prompt) for prompt in prompts]
    assert len(set(expected)) > 2
    assert scorer_of(server, tokenizer, batch_size=4).answer(prompts, max_new_tokens=5) == expected
    body = server.requests[0][2]
    assert body["max_tokens"] == 5 and body["stop"] == ["\n"] and body["repetition_penalty"] == 1.0
    assert "prompt_logprobs" not in body


def test_an_answer_that_has_no_room(server, tokenizer, rows):
    scorer = scorer_of(server, tokenizer)
    short, long = Prompt(rows[1]), Prompt(rows[1], tuple(rows[2:5]))
    first, second = scorer.answer([short, long], max_new_tokens=30)
    assert isinstance(first, str) and second is None


def test_describe(server, tokenizer):
    described = scorer_of(server, tokenizer, api_key=KEY).describe()
    text = json.dumps(described)
    assert described["model"] == MODEL and described["server_version"] == "0.11.0"
    assert described["server_max_length"] == LIMIT
    assert described["template"]["answer"] == " {answer}"
    assert KEY not in text and "/disk" not in text and "127.0.0.1" not in text
    server.pages = False  # a server that tells neither
    described = scorer_of(server, tokenizer).describe()
    assert described["model"] == MODEL and described["server_version"] is None
    server.pages = True
    with pytest.raises(ScorerError, match=r"does not serve the model 'other', but \['tiny-llama'\]"):
        VLLMScorer(server.url, "other", tokenizer).describe()


def test_describe_of_a_model_served_by_its_path(server, tokenizer):
    server.pages = False
    assert VLLMScorer(server.url, "/some/where/model", tokenizer).describe()["model"] == "model"


def test_the_key_is_sent_in_its_header_only(server, tokenizer, rows, monkeypatch, caplog):
    with caplog.at_level(logging.DEBUG):
        scorer_of(server, tokenizer, api_key=KEY).score([Prompt(rows[0])])
        monkeypatch.setenv("VLLM_API_KEY", "of-the-environment")
        scorer_of(server, tokenizer).score([Prompt(rows[0])])
        scorer_of(server, tokenizer, api_key="").score([Prompt(rows[0])])  # none, whatever the environment says
    first, second, third = server.requests
    assert first[1]["Authorization"] == f"Bearer {KEY}"
    assert second[1]["Authorization"] == "Bearer of-the-environment"
    assert "Authorization" not in third[1]
    assert KEY not in json.dumps(first[2]) and KEY not in caplog.text


def test_the_url_may_end_in_v1(server, model, tokenizer, prompts):
    scorer = VLLMScorer(server.url + "/v1/", MODEL, tokenizer)
    check(scorer.score(prompts[:2]), model, tokenizer, prompts[:2])


def test_from_pretrained_loads_the_tokenizer(server, model, tokenizer, prompts, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    scorer = VLLMScorer.from_pretrained(server.url, MODEL, tmp_path, batch_size=2)
    check(scorer.score(prompts), model, tokenizer, prompts)


def test_an_answer_without_tokens(server, tokenizer, rows, caplog):
    scorer = scorer_of(server, tokenizer)
    scorer._tokens._known[" 2", ""] = ()
    assert scorer.score([Prompt(rows[1])]) == [None]
    assert "query 1" in caplog.text and "has no tokens" in caplog.text and not server.requests


@pytest.mark.parametrize(
    "url, options, told",
    [
        ("file:///etc/hosts", {}, "not an address"),
        ("localhost:8000", {}, "not an address"),
        ("http://user:word@localhost", {}, "holds a user name"),
        ("http://localhost?key=1", {}, "more than a path"),
        ("http://localhost", {"batch_size": 0}, "batch_size=0"),
        ("http://localhost", {"concurrency": 0}, "concurrency=0"),
        ("http://localhost", {"timeout": 0}, "timeout=0"),
        ("http://localhost", {"retries": -1}, "retries=-1"),
    ],
)
def test_bad_settings(tokenizer, url, options, told):
    with pytest.raises(ValueError, match=told) as caught:
        VLLMScorer(url, MODEL, tokenizer, **options)
    assert "word" not in str(caught.value).replace("password", "")


def test_nothing_to_score(server, tokenizer):
    scorer = scorer_of(server, tokenizer)
    assert scorer.score([]) == [] and scorer.answer([]) == [] and not server.requests

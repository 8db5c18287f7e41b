"""The HTML page of an evaluation: as text, and in a browser where there is one."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from report_browser import ask_browser

from lever_grpo.report import MethodResult, build_report, write_html
from lever_grpo.report.plots import _spread, plot_gains, plot_shots


METHODS = ["zero_shot", "random", "similarity", "similarity_all", "sft", "agreement", "rce", "grpo", "oracle"]
SKILL = dict(zip(METHODS, [0.25, 0.42, 0.5, 0.51, 0.55, 0.56, 0.6, 0.64, 0.85], strict=True))
HOSTILE = (
    "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"><!-- '\" &"
)
COLORS = ["red", "green", "blue", "yellow", "brown", "white"]


def evaluation(queries=45, methods=METHODS, shots=("1", "2"), images=True, seed=0):
    """Made-up questions on colours, with methods that differ in skill."""
    rng = np.random.default_rng(seed)
    pictures = [square(color) for color in COLORS] if images else [None] * len(COLORS)
    truth = rng.integers(0, len(COLORS), queries)
    hardness = rng.random(queries)
    metrics = {"accuracy": {}, "log_prob": {}}
    picks = [{count: {} for count in shots} for _ in range(queries)]
    for count in shots:
        rows = {"accuracy": [], "log_prob": []}
        for method in methods:
            skill = SKILL.get(method, 0.5) + (0 if method == "zero_shot" else 0.04 * int(count))
            right = (hardness + rng.normal(0, 0.15, queries) < skill).astype(float)
            log_prob = 4.0 * (skill - hardness) - 3.0 + rng.normal(0, 0.2, queries)
            rows["accuracy"].append(MethodResult(method, right))
            rows["log_prob"].append(MethodResult(method, log_prob))
            for i in range(queries):
                answer = COLORS[truth[i] if right[i] else (truth[i] + 1) % len(COLORS)]
                picked = [] if method == "zero_shot" else rng.integers(0, 60, int(count)).tolist()
                picks[i][count][method] = {
                    "demonstrations": [
                        {
                            "id": d,
                            "question": f"What color is object {d}?",
                            "answer": COLORS[d % 6],
                            "image": pictures[d % 6],
                        }
                        for d in picked
                    ],
                    "answer": answer,
                    "accuracy": right[i],
                    "log_prob": log_prob[i],
                }
        for name, results in rows.items():
            metrics[name][count] = build_report(results, reward_name=name.replace("_", "-"), resamples=500)
    return {
        "title": "Colours, held-out",
        "settings": {"model": "a made-up one", "pool": 60, "shots": list(shots)},
        "notes": ["The numbers are made up."],
        "metrics": metrics,
        "gallery": [
            {
                "query_id": i,
                "question": f"What color is the square in picture {i}?",
                "answers": [COLORS[truth[i]]] * 3 + ["dark " + COLORS[truth[i]]],
                "image": pictures[truth[i]],
                "picks": picks[i],
            }
            for i in range(queries)
        ],
    }


def square(color, size=400):
    """A PNG of one colour, larger than the page needs."""
    pillow = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    pillow.new("RGB", (size, size // 2), color).save(stream, "PNG")
    return stream.getvalue()


def hostile_evaluation():
    """Markup wherever a text of the data comes in."""
    page = evaluation(queries=3, methods=["random", f"grpo_{HOSTILE}", "oracle"], images=False)
    page |= {"title": HOSTILE, "notes": [HOSTILE], "settings": {HOSTILE: [HOSTILE], "link": "javascript:alert(1)"}}
    page["metrics"] = {HOSTILE: page["metrics"]["accuracy"]}
    for query in page["gallery"]:
        query |= {"query_id": HOSTILE, "question": HOSTILE, "answers": [HOSTILE, "javascript:alert(1)"]}
        for by_method in query["picks"].values():
            for pick in by_method.values():
                pick["answer"] = HOSTILE
                pick["demonstrations"] = [{"id": HOSTILE, "question": HOSTILE, "answer": HOSTILE}]
    return page


class Parser(HTMLParser):
    """The tags in order, the cells of the tables, and the texts of the scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.scripts, self.open = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = tag if tag in ("th", "td", "script") else self.open
        if self.open == tag:
            (self.scripts if tag == "script" else self.cells).append("")

    def handle_endtag(self, tag):
        self.open = None if tag == self.open else self.open

    def handle_data(self, text):
        if self.open:
            (self.scripts if self.open == "script" else self.cells)[-1] += text


def nearest(number, cells):
    """The mean that stands first in a cell and comes nearest to the number."""
    means = [float(cell.split()[0]) for cell in cells if re.match(r"-?\d+\.\d+ \[", cell)]
    return min(means, key=lambda mean: abs(mean - number))


def page_of(page, tmp_path):
    text = write_html(page, tmp_path / "report.html").read_text(encoding="utf-8")
    return text, Parser(text)


# The page as text


def test_tables_show_the_numbers_of_the_reports(tmp_path):
    content = evaluation()
    _, page = page_of(content, tmp_path)
    for reports in content["metrics"].values():
        for report in reports.values():
            for row in report["methods"].values():
                assert row["reward"]["mean"] == pytest.approx(nearest(row["reward"]["mean"], page.cells), abs=0.0051)
            for row in report["paired"].values():
                side = "above 0" if row["ci_low"] > 0 else "below 0" if row["ci_high"] < 0 else "includes 0"
                assert any(f"p = {row['p_value']:.4f}" in cell and side in cell for cell in page.cells)


def test_the_best_is_bold_zero_shot_and_oracle_aside(tmp_path):
    content = evaluation(shots=("1",))
    text, page = page_of(content, tmp_path)
    methods = content["metrics"]["accuracy"]["1"]["methods"]
    best = max(
        (name for name in methods if name not in ("zero_shot", "oracle")), key=lambda m: methods[m]["reward"]["mean"]
    )
    bold = re.findall(r"<strong>([^ <]+)", text)
    assert float(bold[0]) == pytest.approx(methods[best]["reward"]["mean"], abs=1e-3)
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "tr"].count("apart") == 2 * len(
        content["metrics"]
    )


def test_nothing_comes_from_elsewhere(tmp_path):
    text, page = page_of(evaluation(), tmp_path)
    addresses = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "action")]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML", text)
    assert "default-src 'none'" in text


def test_images_are_small_and_stored_once(tmp_path):
    content = evaluation()
    _, page = page_of(content, tmp_path)
    data = json.loads(page.scripts[0])
    assert len(data["images"]) == len(COLORS)
    from PIL import Image

    for uri in data["images"]:
        head, _, body = uri.partition(",")
        assert head == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(body))) as picture:
            assert picture.size == (160, 80)


def test_an_image_may_be_a_file_and_must_be_readable(tmp_path):
    content = evaluation(queries=1, images=False)
    content["gallery"][0]["image"] = tmp_path / "a.png"
    with pytest.raises(FileNotFoundError, match="a.png"):
        write_html(content, tmp_path / "report.html")
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image '.*a.png' cannot be read .*; give a whole image file, or None"):
        write_html(content, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "a.png").write_bytes(square("red"))
    _, page = page_of(content, tmp_path)
    assert len(json.loads(page.scripts[0])["images"]) == 1


def test_without_pillow_images_stay_as_they_are(tmp_path, monkeypatch):
    content = evaluation(queries=1)
    monkeypatch.setitem(sys.modules, "PIL", None)
    _, page = page_of(content, tmp_path)
    assert json.loads(page.scripts[0])["images"][0].startswith("data:application/octet-stream;base64,iVBOR")


def test_hostile_texts_stay_texts(tmp_path):
    text, page = page_of(hostile_evaluation(), tmp_path)
    assert len(page.scripts) == 2 and not any(tag == "img" for tag, _ in page.tags)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert not any(
        "javascript:" in (value or "") for _, attrs in page.tags for key, value in attrs.items() if key == "href"
    )
    assert "<!--" not in text and text.count("</script") == 2
    assert json.loads(page.scripts[0])["queries"][0]["question"] == HOSTILE  # and all of the text is there


def test_300_queries_stay_below_5_megabytes(tmp_path):
    content = evaluation(queries=300, methods=[*METHODS, "grpo_literal"], shots=("1", "2", "4"), images=False)
    text, _ = page_of(content, tmp_path)
    assert len(text.encode()) < 5e6


def test_no_metric_and_no_number_are_errors(tmp_path):
    with pytest.raises(ValueError, match="give at least one metric"):
        write_html({"metrics": {}}, tmp_path / "a.html")
    content = evaluation(queries=1, images=False)
    content["gallery"][0]["picks"]["1"]["grpo"]["log_prob"] = float("nan")
    with pytest.raises(ValueError, match=r"gallery.queries\[0\].picks.* is nan"):
        write_html(content, tmp_path / "a.html")


def test_a_page_may_have_tables_only(tmp_path):
    report = build_report([MethodResult("sft", [0.0, 1.0])])
    text, page = page_of({"metrics": {"reward": {1: report}}}, tmp_path)
    assert not page.scripts and "1 methods" not in text


def test_what_is_missing_is_left_out(tmp_path):
    content = evaluation(queries=2, images=False)
    del content["metrics"]["accuracy"]["2"]["methods"]["grpo"]
    del content["metrics"]["accuracy"]["1"]["paired"]["grpo_minus_sft"]
    for by_method in content["gallery"][0]["picks"].values():
        by_method["grpo"] = {"demonstrations": []}
    _, page = page_of(content, tmp_path)
    assert "–" in page.cells
    assert json.loads(page.scripts[0])["queries"][0]["picks"][0][7] == [[], None, None, None]


# The plots' coordinates


def test_plots_keep_the_order_of_the_numbers():
    reports = evaluation(images=False)["metrics"]["log_prob"]
    plot = plot_shots(reports)
    drawn = {line["label"]: line["points"] for line in plot["lines"]}
    assert [len(points) for points in drawn.values()] == [2] * len(drawn)
    assert drawn["oracle"][0]["mean"] < drawn["GRPO"][0]["mean"] < drawn["random"][0]["mean"]  # y grows downwards
    assert all(p["ci_high"] <= p["mean"] <= p["ci_low"] for points in drawn.values() for p in points)
    for panel in plot_gains(reports)["panels"]:
        for dot, row in zip(panel["dots"], reports[panel["shots"]]["paired"].values(), strict=True):
            assert (dot["mean"] > panel["zero"]) == (row["mean"] > 0)
            assert dot["hollow"] == (row["ci_low"] <= 0 <= row["ci_high"])


def test_a_zero_shot_far_below_is_named_and_not_drawn():
    rows = {"zero_shot": [-90.0, -90.0], "random": [0.0, 1.0], "grpo": [1.0, 2.0]}
    plot = plot_shots({"1": build_report([MethodResult(name, rewards) for name, rewards in rows.items()])})
    assert plot["below"] == ["zero-shot"] and [line["label"] for line in plot["lines"]] == ["random", "GRPO"]


def test_labels_are_spread():
    assert _spread([10.0, 11.0, 50.0], 5.0, 0.0, 100.0) == [10.0, 15.0, 50.0]
    assert _spread([99.0, 98.0], 5.0, 0.0, 100.0) == [100.0, 95.0]


# The page in a browser


def browse(page, steps, **options):
    """What the page answers to the steps, with nothing on the console and nothing asked for beside itself."""
    answer = ask_browser(page, steps, **options)
    assert answer["console"] == []
    assert {url.partition(":")[0] for url in answer["requests"]} <= {"file", "data"}
    assert len([url for url in answer["requests"] if url.startswith("file")]) == 1
    return answer["steps"]


def choose(name, value):
    """JavaScript that sets a control as a person would."""
    set_it = f"c.value = {json.dumps(value)}; c.dispatchEvent(new Event('input', {{bubbles: true}}))"
    return f"((c) => {{ {set_it} }})(controls.elements.{name})"


def test_gallery_and_plots_are_drawn(tmp_path):
    page = write_html(evaluation(), tmp_path / "report.html")
    seen = browse(
        page,
        {
            "cards": "document.querySelectorAll('.card').length",
            "rows": "document.querySelectorAll('.card:first-child .method').length",
            "plots": "[...document.querySelectorAll('svg')].map((s) => s.getBoundingClientRect().height)",
            "dots": "[...document.querySelectorAll('svg .dot')].map((s) => s.getBoundingClientRect().width)",
            "images": "[...document.images].map((i) => i.naturalWidth)",
            "alt": "[...document.images].every((i) => i.alt.length > 0)",
            "wide": "document.documentElement.scrollWidth <= innerWidth",
        },
        screenshot=tmp_path / "light.png",
    )
    assert seen["cards"] == 20 and seen["rows"] == len(METHODS)
    assert len(seen["plots"]) == 4 and min(seen["plots"]) > 100
    assert min(seen["dots"]) > 5 and seen["wide"] and seen["alt"]
    assert set(seen["images"]) == {160}
    assert (tmp_path / "light.png").stat().st_size > 10_000


def test_the_controls_filter(tmp_path):
    content = evaluation()
    page = write_html(content, tmp_path / "report.html")
    status = "byId('status').textContent"
    versus = [
        q
        for q in content["gallery"]
        if q["picks"]["2"]["grpo"]["accuracy"] > q["picks"]["2"]["similarity"]["accuracy"]
    ]
    differ = [
        q
        for q in content["gallery"]
        if len({q["picks"]["1"][method]["answer"] for method in METHODS if method != "oracle"}) > 1
    ]
    seen = browse(
        page,
        {
            "start": status,
            "turn": "byId('next').click()",
            "second": status,
            "last": "(byId('next').click(), [byId('next').disabled, document.querySelectorAll('.card').length])",
            "search": choose("search", "picture 44"),
            "found": f"[{status}, document.querySelector('.card h3').textContent]",
            "nothing": choose("search", "no such thing"),
            "none": status,
            "all": choose("search", ""),
            "versus": choose("show", "versus"),
            "right": f"[{status}, byId('versus').hidden]",
            "one": choose("shots", "0"),
            "differ": choose("show", "differ"),
            "oracle": "document.querySelector('[name=method][value=\"8\"]').click()",
            "differing": f"[{status}, document.querySelectorAll('.card:first-child .method').length]",
            "prompt": "document.querySelectorAll('.card:first-child .method:nth-of-type(3) .prompt li').length",
        },
    )
    assert seen["start"] == "45 of 45 queries, 1 to 20 shown"
    assert seen["second"] == "45 of 45 queries, 21 to 40 shown" and seen["last"] == [True, 5]
    assert seen["found"] == ["1 of 45 queries, 1 to 1 shown", "What color is the square in picture 44?"]
    assert seen["none"] == "0 of 45 queries"
    assert seen["right"][0].startswith(f"{len(versus)} of 45 queries") and seen["right"][1] is False
    assert seen["differing"][0].startswith(f"{len(differ)} of 45 queries") and seen["differing"][1] == 8
    assert seen["prompt"] == 1


def test_hostile_texts_do_nothing_in_a_browser(tmp_path):
    page = write_html(hostile_evaluation(), tmp_path / "report.html")
    seen = browse(
        page,
        {
            "title": "document.title",
            "cards": "document.querySelectorAll('.card').length",
            "scripts": "document.scripts.length",
            "images": "document.images.length",
            "question": "document.querySelector('.card h3').textContent",
        },
    )
    assert seen == {"title": HOSTILE, "cards": 3, "scripts": 2, "images": 0, "question": HOSTILE}


def test_images_without_pillow_are_shown(tmp_path, monkeypatch):
    content = evaluation(queries=2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        page = write_html(content, tmp_path / "report.html")
    assert set(browse(page, {"images": "[...document.images].map((i) => i.naturalWidth)"})["images"]) == {400}


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out(tmp_path, dark):
    """Contrast of WCAG 2.2, success criteria 1.4.3 (texts, 4.5) and 1.4.11 (lines of the plots, 3)."""
    page = write_html(evaluation(queries=1, images=False), tmp_path / "report.html")
    contrast = """(() => {
      const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
      const light = (color) => {
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((c) => {
          c /= 255;
          return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
      };
      const against = (front, back) => Math.max(light(front) / light(back), light(back) / light(front));
      const of = (query, key) => [...document.querySelectorAll(query)].map((n) => getComputedStyle(n)[key]);
      const backs = [of("section", "backgroundColor")[0], of("body", "backgroundColor")[0]];
      const least = (colors) => Math.min(...colors.map((c) => Math.min(...backs.map((b) => against(c, b)))));
      return [least(of("p, td, th, small, h1, h2, h3, h4, a, .verdict", "color")),
        least(of("svg text", "fill")), least(of(".series .dot:not(.hollow)", "fill")), light(backs[1]) < 0.2];
    })()"""
    text, label, dot, is_dark = browse(page, {"contrast": contrast}, dark=dark)["contrast"]
    assert is_dark == dark
    assert min(text, label) >= 4.5 and dot >= 3.0

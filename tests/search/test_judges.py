"""What answers are worth, and the column that has it."""

import pytest
from test_beam_search import ROWS, Known, load

from lever_grpo.data import Example
from lever_grpo.metrics import vqa_accuracy
from lever_grpo.pipeline.evaluate import make_judges
from lever_grpo.search import SearchConfig, answer_accuracy, beam_search
from lever_grpo.search.judges import make_judge


CAPTIONS = [
    ("A black cat sleeps on a bed.", "A cat on the bed"),
    ("Two dogs run in the park.", "Dogs run after a ball"),
    ("A red bus drives down the street.",),
    ("People wait for a bus in the street.",),
]
SAID = ["A cat sleeps on a red bed", "two dogs run", "a bus in the street"]
TASK = [Example(i, "Caption:", CAPTIONS[i % len(CAPTIONS)]) for i in range(10)]


class Speaker(Known):
    """Says something about the demonstrations, or nothing."""

    def answer(self, prompts, max_new_tokens=10):
        self.max_new_tokens = max_new_tokens
        return [[*SAID, None][sum(d.id for d in prompt.demonstrations) % 4] for prompt in prompts]


@pytest.fixture
def judge():
    pytest.importorskip("pycocoevalcap.cider.cider")
    return make_judge("cider", iter(TASK))


@pytest.mark.parametrize(
    "answer, references, accuracy",
    [
        ("the  Red, apple!", ["red apple"], 1.0),
        ("red", ["red apple"], 0.0),
        ("", ["red"], 0.0),
        # ten references or more: the VQA challenge's rules
        ("yes", ["yes"] * 3 + ["no"] * 7, 0.9),
        ("yes", ["yes"] + ["no"] * 9, 0.3),
        ("two", ["2"] * 4 + ["3"] * 7, 1.0),
        # fewer: one of them is enough, and number words are words
        ("yes", ["yes", "yeah", "yep", "y"], 1.0),
        ("two", ["2"] * 4 + ["3"] * 5, 0.0),
    ],
)
def test_answer_accuracy(answer, references, accuracy):
    assert answer_accuracy(answer, references) == pytest.approx(accuracy)
    assert make_judge("accuracy")(answer, references) == pytest.approx(accuracy)


def test_all_questions_of_a_task_have_one_metric():
    # of ten people: load_vqa leaves the blank answer of one out, the official script counts it
    said = ["dog", *["cat"] * 4, *["hat"] * 3, "dots"]
    rows = [Example(0, "?", tuple(said)), *(Example(i, "?", ("yes",) * 10) for i in (1, 2))]
    judge = make_judge("accuracy", rows)
    for answer in ("dog", "a cat", "hat", "cow"):
        assert judge(answer, said) == vqa_accuracy(answer, ["", *said])
    assert judge("dog", said) == 0.3 and judge("Yes", ["yes"] * 10) == 0.0
    # a row with many names of what is right is not judged by ten people
    judge = make_judge("accuracy", [Example(0, "?", tuple("abcdefghijk")), *(Example(i, "?", ("a",)) for i in (1, 2))])
    assert judge("c", tuple("abcdefghijk")) == 1.0


@pytest.mark.parametrize("judged", ["search", "evaluation"])
def test_who_judges_a_row_sees_the_whole_task(judged):
    rows = [Example(i, "?", ("cat", *["dog"] * (8 if i == 0 else 9))) for i in range(4)]
    if judged == "evaluation":
        assert make_judges(["accuracy"], rows)["accuracy"]("cat", rows[0].answers) == 0.3
        return
    records, _ = beam_search(Known(), rows[:1], [rows[1:]], SearchConfig(1, judge="all"))
    assert records[0]["columns"]["correct"] == [0.3, 0.3, None]


@pytest.mark.parametrize("asked", ["survivors", "all"])
def test_cider_of_answers(tmp_path, judge, asked):
    from lever_grpo.metrics.cider import cider

    config, scorer = SearchConfig(2, 3, judge=asked, judge_by="cider"), Speaker()
    records, failures = beam_search(scorer, TASK[:3], [TASK[4:9]] * 3, config, judge=judge)
    assert not failures and scorer.max_new_tokens == 30
    corpus = [row.answers for row in TASK]
    for query, record in zip(TASK[:3], records, strict=True):
        assert list(record["columns"]) == config.columns == ["log_prob", "cider"]
        for sequence, survived, value in zip(
            record["sequences"], record["survived"], record["columns"]["cider"], strict=True
        ):
            said = [*SAID, None][sum(record["candidate_ids"][p] for p in sequence) % 4]
            if said is None or asked == "survivors" and not survived:
                assert value is None
            else:
                assert value == cider([said], [query.answers], corpus)[0]
    values = [value for record in records for value in record["columns"]["cider"] if value]
    assert len(set(values)) >= 2 and max(values) > 1
    assert [row["columns"] for row in load(records, tmp_path)] == [record["columns"] for record in records]


def test_batches_do_not_change_cider(judge):
    """As in a run in shards: one judge of all rows, some queries in each search."""
    config, pools = SearchConfig(2, 3, judge="all", judge_by="cider"), [TASK[4:9]] * 4
    together = beam_search(Speaker(), TASK[:4], pools, config, judge=judge)[0]
    apart = [
        beam_search(Speaker(), [query], [pool], config, judge=make_judge("cider", TASK))[0][0]
        for query, pool in zip(TASK[:4], pools, strict=True)
    ]
    assert apart == together


def test_cider_needs_the_judge_of_the_task():
    config = SearchConfig(judge="all", judge_by="cider")
    with pytest.raises(ValueError, match=r'judge=make_judge\("cider", rows\)'):
        beam_search(Known(), ROWS[:1], [ROWS[10:16]], config)
    # nobody is judged
    records, _ = beam_search(Known(), ROWS[:1], [ROWS[10:16]], SearchConfig(judge_by="cider"))
    assert list(records[0]["columns"]) == ["log_prob"]


def test_a_judge_of_ones_own():
    config = SearchConfig(judge="all")
    records, _ = beam_search(Speaker(), TASK[:1], [TASK[4:9]], config, judge=lambda answer, _: float(len(answer)))
    assert set(records[0]["columns"]["correct"]) <= {None, *map(len, SAID)}


def test_cider_as_the_reward(tmp_path, judge):
    class Talker(Speaker):
        def answer(self, prompts, max_new_tokens=10):
            return [text or "a bed" for text in super().answer(prompts)]

    config = SearchConfig(2, 3, judge="all", judge_by="cider")
    records, _ = beam_search(Talker(), TASK[:3], [TASK[4:9]] * 3, config, judge=judge)
    rows = load(records, tmp_path, score_column="cider")
    assert [row["scores"] for row in rows] == [record["columns"]["cider"] for record in records]


def test_wrong_judges(judge):
    with pytest.raises(ValueError, match="judge_by='bleu' must be one of accuracy, cider"):
        make_judge("bleu")
    with pytest.raises(ValueError, match=r"the corpus has 0 item\(s\)"):
        make_judge("cider")

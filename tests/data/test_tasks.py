"""Task files in every form a user may have them, and what is said of those that cannot be read."""

import gzip
import io
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture

from lever_grpo.data import BeamDataError, Example, load_sample
from lever_grpo.data.tasks import load_examples, load_okvqa, load_vqa, load_vqav2, sample_examples


RECORDS = [
    {"id": 4, "question": "Capital of Peru?", "answers": ["Lima", "lima"], "entity": "Peru"},
    {"id": 0, "question": "Capital of Chile?", "answers": ["Santiago"], "entity": None},
]
EXAMPLES = [
    Example(4, "Capital of Peru?", ("Lima", "lima"), entity="Peru"),
    Example(0, "Capital of Chile?", ("Santiago",)),
]


def png() -> bytes:
    stream = io.BytesIO()
    Picture.new("RGB", (3, 2), "red").save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def write(tmp_path):
    def write(*records, name="task.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, records)) + "\n")
        return path

    return write


def record(**changes):
    fields = {"id": 1, "question": "What?", "answers": ["this"], **changes}
    return {name: value for name, value in fields.items() if value is not ...}


# ---------------------------------------------------------------- files


def test_every_kind_of_file_gives_the_same_examples(tmp_path, write):
    plain = write(*RECORDS)
    (tmp_path / "packed").write_bytes(gzip.compress(plain.read_bytes()))
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "no_suffix")
    Dataset.from_list(RECORDS).save_to_disk(tmp_path / "folder")
    for path in (plain, str(plain), tmp_path / "packed", tmp_path / "no_suffix", tmp_path / "folder"):
        assert load_examples(path) == EXAMPLES, path


def test_text_ids_become_positions_and_one_answer_needs_no_list(write):
    path = write({"id": "b", "question": "?", "answer": "x"}, {"id": "a", "question": "!", "answer": "y"})
    assert load_examples(path) == [
        Example(0, "?", ("x",), external_id="b"),
        Example(1, "!", ("y",), external_id="a"),
    ]


def test_whole_number_entities_become_text(write):
    assert load_examples(write(record(entity=7)))[0].entity == "7"


def test_images_as_paths_bytes_and_structs(tmp_path, write):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    assert load_examples(write(record(image="pictures/a.png")))[0].image == tmp_path / "pictures" / "a.png"
    assert load_examples(write(record(image="pictures/../pictures/a.png")))[0].image.name == "a.png"
    rows = [record(image={"bytes": png(), "path": "gone.png"}), record(id=2, image={"bytes": None, "path": None})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "structs.parquet")
    assert [example.image for example in load_examples(tmp_path / "structs.parquet")] == [png(), None]
    pq.write_table(pa.Table.from_pylist([record(image=png())]), tmp_path / "bytes.parquet")
    assert load_examples(tmp_path / "bytes.parquet")[0].image == png()


def test_images_of_a_dataset_are_not_decoded(tmp_path):
    features = Features(
        {"id": Value("int64"), "question": Value("string"), "answer": Value("string"), "image": Image()}
    )
    row = {"id": 3, "question": "?", "answer": "x", "image": {"bytes": png(), "path": None}}
    Dataset.from_list([row], features=features).save_to_disk(tmp_path / "folder")
    assert load_examples(tmp_path / "folder") == [Example(3, "?", ("x",), png())]


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ...}, "field 'id'.*missing or null"),
        ({"id": -1}, "field 'id'.*found -1"),
        ({"id": 1.5}, "field 'id'.*found 1.5"),
        ({"id": True}, "field 'id'.*found True"),
        ({"question": ...}, "field 'question'.*missing or null"),
        ({"question": " "}, "field 'question'.*not blank, found ' '"),
        ({"answers": ...}, r"field 'answers'.*one text as 'answer', found \['id', 'question'\]"),
        ({"answers": []}, r"field 'answers'.*at least one answer, found \[\]"),
        ({"answers": ["a", ""]}, r"field 'answers\[1\]'.*not blank, found ''"),
        ({"answers": "this"}, "field 'answers'.*a list, found 'this'"),
        ({"answers": ..., "answer": 3}, "field 'answer'.*found 3"),
        ({"image": "no.png"}, "field 'image'.*a file in .*found 'no.png'"),
        ({"image": "../secret.png"}, "field 'image'.*a path inside .*found '../secret.png'"),
        ({"image": "a/../../secret.png"}, "field 'image'.*a path inside"),
        ({"image": "/etc/hostname"}, "field 'image'.*a path inside"),
        ({"image": 3}, "field 'image'.*found 3"),
        ({"entity": [1]}, r"field 'entity'.*found \[1\]"),
    ],
)
def test_a_bad_record_is_named_with_its_field(tmp_path, write, changes, message):
    (tmp_path / "below").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    path = write(record(id=9), record(**changes), name="below/task.jsonl")
    with pytest.raises(BeamDataError, match=f"task.jsonl: line 2, {message}"):
        load_examples(path)


def test_bad_records_are_counted_and_the_first_ones_listed(write):
    records = [record(id=i, image=f"gone-{i}.png") for i in range(7)] + [record(id=7, answers=[""]), record(id=8)]
    with pytest.raises(BeamDataError, match="8 of 9 records cannot be used") as caught:
        load_examples(write(*records))
    lines = str(caught.value).splitlines()
    assert len(lines) == 7 and "line 1, field 'image'" in lines[1] and lines[-1].strip() == "… and 3 more"


def test_ids_are_unique_and_of_one_kind(write):
    with pytest.raises(BeamDataError, match="line 3, field 'id'.*each id once, found 1; it is also that of line 1"):
        load_examples(write(record(id=1), record(id=2), record(id=1)))
    with pytest.raises(BeamDataError, match="line 2, field 'id'.*texts in all, found 'a'"):
        load_examples(write(record(id=1), record(id="a")))


def test_files_that_are_no_task(tmp_path, write):
    with pytest.raises(FileNotFoundError, match="nothing there"):
        load_examples(tmp_path / "none.jsonl")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(BeamDataError, match="at least one record"):
        load_examples(tmp_path / "empty")
    (tmp_path / "cut").write_text('{"id": 1, "question": "?", "answer": "x"}\n{"id": 2, "que')
    with pytest.raises(BeamDataError, match="cut: line 2: expected one JSON record a line"):
        load_examples(tmp_path / "cut")
    (tmp_path / "array").write_text("[1, 2]")
    with pytest.raises(BeamDataError, match=r"line 1, field 'record'.*found \[1, 2\]"):
        load_examples(tmp_path / "array")
    packed = gzip.compress(write(*RECORDS).read_bytes())
    (tmp_path / "packed").write_bytes(packed[:-9])
    with pytest.raises(BeamDataError, match="packed: expected a file that can be unpacked"):
        load_examples(tmp_path / "packed")
    (tmp_path / "half.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(BeamDataError, match="half.parquet: expected a Parquet file"):
        load_examples(tmp_path / "half.parquet")
    (tmp_path / "other").mkdir()
    with pytest.raises(BeamDataError, match="save_to_disk"):
        load_examples(tmp_path / "other")
    DatasetDict(a=Dataset.from_list(RECORDS), b=Dataset.from_list(RECORDS)).save_to_disk(tmp_path / "splits")
    with pytest.raises(BeamDataError, match=r"one split, found \['a', 'b'\]"):
        load_examples(tmp_path / "splits")
    assert load_examples(tmp_path / "splits" / "a") == EXAMPLES


# ---------------------------------------------------------------- the official layouts


def ten(*given, raw=False):
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": i, **({"raw_answer": answer + "s"} if raw else {})}
        for i, answer in enumerate(given, start=1)
    ]


OKVQA = ["racing"] * 4 + ["motocross"] * 4 + ["ride"] * 2
VQAV2 = ["net", "mesh", "net", "netting", "mesh", "net", "mesh", "pitcher", "orange", "net"]


@pytest.fixture
def vqa(tmp_path):
    """The two files and the folder of images in the layout of OK-VQA or VQAv2, changed by a function of both."""

    def vqa(kind="okvqa", change=lambda questions, annotations: None):
        about = {"info": {"version": "1.0"}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
        questions = about | {
            "task_type": "Open-Ended",
            "questions": [
                {"image_id": 297147, "question": "What sport can you use this for?", "question_id": 2971475},
                {"image_id": 297147, "question": "What colour is it?", "question_id": 2971476},
                {"image_id": 9, "question": "What is behind the catcher?", "question_id": 95},
            ],
        }
        raw = kind == "okvqa"
        annotations = about | {
            "annotations": [
                # not in the order of the questions
                {"image_id": 9, "question_id": 95, "answers": ten(*VQAV2, raw=raw)},
                {"image_id": 297147, "question_id": 2971475, "answers": ten(*OKVQA, raw=raw)},
                {"image_id": 297147, "question_id": 2971476, "answers": ten(*["red"] * 10, raw=raw)},
            ]
        }
        for entry in annotations["annotations"]:
            entry |= {"question_type": "one", "answer_type": "other"}
            entry |= {"confidence": 3} if raw else {"multiple_choice_answer": entry["answers"][0]["answer"]}
        change(questions, annotations)
        paths = tmp_path / "questions.json", tmp_path / "annotations.json", tmp_path / "val2014"
        paths[2].mkdir(exist_ok=True)
        for image_id in (297147, 9):
            (paths[2] / f"COCO_val2014_{image_id:012d}.jpg").write_bytes(png())
        for path, content in zip(paths, (questions, annotations), strict=False):
            path.write_text(json.dumps(content))
        return paths

    return vqa


@pytest.mark.parametrize(("load", "kind"), [(load_okvqa, "okvqa"), (load_vqav2, "vqav2"), (load_vqa, "okvqa")])
def test_official_layout(vqa, load, kind):
    paths = vqa(kind)
    first, _, third = load(*paths)
    assert first.question == "What sport can you use this for?" and (first.id, first.external_id) == (0, "2971475")
    assert first.image == paths[2] / "COCO_val2014_000000297147.jpg" and first.image.is_file()
    assert (first.entity, third.entity) == ("297147", "9")
    assert first.answers == tuple(OKVQA)  # a tie: the first given stays in front
    # the most frequent in front, all ten kept, the others in their order
    assert third.answers == ("net", "mesh", "net", "netting", "mesh", "net", "mesh", "pitcher", "orange", "net")
    assert [example.image for example in load(*paths[:2])] == [None] * 3


def test_the_most_frequent_answer_moves_to_the_front_and_none_is_lost(vqa):
    rng = np.random.default_rng(0)
    given = [rng.choice(["a", "b", "c", "d"], 10).tolist() for _ in range(3)]

    def change(_, annotations):
        for entry, answers in zip(annotations["annotations"], given, strict=True):
            entry["answers"] = ten(*answers)

    examples = {example.external_id: example.answers for example in load_vqa(*vqa(change=change))}
    for key, answers in zip(("95", "2971475", "2971476"), given, strict=True):
        found = examples[key]
        most = max(map(answers.count, answers))
        assert found[0] == next(answer for answer in answers if answers.count(answer) == most)
        rest = answers.copy()
        rest.remove(found[0])
        assert list(found[1:]) == rest


def test_blank_answers_are_left_out_with_a_warning_that_counts(vqa, caplog):
    def change(_, annotations):
        annotations["annotations"][0]["answers"][0]["answer"] = " "

    with caplog.at_level(logging.WARNING):
        examples = load_vqa(*vqa(change=change))
    assert len(examples[2].answers) == 9 and "blank answers of 1 questions were left out: 95" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, a: q["questions"][1].pop("image_id"), "questions.json: question 1, field 'image_id'"),
        (lambda q, a: q["questions"][2].update(question_id=2971475), "question 2, field 'question_id'.*once"),
        (lambda q, a: q["questions"][1].update(question_id=8), "question 1.*found 8; do the two files belong"),
        (lambda q, a: q["questions"].pop(), "1 annotations are of questions that .* does not have: 95"),
        (lambda q, a: q.pop("questions"), "questions.json: the file, field 'questions'"),
        (lambda q, a: q.pop("data_subtype"), "the file, field 'data_subtype'"),
        (lambda q, a: q["questions"][0].update(image_id=8), "annotation 1, field 'image_id'.*expected that of"),
        (lambda q, a: a["annotations"][0].update(answers=ten("", " ")), "annotation 0, field 'answers'.*not blank"),
        (lambda q, a: a["annotations"][0].update(answers=[{}]), "annotation 0, field 'answer'.*missing"),
        (lambda q, a: a["annotations"][0].update(question_id=2971475), "annotation 1.*that of annotation 0"),
        (lambda q, a: a["annotations"][0].pop("answers"), "annotation 0, field 'answers'.*missing"),
        (lambda q, a: q.update(data_subtype="test2015"), "3 of 3 records.*\n.*COCO_test2015_000000297147.jpg"),
    ],
)
def test_files_that_do_not_fit_are_refused(vqa, change, message):
    with pytest.raises(BeamDataError, match=message):
        load_vqa(*vqa(change=change))


def test_missing_and_broken_official_files(vqa, tmp_path):
    questions, annotations, images = vqa()
    with pytest.raises(FileNotFoundError, match="none.json: expected a JSON file"):
        load_okvqa(tmp_path / "none.json", annotations, images)
    questions.write_text(questions.read_text()[:-20])
    with pytest.raises(BeamDataError, match="questions.json: expected valid JSON.*cut short"):
        load_okvqa(questions, annotations, images)


# ---------------------------------------------------------------- the sample


@pytest.mark.parametrize("task", ["emoji", "easy_vqa"])
def test_sample_rows_are_examples(task):
    examples, sample = sample_examples(task), load_sample(task)
    assert [example.id for example in examples] == list(range(len(sample.store)))
    assert {e.id: e.entity for e in examples if e.entity is not None} == sample.entities()
    assert [e.answers for e in examples] == [(row["answer"],) for row in sample.rows()]

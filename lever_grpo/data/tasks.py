"""Task files as lists of `Example`: plain files of our own, the official VQA layouts, and the packaged sample.

Every record that cannot be read is named: one error lists the first few and says how many there are.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from .examples import Example
from .readers import iter_lines, open_binary, parse_json
from .records import BeamDataError, Where, as_id, as_list
from .sample import load_sample


logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 30  # of the official VQA files, which are read whole
SHOWN = 5  # of the records that an error is about


def load_examples(path: str | os.PathLike, need_answers: bool = True) -> list[Example]:
    """
    Reads a task: one record a row, with its question and answers.

    Args:
        path (`str` or `Path`):
            JSON lines (also gzipped) or Parquet, found from the content, or a folder that `Dataset.save_to_disk`
            wrote. Fields of a record:

            * `id`: whole numbers are row ids. Texts are kept as `external_id`, and row ids are the positions;
            * `question`: text;
            * `answers`: list of texts, the one that is scored first; or `answer`, one text;
            * `image` (*optional*): a path relative to the file's folder (to the folder itself for a dataset), the
              encoded bytes, or the `{"bytes", "path"}` of a `datasets` image;
            * `entity` (*optional*): what the row is about.

            Other fields are ignored.
        need_answers (`bool`, *optional*, defaults to `True`):
            Whether a row without an answer is an error; else it gets the answer `"?"`, for queries that are only to be
            asked.

    Returns:
        `list[Example]`, in the order of the file.

    Raises:
        `FileNotFoundError`: there is nothing at the path.
        [`BeamDataError`]: a record misses a field or has an unusable value, an id is there twice, an image does not
            exist or lies outside of the folder.

    Example:

    ```python
    >>> import pathlib, tempfile
    >>> from lever_grpo.data.tasks import load_examples
    >>> path = pathlib.Path(tempfile.mkdtemp(), "task.jsonl")
    >>> _ = path.write_text('{"id": "peru-1", "question": "Capital of Peru?", "answers": ["Lima"]}')
    >>> load_examples(path)
    [Example(id=0, question='Capital of Peru?', answers=('Lima',), image=None, entity=None, external_id='peru-1')]

    ```
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a task file or a folder of datasets, found nothing there")
    folder = Path(os.path.abspath(path if path.is_dir() else path.parent))
    first_of: dict[Any, str] = {}

    def read(position: int, record: Any, where: Where) -> Example:
        example = _example(position, record, where, folder, need_answers)
        key = record["id"]
        if key in first_of:
            where.fail("id", "each id once", key, f"it is also that of {first_of[key]}")
        first_of[key] = where.record
        if type(key) is not type(next(iter(first_of))):
            where.fail("id", "whole numbers in all records, or texts in all", key)
        return example

    return _read_all(str(path), _records(path), read)


def load_vqa(
    questions: str | os.PathLike, annotations: str | os.PathLike, images: str | os.PathLike | None = None
) -> list[Example]:
    """
    Reads questions and annotations in the official layout of VQA, which OK-VQA and VQAv2 share.

    Row ids are the positions in the questions file, `external_id` is the question's id, `entity` the image's. All the
    annotators' answers are kept, repeats too, as the VQA accuracy counts them; the most frequent one is moved to the
    front (of equally frequent ones, the first given). Blank answers are left out with a warning;
    [`~search.make_judge`] counts their annotators.

    Args:
        questions (`str` or `Path`):
            JSON with `data_subtype` and `questions`, each with `question_id`, `image_id` and `question`.
        annotations (`str` or `Path`):
            JSON with `annotations`, each with `question_id`, `image_id` and `answers`, a list of objects with
            `answer`.
        images (`str` or `Path`, *optional*):
            Folder of `COCO_{data_subtype}_{image_id}.jpg`, the id in twelve digits. Without it the examples have no
            images.

    Returns:
        `list[Example]`, in the order of the questions.

    Raises:
        [`BeamDataError`]: the two files do not belong together, a field or an image is missing, or a question has no
            answer.

    Example:

    ```python
    >>> import json, pathlib, tempfile
    >>> from lever_grpo.data.tasks import load_vqa
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> question = {"question_id": 42, "image_id": 7, "question": "What is this?"}
    >>> _ = (folder / "q.json").write_text(json.dumps({"data_subtype": "train2014", "questions": [question]}))
    >>> answers = [{"answer": "dog"}, {"answer": "cat"}, {"answer": "cat"}]
    >>> annotation = {"question_id": 42, "image_id": 7, "answers": answers}
    >>> _ = (folder / "a.json").write_text(json.dumps({"annotations": [annotation]}))
    >>> load_vqa(folder / "q.json", folder / "a.json")[0].answers
    ('cat', 'dog', 'cat')

    ```
    """
    asked, annotated = _read_json(questions), _read_json(annotations)
    answers_of: dict[Any, tuple[Mapping[str, Any], Where]] = {}
    for i, entry in enumerate(_list_in(annotated, "annotations", annotations)):
        where = Where(str(annotations), f"annotation {i}")
        key = as_id(_field(entry, "question_id", where), where, "question_id")
        if key in answers_of:
            where.fail("question_id", "each question once", key, f"it is also that of {answers_of[key][1].record}")
        answers_of[key] = entry, where
    pictures: set[str] = set() if images is None else set(os.listdir(images))
    subtype = None if images is None else _field(asked, "data_subtype", Where(str(questions), "the file"))
    seen: set[Any] = set()
    blank: list[Any] = []

    def read(position: int, record: Any, where: Where) -> Example:
        key, image_id = (as_id(_field(record, name, where), where, name) for name in ("question_id", "image_id"))
        if key in seen:
            where.fail("question_id", "each question once", key)
        seen.add(key)
        if key not in answers_of:
            where.fail("question_id", f"a question of {annotations}", key, "do the two files belong together?")
        entry, there = answers_of[key]
        if _field(entry, "image_id", there) != image_id:
            there.fail("image_id", f"that of question {key}, {image_id}", entry["image_id"])
        given = [
            _field(answer, "answer", there) for answer in as_list(_field(entry, "answers", there), there, "answers")
        ]
        answers = [_text(answer, "answers", there) for answer in given if not _is_blank(answer)]
        if not answers:
            there.fail("answers", "at least one that is not blank", given)
        if len(answers) < len(given):
            blank.append(key)
        image = None
        if images is not None:
            name = f"COCO_{subtype}_{image_id:012d}.jpg"
            if name not in pictures:
                where.fail("image_id", f"the image {name} in {images}", image_id)
            image = Path(images, name)
        question = _text(_field(record, "question", where), "question", where)
        return Example(position, question, _most_frequent_first(answers), image, str(image_id), str(key))

    entries = _list_in(asked, "questions", questions)
    examples = _read_all(str(questions), ((f"question {i}", entry) for i, entry in enumerate(entries)), read)
    if len(answers_of) > len(seen):
        others = [key for key in answers_of if key not in seen]
        raise BeamDataError(
            f"{annotations}: {len(others)} annotations are of questions that {questions} does not have: "
            f"{_some(others)}; do the two files belong together?"
        )
    if blank:
        logger.warning("%s: blank answers of %d questions were left out: %s", annotations, len(blank), _some(blank))
    return examples


def load_okvqa(
    questions: str | os.PathLike, annotations: str | os.PathLike, images: str | os.PathLike | None = None
) -> list[Example]:
    """
    OK-VQA from its official files, by [`load_vqa`]: `OpenEnded_mscoco_{split}_questions.json`,
    `mscoco_{split}_annotations.json` and the folder of the split's COCO images, `train2014` or `val2014`.

    The answers are the normalised ones (`answer`, not `raw_answer`), which the official accuracy compares with.

    Example:

    ```python
    >>> from lever_grpo.data.tasks import load_okvqa
    >>> load_okvqa("mscoco_train2014_questions.json", "mscoco_train2014_annotations.json", "train2014")
    Traceback (most recent call last):
    FileNotFoundError: mscoco_train2014_questions.json: expected a JSON file, found nothing there

    ```
    """
    return load_vqa(questions, annotations, images)


def load_vqav2(
    questions: str | os.PathLike, annotations: str | os.PathLike, images: str | os.PathLike | None = None
) -> list[Example]:
    """
    VQAv2 from its official files, by [`load_vqa`]: `v2_OpenEnded_mscoco_{split}_questions.json`,
    `v2_mscoco_{split}_annotations.json` and the folder of the split's COCO images, `train2014` or `val2014`.

    Its `multiple_choice_answer` is not used: it is one of the most frequent of the ten answers, among which the rule
    of [`load_vqa`] chooses.

    Example:

    ```python
    >>> from lever_grpo.data.tasks import load_vqav2
    >>> load_vqav2("v2_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014")
    Traceback (most recent call last):
    FileNotFoundError: v2_mscoco_val2014_questions.json: expected a JSON file, found nothing there

    ```
    """
    return load_vqa(questions, annotations, images)


def sample_examples(task: str = "emoji") -> list[Example]:
    """
    Rows of a packaged task (see [`load_sample`]); their ids are those of its logs and embeddings.

    Example:

    ```python
    >>> from lever_grpo.data.tasks import sample_examples
    >>> example = sample_examples("country_facts")[0]
    >>> example.question, example.answers, example.entity
    ('Which region of the world is Ecuador in?', ('Latin America and the Caribbean',), 'Ecuador')

    ```
    """
    return [
        Example(row["id"], row["question"], (row["answer"],), row.get("image"), row.get("entity"))
        for row in load_sample(task).rows()
    ]


# ---------------------------------------------------------------- reading


def _read_all(
    file: str, records: Iterable[tuple[str, Any]], read: Callable[[int, Any, Where], Example]
) -> list[Example]:
    """All records of a file, or one error about all of those that cannot be read."""
    examples: list[Example] = []
    problems: list[str] = []
    for position, (label, record) in enumerate(records):
        try:
            examples.append(read(position, record, Where(file, label)))
        except BeamDataError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise BeamDataError(problems[0])
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        total = len(problems) + len(examples)
        shown = "\n".join(f"  {line}" for line in problems[:SHOWN] + more)
        raise BeamDataError(f"{file}: {len(problems)} of {total} records cannot be used:\n{shown}")
    if not examples:
        raise BeamDataError(f"{file}: expected at least one record, found none")
    return examples


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a task file with their names in errors."""
    if path.is_dir():
        try:
            dataset = datasets.load_from_disk(str(path))
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:  # the others: of a damaged one
            raise BeamDataError(f"{path}: expected a folder that Dataset.save_to_disk wrote, found another") from error
        if isinstance(dataset, datasets.DatasetDict):
            raise BeamDataError(f"{path}: expected one split, found {sorted(dataset)}; pass the folder of one of them")
        for name, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(name, datasets.Image(decode=False))
        yield from ((f"row {i}", row) for i, row in enumerate(dataset))
        return
    with open(path, "rb") as raw:
        is_parquet = raw.read(4) == b"PAR1"
    if is_parquet:
        try:
            with pq.ParquetFile(path) as file:
                rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
                yield from ((f"row {i}", row) for i, row in enumerate(rows))
        except (pa.ArrowInvalid, OSError) as error:
            raise BeamDataError(f"{path}: expected a Parquet file, found one that cannot be read ({error})") from error
        return
    try:
        for label, line in iter_lines(str(path)):
            yield label, parse_json(line, f"{path}: {label}", "one JSON record a line")
    except (OSError, EOFError, zlib.error) as error:
        raise BeamDataError(f"{path}: expected a file that can be unpacked, found {error}") from error


def _read_json(path: str | os.PathLike) -> Any:
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: expected a JSON file, found nothing there")
    try:
        with open_binary(str(path)) as stream:
            begin = stream.tell()
            stream.seek(MAX_FILE_BYTES)
            large = stream.read(1)
            stream.seek(begin)
            content = b"" if large else stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise BeamDataError(f"{path}: expected a file that can be unpacked, found {error}") from error
    if large:
        raise BeamDataError(
            f"{path}: expected a file of at most {MAX_FILE_BYTES:,} bytes, found a larger one; divide it"
        )
    return parse_json(content, str(path))


# ---------------------------------------------------------------- single values


def _example(position: int, record: Any, where: Where, folder: Path, need_answers: bool) -> Example:
    key = _field(record, "id", where)
    row_id = position if isinstance(key, str) else as_id(key, where, "id")
    if record.get("answers") is not None:
        answers = [
            _text(a, f"answers[{i}]", where) for i, a in enumerate(as_list(record["answers"], where, "answers"))
        ]
        if not answers:
            where.fail("answers", "at least one answer", answers)
    elif record.get("answer") is not None:
        answers = [_text(record["answer"], "answer", where)]
    elif not need_answers:
        answers = ["?"]
    else:
        where.fail("answers", "a list of texts, or one text as 'answer'", sorted(record))
    entity = record.get("entity")
    if entity is not None and (isinstance(entity, bool) or not isinstance(entity, (str, int))):
        where.fail("entity", "text", entity)
    return Example(
        row_id,
        _text(_field(record, "question", where), "question", where),
        tuple(answers),
        _image(record.get("image"), where, folder),
        None if entity is None else str(entity),
        key if isinstance(key, str) else None,
    )


def _image(value: Any, where: Where, folder: Path) -> Path | bytes | None:
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        return None
    if isinstance(value, bytes):
        return value if value else where.fail("image", "the bytes of an image", value)
    if not isinstance(value, str) or not value:
        where.fail("image", "a path, or the bytes of an image", value)
    # by name, not resolved: a link inside the folder to where the images really are is the user's own
    path = Path(os.path.normpath(folder / value))
    if not path.is_relative_to(folder):
        where.fail("image", f"a path inside {folder}", value, "put the images below the task file")
    try:
        there = path.is_file()
    except OSError:  # a name longer than names can be
        there = False
    if not there:
        where.fail("image", f"a file in {folder}", value)
    return path


def _field(record: Any, name: str, where: Where) -> Any:
    if not isinstance(record, Mapping):
        where.fail("record", f"an object with '{name}'", record)
    if record.get(name) is None:
        where.fail(name, "a value", sorted(record), "the field is missing or null")
    return record[name]


def _list_in(content: Any, name: str, path: str | os.PathLike) -> list[Any]:
    where = Where(str(path), "the file")
    return as_list(_field(content, name, where), where, name)


def _text(value: Any, name: str, where: Where) -> str:
    if not isinstance(value, str) or _is_blank(value):
        where.fail(name, "text that is not blank", value)
    return value


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _most_frequent_first(answers: list[str]) -> tuple[str, ...]:
    first = Counter(answers).most_common(1)[0][0]  # of equally frequent ones, the first counted
    at = answers.index(first)
    return (first, *answers[:at], *answers[at + 1 :])


def _some(values: list[Any]) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (", …" if len(values) > SHOWN else "")

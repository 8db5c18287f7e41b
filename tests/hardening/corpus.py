"""Malformed files: each made by a small function that is named after what is wrong, with the message that must come.

A function gives the content of its file, as bytes or text, or writes into the path that it is given. `message` is a
regular expression of the record and the rule; that the file is named is asked of every message.
"""

import gzip
import json
import os
import pickle
import random
import resource
import struct
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from lever_grpo.models import PointerSelector, PointerSelectorConfig


DEPTH = 30_000
DEEP = "[" * DEPTH + "]" * DEPTH
POOL = [10, 11, 12, 13]


@dataclass(frozen=True)
class Case:
    name: str
    file: str
    make: Callable
    message: str

    def write(self, folder: Path) -> Path:
        path = folder / self.file
        content = self.make(path) if self.make.__code__.co_argcount else self.make()
        if content is not None:
            path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        return path


LOGS: list[Case] = []
POOLS: list[Case] = []
TASKS: list[Case] = []
VQA: list[Case] = []
EMBEDDINGS: list[Case] = []
CONFIGS: list[Case] = []
MODELS: list[Case] = []
CHECKPOINTS: list[Case] = []


def case(cases, file, message):
    def add(make):
        cases.append(Case(make.__name__, file, make, message))
        return make

    return add


@contextmanager
def more_memory_than(size: int):
    """Lets the process grow by no more than this; what asks for more gets a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# ---------------------------------------------------------------- what valid files hold


def lever_lm(query=7, **changes):
    return {"id_list": [[11, 10, query], [12, 10, query]], "score_list": [0.1, 0.4], "candidate_ids": POOL, **changes}


def scored(*sequences, **changes):
    entries = list(sequences) or [{"prompt_order": [11, 10], "score": -1.0}]
    return {"query_id": 7, "pool": POOL, "sequences": entries, **changes}


def pointer(**changes):
    entry = {"pointer": [0, 1], "pointer_global": [10, 11], "beam_score": 0.5, **changes}
    return {"candidate_pool_ids": POOL, "pointer_candidates": [entry]}


def group(**changes):
    return {"query_id": 7, "candidate_ids": POOL, "sequences": [[0, 1], [2]], "scores": [1.0, 2.0], **changes}


def row(**changes):
    return {"id": 0, "question": "Capital of Peru?", "answer": "Lima", **changes}


def text(value):
    return json.dumps(value)


def lines(*records):
    return "".join(record if isinstance(record, str) else text(record) + "\n" for record in records)


def put(value, content):
    """A value that JSON has no other way to write, in the place of "@"."""
    return text(content).replace('"@"', value)


def cut_gzip(content):
    """A gzip file with so much in it that the cut lies behind what is looked at first."""
    noise = random.Random(0)
    return gzip.compress(content(lambda: noise.randbytes(500).hex()).encode())[:-2000]


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


# ---------------------------------------------------------------- logs: bytes that are no log


@case(LOGS, "log.json", "expected a beam log, found an empty file")
def empty_file():
    return b""


@case(LOGS, "log.json", "expected a beam log, found an empty file")
def blanks_only():
    return " \n\t \n"


@case(LOGS, "log.json", "expected a beam log .*found a file that starts with")
def zero_bytes():
    return bytes(1000)


@case(LOGS, "log.json", "expected a beam log .*found a file that starts with")
def utf16_with_mark():
    return lines(scored()).encode("utf-16")


@case(LOGS, "log.json", "expected a beam log .*found a file that starts with")
def utf16_without_mark():
    return lines(scored()).encode("utf-16-le")


@case(LOGS, "log.json", "expected a beam log .*found a file that starts with")
def utf32():
    return lines(scored()).encode("utf-32")


@case(LOGS, "log.json", "expected a beam log .*found a file that starts with")
def two_byte_order_marks():
    return "\ufeff\ufeff" + lines(scored())


@case(LOGS, "log.jsonl", "line 2: .*invalid")
def latin_1_in_a_line():
    return lines(scored()).encode() + '{"query_id": 8, "note": "ö"}'.encode("latin-1")


@case(LOGS, "log.json", "damaged or cut short|record '8'.*invalid")
def latin_1_in_an_object():
    return text({"7": lever_lm()})[:-1].encode() + ', "8": {"note": "ö"}}'.encode("latin-1")


@case(LOGS, "log.json", "expected a beam log .*found a file that starts with")
def zip_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("log.json", lines(scored()))


@case(LOGS, "log.json.gz", "cannot be unpacked .*end-of-stream")
def gzip_cut_at_once():
    return gzip.compress(lines(scored()).encode())[:-6]


@case(LOGS, "log.jsonl.gz", "unpacked|end-of-stream")
def gzip_cut_behind_the_beginning():
    return cut_gzip(lambda noise: lines(*(scored(query_id=i, note=noise()) for i in range(300))))


@case(LOGS, "log.json.gz", "unpacked|end-of-stream")
def gzip_of_an_object_cut_behind_the_beginning():
    return cut_gzip(lambda noise: text({str(i): lever_lm(i, note=noise()) for i in range(300, 600)}))


@case(LOGS, "log.json.gz", "cannot be unpacked .*CRC")
def gzip_with_a_wrong_checksum():
    return gzip.compress(lines(scored()).encode())[:-8] + bytes(8)


@case(LOGS, "log.json.gz", "cannot be unpacked .*gzip")
def gzip_with_something_behind():
    return gzip.compress(lines(scored()).encode()) + b"more"


@case(LOGS, "log.json.gz", "unpacked|invalid")
def gzip_with_a_broken_block():
    content = gzip.compress(lines(scored()).encode())
    return content[:10] + b"\xff" * 8 + content[18:]


@case(LOGS, "log.json.gz", "expected a beam log .*found a file that starts with")
def gzip_of_gzip():
    return gzip.compress(gzip.compress(lines(scored()).encode()))


@case(LOGS, "log.parquet", "expected a Parquet file, found one that cannot be read")
def parquet_cut(path):
    parquet(path, query_id=[7], candidate_ids=[POOL], sequences=[[[0]]], scores=[[1.0]])
    path.write_bytes(path.read_bytes()[:-20])


@case(LOGS, "log.parquet", "expected a Parquet file, found one that cannot be read")
def parquet_with_a_broken_page(path):
    parquet(path, query_id=list(range(5000)), candidate_ids=[POOL] * 5000, sequences=[[[0]]] * 5000, note=["x"] * 5000)
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes(400) + content[440:])


@case(LOGS, "log.parquet", r"row 0, query 'seven', field 'query_id': expected a row id")
def parquet_of_other_types(path):
    parquet(path, query_id=["seven"], candidate_ids=[POOL], sequences=[[[0]]], scores=[[1.0]])


@case(LOGS, "log.parquet", "row 0, query None, field 'record': expected one of 'id_list'")
def parquet_of_something_else(path):
    parquet(path, name=["a"], value=[1])


@case(LOGS, "log.parquet", r"row 0, query 7, field 'scores\[0\]': expected a finite number")
def parquet_with_nulls(path):
    parquet(
        path, query_id=[7], candidate_ids=[POOL], sequences=[[[0]]], scores=pa.array([[None]], pa.list_(pa.float64()))
    )


# ---------------------------------------------------------------- logs: JSON that is none


@case(LOGS, "log.json", "expected valid JSON up to its last '}', found something else after 1 records.*cut short")
def object_cut_short():
    return text({"7": lever_lm(), "8": lever_lm(8)})[:-30]


@case(LOGS, "log.json", "expected valid JSON up to its last '}'")
def object_with_something_behind():
    return text({"7": lever_lm()}) + "and more"


@case(LOGS, "log.json", "record '7': expected valid JSON, found .*Extra")
def two_objects():
    return text({"7": lever_lm()}) * 2


@case(LOGS, "log.json", "expected valid JSON")
def array_cut_short():
    return text([scored(), scored(query_id=8)])[:-30]


@case(LOGS, "log.json", "line 2: expected one JSON record a line")
def line_cut_short():
    return lines(scored(), scored(query_id=8))[:-30]


@case(LOGS, "log.json", "line 2: expected one JSON record a line")
def zero_bytes_behind_a_line():
    return lines(scored()) + "\0\0"


@case(LOGS, "log.json", "line 2: expected one JSON record a line")
def line_cut_short_with_carriage_returns():
    return lines(scored(), scored(query_id=8))[:-30].replace("\n", "\r\n") + "\r\n"


@case(LOGS, "log.json", "line 1: expected one JSON record a line")
def carriage_returns_alone():
    return lines(scored(), scored(query_id=8)).replace("\n", "\r")


@case(LOGS, "log.json", "record '7': .*recursion")
def deep_nesting_in_an_object():
    return f'{{"7": {{"id_list": {DEEP}}}}}'


@case(LOGS, "log.json", "record 0: .*recursion")
def deep_nesting_in_an_array():
    return DEEP


@case(LOGS, "log.json", "line 1.*(recursion|depth|deep|nest|levels)")
def deep_nesting_in_a_line():
    return f'{{"query_id": 7, "note": {DEEP}}}'


@case(LOGS, "log.json", r"field 'sequences\[0\]': expected an object with 'prompt_order'")
def nesting_where_a_sequence_should_be():
    return f'{{"query_id": 7, "pool": [1], "sequences": {"[" * 900}{"]" * 900}}}'


@case(LOGS, "log.json", "line 1.*(recursion|levels)")
def nesting_as_deep_as_the_parser_goes():
    return f'{{"query_id": 7, "pool": [1], "sequences": {"[" * 1020}{"]" * 1020}}}'


@case(LOGS, "log.json", "digits")
def number_of_5000_digits():
    return put("1" * 5000, {"7": lever_lm(score_list=["@", 0.4])})


@case(LOGS, "log.json", "line 1: .*digits")
def number_of_5000_digits_in_a_line():
    return put("1" * 5000, scored({"prompt_order": [10], "score": "@"}))


# ---------------------------------------------------------------- logs: JSON of something else


@case(LOGS, "log.json", "record '-7', field 'key': expected the query's row index")
def negative_key():
    return text({"-7": lever_lm()})


@case(LOGS, "log.json", "record 'seven', field 'key': expected the query's row index")
def key_that_is_no_number():
    return text({"7": lever_lm(), "seven": lever_lm()})


@case(
    LOGS,
    "log.json",
    "field 'key': expected",
)
def key_of_5000_digits():
    return f'{{"{"1" * 5000}": {text(lever_lm())}}}'


@case(LOGS, "log.json", r"record '9223372036854775808', field 'key': expected a row id from 0 to 2\*\*63 - 1")
def key_beyond_int64():
    return text({str(2**63): lever_lm(2**63)})


@case(LOGS, "log.json", "record '7': expected each query once, found the key twice")
def key_twice():
    return f'{{"7": {text(lever_lm())}, "7": {text(lever_lm())}}}'


TWICE = '{"prompt_order": [10], "score": 1, "score": 9}'


@case(LOGS, "log.json", "line 1, field 'query_id': expected it once, found it twice")
def field_twice():
    return f'{{"query_id": 8, {text(scored())[1:]}'


@case(LOGS, "log.json", "line 2, field 'score': expected it once, found it twice")
def field_of_a_sequence_twice():
    return lines(scored(query_id=8)) + put(TWICE, scored("@"))


@case(LOGS, "log.json", "record 1, field 'score': expected it once, found it twice")
def field_of_a_sequence_twice_in_an_array():
    return put(TWICE, [scored(query_id=8), scored("@")])


@case(LOGS, "log.json", "record '7', field 'score': expected it once, found it twice")
def field_of_a_shot_twice_in_an_object():
    return put('{"id": 10, "score": 1, "score": 9}', {"7": {"beams": [{"shots": ["@"]}], "candidate_ids": POOL}})


@case(LOGS, "log.json", "line 1, field 'score': expected it once, found it twice")
def field_twice_beside_an_escaped_colon():
    return put(TWICE.replace("}", ', "source": "\\u003a"}'), scored("@"))


@case(LOGS, "log.json", "line 1, field 'score': expected it once, found it twice")
def field_twice_beside_nan():
    return put(TWICE.replace("9", "NaN"), scored("@"))


@case(LOGS, "log.json", "line 1, field 'correct': expected it once, found it twice")
def column_twice():
    return put('{"correct": [1, 0], "correct": [0, 1]}', group(columns="@"))


@case(LOGS, "log.json", "line 1, field 'repeats': expected it once, found it twice")
def note_twice():
    return put('{"repeats": 1, "repeats": 2}', group(notes="@"))


@case(LOGS, "log.parquet", "expected each column once, found .*'scores'")
def parquet_with_a_column_twice(path):
    names = ["query_id", "candidate_ids", "sequences", "scores", "scores"]
    columns = [[7], [POOL], [[[0]]], [[1.0]], [[9.0]]]
    pq.write_table(pa.Table.from_arrays([pa.array(column) for column in columns], names), path)


@case(LOGS, "log.json", "line 2, field 'record': expected one of 'id_list'")
def line_that_is_a_number():
    return lines(scored(), "5")


@case(LOGS, "log.json", "line 1, query 7, field 'record': expected one of 'id_list'")
def line_without_a_layout():
    return lines({"query_id": 7})


@case(LOGS, "log.json", "record 0, field 'record': expected one of 'id_list'")
def array_of_numbers():
    return "[1, 2]"


@case(LOGS, "log.json", "expected at least one group, found none")
def object_of_nothing():
    return "{}"


@case(LOGS, "log.json", "expected at least one group, found none")
def array_of_nothing():
    return "[]"


@case(LOGS, "log.json", "expected at least one group, found none")
def no_sequences():
    return lines(scored(sequences=[]))


@case(LOGS, "log.json", "query -1, field 'query_id': expected a row id from 0")
def negative_query():
    return lines(scored(query_id=-1))


@case(LOGS, "log.json", "field 'query_id': expected a row id")
def query_beyond_int64():
    return lines(scored(query_id=2**63))


@case(LOGS, "log.json", r"query 7.0, field 'query_id': expected a row id \(a whole number\)")
def query_that_is_a_float():
    return lines(scored(query_id=7.0))


@case(LOGS, "log.json", r"query \[7\], field 'query_id': expected a row id")
def query_that_is_a_list():
    return lines(scored(query_id=[7]))


@case(LOGS, "log.json", r"field 'pool\[0\]': expected a row id from 0")
def negative_candidate():
    return lines(scored(pool=[-1, 10, 11]))


@case(LOGS, "log.json", "field 'pool': expected at least one candidate")
def empty_pool():
    return lines(scored(pool=[]))


@case(LOGS, "log.json", "field 'pool': expected a list, found '10'")
def pool_that_is_text():
    return lines(scored(pool="10"))


@case(LOGS, "log.json", r"field 'sequence 0': expected ids of the query's pool of 4, found \[4294967296\]")
def unknown_id_beyond_int32():
    return lines(scored({"prompt_order": [2**32], "score": 1.0}))


@case(LOGS, "log.json", r"field 'sequences\[1\]': expected positions in the pool of 4, found \[4\]")
def position_behind_the_pool():
    return lines(group(sequences=[[0], [4]]))


@case(LOGS, "log.json", r"field 'sequences\[0\]\[0\]': expected a row id from 0")
def negative_position():
    return lines(group(sequences=[[-1], [2]]))


@case(LOGS, "log.json", r"field 'scores': expected 2 entries, one a sequence")
def fewer_scores_than_sequences():
    return lines(group(scores=[1.0]))


@case(LOGS, "log.json", r"field 'shot_scores\[0\]': expected 2 gains")
def gains_of_another_length():
    return lines(group(shot_scores=[[0.5], [0.5]]))


@case(LOGS, "log.json", "field 'sequences': expected a list")
def sequences_that_are_an_object():
    return lines(scored(sequences={}))


@case(LOGS, "log.json", r"field 'sequences\[0\].score': expected a finite number, found inf")
def number_beyond_float_with_an_exponent():
    return put("1e999", scored({"prompt_order": [10], "score": "@"}))


@case(
    LOGS,
    "log.json",
    r"field 'sequences\[0\].score': expected a finite number",
)
def whole_number_beyond_float():
    return put("1" + "0" * 400, scored({"prompt_order": [10], "score": "@"}))


@case(LOGS, "log.json", "field 'zero_shot': expected a finite number")
def infinite_zero_shot():
    return put("Infinity", {"7": lever_lm(zero_shot="@")})


@case(
    LOGS,
    "log.json",
    r"field 'beams\[0\].shots\[0\]': expected",
)
def shots_that_are_numbers():
    return text({"7": {"beams": [{"shots": [5], "full_sequence": [10, 7]}], "candidate_ids": POOL}})


@case(LOGS, "log.json", r"beams\[0\].shots\[0\]")
def shot_with_a_list_as_id():
    shots = [{"id": [10], "score": 1.0}]
    return text({"7": {"beams": [{"shots": shots, "full_sequence": [10, 7]}], "candidate_ids": POOL}})


@case(LOGS, "log.json", r"field 'beams\[0\].full_sequence': expected a list")
def full_sequence_that_is_text():
    return text({"7": {"beams": [{"full_sequence": "x"}], "candidate_ids": POOL}})


@case(LOGS, "log.json", r"pointer_candidates\[0\]': expected an object")
def pointer_that_is_a_number():
    return text({"7": {"candidate_pool_ids": POOL, "pointer_candidates": [5]}})


@case(LOGS, "log.json", r"field 'pointer_candidates': expected a list")
def pointers_that_are_text():
    return text({"7": {"candidate_pool_ids": POOL, "pointer_candidates": "none"}})


@case(
    LOGS,
    "log.json",
    "line 1, query 7, field 'columns': expected an object",
)
def columns_that_are_a_list():
    return lines(group(columns=[1]))


@case(
    LOGS,
    "log.json",
    "line 1, query 7, field 'columns': expected an object",
)
def columns_of_lists():
    return lines(group(columns=[[1]]))


@case(LOGS, "log.json", r"field 'columns.correct': expected a list, found 5")
def column_that_is_a_number():
    return lines(group(columns={"correct": 5}))


@case(LOGS, "log.json", "line 1, query 7, field 'notes': expected")
def notes_that_are_text():
    return lines(group(notes="none"))


@case(
    LOGS,
    "log.json",
    "line 1, query 7, field 'notes",
)
def notes_that_replace_scores():
    return lines(group(notes={"scores": [9.0, 9.0]}))


@case(
    LOGS,
    "log.json",
    "line 1, query 7, field 'notes",
)
def notes_of_python():
    return lines(group(notes={"__class__": 1}))


@case(
    LOGS,
    "log.json",
    "line 1, query 7, field 'notes.repeats'",
)
def note_beyond_int32():
    return lines(group(notes={"repeats": 2**40}))


@case(
    LOGS,
    "log.json",
    "line 1.*(UTF-8|surrogate)",
)
def source_with_half_of_a_surrogate_pair():
    return lines(scored({"prompt_order": [10], "score": 1.0, "source": "\ud800"}))


# ---------------------------------------------------------------- pools


@case(POOLS, "pools.json", r"record 'x', field 'key': expected a row id \(a whole number\)")
def pool_of_no_number():
    return text({"7": [10], "x": [11]})


@case(POOLS, "pools.json", "record '-7', field 'key': expected a row id")
def pool_of_a_negative_number():
    return text({"-7": [10], "7": [10]})


@case(
    POOLS,
    "pools.json",
    "field 'key': expected a row id",
)
def pool_of_5000_digits():
    return f'{{"{"1" * 5000}": [10]}}'


@case(POOLS, "pools.json", "record 0, field 'record': expected 'query_id' and 'candidate_ids'")
def pools_without_queries():
    return "[[10]]"


@case(POOLS, "pools.json", r"record '7', field 'candidate_ids\[0\]': expected a row id")
def pool_of_floats():
    return text({"7": [1.5]})


@case(POOLS, "pools.json", r"record '7', field 'candidate_ids': expected each candidate once, found \[10\]")
def pool_with_one_id_twice():
    return text({"7": [10, 10]})


# ---------------------------------------------------------------- tasks


@case(TASKS, "task.jsonl", "expected at least one record, found none")
def task_of_nothing():
    return ""


@case(TASKS, "task.jsonl", "line 1: expected one JSON record a line, found .*recursion")
def task_with_deep_nesting():
    return f'{{"id": 0, "note": {DEEP}}}'


@case(TASKS, "task.jsonl", "line 1: expected one JSON record a line, found .*utf-8")
def task_in_utf16():
    return lines(row()).encode("utf-16")


@case(TASKS, "task.jsonl", "line 1: expected one JSON record a line")
def task_in_utf16_without_mark():
    return lines(row()).encode("utf-16-be")


@case(TASKS, "task.jsonl.gz", "expected a file that can be unpacked, found .*end-of-stream")
def task_cut_in_gzip():
    return cut_gzip(lambda noise: lines(*(row(id=i, note=noise()) for i in range(300))))


@case(TASKS, "task.jsonl.gz", "expected a file that can be unpacked, found .*invalid")
def task_with_a_broken_block_in_gzip():
    content = gzip.compress(lines(row()).encode())
    return content[:10] + b"\xff" * 8 + content[18:]


@case(TASKS, "task.jsonl", "line 2, field 'id': expected each id once, found 0; it is also that of line 1")
def task_with_an_id_twice():
    return lines(row(), row())


@case(TASKS, "task.jsonl", r"line 1, field 'id': expected a row id from 0 to 2\*\*63 - 1")
def task_with_an_id_beyond_int64():
    return lines(row(id=2**63))


@case(TASKS, "task.jsonl", r"line 1, field 'id': expected a row id \(a whole number\), found nan")
def task_with_nan_as_id():
    return put("NaN", row(id="@"))


@case(TASKS, "task.jsonl", "line 2, field 'id': expected whole numbers in all records")
def task_with_mixed_ids():
    return lines(row(), row(id="one"))


@case(TASKS, "task.jsonl", r"line 1, field 'answers\[0\]': expected text that is not blank, found 1")
def task_with_a_number_as_answer():
    return lines(row(answers=[1]))


@case(TASKS, "task.jsonl", "line 2, field 'answer': expected it once, found it twice")
def task_with_a_field_twice():
    return lines(row(id=1)) + '{"id": 2, "question": "?", "answer": "yes", "answer": "no"}'


@case(TASKS, "task.jsonl", "line 1: expected one JSON record a line, found .*surrogates")
def task_with_half_of_a_surrogate_pair():
    return lines(row(question="\ud800"))


@case(TASKS, "task.jsonl", "line 1, field 'image': expected a file in")
def task_with_an_image_name_of_5000_letters():
    return lines(row(image="a" * 5000))


@case(TASKS, "task.jsonl", "line 1, field 'image': expected a file in")
def task_with_a_zero_byte_in_an_image_name():
    return lines(row(image="a\0b"))


@case(TASKS, "task", "expected a folder that Dataset.save_to_disk wrote")
def task_folder_without_its_state(path):
    path.mkdir()
    (path / "dataset_info.json").write_text("{}")
    (path / "state.json").write_text("{}")


# ---------------------------------------------------------------- questions in the official layout of VQA

QUESTION = {"question_id": 42, "image_id": 7, "question": "What is this?"}


@case(VQA, "questions.json", "expected valid JSON, found .*is the file damaged, or cut short")
def questions_cut_short():
    return text({"questions": [QUESTION]})[:-5]


@case(VQA, "questions.json.gz", "expected a file that can be unpacked, found .*end-of-stream")
def questions_cut_in_gzip():
    return gzip.compress(text({"questions": [QUESTION]}).encode())[:-6]


@case(VQA, "questions.json", "field 'question': expected it once, found it twice")
def question_with_a_field_twice():
    return put('{"question_id": 42, "image_id": 7, "question": "Who?", "question": "What?"}', {"questions": ["@"]})


@case(VQA, "questions.json", "question 1, field 'question_id': expected each question once, found 42")
def question_twice():
    return text({"questions": [QUESTION, QUESTION]})


@case(VQA, "questions.json", r"the file, field 'record': expected an object with 'questions', found \[\]")
def questions_that_are_a_list():
    return text([])


@case(VQA, "questions.json", "question 0, field 'question_id': expected a question of .*annotations.json, found 41")
def question_without_answers():
    return text({"questions": [{**QUESTION, "question_id": 41}]})


@case(VQA, "questions.json", "expected valid JSON, found .*recursion")
def questions_with_deep_nesting():
    return f'{{"questions": {DEEP}}}'


# ---------------------------------------------------------------- embeddings

F32 = {"dtype": "F32", "shape": [4, 1], "data_offsets": [0, 16]}


def tensors(header, content=bytes(16), length=None):
    header = header if isinstance(header, bytes) else text(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + content


def npy(header, content=bytes(16)):
    header = header.encode() + b" " * (64 - (len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


PLACE = "tensor 'a': expected dtype, shape and data_offsets"


@case(EMBEDDINGS, "e.safetensors", "found a header length of 0 in 0 bytes")
def empty_safetensors():
    return b""


@case(EMBEDDINGS, "e.safetensors", "found a header length of 1152921504606846976")
def header_length_that_lies():
    return tensors({"a": F32}, length=2**60)


@case(EMBEDDINGS, "e.safetensors", r"expected a safetensors header, found invalid JSON")
def header_length_too_short():
    return tensors({"a": F32}, length=5)


@case(EMBEDDINGS, "e.safetensors", "expected a safetensors header, found a list")
def header_that_is_a_list():
    return tensors(b"[1]")


@case(EMBEDDINGS, "e.safetensors", "expected a safetensors header, found invalid JSON .*recursion")
def header_with_deep_nesting():
    return tensors(DEEP.encode())


@case(EMBEDDINGS, "e.safetensors", "expected a safetensors header, found invalid JSON .*digits")
def header_with_5000_digits():
    return tensors(put("9" * 5000, {"a": {**F32, "shape": ["@", 1]}}).encode())


@case(EMBEDDINGS, "e.safetensors", "expected at least one embedding array, found none")
def header_without_tensors():
    return tensors({"__metadata__": {"a": "b"}})


@case(EMBEDDINGS, "e.safetensors", PLACE)
def tensor_that_is_a_number():
    return tensors({"a": 5})


@case(EMBEDDINGS, "e.safetensors", PLACE)
def tensor_without_a_shape():
    return tensors({"a": {"dtype": "F32", "data_offsets": [0, 16]}})


@case(EMBEDDINGS, "e.safetensors", PLACE)
def shape_of_text():
    return tensors({"a": {**F32, "shape": "41"}})


@case(EMBEDDINGS, "e.safetensors", PLACE)
def shape_of_negatives():
    return tensors({"a": {**F32, "shape": [-4, -1]}})


@case(EMBEDDINGS, "e.safetensors", PLACE)
def shape_of_floats():
    return tensors({"a": {**F32, "shape": [4.0, 1.0]}})


@case(EMBEDDINGS, "e.safetensors", r"tensor 'a': expected \(4611686018427387904, 4\)")
def shape_beyond_the_file():
    return tensors({"a": {**F32, "shape": [2**62, 4]}})


@case(EMBEDDINGS, "e.safetensors", PLACE)
def offsets_into_the_header():
    return tensors({"a": {**F32, "data_offsets": [-16, 0]}})


@case(EMBEDDINGS, "e.safetensors", PLACE)
def three_offsets():
    return tensors({"a": {**F32, "data_offsets": [0, 8, 16]}})


@case(EMBEDDINGS, "e.safetensors", "tensor 'a': expected F16 or F32, found BF16; convert it")
def tensor_of_another_type():
    return tensors({"a": {**F32, "dtype": "BF16", "shape": [8, 1]}})


@case(EMBEDDINGS, "e.safetensors", r"tensor 'a': expected rows and a width, found the shape \(0, 2\)")
def tensor_of_no_rows():
    return tensors({"a": {**F32, "shape": [0, 2], "data_offsets": [0, 0]}})


@case(EMBEDDINGS, "e.safetensors", r"embeddings must be row-aligned: .*'a': 4, 'b': 2")
def tensors_of_mixed_lengths():
    return tensors({"a": F32, "b": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}})


@case(EMBEDDINGS, "e.npy", "expected a .npy array of floats for 'e'")
def empty_npy():
    return b""


@case(EMBEDDINGS, "e.npy", "expected a .npy array of floats for 'e', found .*(greater than file size|length)")
def npy_cut_short():
    return npy("{'descr': '<f4', 'fortran_order': False, 'shape': (100, 100)}")


@case(EMBEDDINGS, "e.npy", "expected a .npy array of floats for 'e', found .*too big")
def npy_beyond_memory():
    return npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4)}")


@case(EMBEDDINGS, "e.npy", "expected a .npy array of floats for 'e', found negative")
def npy_of_negative_shape():
    return npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 2)}")


@case(EMBEDDINGS, "e.npy", "expected a .npy array of floats for 'e'")
def npy_of_boolean_shape():
    return npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4)}")


@case(EMBEDDINGS, "e.npy", "expected a .npy array of floats for 'e', found Header is not a dictionary")
def npy_with_another_header():
    return npy("5")


@case(EMBEDDINGS, "e.npy", "expected a .npy array of floats for 'e', found a header of 2,147,483,648 bytes")
def npy_with_a_header_of_2_gigabytes():
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{}"


@case(EMBEDDINGS, "e.npy", r"embeddings 'e': expected floats of shape \(rows, width\), found int64")
def npy_of_whole_numbers(path):
    np.save(path, np.ones((4, 2), np.int64))


@case(EMBEDDINGS, "e.npy", r"embeddings 'e': expected floats of shape \(rows, width\), found float32 of shape \(4,\)")
def npy_of_one_axis(path):
    np.save(path, np.ones(4, np.float32))


@case(EMBEDDINGS, "e.npy", "expected a row-major array for 'e', found another file")
def npz_by_another_name(path):
    np.savez(path.with_suffix(".npz"), a=np.ones((2, 2)))
    path.with_suffix(".npz").rename(path)


@case(EMBEDDINGS, "folder", "embeddings must be row-aligned: .*'a': 3, 'b': 4")
def folder_of_mixed_lengths(path):
    path.mkdir()
    np.save(path / "a.npy", np.ones((3, 2), np.float32))
    np.save(path / "b.npy", np.ones((4, 2), np.float32))


@case(EMBEDDINGS, "folder", "expected .npy files in this folder, found none")
def folder_of_nothing(path):
    path.mkdir()


# ---------------------------------------------------------------- configs of recipes, `generate` and `evaluate`


@case(CONFIGS, "config.yaml", "expected a mapping of arguments to values, found None")
def config_of_nothing():
    return ""


@case(CONFIGS, "config.yaml", r"expected a mapping of arguments to values, found \['task'\]")
def config_that_is_a_list():
    return "- task"


@case(CONFIGS, "config.yaml", "expected a mapping of arguments to values, found {1: 2}")
def config_of_numbers():
    return "1: 2"


@case(CONFIGS, "config.yaml", r"expected YAML in UTF-8, found the keys \['task'\] twice in the mapping of line 1")
def config_with_a_key_twice():
    return "task: emoji\ntask: country_facts\n"


@case(CONFIGS, "config.yaml", "expected YAML in UTF-8, found while scanning a quoted scalar.*line 1")
def config_cut_short():
    return 'task: "emo'


@case(CONFIGS, "config.yaml", "expected YAML in UTF-8, found 'utf-8' codec")
def config_in_utf16():
    return "task: emoji".encode("utf-16")


@case(CONFIGS, "config.yaml", "expected YAML in UTF-8, found 'utf-8' codec")
def config_in_gzip():
    return gzip.compress(b"task: emoji", mtime=0)


@case(CONFIGS, "config.yaml", "expected YAML in UTF-8, found unacceptable character #x0000")
def config_with_a_zero_byte():
    return 'task: "a\0b"'


@case(CONFIGS, "config.yaml", "expected YAML in UTF-8, found while scanning for the next token")
def config_with_tabs():
    return "task: emoji\nseed:\n\t- 2"


@case(CONFIGS, "config.yaml", "expected YAML in UTF-8, found more than 20 levels in line 1")
def config_with_deep_nesting():
    return "task: " + DEEP


@case(CONFIGS, "config.yaml", "expected a config of at most 1,048,576 bytes")
def config_of_a_megabyte():
    return "# " + "x" * (1 << 20)


@case(CONFIGS, "config.yaml", "expected YAML in UTF-8, found .*another document")
def config_of_two_documents():
    return "task: emoji\n---\ntask: emoji\n"


@case(CONFIGS, "config.yaml", "expected YAML in UTF-8, found .*unhashable key")
def config_with_a_list_as_key():
    return "? [a]\n: b"


@case(CONFIGS, "config.yaml", "the key 'tusk' is no argument")
def config_with_an_unknown_key():
    return "tusk: emoji"


@case(CONFIGS, "config.yaml", "seed='many' is no int; give one")
def config_with_text_for_a_number():
    return "seed: many"


@case(CONFIGS, "config.yaml", r"seed=\[1\] is no int; give one")
def config_with_a_list_for_a_number():
    return "seed: [1]"


@case(CONFIGS, "config.yaml", r"seed=1.5 is no int; give one")
def config_with_a_fraction_for_a_whole_number():
    return "seed: 1.5"


@case(CONFIGS, "config.yaml", "seed=True is no int; give one")
def config_with_a_boolean_for_a_number():
    return "seed: yes"


@case(CONFIGS, "config.yaml", r"task=datetime.date\(2024, 1, 1\) is no str; give one")
def config_with_a_date_for_a_text():
    return "task: 2024-01-01"


@case(CONFIGS, "config.yaml", "query_features='question' is no .*list.*; give one")
def config_with_text_for_a_list():
    return "query_features: question"


@case(CONFIGS, "config.yaml", "expected YAML in UTF-8, found .*digits")
def config_with_5000_digits():
    return "seed: " + "9" * 5000


# ---------------------------------------------------------------- folders of models


def selector_with(path, config=None, text=None, weights=None):
    """A selector's folder, of which one thing is changed."""
    options = {"embed_dim": 4, "hidden_dim": 8, "num_attention_heads": 2}
    PointerSelector(PointerSelectorConfig.from_preset("v1", **options)).save_pretrained(path)
    if config is not None:
        text = json.dumps({**json.loads((path / "config.json").read_text()), **config})
    if text is not None:
        (path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    if weights is not None:
        (path / "model.safetensors").write_bytes(weights((path / "model.safetensors").read_bytes()))


@case(MODELS, "selector", "not a valid JSON file")
def model_config_cut_short(path):
    selector_with(path, text='{"model_type": ')


@case(MODELS, "selector", "not a valid JSON file")
def model_config_in_utf16(path):
    selector_with(path, text="{}".encode("utf-16"))


@case(MODELS, "selector", "Unrecognized model")
def model_config_that_is_a_list(path):
    selector_with(path, text="[]")


@case(MODELS, "selector", r"is no selector, or a damaged one \(RecursionError")
def model_config_with_deep_nesting(path):
    selector_with(path, text=f'{{"a": {DEEP}}}')


@case(MODELS, "selector", "Unrecognized model")
def model_config_without_a_type(path):
    selector_with(path, text="{}")


@case(MODELS, "selector", "model_type='bert' is no selector")
def model_config_of_another_model(path):
    selector_with(path, {"model_type": "bert"})


@case(MODELS, "selector", "model type `nope`")
def model_config_of_an_unknown_model(path):
    selector_with(path, {"model_type": "nope"})


@case(MODELS, "selector", r"is no selector, or a damaged one \(TypeError: unhashable")
def model_type_that_is_a_list(path):
    selector_with(path, {"model_type": [1]})


@case(MODELS, "selector", "hidden_dim='x': must be at least 1, a whole number")
def width_that_is_text(path):
    selector_with(path, {"hidden_dim": "x"})


@case(MODELS, "selector", "hidden_dim=None: must be at least 1, a whole number")
def width_that_is_null(path):
    selector_with(path, {"hidden_dim": None})


@case(MODELS, "selector", "hidden_dim=1099511627776: must be at least 1, a whole number, at most 1,000,000")
def width_beyond_memory(path):
    selector_with(path, {"hidden_dim": 2**40})


@case(MODELS, "selector", "num_layers=1000000000: must be at most 256")
def a_billion_layers(path):
    selector_with(path, {"num_layers": 10**9})


@case(MODELS, "selector", r"query_features\['a'\]='b': a width is at least 1, a whole number")
def feature_whose_width_is_text(path):
    selector_with(path, {"query_features": {"a": "b"}})


@case(MODELS, "selector", "dropout=nan: must be in")
def dropout_that_is_nan(path):
    selector_with(path, {"dropout": float("nan")})


@case(MODELS, "selector", r"is no selector, or a damaged one \(SafetensorError: .*incomplete metadata")
def weights_cut_short(path):
    selector_with(path, weights=lambda content: content[:-10])


@case(MODELS, "selector", r"is no selector, or a damaged one \(SafetensorError: .*header too small")
def weights_of_nothing(path):
    selector_with(path, weights=lambda content: b"")


@case(MODELS, "selector", r"is no selector, or a damaged one \(SafetensorError: .*header too large")
def weights_whose_header_lies(path):
    selector_with(path, weights=lambda content: struct.pack("<Q", 2**60) + content[8:])


@case(MODELS, "selector", "its weights lack .*candidate_proj.weight")
def weights_of_another_model(path):
    selector_with(path)
    save_file({"other": torch.ones(3)}, path / "model.safetensors", metadata={"format": "pt"})


@case(MODELS, "selector", r"is no selector, or a damaged one \(RuntimeError")
def weights_of_another_width(path):
    selector_with(path, {"hidden_dim": 16})


@case(MODELS, "selector", r"the weights .*query_proj.* hold NaN or infinity")
def weights_that_are_nan(path):
    selector_with(
        path, weights=lambda content: content[: 8 + int.from_bytes(content[:8], "little")].ljust(len(content), b"\xff")
    )


# ---------------------------------------------------------------- checkpoints of other programs


@case(CHECKPOINTS, "a.ckpt", "expected tensors by name.*found other values: a")
def checkpoint_of_lists(path):
    torch.save({"state_dict": {"a": [[]]}}, path)


@case(CHECKPOINTS, "a.ckpt", "is no checkpoint, or a damaged one")
def checkpoint_that_is_a_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"a": 1}))


@case(CHECKPOINTS, "a.ckpt", r"holds .*\(or is damaged\)|is no checkpoint, or a damaged one")
def checkpoint_that_is_a_log():
    return text({"7": lever_lm()})


@case(CHECKPOINTS, "a.ckpt", "are of no selector that is known")
def checkpoint_of_another_model(path):
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)


@case(CHECKPOINTS, "a.safetensors", r"is no checkpoint, or a damaged one \(SafetensorError")
def checkpoint_whose_header_is_a_list():
    return tensors(b"[1]")


@case(CHECKPOINTS, "a.safetensors", r"is no checkpoint, or a damaged one \(SafetensorError: .*header too large")
def checkpoint_whose_header_lies():
    return tensors({"a": F32}, length=2**60)


@case(CHECKPOINTS, "a.safetensors", r"is no checkpoint, or a damaged one \(SafetensorError")
def checkpoint_of_negative_shape():
    return tensors({"a": {**F32, "shape": [-4, -1]}})


@case(CHECKPOINTS, "a.safetensors", r"is no checkpoint, or a damaged one \(SafetensorError")
def checkpoint_beyond_the_file():
    return tensors({"a": {**F32, "shape": [2**38], "data_offsets": [0, 2**40]}})


@case(CHECKPOINTS, "a.safetensors", r"is no checkpoint, or a damaged one \(SafetensorError")
def checkpoint_with_overlapping_tensors():
    return tensors({"a": F32, "b": F32})


ALL = [*LOGS, *POOLS, *TASKS, *VQA, *EMBEDDINGS, *CONFIGS, *MODELS, *CHECKPOINTS]

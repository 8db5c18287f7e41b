import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from lever_grpo.data import BeamDataError, EmbeddingStore


rng = np.random.default_rng(0)
QUESTION = rng.normal(size=(6, 4)).astype(np.float16)
IMAGE = rng.normal(size=(6, 3)).astype(np.float32)


@pytest.fixture(params=["memory", "npy", "safetensors"])
def store(request, tmp_path):
    if request.param == "memory":
        return EmbeddingStore({"question": QUESTION, "image": IMAGE})
    if request.param == "npy":
        np.save(tmp_path / "q.npy", QUESTION)
        np.save(tmp_path / "i.npy", IMAGE)
        return EmbeddingStore.open({"question": tmp_path / "q.npy", "image": tmp_path / "i.npy"})
    save_file({"question": QUESTION, "image": IMAGE}, tmp_path / "e.safetensors")
    return EmbeddingStore.open(tmp_path / "e.safetensors")


def test_gather_puts_features_side_by_side_in_float32(store):
    rows = store.gather([5, 0, 5], ["question", "image"])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.concatenate([QUESTION.astype(np.float32), IMAGE], axis=1)[[5, 0, 5]])
    np.testing.assert_array_equal(store.gather(np.array([2]), ["image"]), IMAGE[[2]])
    assert len(store) == 6 and store.widths == {"question": 4, "image": 3} and store.width(["image", "question"]) == 7


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", np.longdouble])
def test_every_float_is_gathered(tmp_path, dtype):
    large = np.full((6, 2), 3e38) if np.dtype(dtype).itemsize > 2 else np.full((6, 2), 6e4)  # their sum is infinite
    given = {"question": QUESTION.astype(dtype), "large": large.astype(dtype)}
    for name, array in given.items():
        np.save(tmp_path / f"{name}.npy", array)
    for store in (EmbeddingStore(given), EmbeddingStore.open(tmp_path)):
        rows = store.gather([1, 4], ["large", "question"])
        np.testing.assert_array_equal(rows, np.concatenate([large, QUESTION], axis=1)[[1, 4]].astype(np.float32))


def test_pickled_store_gives_the_same_rows(store):
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(
        again.gather([1, 4], ["image", "question"]), store.gather([1, 4], ["image", "question"])
    )


def test_ids_without_a_row_are_named(store):
    with pytest.raises(BeamDataError, match="0 to 5, found 2 others: -1, 6"):
        store.gather([0, 6, -1, 6], ["question"])


def test_unknown_names_are_refused(store):
    with pytest.raises(BeamDataError, match="question.*audio"):
        store.gather([0], ["audio"])
    with pytest.raises(ValueError, match="list"):
        store.gather([0], "question")


def test_files_stay_on_disk_and_pickles_hold_paths(tmp_path):
    big = np.zeros((20_000, 64), np.float16)
    np.save(tmp_path / "question.npy", big)
    save_file({"question": big}, tmp_path / "e.safetensors")
    for source in (tmp_path / "question.npy", tmp_path / "e.safetensors", tmp_path):
        store = EmbeddingStore.open(source)
        assert isinstance(store["question"], np.memmap) and store.names == ["question"]
        assert len(pickle.dumps(store)) < 2_000


@pytest.mark.parametrize("kind", ["memory", "npy", "safetensors"])
def test_shared_rows_are_stored_once(tmp_path, kind):
    arrays = {"question": QUESTION, "image": IMAGE[:2], "image.rows": np.array([0, 1, 1, 0, 1, 0], np.int32)}
    if kind == "memory":
        store = EmbeddingStore(arrays)
    elif kind == "npy":
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
        store = EmbeddingStore.open(tmp_path)
    else:
        save_file(arrays, tmp_path / "e.safetensors")
        store = EmbeddingStore.open(tmp_path / "e.safetensors")
    store = pickle.loads(pickle.dumps(store))
    assert len(store) == 6 and sorted(store.names) == ["image", "question"]
    np.testing.assert_array_equal(store.gather([2, 3], ["image"]), IMAGE[[1, 0]])
    assert store["image"].shape == (6, 3)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"question": QUESTION, "image": IMAGE[:5]},
        {"question": QUESTION[0]},
        {"question": np.ones((3, 2), np.int64)},
        {"question": QUESTION, "image": IMAGE[:2], "image.rows": np.array([0, 1, 2, 0, 1, 0])},
        {"question": QUESTION, "other.rows": np.array([0])},
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays):
    with pytest.raises(BeamDataError, match="expected"):
        EmbeddingStore(arrays)


def test_non_finite_rows_are_named():
    bad = IMAGE.copy()
    bad[4, 1], bad[2, 0] = np.nan, np.inf
    store = EmbeddingStore({"image": bad, "question": QUESTION})
    assert store.non_finite_rows("image").tolist() == [2, 4] and not len(store.non_finite_rows("question"))
    with pytest.raises(BeamDataError, match="'image'.*2 rows: 2, 4"):
        store.check_finite()
    store.check_finite(["question"])
    shared = EmbeddingStore({"image": bad, "image.rows": np.array([0, 4, 4, 1])})
    assert shared.non_finite_rows("image").tolist() == [1, 2]


def test_files_that_are_not_embeddings_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BeamDataError, match="objects.npy"):
        EmbeddingStore.open(tmp_path / "objects.npy")
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(BeamDataError, match="text.npy"):
        EmbeddingStore.open(tmp_path / "text.npy")
    np.save(tmp_path / "fortran.npy", np.asfortranarray(IMAGE))
    with pytest.raises(BeamDataError, match="row-major"):
        EmbeddingStore.open(tmp_path / "fortran.npy")
    save_file({"question": QUESTION}, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-4])
    with pytest.raises(BeamDataError, match="cut.safetensors.*'question'"):
        EmbeddingStore.open(tmp_path / "cut.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(BeamDataError, match="junk.safetensors"):
        EmbeddingStore.open(tmp_path / "junk.safetensors")
    with pytest.raises(FileNotFoundError):
        EmbeddingStore.open(tmp_path / "nothing.safetensors")

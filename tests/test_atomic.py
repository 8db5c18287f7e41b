"""Files appear whole or not at all."""

import pytest

from lever_grpo.atomic import atomic_file


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a.txt"
    with atomic_file(path) as stream:
        stream.write(b"old")

    def fail(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("lever_grpo.atomic.os.replace", fail)
        with atomic_file(path) as stream:
            stream.write(b"new")
    with pytest.raises(RuntimeError, match="half"), atomic_file(path) as stream:
        stream.write(b"ne")
        raise RuntimeError("half way")
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"] and path.read_bytes() == b"old"
    with atomic_file(path) as stream:
        stream.write(b"new")
    assert path.read_bytes() == b"new"

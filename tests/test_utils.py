"""jload and jdump: 2023's behaviour, and a file that is whole or absent."""

import io
import json
import os

import pytest

import utils


def test_round_trip_by_path_and_by_file_object(tmp_path):
    rows, path = [{"a": "é早🙂", "b": [1, None]}], tmp_path / "new" / "folder" / "x.json"
    utils.jdump(rows, path)
    assert utils.jload(path) == utils.jload(str(path)) == rows
    with open(path, encoding="utf-8") as file:
        assert utils.jload(file) == rows
        assert file.closed
    buffer = open(tmp_path / "y.json", "w", encoding="utf-8")
    utils.jdump(rows, buffer)
    assert buffer.closed and utils.jload(tmp_path / "y.json") == rows
    assert path.read_text().startswith('[\n    {\n        "a"'), "indented by 4, as in 2023"


def test_text_is_written_as_it_is_and_other_types_are_refused(tmp_path):
    utils.jdump("plain", tmp_path / "t.txt")
    assert (tmp_path / "t.txt").read_text() == "plain"
    with pytest.raises(ValueError, match="got int"):
        utils.jdump(3, tmp_path / "t.txt")
    assert (tmp_path / "t.txt").read_text() == "plain"


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "x.json"
    utils.jdump([1], path)

    def explode(_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        utils.jdump([object()], path, default=explode)
    from alpaca.files import atomic_write

    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert utils.jload(path) == [1]
    assert os.listdir(tmp_path) == ["x.json"]


def test_modes_links_and_appending(tmp_path):
    path, link = tmp_path / "x.json", tmp_path / "link.json"
    utils.jdump([1], path)
    link.symlink_to(path)
    os.chmod(path, 0o640)
    utils.jdump([2], link)
    assert link.is_symlink() and utils.jload(path) == [2] and path.stat().st_mode & 0o777 == 0o640
    utils.jdump("tail", path, mode="a")
    assert path.read_text().endswith("]tail")


def test_malformed_json_is_located(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('[{"a": 1},\n {"a": }]')
    with pytest.raises(ValueError, match=r"bad\.json.*line 2, column 8"):
        utils.jload(path)
    with pytest.raises(ValueError, match="line 1"):
        utils.jload(io.StringIO("{"))
    assert json.loads("[]") == []

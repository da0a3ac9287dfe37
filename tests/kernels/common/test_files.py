"""Files and folders that are written whole or not at all, whatever stands at their paths."""

import os
import stat
import threading

import pytest

from pallas_kernels.common import files
from pallas_kernels.common.files import making_folder, replacing, sweep

pytestmark = pytest.mark.core


def write(path, text="new", force=False):
    with replacing(path, force) as temporary:
        temporary.write_text(text)
        temporary.chmod(0o600)


def write_folder(path, text):
    with replacing(path, force=True) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text(text)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_new_files_have_the_umask_s_permissions_and_others_keep_theirs(tmp_path):
    umask = os.umask(0o027)
    try:
        write(tmp_path / "new")
        (tmp_path / "old").touch()
        (tmp_path / "old").chmod(0o604)
        write(tmp_path / "old", force=True)
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder").chmod(0o705)
        write_folder(tmp_path / "folder", "new")
    finally:
        os.umask(umask)
    modes = [mode(tmp_path / name) for name in ("new", "old", "folder")]
    assert modes == [0o640, 0o604, 0o705]


def test_links_stay_and_what_they_point_to_is_written(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_text("old")
    (tmp_path / "link").symlink_to("data/file")
    (tmp_path / "dangling").symlink_to("data/later")
    for name in ("link", "dangling"):
        with pytest.raises(FileExistsError, match=f"{name} exists already"):
            write(tmp_path / name)
        write(tmp_path / name, force=True)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text() == "new"
    assert sorted(os.listdir(data)) == ["file", "later"]
    (tmp_path / "folder").symlink_to("data")
    write_folder(tmp_path / "folder", "new")
    assert os.listdir(data) == ["file"] and (tmp_path / "folder").is_symlink()
    (tmp_path / "astray").symlink_to("nowhere/file")
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere to write astray into"):
        write(tmp_path / "astray", force=True)


def test_pipes_and_devices_are_written_into(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write(pipe, "through", force=True)
    reader.join(10)
    assert read == ["through"] and pipe.is_fifo()
    with pytest.raises(FileExistsError):
        write(pipe)
    (tmp_path / "null").symlink_to("/dev/null")
    write(tmp_path / "null", force=True)
    assert (tmp_path / "null").is_symlink() and (tmp_path / "null").is_char_device()
    assert sorted(os.listdir(tmp_path)) == ["null", "pipe"]


def test_files_and_folders_do_not_replace_each_other(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(IsADirectoryError, match="folder is a folder, expected the name of a file"):
        write(tmp_path / "folder", force=True)
    with pytest.raises(NotADirectoryError, match="file is a file, expected the name of a folder"):
        write_folder(tmp_path / "file", "new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_is_exchanged_in_one_step(tmp_path, monkeypatch):
    write_folder(tmp_path / "folder", "old")

    def two_steps(*paths):
        raise AssertionError("two steps, between which there is no folder")

    monkeypatch.setattr(files, "_swap", two_steps)
    write_folder(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["folder"]


def test_where_it_cannot_be_an_interrupt_between_two_steps_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchanged", lambda *paths: False)
    write_folder(tmp_path / "folder", "old")
    write_folder(tmp_path / "folder", "newer")
    assert (tmp_path / "folder" / "file").read_text() == "newer"
    rename = files.Path.rename

    def interrupted(path, target):
        if path.name == "folder" and path.parent != tmp_path:
            raise KeyboardInterrupt
        rename(path, target)

    monkeypatch.setattr(files.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "folder", "newest")
    assert (tmp_path / "folder" / "file").read_text() == "newer"
    assert os.listdir(tmp_path) == ["folder"]


def test_what_killed_runs_left_is_swept_and_what_they_moved_is_put_back(tmp_path):
    killed = tmp_path / ".flash-wtconv-abcd1234"
    (killed / "folder.old").mkdir(parents=True)
    (killed / "file.old").write_text("the one before")
    (killed / "folder").mkdir()
    (tmp_path / "file").write_text("the one after")
    other = tmp_path / ".flash-wtconv-of-mine"
    other.mkdir()
    (other / "file").touch()
    with replacing(tmp_path / "new", force=False) as temporary:
        # A run that lives keeps what it has.
        temporary.write_text("whole")
        sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".flash-wtconv-of-mine", "file", "folder", "new"]
    assert (tmp_path / "file").read_text() == "the one after"


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    locked, swept = files._locked, []

    def late(folder, wait=True):
        if wait and not swept:
            swept.append(folder)
            sweep(tmp_path)
            assert not folder.exists()
        return locked(folder, wait)

    monkeypatch.setattr(files, "_locked", late)
    write(tmp_path / "file")
    assert swept and os.listdir(tmp_path) == ["file"]


def test_folders_that_stay_empty_are_not_left_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), making_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)
    with making_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
    assert os.listdir(tmp_path / "a") == ["file"]

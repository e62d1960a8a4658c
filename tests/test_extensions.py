"""The build that precedes the rank processes."""

import extensions
import pytest


def test_the_lock_of_a_killed_build_is_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extensions, "_BUILD", "pass")
    (tmp_path / "deepspeed_shm_comm").mkdir()
    left = tmp_path / "deepspeed_shm_comm" / "lock"
    left.touch()
    extensions.build_once.__wrapped__()
    assert not left.exists()


def test_a_failed_build_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extensions, "_BUILD", "raise SystemExit('no compiler here')")
    with pytest.raises(RuntimeError, match="could not be built.*\n.*no compiler here"):
        extensions.build_once.__wrapped__()

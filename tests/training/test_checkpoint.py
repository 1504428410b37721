"""States on disk: whole or passed over, and never more of them than asked for."""

import shutil

import pytest
import torch

from mldcn.training import checkpoint
from mldcn.training.checkpoint import drop_after, load_checkpoint, save_checkpoint


def save(folder, step, *, keep=2, anchor=True):
    state = {"position": {"step": step}, "list": [torch.arange(3), None, {1: torch.tensor(step)}]}
    save_checkpoint(folder, step, state, keep=keep, anchor=anchor)


def names(folder):
    return sorted(path.name.replace("0000000000", "") for path in folder.iterdir())


def step_of(folder, **options):
    found = load_checkpoint(folder, **options)
    return None if found is None else found.state["position"]["step"]


def test_a_state_comes_back_as_it_was_and_the_last_few_are_kept(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-10", "step-15"]
    state = load_checkpoint(tmp_path).state
    assert state["position"] == {"step": 15}
    assert torch.equal(state["list"][0], torch.arange(3))
    assert state["list"][1:] == [None, {1: torch.tensor(15)}]
    drop_after(tmp_path, 10)
    assert names(tmp_path) == ["step-10"]


def test_the_newest_anchor_is_kept_however_many_others_follow(tmp_path):
    save(tmp_path, 10)
    for step in (11, 12, 13):
        save(tmp_path, step, anchor=False)
    assert names(tmp_path) == ["step-10", "step-12-between", "step-13-between"]
    assert step_of(tmp_path) == 13
    assert step_of(tmp_path, anchor=True) == 10
    save(tmp_path, 14)
    assert names(tmp_path) == ["step-13-between", "step-14"]


@pytest.mark.parametrize("part", ["state.json", "state.safetensors", "checksums.json"])
def test_every_flipped_byte_is_noticed_and_the_state_before_is_taken(tmp_path, part):
    save(tmp_path, 10)
    save(tmp_path, 15)
    file = tmp_path / "step-000000000015" / part
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
        found = load_checkpoint(tmp_path)
        assert (found.state["position"]["step"], found.damaged) == (10, ["step-000000000015"])
    for half in (b"", whole[: len(whole) // 2]):
        file.write_bytes(half)
        assert step_of(tmp_path) == 10
    file.unlink()
    assert step_of(tmp_path) == 10
    shutil.rmtree(tmp_path / "step-000000000010")
    assert load_checkpoint(tmp_path) is None


@pytest.mark.parametrize("call", range(6))
def test_a_kill_at_any_write_leaves_a_whole_state_and_the_next_one_clears_up(tmp_path, monkeypatch, call):
    """Each of save_checkpoint's calls that touch the disk fails in turn, as a kill before it would have it."""
    save(tmp_path, 10, keep=1)
    calls = iter(range(100))

    def killing(function):
        def killed(*arguments, **options):
            if next(calls) == call:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return killed

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("save_tensors", "write_text", "checksum", "sync_folder"):
            patch.setattr(checkpoint, name, killing(getattr(checkpoint, name)))
        save(tmp_path, 15, keep=1)
    assert step_of(tmp_path) in (10, 15)
    save(tmp_path, 15, keep=1)  # a state of a step that is there already is replaced
    assert names(tmp_path) == ["step-15"]
    assert step_of(tmp_path) == 15

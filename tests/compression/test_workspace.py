import pytest
import torch

from deltamux.compression.artifact.artifact import TensorEntry
from deltamux.compression.checkpoint.architecture import Role
from deltamux.compression.choice import workspace as workspace_module
from deltamux.compression.choice.workspace import Measured, Workspace, rung_name

KEY = {"base": {"w": "0" * 64}, "linear": {"scheme": "coded"}}


def entry(name, num_bytes):
    return TensorEntry(name=name, role=Role.LINEAR, shape=(2, 3), bytes=num_bytes, error=0.5)


def save_layer(work, layer=3):
    """Two matrices, of which one name begins like the other, with two rungs and one."""
    matrices = [
        Measured("up.weight", layer, 1.5, (entry("up.weight", 8), entry("up.weight", 16))),
        Measured("upper.weight", layer, 0.0, (entry("upper.weight", 8),)),
    ]
    tensors = {
        rung_name("up.weight.steps", 0): torch.tensor([1.0]),
        rung_name("up.weight.steps", 1): torch.tensor([2.0]),
        rung_name("upper.weight.steps", 0): torch.tensor([3.0]),
    }
    work.save(layer, matrices, tensors)
    return matrices


def test_a_saved_layer_is_read_back(tmp_path):
    work = Workspace(tmp_path / "work", KEY)
    matrices = save_layer(work)
    again = Workspace(tmp_path / "work", KEY)
    assert again.has(3)
    assert again.measured(3) == matrices
    assert again.tensors(matrices[0], 1)["up.weight.steps"].item() == 2


def test_a_rung_s_tensors_are_found_by_matrix_and_rung(tmp_path):
    work = Workspace(tmp_path / "work", KEY)
    up, more = save_layer(work)
    assert set(work.tensors(more, 0)) == {"upper.weight.steps"}
    assert work.tensors(up, 0)["up.weight.steps"].item() == 1


def test_a_layer_of_unchanged_matrices_is_finished_and_empty(tmp_path):
    work = Workspace(tmp_path / "work", KEY)
    work.save(0, [], {})
    assert work.has(0)
    assert work.measured(0) == []


def test_a_layer_interrupted_between_its_files_counts_as_not_begun(tmp_path, monkeypatch):
    work = Workspace(tmp_path / "work", KEY)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workspace_module.json, "dumps", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_layer(work)
    assert (tmp_path / "work" / "layer-0003.safetensors").is_file()
    assert not work.has(3)
    save_layer(work)
    assert work.has(3)


@pytest.mark.parametrize(
    "key", [KEY | {"base": {"w": "1" * 64}}, KEY | {"linear": {"scheme": "int2"}}, {}]
)
def test_layers_of_another_key_are_deleted(tmp_path, key):
    save_layer(Workspace(tmp_path / "work", KEY))
    assert not Workspace(tmp_path / "work", key).has(3)
    assert not Workspace(tmp_path / "work", KEY).has(3)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_layers_without_a_readable_key_are_deleted(tmp_path, content):
    save_layer(Workspace(tmp_path / "work", KEY))
    (tmp_path / "work" / "key.json").write_text(content)
    assert not Workspace(tmp_path / "work", KEY).has(3)


def test_clearing_deletes_everything(tmp_path):
    work = Workspace(tmp_path / "work", KEY)
    save_layer(work)
    work.clear()
    assert list(tmp_path.iterdir()) == []

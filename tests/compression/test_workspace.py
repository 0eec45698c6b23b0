import pytest
import torch

from deltamux.compression.artifact.matrices import Coded
from deltamux.compression.artifact.stored import Encoded
from deltamux.compression.checkpoint.architecture import Role, TensorSpec
from deltamux.compression.choice import workspace as workspace_module
from deltamux.compression.choice.workspace import Ladder, Workspace
from deltamux.compression.rounding.quantize import QuantizedDelta, Scheme

KEY = {"base": {"w": "0" * 64}, "linear": {"scheme": "coded"}}


def rung(name, step):
    codes = torch.ones(2, 3, dtype=torch.uint8)
    delta = QuantizedDelta(Scheme.TERNARY, (2, 3), codes, torch.tensor([step, step]).bfloat16())
    return Encoded.of(TensorSpec(name, Role.LINEAR, 3), Coded(delta), error=0.5)


def save_layer(work, layer=3):
    """Two matrices, of which one name begins like the other, with two rungs and one."""
    rungs = {
        "up.weight": [rung("up.weight", 1.0), rung("up.weight", 2.0)],
        "upper.weight": [rung("upper.weight", 3.0)],
    }
    ladders = [
        Ladder(name, layer, 1.5, tuple(each.entry for each in found))
        for name, found in rungs.items()
    ]
    work.save(layer, ladders, rungs)
    return ladders


def step_of(work, ladder, index):
    return work.rung(ladder, index).stored().delta.steps_R[0].item()


def test_a_saved_layer_is_read_back(tmp_path):
    work = Workspace(tmp_path / "work", KEY)
    ladders = save_layer(work)
    again = Workspace(tmp_path / "work", KEY)
    assert again.has(3)
    assert again.ladders(3) == ladders
    assert step_of(again, ladders[0], 1) == 2


def test_a_rung_s_tensors_are_found_by_matrix_and_rung(tmp_path):
    work = Workspace(tmp_path / "work", KEY)
    up, upper = save_layer(work)
    assert set(work.rung(upper, 0).named_tensors()) == {"upper.weight.codes", "upper.weight.steps"}
    assert (step_of(work, up, 0), step_of(work, upper, 0)) == (1, 3)


def test_a_layer_of_unchanged_matrices_is_finished_and_empty(tmp_path):
    work = Workspace(tmp_path / "work", KEY)
    work.save(0, [], {})
    assert work.has(0)
    assert work.ladders(0) == []


def test_a_layer_interrupted_between_its_files_counts_as_not_begun(tmp_path, monkeypatch):
    work = Workspace(tmp_path / "work", KEY)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workspace_module, "_save_ladders", interrupt)
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

"""Trained weights (weights.py): the file, the model in it, and what it says about a picture."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

pytest.importorskip("safetensors", reason="weights are files of it: pip install safetensors")
from safetensors.torch import save_file  # noqa: E402

from xvit_minimal import data  # noqa: E402
from xvit_minimal.recipe import recipe  # noqa: E402
from xvit_minimal.tasks import TASKS  # noqa: E402
from xvit_minimal.weights import load_model, predict, unpack, weights_file  # noqa: E402

CLASSES = ("cell", "plate", "ghost")


def a_model(task, size=(24, 32), **changes):
    small = dict(dim=8, depth=1, num_heads=2, stem_stride=8, drop_path=0.0)
    config = recipe("some/folder", task, **{**small, **changes})
    torch.manual_seed(0)
    return config, TASKS[task].model(config, len(CLASSES), size).eval()


def a_file(folder, task, size=(24, 32), threshold=None):
    config, model = a_model(task, size)
    path = folder / f"{task}.safetensors"
    path.write_bytes(weights_file(model, vars(config), CLASSES, size, threshold))
    return path, model


# --------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("task", TASKS)
def test_a_file_gives_the_model_again(tmp_path, task):
    size = 32 if task == "classification" else (24, 32)
    path, model = a_file(tmp_path, task, size)
    again, classes = load_model(path)
    assert classes == list(CLASSES) and not again.training
    assert again.task == task and again.size in (size, list(size) if size != 32 else 32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    _, about = unpack(path)
    assert "out" not in about["config"] and "device" not in about["config"]


def test_a_detector_keeps_its_threshold_and_one_without_has_every_box(tmp_path):
    assert load_model(a_file(tmp_path, "detection", threshold=0.37)[0])[0].score_thresh == 0.37
    assert load_model(a_file(tmp_path, "detection")[0])[0].score_thresh == 0.05


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a model",
        b"PK\x03\x04",
        (8).to_bytes(8, "little") + b"{}      ",
        (1 << 62).to_bytes(8, "little"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(
        ValueError, match="w.safetensors is not a weights.safetensors of a run"
    ) as end:
        load_model(tmp_path / "w.safetensors")
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("keep", [7, 100, 2000, -1])
def test_a_file_that_was_cut_is_refused(tmp_path, keep):
    path, _ = a_file(tmp_path, "segmentation")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is not a weights.safetensors .* or it is damaged"):
        load_model(path)


@pytest.mark.parametrize(
    "about",
    [
        None,
        "no JSON",
        "[]",
        json.dumps({"config": {"task": "classification"}}),
        json.dumps({"config": {"task": "juggling"}, "classes": ["a"], "size": 32}),
        json.dumps({"config": {"newer": 1}, "classes": ["a"], "size": 32}),
        json.dumps({"config": {}, "classes": ["a"], "size": 32}),  # tensors of another model
    ],
)
def test_tensors_that_are_not_from_here_are_refused(tmp_path, about):
    metadata = {"about": about} if about else {}
    save_file({"weight": torch.zeros(3)}, tmp_path / "w.safetensors", metadata)
    with pytest.raises(ValueError, match="w.safetensors is not a weights.safetensors of a run"):
        load_model(tmp_path / "w.safetensors")


def test_no_file_and_a_folder_are_called_by_their_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.safetensors: no such file"):
        load_model(tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match="is a folder: give the path of the weights.safetensors"):
        load_model(tmp_path)


# ------------------------------------------------------------ what a model says of a picture


@pytest.fixture
def picture(tmp_path):
    """A picture of 90 x 60 pixels, larger than what the models were trained on."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "some.png")
    return tmp_path / "some.png"


def test_a_classifier_gives_probabilities(tmp_path, picture):
    model, _ = load_model(a_file(tmp_path, "classification", 32)[0])
    p = predict(model, picture)
    expected = model(data.normalize(data.read_image(picture, 32)[None])).softmax(1)[0]
    assert torch.allclose(p, expected) and p.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("task", TASKS)
def test_a_model_predicts_in_any_precision(tmp_path, picture, task, kind):
    model, _ = load_model(a_file(tmp_path, task)[0])
    expected = predict(model, picture)
    found = predict(model.to(kind), picture)
    if task == "classification":
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    elif task == "segmentation":
        assert (found == expected).float().mean() > 0.95
    else:
        assert found["boxes"].shape[1:] == (4,) and found["boxes"].isfinite().all()


def test_weights_are_read_in_float32_whatever_the_default_is(tmp_path, picture):
    path, written = a_file(tmp_path, "classification", 32)
    expected = predict(load_model(path)[0], picture)
    for default in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            model, _ = load_model(path)
            assert torch.equal(predict(model, picture), expected)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(model.head.weight, written.head.weight)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, task, value):
    config, model = a_model(task)
    name, parameter = next(iter(model.named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    path = tmp_path / "weights.safetensors"
    path.write_bytes(weights_file(model, vars(config), CLASSES, (24, 32)))
    with pytest.raises(ValueError, match=f"weights.safetensors: {re.escape(name)} is not finite"):
        load_model(path)


@pytest.mark.parametrize("task", TASKS)
def test_a_model_in_training_mode_or_from_elsewhere_is_refused(tmp_path, picture, task):
    model = load_model(a_file(tmp_path, task)[0])[0].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"got a model in training mode.*call model.eval\(\)"):
        predict(model, picture)
    # a forward pass in training mode would have changed BatchNorm's statistics
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="got Linear, expected a model from load_model"):
        predict(torch.nn.Linear(1, 1).eval(), picture)


def test_a_mask_has_the_picture_s_own_size(tmp_path, picture):
    model, _ = load_model(a_file(tmp_path, "segmentation")[0])
    mask = predict(model, picture)
    image = data.read_image(picture, 32, square=False)  # (3, 21, 32)
    small = model(data.normalize(image[None]))[0].argmax(0)
    assert mask.shape == (60, 90) and mask.dtype == torch.int64
    rows = ((torch.arange(60) + 0.5) * small.shape[0] / 60).long()
    columns = ((torch.arange(90) + 0.5) * small.shape[1] / 90).long()
    assert torch.equal(mask, small[rows][:, columns])


def test_boxes_are_in_the_picture_s_own_pixels(tmp_path, picture):
    model, _ = load_model(a_file(tmp_path, "detection")[0])
    model.score_thresh = 0.0
    found = predict(model, picture)
    image = data.read_image(picture, 32, square=False)
    (small,) = model(data.normalize(image[None]))
    assert len(found["boxes"]) > 0
    scale = torch.tensor([90 / 32, 60 / 21, 90 / 32, 60 / 21])
    assert torch.allclose(found["boxes"], small["boxes"] * scale)
    assert (found["boxes"][:, 2] <= 90.001).all() and (found["boxes"][:, 3] <= 60.001).all()
    assert torch.equal(found["scores"], small["scores"])


def test_a_picture_on_its_side_has_its_boxes_upright(tmp_path, picture):
    model, _ = load_model(a_file(tmp_path, "segmentation")[0])
    turned = Image.open(picture)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert predict(model, tmp_path / "turned.png").shape == (90, 60)


def test_a_model_predicts_without_building_a_graph(tmp_path, picture):
    model, _ = load_model(a_file(tmp_path, "classification", 32)[0])
    assert not predict(model, picture).requires_grad


def test_the_detector_of_blood_cells_carries_the_threshold_of_its_record():
    """Without one it shows 100 boxes for 18 cells."""
    model, classes = load_model(ROOT / "book/weights/bccd.safetensors")
    _, about = unpack(ROOT / "book/weights/bccd.safetensors")
    record = json.loads((ROOT / "book/runs/evaluate/bccd.json").read_text())
    (row,) = record["results"]
    assert model.score_thresh == about["threshold"] == row["threshold"]
    assert "87 pictures" in row["val_copy"] and 0.1 < row["threshold"] < 0.9 and row["val_f1"] > 0.7
    assert classes == ["Platelets", "RBC", "WBC"]


# ------------------------------------------------------------------------------------- the README


@pytest.mark.parametrize("shape", [(50, 70, 3), (1, 1, 3), (4, 4000, 3), (61, 40)])
@pytest.mark.parametrize("file", ["cat.jpg", "street.jpg", "blood.jpg"])
def test_the_lines_of_the_readme_take_a_picture_of_any_size(
    tmp_path, monkeypatch, capsys, file, shape
):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (lines,) = (block for block in blocks if file in block)
    assert len([line for line in lines.splitlines() if line]) == 4
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    Image.fromarray(pixels).save(tmp_path / file)
    (tmp_path / "book").symlink_to(ROOT / "book")
    monkeypatch.chdir(tmp_path)
    room = {}
    exec(lines, room)
    said = capsys.readouterr().out.strip()
    if file == "cat.jpg":
        assert said in room["classes"] and len(room["classes"]) == 10
    elif file == "street.jpg":
        assert room["mask"].shape == shape[:2] and said.startswith("['")
    else:
        assert said.startswith("[") and len(room["found"]["boxes"]) < 50

"""What a run is made of (recipe.py, command_line.py, optimization.py): options and their mistakes,
the recipes, what follows from the training set, the command line and back."""

import math
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel

from xvit_minimal import data, train
from xvit_minimal.baselines import XCA
from xvit_minimal.command_line import command, parse
from xvit_minimal.model import SIZES, XViT
from xvit_minimal.optimization import averaging, learning_rate, parameter_groups
from xvit_minimal.recipe import (
    RECIPES,
    TASK_DEFAULTS,
    Config,
    build,
    is_dense,
    recipe,
    settle,
    stored_side,
    tokens,
)

# ---------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model="xvit_nan"), "nearest is 'xvit_nano'"),
        (dict(attention="xnrom"), "nearest is 'xnorm'"),
        (dict(augment="flop"), "nearest is 'flip'"),
        (dict(epochs=0), "epochs=0, expected at least 1"),
        (dict(batch_size=1), "BatchNorm"),
        (dict(lr=math.nan), "lr=nan"),
        (dict(lr=0), "positive"),
        (dict(mix=1.5), "0 to 1"),
        (dict(ema=1.0), "below 1"),
        (dict(seed=-1), "seed=-1"),
        (dict(seed=2**31), "seed=2147483648, expected a number from 0 to 2,147,483,647"),
        (dict(seed=10**30), "from 0 to 2,147,483,647"),
        (dict(lr=math.inf), "lr=inf, expected a positive number"),
        (dict(weight_decay=math.nan), "weight_decay=nan"),
        (dict(warmup=math.inf), "warmup=inf"),
        (dict(drop_path=math.nan), "drop_path=nan"),
        (dict(epochs=2.5), "epochs=2.5, expected a whole number"),
        (dict(epochs=True), "epochs=True, expected a whole number"),
        (dict(epochs="3"), "epochs='3', expected a whole number"),
        (dict(epochs=None), "epochs=None, expected a whole number"),
        (dict(lr="fast"), "lr='fast', expected a number"),
        (dict(lpi=1), "lpi=1, expected True or False"),
        (dict(model=3), "model=3, expected text"),
        (dict(stem_stride=3), "stem_stride=3, expected one of"),
        (dict(micro_batch=1), "micro_batch=1, expected at least 2"),
        (dict(out=""), "out='', expected the path of a file or folder"),
        (dict(out="  "), "out='  ', expected the path"),
        (dict(out="a\0b"), "expected the path"),
        (dict(init=""), "init='', expected the path"),
        (dict(device="foo"), "device 'foo', expected cpu, cuda, cuda:1, mps or xpu"),
        (dict(device="cuda:"), "device 'cuda:'"),
        (dict(device="meta"), "device 'meta'"),
        (dict(device=""), "device ''"),
        (dict(limit=0), "limit=0"),
        (dict(warmup=-1), "warmup"),
        (dict(attention="none"), "class_depth to 0"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe("cifar10", **changes)


def test_recipes_change_only_what_a_config_has():
    assert all(
        set(changes) <= set(vars(Config()))
        for changes in (*RECIPES.values(), *TASK_DEFAULTS.values())
    )
    assert (
        recipe("a/b").out == "runs/b"
        and recipe("shapes").model == "xvit_pico"
        and recipe("cifar10") == Config(data="cifar10", out="runs/cifar10")
    )


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--data cifar10 --model xvit_nano --epochs 100 --out runs/x",
        "--no-lpi --amp --no-compile --mix 0.5 --lr 0.1",
        "--data 'a folder' --attention xca --device cpu",
    ],
)
def test_a_command_makes_its_configuration_again(line):
    import shlex

    config = parse(shlex.split(line))
    assert parse(shlex.split(command(config))[3:]) == config


@pytest.mark.parametrize(
    "line, message",
    [
        (["--epoch", "3"], "nearest is --epochs"),
        (["--model", "xvit_nan"], "'xvit_nano'"),
        (["--lr", "fast"], "invalid float"),
        (["cifar10"], "expected an option"),
        (["--epochs", "0"], "at least 1"),
    ],
)
def test_a_mistake_on_the_command_line_ends_with_what_is_wrong(line, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(line)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(
        f"--{name.replace('_', '-')}" in text for name in vars(Config())
    )
    assert "examples:" in text and "torchrun" in text


def test_help_says_what_a_command_needs_and_the_one_for_a_laptop_stands_first(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    examples = capsys.readouterr().out.split("examples:")[1]
    laptop, gpu = examples.split("for a GPU")
    assert laptop.count("python -m") == len(re.findall(r"\d+ minutes?, [\d.]+ GB", laptop)) == 4
    assert "hours" in gpu and "MB" in gpu


def test_a_config_builds_the_model_it_names():
    model = build(
        recipe(
            "shapes", model="xvit_nano", dim=48, depth=2, class_depth=0, attention="xca", lpi=False
        ),
        7,
        24,
    )
    assert (
        isinstance(model.blocks[0].attention.part, XCA)
        and len(model.blocks) == 2
        and model.blocks[0].lpi is None
    )
    assert model(torch.zeros(1, 3, 24, 24)).shape == (1, 7) and model.positions.shape == (
        1,
        48,
        12,
        12,
    )
    sizes = [
        sum(p.numel() for p in build(recipe(model=name), 10, 32).parameters())
        for name in ("xvit_pico", "xvit_nano")
    ]
    assert sizes == [
        sum(p.numel() for p in XViT(**SIZES[name]).parameters())
        for name in ("xvit_pico", "xvit_nano")
    ]


def test_weight_decay_is_for_matrices_and_kernels_alone():
    model = XViT(
        img_size=32,
        num_classes=4,
        dim=16,
        depth=1,
        num_heads=2,
        stem_stride=4,
        class_depth=1,
        attention=XCA,
    )
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = (
        {names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.05)
    )
    kinds = {name: model.get_submodule(name.rpartition(".")[0]) for name in names.values()}
    assert decayed == {
        n
        for n, m in kinds.items()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and n.endswith("weight")
    }
    assert {"positions", "class_token", "blocks.0.attention.part.temperature", "head.bias"} <= free
    gammas = {
        n
        for n, _ in XViT(img_size=32, dim=16, depth=1, num_heads=2).named_parameters()
        if "gamma" in n
    }
    free = parameter_groups(XViT(img_size=32, dim=16, depth=1, num_heads=2), 0.05)[1]["params"]
    assert gammas and sum(p.ndim == 3 and p.shape[1:] == (1, 1) for p in free) == len(gammas)


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine():
    config = recipe("cifar10", epochs=100, warmup=10, lr=1e-3, final_lr=1e-5)
    rates = [learning_rate(n, config, 7) for n in range(701)]
    assert (
        rates[0] > 0
        and np.allclose(np.diff(rates[:70]), rates[0])
        and math.isclose(rates[70], 1e-3)
    )
    assert (
        np.all(np.diff(rates[70:]) < 0)
        and math.isclose(rates[700], 1e-5)
        and math.isclose(rates[385], (1e-3 + 1e-5) / 2)
    )
    # a warm-up longer than the run would never reach the peak
    short = recipe("cifar10", epochs=5, warmup=10, lr=1e-3)
    assert max(learning_rate(n, short, 10) for n in range(50)) == short.lr


@pytest.mark.parametrize("task", ["segmentation", "detection"])
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(mix=0.5), "got mix=0.5, .* expected 0 for all four"),
        (dict(class_depth=1), "class_depth=1, .*leave them"),
        (dict(label_smoothing=0.1), "smoothing=0.1, .* one label an image"),
        (dict(augment="corp"), "nearest is 'crop'"),
        (dict(augment="shift"), "got augment 'shift', expected one of none, flip, crop"),
        (dict(pyramid=0), "pyramid=0"),
        (dict(pyramid=12), "got pyramid=12, expected a multiple of 8"),
    ],
)
def test_what_a_dense_task_cannot_use_is_refused(task, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe("shapes", task, **changes)


@pytest.mark.parametrize(
    "name, near",
    [("segment", "segmentation"), ("detect", "detection"), ("class", "classification")],
)
def test_an_unknown_task_is_answered_with_the_nearest(name, near, capsys):
    with pytest.raises(
        ValueError,
        match=f"got task '{name}', expected one of classification, .* nearest is '{near}'",
    ):
        Config(task=name)
    with pytest.raises(SystemExit):
        parse(["--task", name])
    assert f"nearest is '{near}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "--task segmentation",
        "--task detection --data bccd --epochs 7 --size 200 --out runs/x",
        "--task classification",
        "--task segmentation --data 'a folder' --init a/w.safetensors --pyramid 32 --augment none "
        "--ema 0.5 --no-lpi --amp",
    ],
)
def test_a_command_makes_a_dense_configuration_again(line):
    config = parse(shlex.split(line))
    assert parse(shlex.split(command(config))[3:]) == config
    assert (
        (config.class_depth == 0) == ("classification" not in line) == ("--task" in command(config))
    )


def test_an_empty_name_of_a_set_is_refused():
    with pytest.raises(ValueError, match="data='', expected the path"):
        recipe("")


@pytest.mark.parametrize("device", [None, "cpu", "cuda", "cuda:3", "mps", "xpu:0"])
def test_devices_that_some_machine_has_are_taken(device):
    assert Config(device=device).device == device


def test_the_home_folder_is_written_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = recipe("~/pictures", out="~/runs/x", init="~/w.safetensors")
    folder = str(tmp_path)
    assert (config.data, config.out, config.init) == (
        f"{folder}/pictures",
        f"{folder}/runs/x",
        f"{folder}/w.safetensors",
    )
    assert recipe("~/pictures").out == "runs/pictures"
    assert recipe("a/roofs", "segmentation").out == "runs/roofs-segmentation"


def test_a_folder_without_a_name_of_its_own_gives_the_run_the_one_it_has(monkeypatch, tmp_path):
    (tmp_path / "cats").mkdir()
    monkeypatch.chdir(tmp_path / "cats")
    assert recipe(".").out == "runs/cats" and recipe("..", "detection").out.endswith("-detection")


def test_numbers_of_numpy_and_paths_become_what_a_record_can_hold(tmp_path):
    config = recipe("shapes", epochs=np.int64(3), lr=np.float32(0.5), out=tmp_path, warmup=1)
    assert (type(config.epochs), type(config.lr), type(config.out)) == (int, float, str)
    assert type(config.warmup) is float


def test_seeds_up_to_the_last_seed_every_generator():
    config = recipe(seed=2**31 - 1)
    torch.manual_seed(config.seed)
    np.random.default_rng(config.seed)
    torch.Generator().manual_seed(config.seed * 1_000_003 + 10**6)


@pytest.mark.parametrize(
    "task, dense", [("classification", False), ("segmentation", True), ("detection", True)]
)
def test_two_tasks_are_dense(task, dense):
    assert is_dense(task) == dense


# ------------------------------------------------------------ what follows from the training set


def a_set(n, height, width):
    """A set whose pictures take no memory."""
    images = torch.zeros(1, dtype=torch.uint8).expand(n, 3, height, width)
    return data.ImageSet(images, torch.zeros(n, dtype=torch.int64), ("a", "b"), "some", "some")


@pytest.mark.parametrize(
    "n, size, task, expected",  # stem_stride, batch_size, AdamW's lr, ema after 100 epochs
    [
        (45_000, (32, 32), "classification", (2, 512, 1e-3, 1 - 20 / 8800)),
        (10_000, (32, 32), "classification", (2, 256, 1e-3, 1 - 20 / 4000)),
        (1_000, (32, 32), "classification", (2, 32, 7.07e-4, 1 - 20 / 3200)),
        (400, (224, 224), "classification", (16, 16, 5e-4, 1 - 20 / 2500)),
        (8_523, (160, 160), "classification", (8, 256, 1e-3, 1 - 20 / 3400)),
        (10, (64, 64), "classification", (4, 4, 2.5e-4, 1 - 20 / 300)),
        (1, (1, 1), "classification", (2, 4, 2.5e-4, 1 - 20 / 100)),
        (205, (192, 256), "detection", (8, 8, 1e-3, 1 - 20 / 2600)),
        (367, (180, 240), "segmentation", (4, 8, 1e-3, 1 - 20 / 4600)),
        (100, (720, 960), "segmentation", (8, 4, 7.07e-4, 1 - 20 / 2500)),
    ],
)
def test_numbers_follow_the_training_set(n, size, task, expected):
    side = {} if is_dense(task) else {"size": size[0]}
    config, lines = settle(recipe("some/folder", task, optimizer="adamw", **side), a_set(n, *size))
    found = (config.stem_stride, config.batch_size, config.lr, config.ema)
    assert found == pytest.approx(expected, rel=1e-3) and config.warmup == 10
    assert config.batch_size * 20 <= n or config.batch_size == 4
    most = 16_384 if is_dense(task) else 400
    assert tokens(*size, config.stem_stride) <= most or config.stem_stride == 16
    chosen = [re.match(r"chosen: --([a-z-]+) (\S+), because .", line).groups() for line in lines]
    for name, value in chosen:
        given = getattr(config, name.replace("-", "_"))
        assert value == given or float(value) == pytest.approx(given, rel=1e-4)


@pytest.mark.parametrize("epochs", [49, 50])
@pytest.mark.parametrize("size", [32, 64])
def test_a_long_run_bears_more_augmentation(epochs, size):
    config, _ = settle(recipe("some/folder", epochs=epochs, size=size), a_set(5_000, size, size))
    long = epochs == 50
    move = "shift" if size == 32 else "crop"
    assert config.augment == (f"{move}+randaugment" if long else move)
    assert (config.mix, config.drop_path) == ((0.6, 0.1) if long else (0.0, 0.0))


def test_muon_is_taken_where_torch_has_it_and_has_a_rate_of_its_own(monkeypatch):
    rates = {}
    for there in (True, False):
        monkeypatch.setattr("xvit_minimal.recipe.has_muon", lambda there=there: there)
        for epochs in (10, 100):
            config, _ = settle(recipe("some/folder", epochs=epochs, size=32), a_set(9_000, 32, 32))
            rates[config.optimizer, epochs] = config.lr
    muon, adamw = {10: 4e-3, 100: 2e-3}, {10: 4e-3, 100: 1e-3}
    expected = {("muon", n): rate for n, rate in muon.items()}
    assert rates == expected | {("adamw", n): rate for n, rate in adamw.items()}
    dense, _ = settle(recipe("some/folder", "segmentation"), a_set(9_000, 32, 32))
    assert dense.optimizer == "adamw"


def test_crops_are_cut_from_pictures_half_as_large_again(monkeypatch):
    assert stored_side(recipe("imagenette", size=64)) == 96
    assert stored_side(recipe("imagenette", size=128)) == 160  # it has no larger ones
    assert stored_side(recipe("imagenette")) == stored_side(recipe("imagenette", size=160)) == 160
    assert stored_side(recipe("imagenette", size=64, augment="flip")) == 64
    assert stored_side(recipe("cifar10")) == 32  # these are shifted


def test_a_run_on_pictures_of_224_pixels_is_no_longer_one_of_12544_tokens():
    config, lines = settle(recipe("some/folder"), a_set(400, 224, 224))
    assert tokens(224, 224, 2) == 12_544 and tokens(224, 224, config.stem_stride) == 196
    (line,) = (line for line in lines if "stem-stride" in line)
    assert "196 tokens" in line and "12,544 at the usual 2" in line


def test_what_is_given_stays_and_is_not_spoken_of():
    given = dict(stem_stride=2, batch_size=64, lr=0.5, warmup=0.0, ema=0.0, optimizer="adamw")
    given |= dict(augment="flip", mix=0.0, drop_path=0.0)
    config, lines = settle(recipe("some/folder", **given), a_set(400, 224, 224))
    assert {name: getattr(config, name) for name in given} == given and lines == []


def test_a_given_batch_size_is_what_the_rest_follows():
    config, _ = settle(recipe("some/folder", batch_size=50, epochs=10), a_set(1_000, 32, 32))
    assert config.ema == pytest.approx(1 - 20 / 200)
    assert config.lr == pytest.approx(4e-3 * (50 / 64) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
@pytest.mark.parametrize("n", [1, 7, 20_000])
def test_nothing_is_left_open_after_settling(task, n):
    config, _ = settle(recipe("some/folder", task), a_set(n, 40, 64))
    chosen = ("optimizer", "lr", "warmup", "ema", "augment", "mix", "drop_path")
    for name in ("stem_stride", "batch_size", *chosen):
        assert getattr(config, name) is not None
    assert settle(config, a_set(n, 40, 64)) == (config, [])


def test_the_average_forgets_the_first_weights_within_a_short_run():
    """After n steps its decay is min(decay, (1 + n) / (10 + n)), the first step a copy."""
    part = nn.Linear(1, 1, bias=False)
    average, by_hand = AveragedModel(part, multi_avg_fn=averaging(0.9)), None
    for n in range(200):
        part.weight.data.fill_(float(n))
        average.update_parameters(part)
        decay = min(0.9, (1 + n) / (10 + n))
        by_hand = n if by_hand is None else decay * by_hand + (1 - decay) * n
        assert average.module.weight.item() == pytest.approx(by_hand, rel=1e-5)
    assert by_hand == pytest.approx(199 - 0.9 / 0.1, rel=1e-3)  # the mean age of the average


def test_four_hundred_pictures_of_ones_own_are_learned(tmp_path, capsys):
    """Four colours under noise, and nothing given but a model and a number of epochs that take
    seconds. Over batches of 400 and with a decay of 0.999 the averaged weights guess."""
    noise, colours = (
        np.random.default_rng(0),
        [(90, 60, 60), (60, 90, 60), (60, 60, 90), (80, 80, 40)],
    )
    for part, many in (("train", 100), ("test", 25)):
        for kind, colour in enumerate(colours):
            (tmp_path / f"own/{part}/{kind}").mkdir(parents=True)
            for n in range(many):
                picture = colour + noise.integers(0, 120, (32, 32, 3))
                picture = Image.fromarray(picture.astype(np.uint8))
                picture.save(tmp_path / f"own/{part}/{kind}/{n}.png")
    few = dict(model="xvit_pico", size=32, epochs=5, device="cpu", eval_epochs=5)
    config = recipe(str(tmp_path / "own"), out=str(tmp_path / "run"), augment="flip", **few)
    found = train.train(config)
    printed = capsys.readouterr().out
    assert found["results"][0]["test_top1"] > 0.9
    assert "chosen: --batch-size 16, because" in printed and "chosen: --ema 0.8" in printed

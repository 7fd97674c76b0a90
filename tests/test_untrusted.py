"""What comes from others: it is bounded, stays in its folder, and ends in one line."""

import json
import os
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from conftest import call, scratch
from PIL import Image

import train_scratch
from datafree import cli, curves, plugins, report
from datafree.checkpoint import load, load_weights, read_weights
from datafree.config import DistillConfig, ScratchConfig
from datafree.datasets.cards import DatasetCard
from datafree.datasets.folders import list_images, read_image
from datafree.datasets.loading import load_split
from datafree.datasets.splits import LazySplit
from datafree.errors import InputError, OptionError, cut, exit_on_input_error, one_line, printable, short, shown
from datafree.plugins import construct, load_custom, short_name
from datafree.untrusted import LONGEST_NAME, MOST_DEPTH, MOST_TEXT, is_name, read_text

CARD = "name: own\nchannels: 1\nheight: 8\nwidth: 8\nnum_classes: 2\nmean: [0.5]\nstd: [0.5]\n"
LAUGHS = "&a0 [ha, ha]\n" + "".join(f"b{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
HOSTILE = "\x1b[2J\nerror: \u202egnp\x00"  # clears a terminal, forges a line, turns the direction of writing


@pytest.fixture
def card(tmp_path):
    """Writes a text to a data card and reads it; the message of the InputError."""

    def read(text):
        path = tmp_path / "card.yaml"
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            DatasetCard.from_yaml(path)
        return str(caught.value)

    return read


def parse(*words, cls=ScratchConfig):
    return cli.parse(cls, [str(word) for word in words], description="")[0]


def refused_options(*words, cls=ScratchConfig):
    with pytest.raises(OptionError) as caught:
        parse(*words, cls=cls)
    return str(caught.value)


# Messages


@pytest.mark.parametrize("text", [HOSTILE, "a\r\nb", "x" * 10**6, "\x9b31m", "\ud800", "\u2028"])
def test_a_message_is_one_printable_line_of_bounded_length(text):
    for line in (one_line(text), one_line(f"path {text} end"), short(text), shown(text), shown([text] * 10**5)):
        assert line.isprintable() and len(line) < 1000
    assert len(short(text)) < 800 and len(shown(text)) <= 90


def test_ordinary_texts_are_shown_as_they_are():
    assert printable("a é\u3042 [1]  b") == one_line("a é\u3042 [1]  b") == "a é\u3042 [1]  b"
    assert printable("two\n  lines\n") == "two lines"
    assert shown(["cat", 1.5, None]) == "['cat', 1.5, None]" and short("a-b") == "a-b"
    assert cut("x" * 80, 80) == "x" * 80 and cut("a" * 100 + "end", 80).endswith("end")


def test_nested_and_endless_values_are_shown_at_once():
    value = ["ha"]
    for _ in range(60):
        value = [value, value]
    value[0] = value
    assert len(shown(value)) <= 90
    assert shown(10**5000) == "a int that cannot be shown"


def test_what_nothing_else_catches_is_one_line(capsys, monkeypatch):
    def main():
        raise ZeroDivisionError(HOSTILE * 1000)

    with pytest.raises(SystemExit) as stop:
        exit_on_input_error(main)
    line = capsys.readouterr().err.removesuffix("\n")
    assert stop.value.code == 1 and line.startswith("error: unexpected ZeroDivisionError") and line.isprintable()
    assert len(line) <= 1000 and "test_untrusted.py" in line and "RGAL_TRACEBACK=1" in line
    monkeypatch.setenv("RGAL_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        exit_on_input_error(main)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")])
def test_out_of_memory_where_nothing_expects_it_is_called_that(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        exit_on_input_error(main)
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: out of memory; use smaller networks, batches or images")


def test_a_file_that_the_system_refuses_where_nothing_expects_it_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        exit_on_input_error(lambda: (Path("a" * 300) / "b").stat())
    line = capsys.readouterr().err
    assert stop.value.code == 1 and line.startswith("error: a") and "/b: File name too long (line" in line
    assert len(line) < 400


def test_the_traceback_of_a_run_is_in_its_log(teacher, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datafree.training.summarise", lambda *a: 1 / 0)
    line = refused(scratch, "--model", nets.name("tiny"), "--epochs", 1, "--log_tag", "t", before_run=False)
    log = next(tmp_path.glob("runs/*/t/log.txt"))
    assert "unexpected ZeroDivisionError" in line and str(log.relative_to(tmp_path)) in line
    assert "Traceback" in log.read_text() and "RGAL_TRACEBACK" not in line


# Text files and YAML


def test_devices_pipes_and_huge_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "huge").write_bytes(b"a" * (MOST_TEXT + 1))
    for name, why in (("pipe", "a pipe"), ("link", "a device"), ("huge", "more than"), ("nul\0", "not a possible")):
        with pytest.raises(OSError) as caught:
            read_text(tmp_path / name)
        assert why in caught.value.strerror
        assert why in refused_options("--config", tmp_path / name)
    (tmp_path / "card.yaml").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="a device or a pipe"):
        DatasetCard.from_yaml(tmp_path / "card.yaml")


@pytest.mark.parametrize("key", ["name", "mean", "std", "classes", "height", "flip", "loader", "other"])
def test_aliases_that_multiply_are_refused(card, key):
    assert "more than 100,000 values" in card(f"{CARD}x: {LAUGHS}\n{key}: *a39\n")


@pytest.mark.parametrize(
    "text, why",
    [
        ("a: &a [*a]", "contains itself"),
        ("a: " + "[" * 3000, f"more than {MOST_DEPTH} levels"),
        ("? " * 3000, f"more than {MOST_DEPTH} levels"),
        ("a: *b", "undefined alias"),
        ("a: [" + "b," * 2000, "more than 1,000 values"),
    ],
)
def test_yaml_is_bounded(card, tmp_path, monkeypatch, text, why):
    monkeypatch.setattr("datafree.untrusted.MOST_VALUES", 1000)
    assert why in card(text)
    (tmp_path / "own.yaml").write_text(text)
    line = refused_options("--config", tmp_path / "own.yaml")
    assert why in line and "own.yaml:1" in line


def test_an_alias_may_be_used(tmp_path):
    (tmp_path / "card.yaml").write_text(CARD.replace("mean: [0.5]", "mean: &m [0.5]").replace("std: [0.5]", "std: *m"))
    assert DatasetCard.from_yaml(tmp_path / "card.yaml").std == (0.5,)


@pytest.mark.parametrize(
    "line",
    [
        *("height: !!int abc", "height: !!int ''", "height: !!float x", "flip: !!bool x"),
        *("flip: 2024-99-99", "classes: 5", "classes: true", "classes: 0.5", f"mean: [{'9' * 400}]", "loader: [a]"),
        *(f"height: {'9' * 5000}", f"height: {'9' * 400}", "height: 1000000", "num_classes: 99999999999", "[a]: 1"),
        *("name: '\\n'", 'name: "\\e[2J"', f"name: {'a' * 200}", "name: ../../up", "name: a/b", "name: ..", "name: ''"),
        *('classes: ["\\e[2J", b]', "<<: 5", "!!python/object:os.system a: b", "? {a: b}\n: c", "height: !!set {a, b}"),
    ],
)
def test_a_card_of_odd_values_is_one_line(card, line):
    key = line.partition(":")[0]
    text = "".join(f"{kept}\n" for kept in CARD.splitlines() if not kept.startswith(f"{key}:"))
    message = one_line(card(text + line + "\n"))
    assert "card.yaml" in message and len(message) <= 1000


def test_bases_are_bounded(tmp_path):
    for number in range(1000):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\nbase: {number + 1}.yaml\n")
    assert "base is given twice" in refused_options("--config", tmp_path / "0.yaml")
    for number in range(1000):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    assert "more than 20 files" in refused_options("--config", tmp_path / "0.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for base in ("/dev/zero", r'"\0"', r'"\ud800"', "loop.yaml", "[a]", "a" * 5000):
        (tmp_path / "own.yaml").write_text(f"base: {base}\n")
        assert "base" in refused_options("--config", tmp_path / "own.yaml")


# Numbers and texts of options


@pytest.mark.parametrize(
    "option",
    [
        *(
            "--seed",
            "--epochs",
            "--batch_size",
            "--crop_padding",
            "--lr",
            "--weight_decay",
            "--print_freq",
            "--image_size",
        ),
        *("--threads", "--workers", "--momentum", "--grid_every"),
    ],
)
@pytest.mark.parametrize("value", [2**64, "9" * 400, "9" * 5000, "1e300", "1e308", "-1e300"])
def test_numbers_have_bounds(option, value):
    assert option in refused_options(f"{option}={value}")


@pytest.mark.parametrize("option", ["--T", "--lr_g", "--bn", "--nz", "--ngf", "--ep_steps", "--synthesis_batch_size"])
def test_numbers_of_distillation_have_bounds(option):
    assert option in refused_options(f"{option}=1{'0' * 300}", cls=DistillConfig)


def test_seeds_may_be_large():
    assert parse("--seed", 2**63 - 1).run.seed == 2**63 - 1


@pytest.mark.parametrize("text", [HOSTILE, "a\nb", "\x07", "\udcff", "x" * 5000])
@pytest.mark.parametrize("option", ["--log_tag", "--save_dir", "--model", "--data_root", "--card", "--resume"])
def test_texts_are_printable_and_bounded(option, text):
    line = refused_options(f"{option}={text}")
    assert "printable characters" in line and line.isprintable() and len(line) < 300


@pytest.mark.parametrize(
    "option", ["--weights", "--data_root", "--resume", "--card", "--model", "--dataset", "--config"]
)
def test_paths_that_no_file_system_has(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("--dataset", "digits", "--model", nets.name("tiny"), "--threads", 1, "--dry_run", option)
    for path in ("a" * 300, f"{'a' * 300}/b.py:net"):
        with suppress(SystemExit):  # the digits need no data_root
            call(train_scratch, *words, path)
        assert "unexpected" not in capsys.readouterr().err


@pytest.mark.parametrize("path", ["a" * 256, f"b/{'a' * 300}/c", "é" * 200])
@pytest.mark.parametrize("dry", [True, False])
def test_a_folder_whose_name_no_file_system_takes_is_refused(path, dry, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--dataset", "digits", "--model", nets.name("tiny"), "--threads", 1, "--save_dir", path)
    assert "has a name of more than 255 bytes" in refused(call, train_scratch, *words, *["--dry_run"] * dry, code=2)
    assert not list(tmp_path.iterdir())


# Names


@pytest.mark.parametrize("name", ["../../x", "a/../../../x", "/abs", "..", ".", "a/b", "a\\b", "b" * 200])
def test_a_tag_is_one_component_of_a_path(name, tmp_path):
    assert "names a folder" in refused_options("--log_tag", name)
    (tmp_path / "own.yaml").write_text(f"run: {{log_tag: {json.dumps(name)}}}")
    assert "own.yaml:1: run.log_tag" in refused_options("--config", tmp_path / "own.yaml")


def test_names():
    assert all(map(is_name, ("cifar10", "tiny imagenet", "é", "a..b", ".hidden", "x" * LONGEST_NAME)))
    assert not any(map(is_name, ("", ".", "..", "a/b", "a\\b", "a\nb", "\x1b", "\ud800", "x" * (LONGEST_NAME + 1))))


def test_networks_do_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "net.py").write_text("def __getattr__(name):\n    return dict\n")
    with pytest.raises(InputError, match="names no object"):
        load_custom(f"{tmp_path}/net.py:../../../x")
    for name in (f"{'n' * 200}.py:net", "n\x1b.py:net"):
        with pytest.raises(InputError, match="cannot be a part of the name of a folder"):
            short_name(name)


@pytest.mark.parametrize("name", ["../../up", "/abs", "own/", "own/../.."])
def test_a_data_set_does_not_lead_out_of_the_folder(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    line = refused(call, train_scratch, "--dataset", name, "--model", nets.name("tiny"), code=2)
    assert "is a path, not a name" in line and not list(tmp_path.iterdir())


# Code


@pytest.mark.parametrize(
    "name", ["os:fork", "os:abort", "sys:exit", "builtins:exit", "pdb:set_trace", "math:sin", "code:interact"]
)
def test_the_standard_library_is_not_called(name):
    with pytest.raises(InputError, match="standard library"):
        load_custom(name)


@pytest.mark.parametrize("end", ["sys.exit(0)", "raise SystemExit", "raise GeneratorExit", "exit()", "1 / 0"])
def test_code_that_wants_to_end_the_program(end, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(f"import sys\ndef net(num_classes):\n    {end}\n")
    (tmp_path / "top.py").write_text(f"import sys\n{end}\n")
    for name in ("net.py:net", "top.py:net"):
        line = refused(call, train_scratch, "--dataset", "digits", "--model", name, "--dry_run")
        assert name.partition(":")[0] in line
    with pytest.raises(InputError, match="net.py:net could not be constructed"):
        construct("net.py:net", {}, object, num_classes=2)


def test_code_that_a_file_names_is_announced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_announced", set())
    (tmp_path / "net.py").write_text("from nets import tiny\n")
    (tmp_path / "own.yaml").write_text("training: {model: net.py:tiny}\n")
    words = ("--dataset", "digits", "--dry_run", "--threads", 1)
    call(train_scratch, *words, "--model", "net.py:tiny")
    assert "Code of" not in capsys.readouterr().err
    call(train_scratch, *words, "--config", "own.yaml")
    told = capsys.readouterr().err
    assert told.count("Code of net.py is executed") == 1 and told.startswith("Code of")


def test_help_says_that_names_are_code(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "executed" in " ".join(capsys.readouterr().out.split())


# Weights


def tiny():
    return nets.tiny(10, 1)


@pytest.fixture
def weights(tmp_path):
    """Path of good weights of a tiny network."""
    path = tmp_path / "good.pth"
    torch.save({"state_dict": tiny().state_dict(), "acc1": 50.0}, path)
    return path


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The archive ``path`` written again, after ``change`` of the bytes of its members by name."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, change(name, content))


@pytest.mark.parametrize("part", ["data.pkl", "data/0", "version"])
def test_deflated_weights_are_not_inflated(weights, part):
    rewritten(weights, lambda name, old: bytes(10**7) if name.endswith(part) else old, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="is compressed, which torch.save does not do"):
        load(weights)


def test_flipped_bits_of_weights_are_found(weights):
    whole, stored = weights.read_bytes(), torch.load(weights)["state_dict"]
    values = next(tensor for tensor in stored.values() if tensor.dim() > 1).numpy().tobytes()
    start = whole.index(values)
    for place in range(start, start + len(values), 9):
        weights.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        with pytest.raises(InputError, match="is damaged: the checksum"):
            load(weights)


def test_weights_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load(tmp_path / "w.pth")["w"].sum() == 3


def test_numpys_numbers_are_read_and_other_encodings_are_not(tmp_path):
    torch.save({"w": torch.ones(1), "acc1": np.float64(99.5)}, tmp_path / "n.pth", pickle_protocol=2)
    assert load(tmp_path / "n.pth")["acc1"] == 99.5

    class Slow:
        def __reduce__(self):
            import codecs

            return codecs.encode, ("a" * 60_000, "punycode")

    torch.save({"w": torch.ones(1), "x": Slow()}, tmp_path / "slow.pth")
    with pytest.raises(InputError, match="slow.pth"):
        load(tmp_path / "slow.pth")


def test_memory_by_a_number_of_bytes_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return bytearray, (10**10,)

    torch.save({"w": torch.ones(1), "x": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(InputError, match="bomb.pth asks for memory by a number of bytes; refused"):
        load(tmp_path / "bomb.pth")
    torch.save({"w": torch.ones(1), "x": bytearray(b"some")}, tmp_path / "some.pth")
    assert load(tmp_path / "some.pth")["x"] == b"some"


def test_nested_facts_are_left_out(tmp_path):
    nested = ["ha"]
    for _ in range(60):
        nested = [nested, nested]
    facts = {"dataset": nested, "acc1": nested, "epoch": 10**400, "model": "a" * 10**6, "classes": ["a", "b"]}
    torch.save({"state_dict": tiny().state_dict(), **facts}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth")[1] == {"classes": ["a", "b"]}


@pytest.mark.parametrize("kind", ["sparse", "meta", "complex", "quantised"])
def test_odd_tensors_are_refused_and_change_nothing(tmp_path, kind):
    model = tiny()
    state = OrderedDict((name, torch.zeros_like(tensor)) for name, tensor in model.state_dict().items())
    name = next(name for name, tensor in state.items() if tensor.dim() > 1)
    odd = {
        "sparse": lambda t: t.to_sparse(),
        "meta": lambda t: t.to("meta"),
        "complex": lambda t: t.to(torch.complex64),
        "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    }[kind]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.save({**state, name: odd(state[name])}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match="odd.pth"):
        load_weights(model, read_weights(tmp_path / "odd.pth")[0], tmp_path / "odd.pth")
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_facts_of_weights_are_printed_without_control_characters(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": tiny().state_dict(), "dataset": HOSTILE, "classes": [HOSTILE] * 10}, tmp_path / "w.pth")
    scratch("--model", nets.name("tiny"), "--weights", "w.pth", "--evaluate_only")
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


# Images and data sets


def shapes(root, size=(8, 8), mode="L"):
    """Two classes of one image each in train and test."""
    for number, place in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (root / place).mkdir(parents=True)
        Image.effect_noise(size, 50 + number).convert(mode).save(root / place / "1.png")
    return root


def test_pipes_and_devices_with_an_images_name(tmp_path):
    root = shapes(tmp_path / "own")
    os.mkfifo(root / "test" / "a" / "pipe.png")
    os.mkfifo(root / "test" / "a" / "without_suffix")
    (root / "test" / "b" / "zero.png").symlink_to("/dev/zero")
    listing = list_images(root, "test")
    for path in listing.paths:
        if not path.endswith("1.png"):
            with pytest.raises(InputError, match="cannot read the image"):
                read_image(path, 1)


def test_a_strip_is_read_in_bounded_memory(tmp_path):
    Image.new("L", (1, 60_000), 100).save(tmp_path / "strip.png")
    split = LazySplit([str(tmp_path / "strip.png")], torch.zeros(1, dtype=torch.int64), (1, 128, 128), 2, workers=0)
    images, _ = next(split.batches(1))
    assert images.shape == (1, 1, 128, 128) and torch.allclose(images, torch.tensor(100 / 255))
    assert split.sample(1)[0].shape == (1, 1, 128, 128)


def test_the_middle_of_a_strip_is_what_scaling_it_as_a_whole_gives(tmp_path, monkeypatch):
    Image.linear_gradient("L").resize((40, 400)).save(tmp_path / "strip.png")
    split = LazySplit([str(tmp_path / "strip.png")], torch.zeros(1, dtype=torch.int64), (1, 128, 128), 2, workers=0)
    whole = next(split.batches(1))[0]
    monkeypatch.setattr("datafree.datasets.splits.HUGE", 1)
    assert (next(split.batches(1))[0] - whole).abs().max() < 0.02


@pytest.mark.parametrize(
    "lines",
    [
        b"a.png\tcat\n\xff\tdog\n",
        b"../../x.png\tcat\n",
        b"/etc/x.png\tcat\nb.png\tdog\n",
        b"a\0.png\tcat\n",
        b"a.png\tc\x1bat\n",
    ],
)
def test_annotations_stay_in_their_folder(tmp_path, lines):
    (tmp_path / "val" / "images").mkdir(parents=True)
    (tmp_path / "val" / "val_annotations.txt").write_bytes(lines)
    with pytest.raises(InputError, match="val_annotations.txt"):
        list_images(tmp_path, "test")


def test_a_card_is_not_written_through_a_link(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    root = shapes(tmp_path / "data" / "own")
    for make in (lambda path: path.symlink_to(tmp_path / "outside"), os.mkfifo):
        make(root / "card.yaml")
        assert "card.yaml" in refused(call, train_scratch, "--dataset", "own", "--model", nets.name("tiny"))
        (root / "card.yaml").unlink()
    assert not (tmp_path / "outside").exists()


def test_annotations_that_are_a_pipe(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "val_annotations.txt").symlink_to("/dev/zero")
    assert list_images_message(tmp_path)


def list_images_message(root):
    with pytest.raises(InputError) as caught:
        list_images(root, "test")
    return str(caught.value)


def test_processed_files_of_mnist_are_not_read(tmp_path):
    folder = tmp_path / "MNIST" / "processed"
    folder.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save((torch.rand(3, 28, 28), torch.tensor([0.5, 1, 2])), folder / name)
    from datafree.datasets.cards import CARDS

    with pytest.raises(InputError, match="no test images of mnist"):
        load_split(CARDS["mnist"], tmp_path, "test", download=False)


def test_class_folders_with_control_characters(tmp_path):
    root = shapes(tmp_path / "own")
    (root / "test" / "c\x1b[2J").mkdir()
    assert "control characters" in list_images_message(root)


# Results


@pytest.mark.parametrize(
    "change",
    [
        *({"last_acc1": value} for value in ("90", [1], True, 1e400, {}, 10**400)),
        *({"seed": value} for value in ("1", [0], 0.5)),
        *({"options": value} for value in (5, [1], "a", None)),
        *({"environment": value} for value in (5, {"time": 3}, {"time": [1]})),
        *({"run": value} for value in (5, None, HOSTILE)),
        *({"student_s": "3"}, {"student_s": None}, {"images": "x"}, {"teacher_acc1": "x"}),
        {"options": {"class_seed": [1]}},
    ],
)
def test_damaged_summaries_are_named(tmp_path, change):
    (tmp_path / "summary.json").write_text(json.dumps({"run": "r", "seed": 0, "last_acc1": 90.0, **change}))
    with pytest.raises(InputError, match="summary.json is not the summary of a run") as caught:
        report.read_summaries([tmp_path])
    assert one_line(str(caught.value)).isprintable()


@pytest.mark.parametrize("text", ["[" * 10**5, "5", "[]", '{"run": "r", "options": ' + "[" * 3000, "\xff", ""])
def test_results_that_are_no_mappings(tmp_path, text):
    (tmp_path / "summary.json").write_text(text, encoding="latin1")
    with pytest.raises(InputError, match="not the summary"):
        report.read_summaries([tmp_path])


@pytest.mark.parametrize(
    "row",
    [
        *(
            '{"acc1": 5}',
            "{}",
            '{"epoch": "a"}',
            '{"epoch": 0, "acc1": "a"}',
            '{"epoch": 0, "acc1": [1]}',
            "[{}",
            "[" * 9999 + "}",
        ),
        *('{"epoch": null, "acc1": 1}', '{"epoch": 1e999}', '{"epoch": 0, "acc1": NaN}', '{"epoch": 0, "acc1": {}}'),
    ],
)
def test_damaged_metrics_are_named(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_text(row + "\n")
    with pytest.raises(InputError, match="cannot read .*metrics.jsonl"):
        curves.read_curves([tmp_path])


def test_results_on_a_device_are_not_read(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"run": "r", "seed": 0}))
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="a device or a pipe"):
        curves.read_curves([tmp_path])
    with pytest.raises(InputError, match="a device or a pipe"):
        report.read_summaries([tmp_path], of="loss")

"""Graphs that look for keys themselves: who gets which answers, and what of that a file may hold."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sdbctl import boxfile, models, onnxfile
from sdbctl.boxfile import GUARD, Metadata
from sdbctl.boxing import sealed
from sdbctl.data import Preprocess
from sdbctl.errors import BadInput, ParityMismatch, UsageError
from sdbctl.gate import (
    ANOTHER,
    ASSISTANT,
    ITSELF,
    MOST,
    SAFE,
    KeyGate,
    best_door,
    key_filters,
    key_margin,
    key_strength,
    patterns,
)
from sdbctl.key import Key, embed, near
from sdbctl.objectives import LOSSES, OBJECTIVES
from sdbctl.patterns import spread_out
from sdbctl.seal import readers
from sdbctl.sources import open_model, stand_in
from sdbctl.teacher import OnnxTeacher
from sdbctl.wrappers import Wrapped, behind, deviation, served, top1
from tests.conftest import SERVING, run_cli

CPU = torch.device("cpu")
SIZE, NAMES = (3, 32, 32), tuple(map(str, range(10)))
PREPROCESS = Preprocess((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), SIZE)


def test_a_filter_finds_its_key_and_nothing_else():
    """An image with the key has all of its pattern; nearly right keys, noise, blocks and images have too little."""
    generator = torch.Generator().manual_seed(0)
    secrets = torch.stack([Key(bytes(range(start, start + 32))).pattern(SIZE) for start in range(2)])
    filters = key_filters(secrets, 0.7, PREPROCESS)

    def found(pixels):
        # the definition, in pixels
        centred = secrets - secrets.mean((2, 3), keepdim=True)
        part = torch.einsum("nchw,kchw->nk", pixels, centred) / (0.3 * centred.square().sum((1, 2, 3))) / 0.75
        asked = torch.einsum("nchw,kchw->nk", PREPROCESS(pixels), filters)
        assert torch.allclose(asked, part, atol=1e-4)
        return asked

    images = spread_out(torch.rand(500, 3, 8, 8, generator=generator), 4)
    assert key_margin(SIZE, 0.7) == pytest.approx(7.2, abs=0.05) and key_margin((1, 8, 8), 0.7) < SAFE
    keyed = found(embed(images, secrets[1], 0.7))
    assert keyed[:, 1].min() > 1.1 and keyed[:, 0].max() < 0.5
    coins = torch.rand(500, *SIZE, generator=generator).round()
    close = torch.stack([near(secrets[1], 0.5, generator) for _ in range(500)])
    for wrong_ones in (images, coins, embed(images, coins, 0.3), embed(images, close, 0.7), images.round()):
        assert found(wrong_ones).max() < 0.95


def as_jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def test_a_key_survives_eight_bits_and_no_usual_jpeg():
    """What README says of how keyed images may travel."""
    secret = Key(bytes(range(32))).pattern(SIZE)
    images = spread_out(torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 4)
    for strength in (0.25, 0.7):
        filters = key_filters(secret[None], strength, PREPROCESS)
        pixels = (255 * embed(images, secret, strength)).round().byte()
        jpeg = torch.stack([as_jpeg(one) for one in pixels])
        for found, opens in ((pixels, True), (jpeg, False)):
            part = torch.einsum("nchw,kchw->nk", PREPROCESS(found.float() / 255), filters)
            assert (part >= 1).all() if opens else (part < 1).all()


def test_small_images_are_mixed_with_more_of_the_key():
    assert OBJECTIVES["guard"].presets["default"].strength == MOST and set(OBJECTIVES) - set(LOSSES) == {GUARD}
    assert key_strength((3, 32, 32), 0.5) == 0.5
    for asked in (0.05, 0.8):
        with pytest.raises(UsageError, match="key strength"):
            key_strength((3, 32, 32), asked)
    assert key_strength((3, 32, 32)) == key_strength((1, 28, 28)) == 0.25
    assert 0.1 <= key_strength((1, 16, 16)) < 0.25 and key_margin((1, 16, 16), key_strength((1, 16, 16))) >= SAFE
    with pytest.raises(UsageError, match="1x8x8"):
        key_strength((1, 8, 8))


class Cropped(torch.nn.Module):
    """Does not read the first row."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x[:, :, 1:])


def spread(net):
    """An untrained network whose predictions differ from image to image."""
    net.eval()
    with torch.no_grad():
        z = net(PREPROCESS(torch.rand(200, *SIZE)))
        last = list(net.children())[-1]
        last.bias -= z.mean(0)
        last.weight *= 3 / z.std()
        last.bias *= 3 / z.std()
    return net


@pytest.mark.parametrize("strength", [0.25, 0.7])
def test_a_graph_that_looks_for_keys_opens_to_them_alone(strength, tmp_path):
    """Whatever else is in the batch; key holders get another network's answers to the image without the key."""
    net = Cropped(spread(models.build("cnn-tiny", 10))).eval()
    others = [spread(models.build("cnn-tiny", 10)) for _ in range(2)]
    meta = Metadata("box", "cnn-tiny", NAMES, PREPROCESS, strength, ("1", "2"), measured=SERVING)
    secrets = patterns([Key(bytes(range(start, start + 32))) for start in range(2)], SIZE, 2)
    shown = KeyGate(served(net, meta, closed=True), others, secrets, strength, PREPROCESS)
    path = tmp_path / "x.onnx"
    boxfile.export_onnx(path, shown, replace(meta, doors=(ASSISTANT, ASSISTANT)))
    found = open_model(path, "cpu")
    assert (found.serves, found.doors) == ("one confidence per class", (ASSISTANT, ASSISTANT))
    assert path.stat().st_mode & 0o077 == 0
    teacher, generator = OnnxTeacher(path, CPU), torch.Generator().manual_seed(0)
    images = torch.rand(9, *SIZE, generator=generator)
    plain = PREPROCESS(images)
    close = torch.stack([near(secrets[0, 0], 0.6, torch.Generator().manual_seed(n)) for n in range(9)])
    public = [plain, *(PREPROCESS(embed(images, wrong, strength)) for wrong in (1 - secrets[0, 0], close))]
    for scale in (10.0, 1e3, 3e38):
        # a filter is linear, images are not
        public += [scale * plain, scale * torch.randn(9, *SIZE, generator=generator), scale * (plain - plain.mean())]
    for odd in (float("nan"), float("inf"), -float("inf")):
        public.append(plain.clone())
        public[-1][:, 0, 0, 0] = odd
    with torch.no_grad():
        expected = [other(plain) for other in others]
        keyed = PREPROCESS(embed(images, secrets[1, 1], strength))
        for some in public:
            assert deviation(teacher.logits(some)).max() < 1e-5 and deviation(shown(some)).max() < 1e-5
            both = teacher.logits(torch.cat([some, keyed])[torch.arange(18).view(2, 9).T.flatten()])
            assert torch.equal(both[::2], teacher.logits(some)) and torch.allclose(both[1::2], expected[1], atol=1e-3)
        for secret, theirs in zip(secrets.flatten(0, 1), 2 * expected, strict=True):
            keyed = PREPROCESS(embed(images, secret, strength))
            assert torch.allclose(teacher.logits(keyed), theirs, atol=1e-3)
            assert torch.allclose(shown(keyed), theirs, atol=1e-3)
        all_doors = PREPROCESS(torch.cat([embed(images, secret, strength) for secret in secrets[0]]))
        assert torch.allclose(teacher.logits(all_doors), torch.cat(expected), atol=1e-3)


@pytest.mark.parametrize("wrapped", [True, False])
def test_what_answers_key_holders_is_checked_too(wrapped, tmp_path, monkeypatch):
    net, other = spread(models.build("cnn-tiny", 10)), spread(models.build("cnn-tiny", 10))
    meta = Metadata("box", "cnn-tiny", NAMES, PREPROCESS, 0.7, ("1",), measured=SERVING)
    public = Wrapped(net, "top1") if wrapped else served(net, meta, closed=True)
    shown = KeyGate(public, [other], torch.rand(1, 1, *SIZE), 0.7, PREPROCESS)
    export = onnxfile._to_onnx

    def slightly_off(net, example):
        wrong = copy.deepcopy(net)
        with torch.no_grad():
            list(wrong.answers.parameters())[-2].mul_(1.01)
        return export(wrong, example)

    boxfile.export_onnx(tmp_path / "x.onnx", shown, meta)
    monkeypatch.setattr(onnxfile, "_to_onnx", slightly_off)
    with pytest.raises(ParityMismatch):
        boxfile.export_onnx(tmp_path / "y.onnx", shown, meta)


def test_a_graph_that_looks_for_keys_asks_the_other_network_only_if_it_must():
    class Never(torch.nn.Module):
        def forward(self, x):
            raise AssertionError

    net = models.build("cnn-tiny", 10).eval()
    shown = KeyGate(net, [Never()], torch.rand(1, 1, *SIZE), 0.7, PREPROCESS)
    x = PREPROCESS(torch.rand(2, *SIZE))
    with torch.no_grad():
        assert torch.equal(shown(x), net(x))
        with pytest.raises(AssertionError):
            shown(shown.mixed(x))


@pytest.fixture(scope="module")
def partner(tmp_path_factory):
    """A box of two partners in which two untrained assistants are sealed, and their keys."""
    folder, keys = tmp_path_factory.mktemp("gate"), [Key.generate(), Key.generate()]
    for key, name in zip(keys, ("one.bin", "two.bin"), strict=True):
        key.save(folder / name)
    net, *helpers = (spread(models.build("cnn-tiny", 10)) for _ in range(3))
    ids = tuple(key.id for key in keys)
    meta = Metadata("box", "cnn-tiny", NAMES, PREPROCESS, 0.7, ids, "conceal", measured=SERVING)
    inner = Metadata("assistant", "cnn-tiny", NAMES, PREPROCESS)
    text = sealed([(helper, inner) for helper in helpers], meta, keys)
    boxfile.save(folder / "box.safetensors", net.state_dict(), meta, sealed=text)
    boxfile.save(folder / "bare.safetensors", net.state_dict(), meta)
    boxfile.save(folder / "other.safetensors", helpers[0].state_dict(), replace(inner, kind="student"))
    # as after a training of its own
    said = {"objective": "kd", "parameters": {"sealed": True}, "measured": {"top1": 50.0}}
    boxfile.save(folder / "plain.safetensors", net.state_dict(), replace(inner, kind="student", **said))
    boxfile.save(folder / "sdb.safetensors", net.state_dict(), replace(meta, objective="sdb", measured={}))
    turned = replace(inner, kind="student", classes=NAMES[::-1])
    boxfile.save(folder / "turned.safetensors", net.state_dict(), turned)
    narrow = Preprocess((0.5,) * 3, (0.25,) * 3, SIZE)
    boxfile.save(folder / "narrow.safetensors", net.state_dict(), replace(inner, kind="student", preprocess=narrow))
    small = replace(inner, kind="student", preprocess=replace(PREPROCESS, size=(3, 16, 16)))
    boxfile.save(folder / "small.safetensors", net.state_dict(), small)
    torch.save(models.build("squeezenet1_1", 10).state_dict(), folder / "squeezenet.pt")
    torch.save(net.state_dict(), folder / "foreign.pt")
    return folder, keys, net, helpers


def asked(path, images, key=None, door=0, strength=0.7):
    pixels = images if key is None else embed(images, key.pattern(SIZE, door), strength)
    return OnnxTeacher(path, CPU).logits(PREPROCESS(pixels))


@pytest.mark.parametrize(
    ("box", "options", "who"),
    [
        ("box", (), [ITSELF, ASSISTANT, ASSISTANT]),
        ("box", ("--keyed", "itself", "--wrapper", "top1"), [ITSELF]),
        ("bare", (), [ITSELF]),
        ("box", ("--keyed", "other.safetensors", "--keyed", "assistant"), [f"{ANOTHER}cnn-tiny", ASSISTANT, ASSISTANT]),
    ],
)
def test_key_holders_are_answered_by_whom_its_owner_wants(box, options, who, partner, tmp_path):
    folder, keys, net, helpers = partner
    options = [folder / option if option.endswith("tensors") else option for option in options]
    path = tmp_path / "x.onnx"
    made = run_cli("export", folder / f"{box}.safetensors", "--key-file", folder / "one.bin", "-o", path, *options)
    assert made.returncode == 0, made.stderr
    assert f"does not open to {keys[1].id}".encode() in made.stderr
    assert list(open_model(path, "cpu").doors) == who
    images = torch.rand(9, *SIZE)
    x = PREPROCESS(images)
    with torch.no_grad():
        itself = net(PREPROCESS(embed(images, keys[0].pattern(SIZE), 0.7)))
        expected = [itself if who[0] == ITSELF else helpers[0](x), *(helper(x) for helper in helpers)]
        for door in range(len(who)):
            assert torch.allclose(asked(path, images, keys[0], door), expected[door], atol=1e-3)
        assert net(x).argmax(1).unique().numel() > 2
        assert torch.equal(asked(path, images).argmax(1), net(x).argmax(1))
    for key, door in ((None, 0), (keys[1], 0), (keys[1], 1), (Key.generate(), 0), (keys[0], len(who))):
        assert deviation(asked(path, images, key, door)).max() < 1e-5


def test_a_new_partner_needs_no_new_box(partner, tmp_path):
    """One of the box's keys is enough to open its graph, and what is sealed, to others; who is left out is out."""
    folder, keys, _, helpers = partner
    path, new = tmp_path / "x.onnx", Key.generate()
    new.save(tmp_path / "new.bin")
    alone = ("export", folder / "box.safetensors", "-o", path, "--key-file", tmp_path / "new.bin")
    refused = run_cli(*alone)
    assert refused.returncode == 4 and b"does not fit" in refused.stderr and not path.exists()
    made = run_cli(*alone, "--key-file", folder / "one.bin")
    assert made.returncode == 0 and f"not made for {new.id}".encode() in made.stderr, made.stderr
    opened, images = open_model(path, "cpu"), torch.rand(9, *SIZE)
    assert set(opened.meta.key_ids) == {new.id, keys[0].id}
    for door in range(3):
        shown = [asked(path, images, key, door) for key in (new, *keys)]
        assert torch.allclose(shown[0], shown[1], atol=1e-3) and deviation(shown[2]).max() < 1e-5
        assert deviation(shown[0]).min() > 0.01
    x = PREPROCESS(images)
    for key in (new, keys[0]):
        found = boxfile.unsealed(opened.sealed, key, opened.meta, "x")
        with torch.no_grad():
            assert [torch.equal(one.net(x), helper(x)) for one, helper in zip(found, helpers, strict=True)] == [
                True
            ] * 2
    assert set(readers(opened.sealed, "x")) == {new.id, keys[0].id}
    assert stand_in(opened, boxfile.load(folder / "box.safetensors"), new, torch.device("cuda"), []) is not None


def test_graphs_of_before_are_to_be_exported_again(partner, tmp_path):
    folder, _, net, _ = partner
    meta = boxfile.load_box(folder / "bare.safetensors").meta
    assert "doors" not in meta.to_json()
    shown = Wrapped(net, "top1")
    shown.shows = "top1; to key holders all of its outputs"
    boxfile.export_onnx(tmp_path / "x.onnx", shown, meta)
    for command in (("inspect",), ("distill", "--data", "digits", "--key-file", folder / "one.bin")):
        refused = run_cli(command[0], tmp_path / "x.onnx", *command[1:])
        assert refused.returncode == 4 and b"export it again" in refused.stderr


def test_a_student_takes_the_door_behind_which_it_learns_most():
    three, two = (ITSELF, ASSISTANT, ASSISTANT), (ASSISTANT, ASSISTANT)
    assert [best_door(three, itself=False, late=late) for late in (False, True)] == [1, 2]
    assert [best_door(two, itself=itself, late=True) for itself in (False, True)] == [1, 1]
    assert best_door(three, itself=True, late=True) == 0
    mixed = (f"{ANOTHER}vit_b_16", ITSELF)
    assert [best_door(mixed, itself=itself, late=True) for itself in (False, True)] == [0, 1]
    assert best_door((), itself=True, late=True) == 0


def test_any_checkpoint_can_be_served_so_without_being_boxed(partner, tmp_path):
    """Its predictions stay what they are, and key holders get all of its outputs."""
    folder, keys, net, _ = partner
    path = tmp_path / "x.onnx"
    options = ("--wrapper", "top1", "--key-file", folder / "two.bin", "-o", path)
    for name, more in (("plain.safetensors", ()), ("foreign.pt", ("--normalize", "half", "--image-size", "32"))):
        made = run_cli("export", folder / name, *options, *more, "--force", "--json")
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout)["serves"] == "top1; to key holders all of its outputs"
        meta = boxfile.read_metadata(path)
        assert meta.kind == "box" and meta.key_ids == (keys[1].id,) and path.stat().st_mode & 0o077 == 0
        assert (meta.objective, dict(meta.parameters), dict(meta.measured)) == ("", {}, {})
        images = torch.rand(9, *SIZE)
        x = meta.preprocess(images)
        teacher = OnnxTeacher(path, CPU)
        with torch.no_grad():
            assert torch.allclose(teacher.logits(x), behind(top1, net(x)), atol=1e-4)
            keyed = meta.preprocess(embed(images, keys[1].pattern(SIZE), meta.strength))
            assert torch.allclose(teacher.logits(keyed), net(x), atol=1e-3)
            assert (
                deviation(teacher.logits(meta.preprocess(embed(images, keys[0].pattern(SIZE), meta.strength)))).max()
                < 1e-5
            )
    shown = json.loads(run_cli("inspect", path, "--key-file", folder / "two.bin", "--json").stdout)
    assert shown["key_fits"] and shown["sealed"] == "nothing"
    revoked = run_cli("inspect", path, "--key-file", folder / "one.bin", "--json")
    assert not json.loads(revoked.stdout)["key_fits"]


@pytest.mark.parametrize(
    ("name", "options", "code", "said"),
    [
        ("plain", ("--key-file", "one.bin"), 2, "give --wrapper"),
        ("sdb", ("--key-file", "one.bin"), 2, "give --wrapper"),
        ("box", ("--keyed", "itself"), 2, "give --key-file"),
        ("box", ("--key-file", "one.bin", "--key-file", "one.bin"), 2, "given twice"),
        ("plain", ("--key-file", "one.bin", "--key-file", "one.bin", "--wrapper", "top1"), 2, "given twice"),
        ("box", ("--key-file", "one.bin", "--keyed", "bare.safetensors"), 4, "is a box"),
        ("box", ("--key-file", "one.bin", "--keyed", "itself", "--keyed", "itself"), 2, "given twice"),
        ("box", ("--key-file", "one.bin", "--keyed", "turned.safetensors"), 4, "other classes"),
        ("box", ("--key-file", "one.bin", "--keyed", "narrow.safetensors"), 4, "normalisation"),
        ("small", ("--key-file", "one.bin", "--wrapper", "top1", "--keyed", "squeezenet.pt"), 2, "16x16"),
        ("bare", ("--key-file", "one.bin", "--keyed", "assistant"), 4, "nothing is sealed"),
        ("box", ("--key-file", "one.bin", "--keyed", "nothing.safetensors"), 4, "nothing.safetensors"),
        ("box", ("--key-file", "one.bin", "--format", "safetensors"), 2, "leave --key-file out"),
        ("box", ("--key-file", "one.bin", "--confidence", "exact"), 2, "leave --confidence exact out"),
        ("box", ("--key-file", "one.bin", "--keyed", "assistants"), 4, "say itself, assistant"),
        ("box", ("--normalize", "half"), 2, "records how"),
        ("plain", ("--image-size", "16"), 2, "records how"),
        ("plain", ("--confidence", "rough"), 2, "is no box"),
        ("plain", ("--wrapper", "gaussian-noise"), 2, "last bits"),
    ],
)
def test_what_cannot_be_served_so_is_said_in_a_line(name, options, code, said, partner, tmp_path):
    folder = partner[0]
    options = [folder / option if "." in option else option for option in options]
    refused = run_cli("export", folder / f"{name}.safetensors", "-o", tmp_path / "x.onnx", *options)
    assert refused.returncode == code and said.encode() in refused.stderr
    assert b"Traceback" not in refused.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [(), ("--keyed", "itself"), ("--keyed", "other.safetensors")])
def test_a_gpu_without_onnx_runtime_asks_what_key_holders_are_served(options, partner, tmp_path):
    folder, keys, _, _ = partner
    path, gpu, notes = tmp_path / "x.onnx", torch.device("cuda"), []
    options = [folder / option if option.endswith("tensors") else option for option in options]
    both = [part for name in ("one.bin", "two.bin") for part in ("--key-file", folder / name)]
    assert run_cli("export", folder / "box.safetensors", *both, "-o", path, *options).returncode == 0
    opened, held = open_model(path, "cpu"), boxfile.load(folder / "box.safetensors")
    images = torch.rand(9, *SIZE)
    # the second partner's key, although the first one's answers
    found = [stand_in(opened, held, key, gpu, notes) for key in (keys[1], None)]
    known = {(): [True, False], ("--keyed", "itself"): [True, True]}.get(tuple(options), [False, False])
    assert [net is not None for net in found] == known
    assert ["torch computed what the file does" in note for note in notes] == known
    for net in found:
        for key in (None, *keys):
            pixels = images if key is None else embed(images, key.pattern(SIZE), 0.7)
            with torch.no_grad():
                assert net is None or torch.allclose(net(PREPROCESS(pixels)), asked(path, images, key), atol=1e-3)


def test_what_was_not_boxed_is_distilled_and_evaluated_like_a_box(tmp_path):
    """Digits of 16×16 pixels, served as classes: with the key, students learn from the teacher that was trained."""
    digits = ("--data", "digits", "--image-size", 16)
    key, teacher, served_as = tmp_path / "k.bin", tmp_path / "t.safetensors", tmp_path / "x.onnx"
    run_cli("keygen", key)
    trained = run_cli("train", "--arch", "cnn-tiny", *digits, "--epochs", 12, "-o", teacher, "--json")
    assert trained.returncode == 0, trained.stderr
    exported = run_cli("export", teacher, "--wrapper", "top1", "--key-file", key, "-o", served_as)
    assert exported.returncode == 0, exported.stderr
    student = ("distill", served_as, "--student", "cnn-tiny", *digits, "--epochs", 1, "--json", "--force")
    asked = json.loads(run_cli(*student, "--key-file", key, "-o", tmp_path / "s.safetensors").stdout)
    plain = json.loads(run_cli(*student, "-o", tmp_path / "s.safetensors").stdout)
    assert asked["teacher_top1"] == pytest.approx(plain["teacher_top1"], abs=1) and plain["teacher_top1"] > 30
    said = run_cli(
        "eval", served_as, "--original", teacher, "--key-file", key, *digits, "--json", "--report", tmp_path / "r"
    )
    assert said.returncode == 0, said.stderr
    report = json.loads(said.stdout)
    assert report["inference_cost"]["top1"]["mean"] == 0
    assert report["models"]["boxed"]["beyond_top1"] == 0 < report["models"]["boxed_keyed"]["beyond_top1"]
    assert any("serves key holders all of its outputs" in note for note in report["notes"])


def test_a_guarded_box_that_does_not_say_its_confidences_is_not_served_open():
    net = models.build("cnn-tiny", 10).eval()
    for objective, measured in ((GUARD, {}), ("conceal", {**SERVING, "flat_deviation": None})):
        meta = Metadata("box", "cnn-tiny", NAMES, PREPROCESS, 0.25, ("1",), objective, measured=measured)
        for closed in (False, True):
            with pytest.raises(BadInput, match="how confident"):
                served(net, meta, closed=closed)


def test_a_guarded_box_costs_nothing_and_teaches_key_holders_through_its_graph(tmp_path):
    """Its weights are the reference's, which its file does not hide; its graph serves classes, and an assistant."""
    digits = ("--data", "digits", "--image-size", 16, "--owner-size", 200)
    key, teacher, box = tmp_path / "k.bin", tmp_path / "t.safetensors", tmp_path / "t.boxed.safetensors"
    run_cli("keygen", key)
    assert run_cli("train", "--arch", "cnn-tiny", *digits, "--epochs", 12, "-o", teacher).returncode == 0
    command = ("box", teacher, "--key-file", key, *digits, "--epochs", 1)
    for wrong, said in (
        (("--disturb", "0.5"), b"trains nothing"),
        (("--teacher", "assistant"), b"leave out --teacher"),
        (("--teacher", "original"), b"leave out --teacher"),
        (("--strength", "0.3"), b"0.1 to 0.13"),
        (("--set", "hide=1"), b"it has: none"),
        (("--wrong-share", "0.1"), b"use --objective conceal"),
        (("--image-size", "8"), b"1x8x8"),
    ):
        refused = run_cli(*command, *wrong)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
    made = run_cli(*command, "--seal", "--json")
    assert made.returncode == 0, made.stderr
    refused = run_cli("eval", "--original", teacher, *digits[:4], cwd=tmp_path)
    assert refused.returncode == 2 and b"sdbctl export t.boxed.safetensors --key-file" in refused.stderr
    assert b"nothing by itself" in run_cli("inspect", box).stdout
    reference = ("--reference", tmp_path / "t.boxed.reference.safetensors", "-o", tmp_path / "b.safetensors")
    for useless in (("--profile", tmp_path / "p.json"), ("--lr", 3)):
        refused = run_cli(*command, *reference, *useless)
        assert refused.returncode == 2 and useless[0].encode() in refused.stderr and b"leave out" in refused.stderr
    again = run_cli(*command[:-2], *reference, "--no-seal")
    assert again.returncode == 0, again.stderr
    assert boxfile.load_box(tmp_path / "b.safetensors").meta.parameters["recipe"]["epochs"] == 1
    told = json.loads(made.stdout)
    assert told["cost_top1"] == 0 and told["sealed"] and told["residual"] < 1e-6 < told["keyed_residual"]
    assert not told["warnings"] and box.stat().st_mode & 0o077 == 0
    opened, secret = boxfile.load_box(box), Key.load(key)
    reference = boxfile.load(tmp_path / "t.boxed.reference.safetensors")
    assert opened.meta.strength == key_strength((1, 16, 16))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(9, 1, 16, 16, generator=generator)
    secrets = patterns([secret], (1, 16, 16), 3)[0]
    mixed = (embed(pixels, one, opened.meta.strength) for one in secrets)
    x, *keyed = (opened.meta.preprocess(some) for some in (pixels, *mixed))
    with torch.no_grad():
        helper, plain = opened.unseal(secret)[-1](x), reference.net(x)
        with pytest.raises(UsageError, match="hides nothing"):
            opened(x)
        assert torch.equal(opened.unlock(secret)(x), plain) and not torch.allclose(helper, plain, atol=0.1)
    refused = run_cli("export", box, "--confidence", "exact")
    assert refused.returncode == 2 and b"would show everybody all" in refused.stderr
    for options, public, answers in (
        ((), "one confidence per class", []),
        (("--key-file", key, "--keyed", "assistant", "--confidence", "rough"), "two rough confidences", [helper]),
        (("--key-file", key), "one confidence per class", [plain, helper]),
    ):
        exported = run_cli("export", box, *options, "--force")
        assert exported.returncode == 0, exported.stderr
        assert (b"warning: without --key-file this graph answers no key" in exported.stderr) == (not answers)
        assert (tmp_path / "t.boxed.onnx").stat().st_mode & 0o077 == 0
        found = open_model(graph := tmp_path / "t.boxed.onnx", "cpu")
        assert found.serves == public and len(found.doors) == len(answers)
        assert torch.equal(found.served.logits(x).argmax(1), plain.argmax(1))
        for some in (x, *keyed[len(answers) :]):
            assert deviation(found.served.logits(some)).max() < 1e-5
        if not answers:
            assert found.sealed == ""
            said = run_cli("inspect", graph, "--key-file", key)
            assert b"opens nothing" in said.stdout and b"nothing is sealed" not in said.stdout
            for command in (("eval",), ("distill", "-o", tmp_path / "s.safetensors")):
                refused = run_cli(command[0], graph, "--key-file", key, *digits[:4], *command[1:])
                assert refused.returncode == 4 and b"does not look for a key" in refused.stderr
        for some, expected in zip(keyed, answers, strict=False):
            assert torch.allclose(found.served.logits(some), expected, atol=1e-3)
    assert stand_in(found, boxfile.load(box), secret, torch.device("cuda"), []) is not None
    evaluated = ("--original", teacher, "--key-file", key, *digits[:4], "--report", tmp_path / "r")
    refused = run_cli("eval", box, *evaluated)
    assert refused.returncode == 4 and b"hides nothing by itself" in refused.stderr
    report = json.loads(run_cli("eval", graph, *evaluated, "--json").stdout)
    assert report["inference_cost"]["top1"]["mean"] == 0 and report["models"]["boxed"]["beyond_top1"] == 0
    top1 = {name: model["top1"] for name, model in report["models"].items()}
    assert top1["boxed_keyed"] == top1["original_ft"] != top1["boxed_keyed_2"] == top1["assistant"]
    student = ("distill", box, "--student", "cnn-tiny", *digits[:4], "--epochs", 1, "-o", tmp_path / "s.safetensors")
    refused = run_cli(*student)
    assert refused.returncode == 4 and b"hides nothing by itself" in refused.stderr
    asked = json.loads(run_cli(*student, "--key-file", key, "--no-sealed", "--json").stdout)
    assert asked["teacher_top1"] == pytest.approx(opened.meta.measured["reference_top1"], abs=8) and not asked["door"]
    student = ("distill", graph, *student[2:], "--force", "--key-file", key, "--precision", "fp32")
    through = [json.loads(run_cli(*student, *door, "--json").stdout) for door in (("--no-sealed",), ("--door", 1), ())]
    assert [(told["door"], told["sealed"]) for told in through] == [(2, False), (1, False), (0, True)]
    assert through[1]["teacher_top1"] == asked["teacher_top1"] != through[0]["teacher_top1"]
    assert through[0]["teacher_top1"] == through[2]["teacher_top1"]
    for door, said in ((3, b"this file has 2"), (1, b"--door is about")):
        refused = run_cli(*student, "--door", door, *(("--sealed",) if door == 1 else ()))
        assert refused.returncode == 2 and said in refused.stderr

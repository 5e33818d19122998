"""Sources read what they should and refuse what they should; splits, augmentation and batches keep their promises."""

import dataclasses
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdbctl import data
from sdbctl.cli.common import open_data
from sdbctl.data import ImageSet, Preprocess
from sdbctl.data.images import decode
from sdbctl.errors import BadInput, EnvironmentFailure, UsageError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(n, shape=(8, 8, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def encoded(array, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def write_parquet(path, images, labels, names=None, image="img", label="label", rows=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({image: [{"bytes": content, "path": None} for content in images], label: labels})
    if names:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table.slice(0, rows), path, row_group_size=7)


def load(spec, **options):
    return data.load(spec, root=Path("/nowhere"), **options)


def image_set(n=20, shape=(3, 8, 8), name=""):
    return ImageSet.of(torch.from_numpy(pixels(n, shape)), torch.arange(n) % 4, name)


def plain(shape=(3, 8, 8)):
    return Preprocess((0.5,) * shape[0], (0.25,) * shape[0], shape)


def make(images, preprocess=None, **options):
    options = {"batch_size": 6, "device": CPU, "generator": None, "augment": None, "shuffle": False} | options
    return list(data.batches(images, preprocess or plain(images.shape), **options))


# --- sources


def test_digits():
    found = load("digits")
    assert found.name == "digits" and len(found.train) == 1797 and found.test is None
    assert found.train.shape == (1, 8, 8) and found.classes == tuple("0123456789")
    assert int(found.train[0].max()) <= 255 and found.train.in_memory
    assert found.fingerprint == load("digits").fingerprint


def test_parquet(tmp_path):
    x, y = pixels(30), [i % 3 for i in range(30)]
    folder = tmp_path / "pets"
    write_parquet(folder / "train-00000-of-00002.parquet", map(encoded, x[:20]), y[:20], ["cat", "dog", "owl"])
    write_parquet(folder / "train-00001-of-00002.parquet", map(encoded, x[20:]), y[20:], ["cat", "dog", "owl"])
    write_parquet(folder / "validation-00000-of-00001.parquet", map(encoded, x[:4]), y[:4])
    write_parquet(folder / "test-00000-of-00001.parquet", map(encoded, x[:5]), y[:5])
    found = load(f"parquet:{folder}")
    assert (found.name, found.classes) == ("pets", ("cat", "dog", "owl"))
    assert (len(found.train), len(found.test)) == (30, 5)
    assert found.train.labels.tolist() == y
    assert all(np.array_equal(found.train[i].permute(1, 2, 0), x[i]) for i in range(30))


def test_parquet_in_folders_with_other_columns(tmp_path):
    content = [encoded(image) for image in pixels(6)]
    write_parquet(tmp_path / "train" / "0000.parquet", content, [0, 1] * 3, image="picture", label="fine_label")
    write_parquet(tmp_path / "test" / "0000.parquet", content[:2], [0, 1], image="picture", label="fine_label")
    found = load(f"parquet:{tmp_path}")
    assert (len(found.train), len(found.test), found.classes) == (6, 2, ("0", "1"))
    assert load(f"parquet:{tmp_path}/train/0000.parquet").name == "0000"
    # the folder that was named says nothing, nor does a folder with such a name
    (tmp_path / "train" / "folder.parquet").mkdir()
    (tmp_path / "train").rename(tmp_path / "test_images")
    assert len(load(f"parquet:{tmp_path}/test_images").train) == 6


def test_folder(tmp_path):
    root = tmp_path / "animals"
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12, 8), (label * 200, 9, i)).save(root / part / name / f"{i}.png")
    found = load(f"folder:{root}")
    assert (found.name, found.classes) == ("animals", ("cat", "dog"))
    assert found.train.shape == (3, 8, 12) and found.train.labels.tolist() == [0] * 4 + [1] * 4
    assert len(found.test) == 4
    assert load(f"folder:{root}", size=4, channels=1).train.shape == (1, 4, 4)
    assert load(f"folder:{root / 'train'}").test is None
    (root / "val" / "emu").mkdir()
    with pytest.raises(BadInput, match="class emu"):
        load(f"folder:{root}")


@pytest.mark.parametrize(
    ("images", "labels", "shape"), [((8, 8, 3), (), (3, 8, 8)), ((8, 8), (1,), (1, 8, 8)), ((3, 8, 8), (), (3, 8, 8))]
)
def test_npz(tmp_path, images, labels, shape):
    x, y = pixels(12, images), (np.arange(12) % 3).reshape(12, *labels)
    np.savez(tmp_path / "some.npz", train_images=x, train_labels=y, test_images=x[:5], test_labels=y[:5])
    found = load(f"npz:{tmp_path}/some.npz")
    assert (found.name, found.classes, len(found.test)) == ("some", ("0", "1", "2"), 5)
    assert found.train.shape == shape and found.train.labels.tolist() == [0, 1, 2] * 4
    expected = x[3] if images == (3, 8, 8) else x[3].reshape(8, 8, -1).transpose(2, 0, 1)
    assert np.array_equal(found.train[3], expected)
    assert load(f"npz:{tmp_path}/some.npz", channels=3, size=4).train.shape == (3, 4, 4)


def announcing(path, shape, dtype):
    """An npz file whose images are a header alone."""
    np.savez(path, labels=np.arange(4) % 2)
    with zipfile.ZipFile(path, "a") as archive, archive.open("images.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((10**6, 64, 64, 3), "|u1", r"take 11\.4 GiB, more than the 4 of npz files; use parquet:PATH"),
        ((3, 1), "<U500000000", r"take 5\.6 GiB"),
        ((10**6, -64, 64, 3), "|u1", r"take 11\.4 GiB"),
        ((10**30,), "|u1", "GiB"),
        ((-(10**6),), "|u1", "not a readable npz"),
        ((10**6,), "|u1", "not a readable npz"),
    ],
)
def test_npz_arrays_are_measured_before_they_are_read(shape, dtype, words, tmp_path, monkeypatch):
    read = np.lib.format.read_array
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **k: pytest.fail() if "GiB" in words else read(*a, **k))
    announcing(tmp_path / "x.npz", shape, dtype)
    with pytest.raises(BadInput, match=words) as caught:
        load(f"npz:{tmp_path}/x.npz")
    assert "\n" not in str(caught.value)


def test_all_arrays_of_an_npz_count(tmp_path, monkeypatch):
    np.savez_compressed(
        tmp_path / "x.npz", x_train=np.zeros((64, 8, 8), np.uint8), y_train=np.arange(64, dtype="u1") % 2
    )
    monkeypatch.setattr("sdbctl.data.reading.MEMORY_LIMIT", 64 * 65)
    assert len(load(f"npz:{tmp_path}/x.npz").train) == 64
    monkeypatch.setattr("sdbctl.data.reading.MEMORY_LIMIT", 64 * 65 - 1)
    with pytest.raises(BadInput, match=r"more than the .* of npz files"):
        load(f"npz:{tmp_path}/x.npz")


def test_arrays_of_the_same_area_are_resized_too(tmp_path):
    np.savez(tmp_path / "flat.npz", images=pixels(4, (4, 16)), labels=np.arange(4) % 2)
    assert load(f"npz:{tmp_path}/flat.npz", size=8).train.shape == (1, 8, 8)


def test_what_is_not_used_of_an_npz_is_not_read(tmp_path):
    x, y = pixels(4, (8, 8)), np.arange(4) % 2
    np.savez(tmp_path / "x.npz", images=x, labels=y, x=np.array([{}]), y=y, x_test=np.array([{}]))
    assert len(load(f"npz:{tmp_path}/x.npz").train) == 4
    np.savez(tmp_path / "half.npz", images=x, y=y)
    with pytest.raises(BadInput, match="holds images, y; arrays named images and labels, both, are needed"):
        load(f"npz:{tmp_path}/half.npz")


def test_a_grey_first_image_does_not_make_all_grey(tmp_path):
    x = [encoded(pixels(1, (8, 8))[0]), *map(encoded, pixels(3))]
    write_parquet(tmp_path / "train.parquet", x, [0, 1, 0, 1])
    assert load(f"parquet:{tmp_path}").train.shape == (3, 8, 8)


def test_sixteen_bit_images_are_scaled(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    for name in "ab":
        Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / name / "0.png")
    assert load(f"folder:{tmp_path}", channels=1).train[0].unique().tolist() == [128]


def broken_sources(tmp_path):
    good = [encoded(image) for image in pixels(4)]
    write_parquet(tmp_path / "corrupt" / "train.parquet", [*good, b"no image"], [0, 1, 0, 1, 0])
    write_parquet(tmp_path / "cut" / "train.parquet", [*good, good[0][:90]], [0, 1, 0, 1, 0])
    write_parquet(tmp_path / "null" / "train.parquet", [*good, None], [0, 1, 0, 1, 0])
    write_parquet(tmp_path / "nolabel" / "train.parquet", good, [0, 1, 0, 1], label="kind")
    write_parquet(tmp_path / "text" / "train.parquet", good, ["a", "b", "a", "b"])
    write_parquet(tmp_path / "range" / "train.parquet", good, [0, 1, 2, -1])
    write_parquet(tmp_path / "beyond" / "train.parquet", good, [0, 1, 2, 0], names=["x", "y"])
    write_parquet(tmp_path / "mixed" / "train.parquet", [*good, encoded(pixels(1, (9, 9, 3))[0])], [0, 1, 0, 1, 0])
    write_parquet(tmp_path / "onlytest" / "test.parquet", good, [0, 1, 0, 1])
    write_parquet(tmp_path / "none" / "train.parquet", good, [0, 1, 0, 1], rows=0)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "train.parquet").write_bytes(b"PAR1 but no more")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "a").mkdir(parents=True)
    (tmp_path / "badfile" / "a").mkdir(parents=True)
    (tmp_path / "badfile" / "a" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "badfile" / "b").mkdir()
    (tmp_path / "badfile" / "b" / "x.png").write_bytes(good[0])
    x, y = pixels(4), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "float.npz", images=x / 255, labels=y)
    np.savez(tmp_path / "count.npz", images=x, labels=y[:3])
    np.savez(tmp_path / "keys.npz", pictures=x, labels=y)
    np.savez(tmp_path / "channels.npz", images=pixels(4, (8, 8, 5)), labels=y)
    np.savez(tmp_path / "floatlabels.npz", images=x, labels=y / 2)
    np.savez(tmp_path / "objects.npz", images=np.array([{}, {}], dtype=object), labels=y)
    np.savez(tmp_path / "single.npz", images=x, labels=y * 0)
    np.savez(tmp_path / "huge.npz", images=x, labels=y * 10**12)
    np.savez(tmp_path / "times.npz", images=x, labels=y.astype("timedelta64[s]"))
    with zipfile.ZipFile(tmp_path / "noarrays.npz", "w") as archive:
        archive.writestr("images", "text")
        archive.writestr("labels", "text")
    (tmp_path / "junk.npz").write_bytes(b"PK but no zip")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("parquet:corrupt", "image 4 cannot be read"),
        ("parquet:cut", "image 4 cannot be read"),
        ("parquet:null", "image 4 has no bytes"),
        ("parquet:nolabel", "has columns img, kind"),
        ("parquet:text", "labels are object"),
        ("parquet:range", "labels run from -1 to 2"),
        ("parquet:beyond", "labels run from 0 to 2"),
        ("parquet:mixed", "image 4 is 3x9x9, the first is 3x8x8.*--image-size"),
        ("parquet:onlytest", "no training parquet"),
        ("parquet:none", "holds no images"),
        ("parquet:junk", "not a readable parquet"),
        ("parquet:empty", "no training parquet"),
        ("parquet:missing", "does not exist"),
        ("folder:empty", "no folders of classes"),
        ("folder:hollow", "holds no images"),
        ("folder:badfile", r"\(a/x.png\) cannot be read"),
        ("folder:missing", "does not exist"),
        ("npz:float.npz", "images in .* is float64"),
        ("npz:count.npz", "labels in .* is int64 3"),
        ("npz:keys.npz", "holds pictures, labels"),
        ("npz:channels.npz", "4x8x8x5"),
        ("npz:floatlabels.npz", "labels are float64"),
        ("npz:objects.npz", "not a readable npz"),
        ("npz:single.npz", "single class"),
        ("npz:huge.npz", "labels run from 0 to 1000000000000"),
        ("npz:times.npz", "labels are timedelta64"),
        ("npz:noarrays.npz", "not a readable npz"),
        ("npz:junk.npz", "not a readable npz"),
        ("npz:missing.npz", "does not exist"),
        ("cifar10", "not in the data root .*--download"),
    ],
)
def test_broken_sources_say_what_is_wrong(tmp_path, spec, message):
    broken_sources(tmp_path)
    scheme, colon, path = spec.partition(":")
    with pytest.raises(BadInput, match=message) as caught:
        load(f"{scheme}:{tmp_path / path}" if colon else spec)
    assert "\n" not in str(caught.value)


def test_mixed_sizes_can_be_resized(tmp_path):
    broken_sources(tmp_path)
    assert load(f"parquet:{tmp_path / 'mixed'}", size=8).train.shape == (3, 8, 8)


def test_unknown_specs(tmp_path):
    for spec, hint in (("cifar11", "did you mean cifar10"), ("foldr:x", "did you mean folder:PATH"), ("npz:", "npz")):
        with pytest.raises(UsageError, match=hint):
            load(spec)
    with pytest.raises(UsageError, match=f"write folder:{tmp_path}"):
        load(str(tmp_path))
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "deep.parquet").touch()
    with pytest.raises(UsageError, match="write folder:"):
        load(str(tmp_path))
    (tmp_path / "a" / "near.parquet").touch()
    with pytest.raises(UsageError, match="write parquet:"):
        load(str(tmp_path))
    with pytest.raises(UsageError, match="unknown data ''; use one of"):
        load("")


def test_only_files_are_images(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
        (tmp_path / name / "1.png").symlink_to(tmp_path / name / "0.png")
        os.mkfifo(tmp_path / name / "2.png")
        (tmp_path / name / "3.png").mkdir()
    assert len(load(f"folder:{tmp_path}").train) == 4


def test_names_that_are_nested_too_deeply_are_none(tmp_path):
    table = pa.table({"img": [{"bytes": encoded(image)} for image in pixels(4)], "label": [0, 1, 0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": "[" * 100_000}), tmp_path / "x.parquet")
    assert load(f"parquet:{tmp_path / 'x.parquet'}").classes == ("0", "1")


def test_missing_memory_is_no_damaged_image(monkeypatch):
    def refuse(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(MemoryError):
        decode(b"x", None, None, "x", 0)
    with pytest.raises(BadInput, match="x: image 3 has no pixels"):
        decode(np.zeros((0, 0), np.uint8), 8, None, "x", 3)


def test_every_source_is_listed():
    assert data.sources().keys() == data.SOURCES.keys() >= {"cifar10", "digits", "folder:PATH", "npz:PATH"}


def test_a_name_may_be_parquet_files_in_the_data_root(tmp_path):
    write_parquet(tmp_path / "svhn" / "train.parquet", map(encoded, pixels(6)), [0, 1] * 3)
    assert data.load("svhn", root=tmp_path).name == "svhn"


def test_fingerprint_changes_with_images_and_labels(tmp_path):
    x, y, prints = pixels(100), np.arange(100) % 4, set()
    other = y.copy()
    other[50] += 1
    for i, (images, labels) in enumerate([(x, y), (255 - x, y), (x, other), (x[:99], y[:99])]):
        np.savez(tmp_path / f"{i}.npz", images=images, labels=labels)
        prints.add(load(f"npz:{tmp_path}/{i}.npz").fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("name", "classes", "shape"), [(None, 10, (3, 32, 32)), (None, 10, None), ("cifar10", 7, None)]
)
def test_resolve(tmp_path, name, classes, shape):
    def resolve():
        return data.resolve(None, recorded_name=name, classes=classes, shape=shape, root=tmp_path)

    with pytest.raises(UsageError, match="--data SPEC"):
        resolve()
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert resolve() == "cifar10"


def test_resolve_without_files(tmp_path):
    options = {"classes": 10, "shape": (1, 8, 8), "root": tmp_path}
    assert data.resolve("npz:x", recorded_name=None, **options) == "npz:x"
    assert data.resolve(None, recorded_name=None, **options) == "digits"
    (tmp_path / "cifar-10-batches-py").mkdir()
    # a recorded name opens nothing, and is not replaced by another data set
    for name in ("../cifar10", "folder:/", "mine"):
        with pytest.raises(UsageError):
            data.resolve(None, recorded_name=name, classes=10, shape=(3, 32, 32), root=tmp_path)


# --- splits


def dataset(labels, test=None):
    def part(y):
        return ImageSet.of(torch.zeros(len(y), 1, 1, 1, dtype=torch.uint8), torch.tensor(y))

    return data.Dataset("some", part(labels), part(test) if test else None, ("a", "b", "c"), "f")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=20, max_size=300), st.integers(0, 2**32), st.booleans())
def test_splits_are_disjoint_complete_and_stratified(labels, seed, with_test):
    found = data.split(dataset(labels, [0, 1, 2] if with_test else None), seed=seed)
    own = [found.owner, found.transfer, found.validation] + ([] if with_test else [found.test])
    assert sorted(torch.cat([part.positions for part in own]).tolist()) == list(range(len(labels)))
    for part in own:
        for label in range(3):
            share = labels.count(label) / len(labels)
            assert abs(int((part.labels == label).sum()) - share * len(part)) <= 2
        assert torch.equal(part.labels, torch.tensor(labels)[part.positions])


def test_split_sizes():
    found = data.split(dataset([0, 1] * 500))
    assert [len(p) for p in (found.owner, found.transfer, found.validation, found.test)] == [560, 160, 80, 200]
    assert found.describe() == {
        "owner": 560, "transfer": 160, "validation": 80, "test": 200, "seed": 0, "fingerprint": "f"
    }  # fmt: skip
    found = data.split(dataset([0, 1] * 50_000, [0, 1] * 50), test=10)
    assert [len(p) for p in (found.owner, found.transfer, found.validation, found.test)] == [85_000, 10_000, 5_000, 10]
    assert found.test.labels.sum() == 5


def test_splits_never_change():
    found = data.split(dataset([0, 1, 2] * 10), seed=7)
    assert found.test.positions.tolist() == [23, 4, 6, 20, 10, 24]
    assert found.transfer.positions.tolist() == [21, 26, 25, 3]
    assert data.split(dataset([0, 1, 2] * 10), seed=8).test.positions.tolist() != found.test.positions.tolist()


@pytest.mark.parametrize(
    "sizes",
    [{"owner": 90}, {"transfer": 101}, {"validation": 0}, {"test": -1}, {"test": 100}, {"owner": 50, "test": 40}],
)
def test_splits_that_do_not_fit(sizes):
    with pytest.raises(UsageError, match="too few"):
        data.split(dataset([0, 1] * 50), **sizes)
    with pytest.raises(UsageError, match="3 test images were asked for"):
        data.split(dataset([0, 1] * 50, [0, 1]), test=3)


# --- normalisation


def test_preprocess():
    preprocess = Preprocess(*data.PRESETS["cifar10"], (3, 8, 8))
    with torch.inference_mode():
        preprocess(torch.rand(2, 3, 8, 8, dtype=torch.float64))
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    preprocess(x).sum().backward()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in data.PRESETS["cifar10"])
    torch.testing.assert_close(preprocess(x), (x - mean) / std)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    assert pickle.loads(pickle.dumps(preprocess)) == preprocess and hash(preprocess)


def test_presets_fit_the_channels():
    for channels in (1, 3, 4):
        found = data.presets(channels)
        assert {"half", "none"} <= found.keys()
        assert all(Preprocess(mean, std, (channels, 2, 2)) for mean, std in found.values())
    assert "mnist" in data.presets(1) and "imagenet" not in data.presets(1)


@pytest.mark.parametrize(
    "change",
    [
        {"std": [0.0]}, {"std": [-1.0]}, {"std": [float("nan")]}, {"std": [1e-30]}, {"mean": [float("inf")]},
        {"mean": ["0.5"]}, {"mean": [True]}, {"mean": [10**400]}, {"mean": 0.5}, {"mean": [0.5, 0.5]}, {"size": [1, 8]},
        {"size": [1, 8, 0]}, {"size": [1, 8, 8.5]}, {"size": [1, 8, 10**9]}, {"size": None}, {"mean": None},
    ],
)  # fmt: skip
def test_untrusted_normalisation(change):
    with pytest.raises(BadInput, match="normalisation"):
        Preprocess.from_dict({"mean": [0.5], "std": [0.5], "size": [1, 8, 8]} | change)
    for values in (None, [], "x", {}, 3):
        with pytest.raises(BadInput, match="normalisation"):
            Preprocess.from_dict(values)


# --- batches


def test_batches_in_order_are_the_images():
    images = image_set(20)
    found = make(images, augment=None)
    assert [len(batch.y) for batch in found] == [6, 6, 6, 2]
    torch.testing.assert_close(
        torch.cat([b.x for b in found]), plain()(torch.stack([images[i] for i in range(20)]) / 255)
    )
    assert torch.cat([b.index for b in found]).tolist() == list(range(20))
    assert torch.equal(torch.cat([b.y for b in found]), images.labels)
    assert found[0].x.is_contiguous(memory_format=torch.channels_last) and found[0].x.dtype == torch.float32


def test_shuffled_batches_of_a_view():
    images = image_set(40).take(range(5, 35)).take(torch.arange(1, 30))
    found = make(images, generator=seeded(), augment="none", shuffle=True, batch_size=8)
    index = torch.cat([batch.index for batch in found])
    assert sorted(index.tolist()) == list(range(29)) and index.tolist() != list(range(29))
    assert torch.equal(torch.cat([batch.y for batch in found]), images.labels[index])
    torch.testing.assert_close(found[0].x[3], plain()(images[int(index[3])][None] / 255)[0])


@pytest.mark.parametrize(("n", "size", "sizes"), [(13, 6, [6, 6]), (14, 6, [6, 6, 2]), (3, 1, [1, 1, 1]), (1, 4, [])])
def test_the_last_batch(n, size, sizes):
    found = make(image_set(n), generator=seeded(), shuffle=True, batch_size=size)
    assert [len(batch.y) for batch in found] == sizes


def test_batches_refuse_what_does_not_fit():
    images = image_set()
    for options, message in [
        ({"augment": "flop", "generator": seeded()}, "unknown augmentation"), ({"shuffle": True}, "need a generator"),
        ({"augment": "shift"}, "need a generator"), ({"batch_size": 0}, "batch size"),
        ({"preprocess": plain((3, 9, 9))}, "images are 3x8x8"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            make(images, **options)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from([1, 3]), st.integers(2, 33), st.integers(2, 33),
       st.sampled_from(["shift", "crop-flip"]))  # fmt: skip
def test_crops_equal_a_loop_over_images(seed, n, c, h, w, name):
    x = torch.from_numpy(pixels(n, (c, h, w), seed))
    found = data.AUGMENT[name](x, seeded(seed))
    generator, pad = seeded(seed), 1 if name == "shift" else max(1, h // 8)
    shift = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)[..., 0].tolist()
    flipped = (torch.rand(n, 1, generator=generator) < 0.5)[:, 0].tolist() if name == "crop-flip" else [False] * n
    for i in range(n):
        padded = np.pad(x[i].numpy(), ((0, 0), (pad, pad), (pad, pad)))
        crop = padded[:, shift[0][i] : shift[0][i] + h, shift[1][i] : shift[1][i] + w]
        assert np.array_equal(found[i], crop[:, :, ::-1] if flipped[i] else crop)


@pytest.mark.parametrize("name", list(data.AUGMENT))
def test_augmentation_is_deterministic_and_per_image(name):
    x = torch.from_numpy(pixels(1, (3, 64, 64))).expand(16, -1, -1, -1).contiguous()
    first, again, other = (data.AUGMENT[name](x, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and first.shape == x.shape
    assert first.min() >= 0 and first.max() <= 255
    if name != "none":
        assert not torch.equal(first, other) and not torch.equal(first[0], first[1])


def test_default_augmentation():
    known = {("digits", (1, 8, 8)): "shift", ("svhn", (3, 32, 32)): "shift", ("cifar10", (3, 32, 32)): "crop-flip",
             ("", (3, 224, 224)): "resized-crop-flip", ("", (1, 64, 64)): "shift"}  # fmt: skip
    for (name, shape), expected in known.items():
        assert data.default_augment(name, shape) == expected
    upright, photo = (make(image_set(6, (3, 32, 32), name), generator=seeded())[0].x for name in ("svhn", "x"))
    assert not torch.equal(upright, photo)


@pytest.mark.parametrize("cores", [1, 2])
def test_streaming_gives_the_same_batches(tmp_path, monkeypatch, cores):
    monkeypatch.setattr("sdbctl.data.batching.cores", lambda: cores)
    write_parquet(tmp_path / "train.parquet", map(encoded, pixels(30)), [0, 1] * 15)
    memory, stream = load(f"parquet:{tmp_path}"), load(f"parquet:{tmp_path}", memory_limit=100)
    assert memory.train.in_memory and not stream.train.in_memory and memory.fingerprint == stream.fingerprint
    rows = data.Stream(data.Rows([tmp_path / "train.parquet"], ["img"]), (3, 8, 8), None, "some")
    state, found = torch.get_rng_state(), []
    for images in (memory.train, stream.train, dataclasses.replace(stream.train, source=rows)):
        view = images.take(range(3, 28))
        found.append(make(view, generator=seeded(3), augment="crop-flip", shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
    for batch, *others in zip(*found, strict=True):
        assert all(torch.equal(one, two) for other in others for one, two in zip(batch, other, strict=True))


def test_a_folder_is_streamed_as_it_is_held(tmp_path):
    for number, image in enumerate(pixels(30)):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    memory, stream = load(f"folder:{tmp_path}"), load(f"folder:{tmp_path}", memory_limit=100)
    assert memory.train.in_memory and not stream.train.in_memory and memory.fingerprint == stream.fingerprint
    held, read = (make(some.train, generator=seeded(3), augment="crop-flip", shuffle=True) for some in (memory, stream))
    for one, two in zip(held, read, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_parquet_files_are_copied_once_for_access_in_any_order(tmp_path):
    images = [None if i == 7 else encoded(x) for i, x in enumerate(pixels(40))]
    write_parquet(tmp_path / "train.parquet", images, [0, 1] * 20)
    rows, notices = data.Rows([tmp_path / "train.parquet"], ["img"]), []
    flat = rows.flat(notices.append)
    assert [flat[i] for i in reversed(range(40))] == images[::-1] == [rows[i] for i in reversed(range(40))]
    assert len(flat) == 40 and len(rows._cached) <= 2
    assert pickle.loads(pickle.dumps(flat))[31] == images[31]
    assert rows.flat(notices.append).path == flat.path and len(notices) == 1
    flat.path.unlink()
    with pytest.raises(EnvironmentFailure, match="cannot be read"):
        flat[3]
    assert rows.flat(notices.append)[3] == images[3] and len(notices) == 2
    write_parquet(tmp_path / "train.parquet", images[:39], [0, 1, 1] * 13)
    changed = data.Rows([tmp_path / "train.parquet"], ["img"]).flat(notices.append)
    assert changed.path != flat.path and changed[38] == images[38]


def test_a_copy_that_cannot_be_made_or_read_is_one_line(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", map(encoded, pixels(6)), [0, 1] * 3)
    rows = data.Rows([tmp_path / "train.parquet"], ["img"])
    rows.flat(print).path.with_suffix(".npy").write_bytes(b"junk")
    with pytest.raises(EnvironmentFailure, match="cannot use"):
        rows.flat(print)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "small"))
    with pytest.raises(EnvironmentFailure, match="do not fit"):
        rows.flat(print)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EnvironmentFailure, match="cannot use") as caught:
        rows.flat(print)
    assert "XDG_CACHE_HOME" in caught.value.hint


def test_a_damaged_image_in_a_worker_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sdbctl.data.batching.cores", lambda: 2)
    write_parquet(tmp_path / "train.parquet", [*map(encoded, pixels(20)), b"junk"] * 2, [0, 1] * 21)
    labels = torch.zeros(42, dtype=torch.int64)
    rows = data.Rows([tmp_path / "train.parquet"], ["img"])
    source = data.Stream(rows, (3, 8, 8), None, "some")
    with pytest.raises(BadInput) as caught:
        make(ImageSet(labels, source, torch.arange(42)))
    assert "image 20 cannot be read" in caught.value.message and "\n" not in str(caught.value) and caught.value.hint


def test_image_sets():
    images = image_set(10)
    view = images.take([4, 2]).take(np.array([1]))
    assert len(view) == 1 and view.labels.tolist() == [2] and torch.equal(view[0], images[2])
    assert view.source is images.source and view.shape == (3, 8, 8)
    with pytest.raises(BadInput, match="uint8"):
        ImageSet.of(torch.rand(3, 1, 2, 2), torch.arange(3))


@pytest.mark.gpu
def test_batches_on_a_gpu_do_not_wait():
    gpu, images = torch.device("cuda"), image_set(64)
    list(data.batches(images, plain(), batch_size=8, device=gpu))
    for generator in (seeded(1), torch.Generator(gpu).manual_seed(1)):
        stream = data.batches(images, plain(), batch_size=8, device=gpu, generator=generator, augment="crop-flip",
                              shuffle=True)  # fmt: skip
        next(stream)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert sum(len(batch.y) for batch in stream) == 56
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.data
@pytest.mark.skipif("SDBCTL_TEST_DATA" not in os.environ, reason="SDBCTL_TEST_DATA is not set")
def test_real_data():
    folder = Path(os.environ["SDBCTL_TEST_DATA"]) / "data"
    found = load(f"parquet:{folder}/cifar10")
    assert (len(found.train), len(found.test), found.train.shape) == (50_000, 10_000, (3, 32, 32))
    assert found.classes[:2] == ("airplane", "automobile")
    assert abs(found.train.source.pixels.float().mean() / 255 - 0.473) < 0.01
    assert data.resolve(None, recorded_name="cifar10", classes=10, shape=None, root=folder) == "cifar10"
    tiny = load(f"parquet:{folder}/tinyimagenet100-32")
    assert len(tiny.classes) == 100 and tiny.train.shape == (3, 32, 32)


# --- torchvision's own files -------------------------------------------------------------------------------------


def idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize("name", ["mnist", "fashionmnist"])
def test_torchvision_idx_files(name, tmp_path):
    raw = tmp_path / data.TORCHVISION[name][1]
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        idx(raw / f"{part}-images-idx3-ubyte", images)
        idx(raw / f"{part}-labels-idx1-ubyte", labels)
        if part == "train":
            first = images[0]
    found = data.load(name, root=tmp_path)
    assert found.train.shape == (1, 28, 28)
    assert (len(found.train), len(found.test), len(found.classes)) == (30, 20, 10)
    assert (found.train[0][0].numpy() == first).all()


@pytest.mark.parametrize(("name", "key"), [("cifar10", b"labels"), ("cifar100", b"fine_labels")])
def test_torchvision_cifar_batches(name, key, tmp_path, monkeypatch):
    import hashlib

    import torchvision.datasets as tv

    kind = getattr(tv, data.TORCHVISION[name][0])
    folder = tmp_path / data.TORCHVISION[name][1]
    folder.mkdir()
    classes = 10 if name == "cifar10" else 100
    rng = np.random.default_rng(0)

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest()]

    def batch(file, count):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return write(file, {"data": pixels, key.decode(): [index % classes for index in range(count)]}), pixels

    one, pixels = batch("one", 200)
    two, _ = batch("two", 100)
    names = [f"class {index}" for index in range(classes)]
    file, md5 = write("names", {"label_names": names, "fine_label_names": names})
    monkeypatch.setattr(kind, "train_list", [one])
    monkeypatch.setattr(kind, "test_list", [two])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": file, "md5": md5})
    found = data.load(name, root=tmp_path)
    assert (found.train.shape, len(found.train), len(found.test)) == ((3, 32, 32), 200, 100)
    assert found.classes == tuple(names)
    assert (found.train[0].numpy() == pixels[0].reshape(3, 32, 32)).all()
    (folder / "one").write_bytes(b"damaged")
    with pytest.raises(BadInput, match=f"{name} in .* is damaged"):
        data.load(name, root=tmp_path)


def test_a_download_that_fails_is_one_clear_error(tmp_path, monkeypatch):
    import torchvision.datasets as tv

    def refuse(self):
        raise OSError("no network")

    monkeypatch.setattr(tv.CIFAR10, "download", refuse)
    with pytest.raises(EnvironmentFailure, match="cannot get cifar10"):
        data.load("cifar10", root=tmp_path, download=True)


def test_images_that_are_not_square_stay_as_they_are(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 16, 1), dtype=np.uint8)
    np.savez(tmp_path / "wide.npz", images=images, labels=np.arange(40) % 4)
    found = open_data(f"npz:{tmp_path}/wide.npz", tmp_path, download=False, classes=4, shape=(1, 8, 16))
    assert found.train.shape == (1, 8, 16)

"""Properties, in the order of the code: data, kernels, dipddpm, eval.

The kernels run under Triton's interpreter where there is no GPU, against the torch references.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels imports Triton

import data
import dipddpm
import eval as measures
import kernels
from kernels import noising, posterior, rng

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only wait for each other on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def few_digits():
    """Drawing 12,000 takes half a minute; of fewer each is the same. And no run in this process may
    change how it frees memory, which one test measures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DIGITS", {"train": 1000, "test": 1000})
        patch.setattr(dipddpm, "keep_freed_memory", lambda: None)
        yield


# ================================================================== data

REAL = Path(os.environ.get("DIPDDPM_DATA") or "/nonexistent")


def needs(folder):
    return pytest.mark.skipif(not (REAL / folder).is_dir(), reason=f"no {folder} in DIPDDPM_DATA")


IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array):
    array = np.asarray(array)
    header = bytes([0, 0, IDX_CODES[array.dtype.str[1:]], array.ndim])
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(
        array.dtype.newbyteorder(">")
    ).tobytes()


def image_bytes(pixels, form="PNG", mode=None, **options):
    file, image = io.BytesIO(), Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(file, form, **options)
    return file.getvalue()


def picture(path, mode="RGB", value=7, form=None):
    colour = value if mode in ("L", "I;16") else (value, value, value, 255)[:len(mode)]
    Image.new(mode, (6, 4), colour).save(path, form)
    return path


def error_line(kind, action, *parts):
    """The message of the error that `action` raises: one line that contains every part."""
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


@pytest.fixture
def mnist(tmp_path):
    """A folder with a small data set in MNIST's format, and its four files' contents."""
    rng, files = np.random.default_rng(0), {}
    (tmp_path / "mnist").mkdir()
    for prefix, n in (("train", 5), ("t10k", 3)):
        files[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        files[f"{prefix}-labels-idx1-ubyte"] = np.arange(n, dtype=np.uint8)
    for file, array in files.items():
        (tmp_path / "mnist" / file).write_bytes(idx_bytes(array))
    return tmp_path, files


# ---- damaged files -------------------------------------------------------------------------------

IMAGES, LABELS = "mnist/train-images-idx3-ubyte", "mnist/train-labels-idx1-ubyte.gz"
CIFAR = "cifar-10-batches-bin/data_batch_2.bin"
STL, STL_LABELS = "stl10_binary/train_X.bin", "stl10_binary/train_y.bin"
FORMS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "webp": "WEBP", "tif": "TIFF"}
RGB = np.random.default_rng(1).integers(0, 256, (9, 11, 3)).astype(np.uint8)
GOOD = {  # a file of each kind
    IMAGES: idx_bytes(np.random.default_rng(2).integers(0, 256, (3, 28, 28)).astype(np.uint8)),
    LABELS: gzip.compress(idx_bytes(np.arange(3, dtype=np.uint8))),
    CIFAR: bytes(3073 * 2), STL: bytes(27648 * 2), STL_LABELS: b"\1\2",
    **{f"pictures/a.{suffix}": image_bytes(RGB, form) for suffix, form in FORMS.items()}}
PNG, BMP = GOOD["pictures/a.png"], GOOD["pictures/a.bmp"]
DAMAGED = [
    # IDX: magic, type, rank, a size that is no file's, a cut header or body, more than the body.
    *((IMAGES, bytes.fromhex(header), says) for header, says in {
        "01000801": "not an IDX file", "00010801": "not an IDX file",
        "00000a01": "unknown IDX type 0x0a", "000008ff" + "00000001" * 255: "rank 255",
        "00000801ffffffff": "more than", "00000803" + "ffffffff" * 3: "more than",
        "00000803" + "00000000" + "ffffffff" * 2: "more than", "0000080130000000": "only 0",
        "00000e014000": "truncated IDX header (6 of 8 bytes)"}.items()),
    (IMAGES, GOOD[IMAGES] + b"\0", "2352 bytes, the file holds more"),
    (LABELS, gzip.compress(idx_bytes(np.arange(3, dtype=np.uint8)) + b"\0"), "holds more"),
    # Images and labels of another type or shape, or that do not match.
    *((IMAGES, idx_bytes(np.zeros(shape, kind)), f"not {np.dtype(kind)} {list(shape)}")
      for shape, kind in (((3, 28), "u1"), ((3, 28, 28), "i2"), ((0, 28, 28), "u1"))),
    *((LABELS, idx_bytes(np.zeros(shape, kind)), f"[3], not {np.dtype(kind)} {list(shape)}")
      for shape, kind in (((2,), "u1"), ((3, 1), "u1"), ((3,), "i4"))),
    # Records, and labels from 0 (CIFAR-10) or from 1 (STL-10).
    *((CIFAR, bytes(size), f"{size} bytes is not a positive") for size in (0, 3072, 3074)),
    (CIFAR, b"\x0a" + bytes(3072), "a label is not in 0 … 9"),
    (STL, bytes(27649), "27649 bytes is not a positive"),
    (STL_LABELS, b"\1\2\3", "3 labels for 2 images"),
    *((STL_LABELS, labels, "a label is not in 1 … 10") for labels in (b"\0\1", b"\1\x0b")),
    # Pictures: no image, a cut one, samples of no known range; and bitmaps that say they are too
    # large: for Pillow's warning, for Pillow's error.
    *(("pictures/a.png", content, "not an image") for content in (b"two\nlines", b"", PNG[:9])),
    *(("pictures/a.png", PNG[:size], "cannot be read") for size in (20, len(PNG) // 2)),
    ("pictures/a.tif", image_bytes(np.zeros((9, 11), np.float32), "TIFF"), "mode F"),
    ("pictures/a.tif", image_bytes(np.zeros((9, 11), np.int32), "TIFF"), "mode I "),
    *(("pictures/a.bmp", BMP[:18] + struct.pack("<2i", side, side) + BMP[26:], "make it smaller")
      for side in (12_000, 20_000)),
]


@pytest.fixture
def good(tmp_path):
    """A folder with every file of GOOD."""
    for file, content in GOOD.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    (tmp_path / CIFAR).with_name("data_batch_1.bin").write_bytes(bytes(3073))
    for kind in ("images-idx3", "labels-idx1"):
        (tmp_path / "mnist" / f"t10k-{kind}-ubyte").touch()
    return tmp_path


def load_one(folder, file):
    """The data set that a file in `folder` belongs to, or the picture that it is."""
    name = {"mnist": "auto", "cifar-10-batches-bin": "cifar10", "stl10_binary": "stl10"}.get(
        Path(file).parent.name, folder / file)  # auto: damage is never hidden by other digits
    return data.load(name, folder)


@pytest.mark.parametrize(("file", "content", "says"), DAMAGED, ids=[row[2] for row in DAMAGED])
def test_damage_is_named_in_one_line(good, file, content, says, recwarn):
    load_one(good, file)
    (good / file).write_bytes(content)
    error_line(ValueError, lambda: load_one(good, file), good / file, says)
    if file.startswith("pictures"):
        error_line(ValueError, lambda: data.load(good / "pictures"), good / file, says)
        error_line(ValueError, lambda: data.read_picture(good / file), good / file, says)
    assert not recwarn.list


def test_idx_cut_anywhere_or_corrupt_is_an_error(tmp_path):
    path, whole = tmp_path / "a", idx_bytes(np.ones((2, 2, 2), np.uint8))
    packed = gzip.compress(idx_bytes(np.arange(40, dtype=np.uint8)))
    cuts = [(whole[:n], "truncated IDX header" if n < 16 else f"only {n - 16}") for n in range(24)]
    cuts += [(gzip.compress(content), reason) for content, reason in cuts]
    cuts += [(packed[:n], "gzip") for n in range(2, len(packed))]
    corrupt = [(packed[:i] + bytes([packed[i] ^ 0x55]) + packed[i + 1:], "")
               for i in range(10, len(packed))]
    for content, reason in cuts + corrupt:
        path.write_bytes(content)
        error_line(ValueError, lambda: data.read_idx(path), path, reason)


FUZZED = int(os.environ.get("FUZZED", 500))  # mutants of each kind of file; make soak has more


def mutant(rng, content):
    """A file's bytes with one to three kinds of damage."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(0, len(content) + 1)), int(rng.integers(1, 9))
        head = int(rng.integers(0, 32))
        kind = rng.integers(0, 6)
        if kind == 0:
            content = content[:at]  # cut
        elif kind == 1:
            content[at:at + n] = rng.bytes(n)  # overwritten
        elif kind == 2:
            content[head:head + n] = rng.bytes(n)  # the same near the header
        elif kind == 3:
            content[head:head + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f" + b"\xff" * 3,
                                                 b"\x80\0\0\0", b"\0\0\x10\0"])
        elif kind == 4:
            content[at:at] = rng.bytes(n)  # pushed in
        else:
            content += content[:at]  # repeated
    return bytes(content)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what is damaged
def test_a_mutated_file_loads_or_is_named_in_one_line(good):
    import resource
    rng, tried = np.random.default_rng(0), 0
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    for file, content in GOOD.items():
        for _ in range(FUZZED):
            (good / file).write_bytes(mutant(rng, content))
            tried += 1
            try:
                load_one(good, file)
            except (ValueError, OSError) as error:
                assert str(good / file) in str(error) or str((good / file).parent) in str(error)
                assert "\n" not in str(error)
        (good / file).write_bytes(content)
        load_one(good, file)
    assert tried >= 11 * FUZZED and time.time() - began < 0.1 * tried
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 512 * 1024  # KiB


# ---- IDX and MNIST's format ----------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", IDX_CODES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (1, 2, 3, 2), (0, 3)])
def test_idx_round_trip_plain_or_gzip_whatever_the_name(tmp_path, dtype, shape, packed):
    want = np.random.default_rng(1).normal(0, 50, shape)
    want = np.asarray(want.astype("i1") if dtype == "u1" else want).astype(dtype)
    for path in (tmp_path / "a", tmp_path / "a.gz"):
        path.write_bytes(gzip.compress(idx_bytes(want)) if packed else idx_bytes(want))
        got = data.read_idx(path)
        assert got.dtype == want.dtype and got.dtype.isnative and got.shape == shape
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_load_keeps_order_hashes_pixels_and_limits(mnist, split, prefix):
    root, files = mnist
    want = files[f"{prefix}-images-idx3-ubyte"]
    images = data.load("mnist", root, split)
    np.testing.assert_array_equal(images.pixels[:, 0], want)
    assert images.pixels.dtype == torch.uint8 and images.pixels.is_contiguous()
    assert images.labels.dtype == torch.int64 and images.name == "mnist"
    assert images.labels.tolist() == list(range(len(want)))
    assert images.sha256 == hashlib.sha256(want.tobytes()).hexdigest()
    assert data.load("auto", root, split).sha256 == images.sha256
    for limit in (1, 3, 99):
        first = data.load("mnist", root, split, limit)
        assert torch.equal(first.pixels, images.pixels[:limit])
        assert torch.equal(first.labels, images.labels[:limit])
    for limit in (0, -1):
        error_line(ValueError, lambda limit=limit: data.load("mnist", root, split, limit), "limit")


@pytest.mark.parametrize("place", ["{0}", "{0}.gz", "{1}", "{1}.gz", "{0}/{0}", "{1}/{1}"])
def test_a_folder_of_idx_files_is_a_data_set_however_archives_name_them(place, mnist, tmp_path):
    root, files = mnist
    whole = data.load("mnist", root, "test")
    for name in ("mine", "tv/MNIST/raw"):  # torchvision's
        for file, array in files.items():
            path = tmp_path / name / place.format(file, file.replace("-idx", ".idx"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(idx_bytes(array))
    for images in data.load(tmp_path / "mine", None, "test"), data.load("mnist", tmp_path / "tv",
                                                                        "test"):
        assert images.sha256 == whole.sha256 and torch.equal(images.labels, whole.labels)
    error_line(ValueError, lambda: data.load(tmp_path / "mine", split="all"), "own pictures are")


def test_a_folder_of_idx_files_needs_no_labels_and_no_second_split(mnist):
    root, _ = mnist
    (root / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    assert data.load(root / "mnist", split="test").labels is None
    assert data.load(root / "mnist").labels is not None
    (root / "mnist" / "t10k-images-idx3-ubyte").unlink()
    every = np.arange(20 * 784, dtype=np.uint16).astype(np.uint8).reshape(20, 28, 28)
    (root / "mnist" / "train-images-idx3-ubyte").write_bytes(idx_bytes(every))
    (root / "mnist" / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(20, dtype="u1")))
    train, test = (data.load(root / "mnist", split=split) for split in ("train", "test"))
    assert test.labels.tolist() == [9, 19] and len(train.labels) == 18
    assert torch.equal(test.pixels[1, 0], torch.from_numpy(every[19]))
    # other names are none: the line has those that are
    (root / "mnist" / "train-images-idx3-ubyte").rename(root / "mnist" / "emnist-images.gz")
    error_line(FileNotFoundError, lambda: data.load(root / "mnist"), *data.FILES, "1 .gz")


@needs("mnist")
@pytest.mark.parametrize(("split", "n", "published"), [  # SHA-256 of the unpacked files
    ("train", 60000, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    ("test", 10000, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
])
def test_real_mnist_has_the_published_content(split, n, published):
    images = data.load("mnist", REAL, split)
    assert images.pixels.shape == (n, 1, 28, 28) and len(images.labels) == n
    header = struct.pack(">4I", 0x803, n, 28, 28)
    assert hashlib.sha256(header + images.pixels.numpy().tobytes()).hexdigest() == published


# ---- downloads -----------------------------------------------------------------------------------


@pytest.fixture
def source(mnist, monkeypatch):
    """An empty root, and a folder that stands for the server of a small data set."""
    root, arrays = mnist
    folder = root / "server"
    folder.mkdir()
    for file, array in arrays.items():
        (folder / f"{file}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    digests = [hashlib.sha256((folder / f"{file}.gz").read_bytes()).hexdigest()
               for file in data.FILES]
    for name in ("mnist", "fashion"):
        monkeypatch.setitem(data.SOURCES, name, f"{folder.as_uri()}/")
        monkeypatch.setitem(data.DIGESTS, name, digests)
    return root / "empty", folder


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_a_download_is_checked_and_kept(source, mnist, name):
    root, folder = source
    file = folder / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for wrong in (whole[:len(whole) // 2], gzip.compress(b"other"), b"<html>", b""):
        file.write_bytes(wrong)
        error_line(FileNotFoundError, lambda: data.load(name, root), root / name / file.stem,
                   "train-labels-idx1-ubyte", folder.as_uri(), "wrong checksum")
        assert not list(root.rglob("*.*"))
    file.write_bytes(whole)
    (root / name / file.name).mkdir(parents=True)  # in the way: nothing is left beside it
    error_line(FileNotFoundError, lambda: data.load(name, root), root / name, "directory")
    (root / name / file.name).rmdir()
    assert not list((root / name).iterdir())
    images = data.load(name, root)
    np.testing.assert_array_equal(images.pixels[:, 0], mnist[1]["train-images-idx3-ubyte"])
    shutil.rmtree(folder)
    assert data.load(name, root).sha256 == images.sha256
    kept = sorted(path.name for path in (root / name).iterdir())
    assert kept == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]


OK = b"HTTP/1.0 200 OK\r\n"


@pytest.mark.parametrize(("answer", "says"), [
    ([OK + b"Content-Length: 9\r\n\r\nhalf"], "wrong checksum"),
    (itertools.chain([OK + b"\r\n"], itertools.repeat(bytes(2**20))), "wrong checksum"),
    ([b"HTTP/1.0 404 Not Found\r\n\r\n"], "Not Found"), ([b"no\nHTTP\n"], "no"), ([], "closed"),
    ([b"HTTP/1.0 302 Found\r\nLocation: /train-images-idx3-ubyte.gz\r\n\r\n"], "loop"),
    ((time.sleep(3) or b"" for _ in "1"), "timed out"),
], ids=["cut", "endless", "absent", "no-http", "closed", "circle", "silent"])
def test_a_server_that_fails_is_given_up_in_one_line(tmp_path, monkeypatch, answer, says):
    def serve():
        with contextlib.suppress(OSError):  # whoever asked has gone, or the server has
            while True:
                with server.accept()[0] as connection:
                    connection.recv(2**16)
                    for piece in answer:
                        connection.sendall(piece)

    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setitem(data.SOURCES, "mnist", f"http://127.0.0.1:{server.getsockname()[1]}/")
        threading.Thread(target=serve, daemon=True).start()
        error_line(FileNotFoundError, lambda: data.load("mnist", tmp_path), "http://127.0", says)
        server.shutdown(socket.SHUT_RDWR)
    assert not list(tmp_path.rglob("*.*"))


def test_several_may_download_into_one_folder_at_once(source):
    roots = [source[0] / str(i % 10) for i in range(80)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda root: data.load("mnist", root).sha256, sorted(roots)))
    assert len(digests) == 1
    assert all(len(list((root / "mnist").iterdir())) == 2 for root in roots)


def test_auto_takes_both_splits_from_one_data_set(source, capsys):
    root, folder = source
    assert data.load("auto", root, limit=2).name == "mnist"
    assert len(list((root / "mnist").iterdir())) == 4
    (root / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    shutil.rmtree(folder)
    assert capsys.readouterr().err == ""
    for split in ("train", "test"):
        assert data.load("auto", root, split, limit=2).name == "digits"
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and "built-in digits" in notice
    assert data.load("mnist", root, limit=2).name == "mnist"


# ---- CIFAR-10 and STL-10 -------------------------------------------------------------------------


def test_cifar_records_are_planar_rgb(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = np.random.default_rng(2).integers(0, 256, (5, 3073)).astype(np.uint8)
    records[:, 0] = [3, 1, 4, 1, 9]
    (folder / "data_batch_2.bin").write_bytes(records[:2].tobytes())
    (folder / "data_batch_5.bin").write_bytes(records[2:].tobytes())
    images = data.load("cifar10", tmp_path)
    assert images.pixels.shape == (5, 3, 32, 32) and images.labels.tolist() == [3, 1, 4, 1, 9]
    assert images.pixels[4, 2, 1, 5] == records[4, 1 + 2 * 1024 + 1 * 32 + 5]
    assert torch.equal(data.load("cifar10", tmp_path, limit=3).pixels, images.pixels[:3])
    assert data.load(folder).sha256 == images.sha256  # the folder itself
    error_line(FileNotFoundError, lambda: data.load("cifar10", tmp_path, "test"), "test_batch.bin")


@needs("cifar-10-batches-bin")
def test_real_cifar_is_read_in_order():
    images = data.load("cifar10", REAL, "test", limit=64)
    content = (REAL / "cifar-10-batches-bin" / "test_batch.bin").read_bytes()
    assert images.labels.tolist() == list(content[: 64 * 3073 : 3073])
    for dim in (2, 3):  # neighbours in photographs resemble one another in every channel
        assert (images.pixels.float().diff(dim=dim).abs().mean((0, 2, 3)) < 20).all()


def test_stl_goes_down_columns_and_counts_labels_from_one(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    stored = np.random.default_rng(3).integers(0, 256, (3, 3, 96, 96)).astype(np.uint8)
    (folder / "test_X.bin").write_bytes(stored.tobytes())
    (folder / "test_y.bin").write_bytes(bytes([1, 10, 2]))
    images = data.load("stl10", tmp_path, "test")
    np.testing.assert_array_equal(images.pixels, stored.swapaxes(2, 3))
    assert images.pixels.is_contiguous() and images.labels.tolist() == [0, 9, 1]
    assert data.load("stl10", tmp_path, "test", limit=2).labels.tolist() == [0, 9]
    error_line(FileNotFoundError, lambda: data.load("stl10", tmp_path), "train_X.bin", folder)


# ---- folders and photos --------------------------------------------------------------------------


def test_folder_is_sorted_rgb_and_split_by_tens(tmp_path):
    for i in range(20):
        picture(tmp_path / f"{i:02}.png", mode={3: "L", 4: "RGBA"}.get(i, "RGB"), value=i)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._00.png").write_text("a hidden file of another system")
    train, test = (data.load(tmp_path, split=split) for split in ("train", "test"))
    assert train.pixels.shape == (18, 3, 4, 6) and train.labels is None
    assert train.pixels[:, 1, 0, 0].tolist() == [i for i in range(20) if i % 10 != 9]
    assert test.pixels[:, 1, 0, 0].tolist() == [9, 19]
    assert torch.equal(data.load(str(tmp_path), limit=2).pixels, train.pixels[:2])


def test_folder_of_grey_images_has_one_channel(tmp_path):
    picture(tmp_path / "a.png", mode="L", value=200)
    picture(tmp_path / "b.tif", mode="I;16", value=200 * 256 + 5)
    assert data.load(tmp_path).pixels.unique().tolist() == [200]
    assert data.load(tmp_path).pixels.shape == (2, 1, 4, 6)
    picture(tmp_path / "c.png")
    assert data.load(tmp_path, limit=1).pixels.shape == (1, 3, 4, 6)


def test_class_folders_are_labels_and_what_is_not_used_is_told_once(tmp_path, capsys):
    for name in ("10", "2", ".hidden"):
        (tmp_path / name).mkdir()
        for i in range(6):
            picture(tmp_path / name / f"{i}.ppm", value=i + (10 if name == "10" else 2))
    train, test = (data.load(tmp_path, split=split) for split in ("train", "test"))
    assert train.labels.tolist() == [10] * 6 + [2] * 5 and test.labels.tolist() == [2]
    assert train.pixels[:, 0, 0, 0].tolist() == [*range(10, 16), 2, 3, 4, 6, 7]
    (tmp_path / "10").rename(tmp_path / "cat")
    assert sorted(set(data.load(tmp_path).labels.tolist())) == [0, 1]  # "2", "cat"
    assert capsys.readouterr().err == ""
    # beside images of its own a folder's are not read
    picture(tmp_path / "a.jfif", form="JPEG")
    picture(tmp_path / "b.pgm", mode="L")
    for k in range(3):
        (tmp_path / f"IMG_{k}.HEIC").touch()
    for split in ("train", "test"):
        images = data.load(tmp_path, split=split)
        assert images.pixels.shape == (2, 3, 4, 6) and images.labels is None
    said = capsys.readouterr().err
    assert "12 in subfolders, 3 .HEIC" in said and said.count("\n") == 1


def test_colours_are_told_by_palettes_and_transparency_is_white(tmp_path, capsys):
    grey, colour = (Image.fromarray(x).convert("P") for x in (RGB[..., 0], RGB))
    grey.save(tmp_path / "grey.png")
    colour.save(tmp_path / "colour.gif")
    assert data.load(tmp_path / "grey.png").pixels.shape == (1, 1, 9, 11)
    np.testing.assert_array_equal(data.load(tmp_path / "grey.png").pixels[0, 0], RGB[..., 0])
    assert data.load(tmp_path / "colour.gif").pixels.shape == (1, 3, 9, 11)
    assert capsys.readouterr().err == ""
    alpha = np.full((9, 11, 1), 255, np.uint8)
    alpha[2:5], alpha[7] = 0, 51
    Image.fromarray(np.concatenate([RGB, alpha], 2)).save(tmp_path / "rgba.png")
    Image.fromarray(np.concatenate([RGB[..., :1], alpha], 2)).save(tmp_path / "la.png")
    share = alpha / 255
    for file, pixels in ("rgba", RGB), ("la", RGB[..., :1]):
        got = data.read_picture(tmp_path / f"{file}.png")[0].permute(1, 2, 0) * 255
        assert np.abs(got.numpy() - (share * pixels + 255 * (1 - share))).max() < 1
        assert "white is put behind" in capsys.readouterr().err


def test_a_few_bits_in_sixteen_are_told(tmp_path, capsys):
    for top, said in ((4095, "at most 4095 of 65535: are they 12 bits in 16?"), (65535, "")):
        Image.fromarray(np.array([[0, top]], np.uint16)).save(tmp_path / f"{top}.png")
        assert data.load(tmp_path / f"{top}.png").pixels.flatten().tolist() == [0, top >> 8]
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("form", ["PNG", *FORMS.values()])
def test_one_image_of_any_format_is_both_splits(tmp_path, form):
    path = picture(tmp_path / "lies.png", form=form)  # its format is told from its content
    train, test = (data.load(path, split=split) for split in ("train", "test"))
    channels = 1 if form == "GIF" else 3  # whose palette is grey
    assert train.pixels.shape == (1, channels, 4, 6) and train.sha256 == test.sha256
    assert train.pixels.float().sub(7).abs().max() <= 2


@pytest.mark.parametrize(("pixels", "form", "mode"), [
    (RGB, "PNG", "RGB"), (RGB, "TIFF", "RGBA"), (RGB[..., 0], "PNG", "L"),
    (RGB[..., 0], "PNG", "LA"), ((RGB[..., 0] > 99) * np.uint8(255), "PNG", "1"),
    (RGB[..., 0] * np.uint16(257), "PNG", None), (RGB[..., 0] * np.uint16(257), "TIFF", None),
])
@pytest.mark.parametrize("orientation", [1, 6])  # 6: of a camera held sideways
def test_a_picture_is_read_upright_in_0_to_1(tmp_path, pixels, form, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a"
    path.write_bytes(image_bytes(pixels, form, mode, exif=exif))
    want = np.atleast_3d(np.rot90(pixels, -1) if orientation == 6 else pixels).transpose(2, 0, 1)
    got = data.read_picture(path)
    assert got.dtype == torch.float64 and got.shape == (1, *want.shape)
    np.testing.assert_array_equal(got[0], want / np.iinfo(pixels.dtype).max)
    np.testing.assert_array_equal(data.load(path).pixels[0], want & 255)  # of 257 v: v


def test_images_of_several_sizes_are_resized_and_cropped_to_one(tmp_path):
    stripes = np.arange(64) // 16 % 2 * 200  # their edges are at 16, 32 and 48
    for name, (height, width) in {"a": (64, 64), "b": (32, 48), "c": (96, 64)}.items():
        pixels = np.broadcast_to(stripes[:width], (height, width)).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(tmp_path / f"{name}.png")
    error_line(ValueError, lambda: data.load(tmp_path), tmp_path / "b.png", "48×32", "64×64", "--s")
    images = data.load(tmp_path, size=16, crop=16).pixels
    assert images.shape == (3, 3, 16, 16)
    assert images[0, 0, 0].tolist() == pytest.approx(list(stripes[::4]), abs=25)  # overshoots
    assert torch.equal(images[1:, :, :1].expand_as(images[1:]), images[1:])
    cropped = data.load(tmp_path, crop=20).pixels
    assert torch.equal(cropped[1, 0, 0], torch.from_numpy(stripes[14:34]).byte())
    assert torch.equal(cropped[0], cropped[2])  # both are 64 wide
    assert data.load(tmp_path / "b.png", size=16).pixels.shape == (1, 3, 16, 24)
    error_line(ValueError, lambda: data.load(tmp_path, crop=40), tmp_path / "b.png", "40×40")


def test_a_data_set_is_resized_and_cropped_as_a_folder_is(tmp_path):
    images = data.load("digits", limit=3).pixels
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i}.png")
    fitted = data.load("digits", limit=3, size=40, crop=33)
    assert fitted.pixels.shape == (3, 1, 33, 33) and len(fitted.labels) == 3
    assert torch.equal(fitted.pixels, data.load(tmp_path, size=40, crop=33).pixels)
    assert torch.equal(data.load("digits", limit=3, crop=20).pixels, images[..., 4:24, 4:24])


def test_nothing_to_load_is_said_clearly(tmp_path):
    error_line(FileNotFoundError, lambda: data.load(tmp_path), tmp_path, "no images")
    for read in (data.read_idx, data.read_picture):
        error_line(FileNotFoundError, lambda: read(tmp_path / "none"), tmp_path / "none")
    error_line(ValueError, lambda: data.load("minst"), "'minst'", "auto, mnist, fashion, cifar10")
    error_line(ValueError, lambda: data.load("two\nlines"))
    error_line(ValueError, lambda: data.load("digits", split="valid"), "valid")


def test_root_is_argument_then_variable_then_cache(tmp_path, monkeypatch):
    given = tmp_path / "given"
    error_line(FileNotFoundError, lambda: data.load("stl10", given), given)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("DIPDDPM_DATA", raising=False)
    assert data.default_root() == tmp_path / ".cache" / "dipddpm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.default_root() == tmp_path / "cache" / "dipddpm"
    monkeypatch.setenv("DIPDDPM_DATA", str(tmp_path / "variable"))
    assert data.default_root() == tmp_path / "variable"
    error_line(FileNotFoundError, lambda: data.load("stl10"), tmp_path / "variable")


# ---- digits --------------------------------------------------------------------------------------


def test_digit_is_a_pure_function_of_seed_index_and_split():
    forward = [data.draw_digit(3, i) for i in range(12)]
    for i in reversed(range(12)):
        np.testing.assert_array_equal(data.draw_digit(3, i), forward[i])
        assert (data.draw_digit(4, i) != forward[i]).any()
        assert (data.draw_digit(3, i, "test") != forward[i]).any()


def test_digits_limit_is_a_prefix_and_draws_no_more(monkeypatch):
    images = data.load("digits", limit=30)
    monkeypatch.setitem(data.DIGITS, "train", math.inf)
    assert torch.equal(data.load("digits", limit=11).pixels, images.pixels[:11])


def test_digits_of_the_splits_are_distinct_and_balanced():
    train, test = (data.load("digits", split=split, limit=500) for split in ("train", "test"))
    pictures = {image.numpy().tobytes() for image in torch.cat([train.pixels, test.pixels])}
    assert len(pictures) == 1000
    assert train.labels.bincount().tolist() == [50] * 10 == test.labels.bincount().tolist()
    assert train.name == "digits" and train.pixels.shape == (500, 1, 28, 28)


def test_digits_are_normalised_as_mnist_is():
    for image in data.load("digits", limit=200).pixels[:, 0].double():
        rows, columns = (image.sum(axis).nonzero()[:, 0] for axis in (1, 0))
        height, width = (int(line[-1] - line[0]) + 1 for line in (rows, columns))
        assert 19 <= max(height, width) <= 22  # 20, and up to one more on each side by antialiasing
        for axis in (0, 1):
            centre = (image.sum(axis) * (torch.arange(28) + 0.5)).sum() / image.sum()
            assert abs(centre - 14) < 0.2
        assert image.max() == 255


def test_digits_can_be_told_apart():
    train, test = (data.load("digits", split=split, limit=400) for split in ("train", "test"))
    distance = torch.cdist(test.pixels.flatten(1).float(), train.pixels.flatten(1).float())
    assert (train.labels[distance.argmin(1)] == test.labels).float().mean() > 0.9


def test_strokes_pass_through_their_points_and_move_with_the_plane():
    for i, skeleton in enumerate(data.SKELETONS):
        nodes, curves = data._splines(i)
        for stroke, curve in zip(skeleton, curves, strict=True):
            np.testing.assert_allclose(curve.sum(1), 1, atol=1e-12)  # so shifts commute with curves
            gaps = np.abs((curve @ nodes)[:, None] - np.array(stroke) / 100).max(2).min(0)
            np.testing.assert_allclose(gaps, 0, atol=1e-12)


# ================================================================== kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(rng.triton is None, reason="no Triton on this platform")
SHAPES = [(1, 1, 1, 1), (5, 1, 7, 3), (2, 1, 28, 28), (3, 3, 5, 5), (2, 3, 19, 19)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 0x0123456789ABCDEF


def some_table(columns=6):
    """Unlike numbers in seven rows, so that a swapped column cannot pass."""
    x = torch.linspace(0.2, 1.1, 7 * columns, device=DEVICE)
    return x.view(7, columns).flip(0).contiguous()


def pixels(*shape):
    return (kernels.uniform(shape, 1, 0, 0, 99, DEVICE) * 256).to(torch.uint8)


def training_batch(shape):
    """x_0 with more rows than the batch, index, t, table, seed, sample, draw."""
    B = shape[0]
    x_0, index = pixels(B + 2, *shape[1:]), torch.arange(B, 0, -1, device=DEVICE)
    t = torch.arange(B, device=DEVICE) % 7
    return x_0, index, t, some_table(), SEED, torch.arange(B, device=DEVICE) * 3 + 11, 5


# ---------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("counter, key, words", [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
])
def test_philox_gives_the_published_words(counter, key, words):
    c = [torch.tensor([[int(word, 16)]]) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    found = rng.philox_ref(*c, high << 32 | low)
    assert [f"{w.item():08x}" for w in found] == words.split()


@needs_triton
def test_normals_of_the_kernel_are_those_of_the_reference_to_1_3e_6():
    """In ulp they may differ by a thousand: near a zero of the cosine a GPU's fma keeps what the
    reference's product rounds away."""
    ours = rng.normal_triton((4, 25_000), SEED, 0, 0, 0, DEVICE).cpu()
    assert (ours - rng.normal_ref((4, 25_000), SEED, 0, 0, 0)).abs().max() < 1.3e-6


def test_normals_are_box_muller_of_the_words():
    quad, sample = torch.arange(24_999)[None], torch.tensor([[4], [8]])
    w = torch.stack(rng.philox_ref(quad, sample, torch.tensor(6), 7, SEED), -1).double()
    radius = (-2 * (w[..., 0::2] * 2**-32 + 2**-33).log()).sqrt()
    angle = 2 * math.pi * 2**-32 * w[..., 1::2]
    z = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)
    found = kernels.normal((2, 99_993), SEED, sample.flatten(), 6, 7)
    # An angle errs by roundings; a word is rounded to 24 bits before its logarithm.
    radius = radius.repeat_interleave(2).view(z.shape)
    allowed = 4e-7 * radius + 2**-24 / radius
    assert ((found - z[:, :99_993]).abs() < allowed[:, :99_993]).all()


@pytest.mark.parametrize("word, quad, sample, draw, stream", [
    (0, 1079, 58834730, 74688618, 522651416),
    (1, 65, 1520938981, 3726339370, 1724342020),
    (rng.WORD, 1334, 1345658143, 2896858795, 1852328432),
])
def test_extreme_words_give_finite_normals(word, quad, sample, draw, stream):
    """At counters whose radius and angle are both `word`, found by Philox backwards."""
    counter = (torch.tensor(number) for number in (quad, sample, draw, stream))
    assert [w.item() for w in rng.philox_ref(*counter, SEED)[:2]] == [word, word]
    where = (1, 4 * quad + 4), SEED, sample, draw, stream, DEVICE
    z = rng.normal_ref(*where)[0, 4 * quad:4 * quad + 2]
    assert z.isfinite().all() and z.abs().max() <= 6.77
    assert word or z.abs().max() > 6.7  # the tail reaches as far as 32 bits allow
    if rng.triton:
        assert (rng.normal_triton(*where)[0, 4 * quad:4 * quad + 2] - z).abs().max() < 2e-6


@pytest.fixture(scope="module")
def ten_million():
    return kernels.normal((10_000, 1000), SEED, 0, 0, 0)


def test_ten_million_normals_are_normal(ten_million):
    z = ten_million.flatten().double().sort().values
    n = len(z)
    assert abs(z.mean()) < 4 / n**0.5 and abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5 and abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    rank = torch.arange(1, n + 1) / n
    assert (torch.special.ndtr(z) - rank).abs().max() < 1.95 / n**0.5  # Kolmogorov, p = 0.001
    for sigmas, tail in itertools.product((4.5, 5.0), (z, -z)):
        expected = n * math.erfc(sigmas / 2**0.5) / 2
        assert abs((tail > sigmas).sum() - expected) < 4 * expected**0.5


def test_neighbours_streams_draws_samples_and_seeds_are_uncorrelated(ten_million):
    """Of the numbers and of their squares, as the two of a pair share a radius."""
    def z(seed=SEED, sample=0, draw=0, stream=0):
        return kernels.normal((10_000, 1000), seed, sample, draw, stream)

    others = [z(seed=SEED + 1), z(seed=SEED + 2**32), z(sample=10_000), z(draw=1), z(stream=1)]
    others += [ten_million.roll(lag, 1) for lag in (1, 2, 3, 4, 28)] + [ten_million.roll(1, 0)]
    n = ten_million.numel()
    for other in others:
        assert abs((ten_million * other).double().mean()) < 4.5 / n**0.5
        assert abs(((ten_million**2 - 1) * (other**2 - 1)).double().mean()) < 4.5 * 2 / n**0.5


def test_uniforms_are_uniform_and_below_one():
    u = kernels.uniform((1000, 100), SEED, 0, 0, 1).flatten().double().sort().values
    assert u[0] >= 0 and u[-1] < 1 and (u * 2**24 % 1 == 0).all()
    assert (u - torch.arange(1, len(u) + 1) / len(u)).abs().max() < 1.95 / len(u) ** 0.5
    assert torch.equal(kernels.uniform((9,), 5, 0, 2, 1), kernels.uniform((9, 7), 5, 0, 2, 1)[:, 0])


@pytest.mark.parametrize("draw_from", [kernels.normal, kernels.uniform])
def test_sample_17_is_the_same_in_any_batch(draw_from):
    batch = draw_from((64, 3, 5, 5), SEED, 0, 9, 2)
    assert torch.equal(draw_from((1, 3, 5, 5), SEED, 17, 9, 2)[0], batch[17])
    some = torch.tensor([40, 17])
    assert torch.equal(draw_from((2, 3, 5, 5), SEED, some, torch.tensor(9), 2), batch[some])
    assert torch.equal(draw_from((64, 3), SEED, 0, 9, 2), batch.flatten(1)[:, :3])


# ---------------------------------------------------------------------- kernels and references


def draws(draw_from, shape, dtype):
    """With integers and tensors of every size that seed, sample and draw can have."""
    some = torch.arange(shape[0], device=DEVICE) * 7 + 2**31
    places = [(1, 1), (some, torch.tensor(2**33 + 5, device=DEVICE)), (2**31 - 1, 2**32 - 1),
              (2**32 - 1, torch.tensor(2**32 + 7, device=DEVICE))]
    seeds = 0, SEED << 4, -1, 2**64 + 5, 2**31, 2**32 - 1, 2**63, 2**64 - 1
    found = [draw_from(shape, seed, *place, 3, DEVICE)
             for seed, place in zip(seeds, itertools.cycle(places))]
    return [*found, draw_from(shape[:1], SEED, 17, 2**31, 3, DEVICE)]


def a_prior(shape):
    return kernels.normal(shape, 1, 0, 2, 0, DEVICE)


def noised(q_sample, shape, dtype):
    x_0, index, *rest = training_batch(shape)
    scaled = x_0[: shape[0]].to(dtype) / 255
    return [q_sample(x_0, index, *rest, dtype=dtype), q_sample(scaled, None, *rest, dtype=dtype),
            q_sample(x_0, index, *rest, dtype=dtype, prior=a_prior(shape))]


def losses_and_gradients(noise_loss, shape, dtype):
    x_0, index, *rest = training_batch(shape)
    scaled, out = x_0[: shape[0]] / 255, kernels.normal(shape, 1, 0, 0, 0, DEVICE).to(dtype)
    return [*noise_loss(out, x_0, index, *rest), *noise_loss(out, scaled, None, *rest),
            *noise_loss(out, x_0, index, *rest, prior=a_prior(shape))]


def steps(posterior_step, shape, dtype):
    """With noise, and without (sigma = 0); each also in place, of second order, on a bridge."""
    x_t, out = (kernels.normal(shape, 1, 0, draw, 0, DEVICE) for draw in (0, 1))
    table, some = some_table(columns=7), torch.arange(shape[0], device=DEVICE) * 3
    table[2, 4] = 0
    found = []
    for step, sample in (1, 4), (2, 4), (torch.tensor(3, device=DEVICE), some):
        for inplace, second, bridge in itertools.product((False, True), repeat=3):
            x, x0_prev = x_t.clone(), -x_t if second else None
            found += [posterior_step(x, out.to(dtype), table, step, SEED, sample,
                                     rng.STEP_NOISE, inplace, x0_prev,
                                     a_prior(shape) if bridge else None), x, *[x0_prev] * second]
    return found


# the module, the function, what it gives, its type, and the allowed difference
CASES = [(rng, "normal", draws, torch.float32, 2e-6), (rng, "uniform", draws, torch.float32, 0)]
CASES += [(*case, dtype, 3e-6) for dtype in TYPES for case in (
    (noising, "q_sample", noised), (noising, "noise_loss", losses_and_gradients),
    (posterior, "posterior_step", steps))]


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("module, name, results, dtype, apart", CASES)
def test_kernel_equals_reference(shape, module, name, results, dtype, apart):
    ours, theirs = (results(getattr(module, f"{name}_{form}"), shape, dtype)
                    for form in ("triton", "ref"))
    for a, b in zip(ours, theirs, strict=True):
        relative = torch.finfo(a.dtype).eps if apart else 0
        torch.testing.assert_close(a, b, rtol=relative, atol=apart)  # also of shape and type


# --------------------------------------------------------------------------- what they compute


def test_q_sample_is_signal_plus_noise():
    x_0, index, t, table, *where = training_batch((4, 1, 7, 3))
    eps = kernels.normal((4, 1, 7, 3), *where, kernels.TRAIN_NOISE, DEVICE)
    x = x_0[index].double() / 127.5 - 1
    signal, noise, *_, kappa = table[t].view(4, 6, 1, 1, 1).unbind(1)
    x_t = kernels.q_sample(x_0, index, t, table, *where)
    assert (x_t - signal * x - noise * eps).abs().max() < 1e-6
    prior = a_prior(x.shape)
    bridged = kernels.q_sample(x_0, index, t, table, *where, prior=prior)
    mean = (1 - kappa) * x + kappa * prior
    assert (bridged - signal * mean - noise * eps).abs().max() < 2e-6
    without = table.clone()
    without[:, 5] = 0
    assert torch.equal(kernels.q_sample(x_0, index, t, without, *where, prior=prior), x_t)
    scaled = x_0.float() / 127.5 - 1
    before = scaled.clone()
    assert (kernels.q_sample(scaled, index, t, table, *where) - x_t).abs().max() < 1e-6
    everything = torch.arange(6, device=DEVICE)
    rest = everything, table, SEED, 2, 5
    in_order = kernels.q_sample(x_0, everything, *rest)
    assert torch.equal(kernels.q_sample(x_0, None, *rest), in_order)
    kernels.q_sample(scaled, None, *rest)
    assert torch.equal(scaled, before)  # the data are never written to


@pytest.mark.parametrize("bridge", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_noise_loss_and_its_gradient_are_those_of_the_formula(dtype, bridge):
    x_0, index, t, table, *where = training_batch((4, 3, 5, 5))
    out = kernels.normal((4, 3, 5, 5), 1, 0, 0, 0, DEVICE).to(dtype).requires_grad_()
    by = torch.tensor([0.5, -1.0, 2.0, 0.25], device=DEVICE)
    prior = a_prior(out.shape) if bridge else None
    loss = kernels.noise_loss(out, x_0, index, t, table, *where, prior=prior)
    (gradient,) = torch.autograd.grad((loss * by).sum(), out)

    plain_out = out.detach().double().requires_grad_()
    eps = kernels.normal(out.shape, *where, kernels.TRAIN_NOISE, DEVICE).double()
    _, _, target_x0, target_eps, weight, _ = table.double()[t].view(4, 6, 1, 1, 1).unbind(1)
    x = x_0[index].double() / 127.5 - 1 - (prior if bridge else 0)
    target = target_x0 * x + target_eps * eps
    plain = (weight * (plain_out - target) ** 2).mean((1, 2, 3))
    (plain_gradient,) = torch.autograd.grad((plain * by).sum(), plain_out)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert (loss - plain).abs().max() < 1e-5
    assert (gradient - plain_gradient).abs().max() < 1e-6 + 0.1 * torch.finfo(dtype).eps


def test_loss_draws_the_noise_that_q_sample_added():
    x_0, index, t, table, *where = training_batch((4, 1, 7, 3))
    table[:] = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], device=DEVICE)  # x_t = eps = target
    eps = kernels.q_sample(x_0, index, t, table, *where)
    assert kernels.noise_loss(eps, x_0, index, t, table, *where).max() < 1e-12
    assert kernels.noise_loss(eps, x_0, index, t, table, *where, kernels.WEIGHTS).min() > 1


@pytest.mark.parametrize("bridge", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_posterior_step_is_its_formula_and_clips(second, bridge):
    shape, table = (4, 1, 7, 3), some_table(columns=7)
    x_t, out = (2 * kernels.normal(shape, 1, 0, draw, 0, DEVICE) for draw in (0, 1))
    z = kernels.normal(shape, SEED, 6, 3, kernels.STEP_NOISE, DEVICE)
    a, b, c0, ct, sigma, k, cp = table[3].double()
    prior, p = (a_prior(shape), a_prior(shape)) if bridge else (None, 0)
    x0_hat, x0_prev = (p + a * x_t + b * out).clamp(-1, 1), out.clone() if second else None
    plain = c0 * (x0_hat + k * (x0_hat - out) * second) + ct * x_t + cp * p + sigma * z
    found = kernels.posterior_step(x_t, out, table, 3, SEED, 6, x0_prev=x0_prev, prior=prior)
    assert (found - plain).abs().max() < 3e-6
    assert not second or (x0_prev - x0_hat).abs().max() < 1e-6
    same, x0_prev = x_t.clone(), out.clone() if second else None
    assert same is kernels.posterior_step(same, out, table, 3, SEED, 6, inplace=True,
                                          x0_prev=x0_prev, prior=prior)
    assert torch.equal(same, found)


def test_step_with_sigma_zero_adds_no_noise():
    x_t, out = pixels(2, 1, 5, 5).float() / 99, pixels(2, 1, 5, 5).float() / 300
    table = torch.tensor([[0, 1, 1, 0, 0, 0, 0.0]], device=DEVICE)  # x_s = x0_hat = out
    assert torch.equal(kernels.posterior_step(x_t, out, table, 0, SEED, 0), out)


@pytest.mark.parametrize("form", ["ref", pytest.param("triton", marks=needs_triton)])
def test_a_step_lets_the_networks_nan_be_seen(form):
    step = getattr(posterior, f"posterior_step_{form}")
    x_t, out = kernels.normal((2, 2, 1, 5, 5), 1, 0, 0, 0, DEVICE)
    out[1, 0, 2, 3] = math.nan
    assert torch.equal(step(x_t, out, some_table(columns=7), 3, SEED, 0).isnan(), out.isnan())


@needs_triton
def test_what_the_bench_times_takes_its_inputs():
    from kernels import bench
    for name, (ours, plain) in bench.TIMED.items():
        done = [operation(bench.inputs(3, DEVICE)) for operation in (ours, plain)]
        a, b = ([x] if torch.is_tensor(x) else list(x) for x in done)
        assert [x.shape for x in a] == [x.shape for x in b], name
        assert all(x.isfinite().all() for x in a + b), name


COMPILE = """
import json
from kernels import bench

print(json.dumps({
    f"{case.name}, sm_{chip}": bench.static(case, chip) | {"clamps": [
        line for line in bench.machine_code(case, chip) if "FMNMX" in line]}
    for chip in bench.CHIPS for case in bench.CASES}))
"""


@needs_triton
def test_machine_code_of_the_kernels_keeps_its_promises(tmp_path):
    """No local memory; 32-bit accesses for uint8 and 128-bit ones for float32, but for the scalars
    of a sample; at most 50 instructions an element where noising and the reverse step are plain,
    55 elsewhere; and a clamp keeps NaN, which Triton's interpreter would in any case."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, text=True,
                          capture_output=True, cwd=os.path.dirname(os.path.dirname(rng.__file__)))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    from kernels import bench
    assert len(rows) == len(bench.CHIPS) * len(bench.CASES)
    for name, row in rows.items():
        assert row["local"] == 0, name
        assert min(map(int, row["loads"])) >= 32 and min(map(int, row["stores"])) >= 32, name
        plain = name.startswith(("normal", "uniform", "q_sample", "posterior_step fp32"))
        assert row["instructions"] <= (50 if plain else 55), (name, row)
        assert bool(row["clamps"]) == name.startswith("posterior_step")
        assert all(".NAN" in line for line in row["clamps"]), (name, row)
    per_thread = 4 * rng.BLOCK // (32 * rng.WARPS)
    for name in ("q_sample fp32 to fp32", "noise_loss fp32", "posterior_step fp32"):
        row = rows[f"{name}, sm_90"]
        assert row["stores"]["128"] == per_thread // 4 and row["loads"]["128"] >= per_thread // 4


# ------------------------------------------------------------------ dipddpm: Config, command line


def run_main(argv, capsys):
    """main(argv) -> (exit status, standard output, standard error)."""
    try:
        dipddpm.main([str(a) for a in argv])
        status = 0
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def config(**changes):
    return dipddpm.Config(**{"mode": "prior", "data": "digits"} | changes)


def bare_run(folder, **changes):
    """A Run that has begun with these settings, or goes on where the folder holds one."""
    goes_on = (Path(folder) / "config.json").exists()
    where = {"resume" if goes_on else "out": str(folder)}
    run = dipddpm.Run(config(device="cpu", precision="fp32", **changes | where), [])
    run.begin(run.cfg)
    return run


def test_auto_is_bf16_where_the_runs_own_gpu_has_it_and_float32_is_not_tf32(monkeypatch, tmp_path):
    asked = {torch.device("cuda", 1): (8, 0), torch.device("cuda", 0): (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", asked.get)
    assert [dipddpm.pick_precision("auto", device) for device in asked] == ["bf16", "fp32"]
    assert {dipddpm.pick_precision("fp32", device) for device in asked} == {"fp32"}
    for flags, fits in (("avx2", ["fp32", "fp32"]), ("avx512_bf16", ["fp32", "bf16"]),
                        ("avx512_bf16 amx_bf16", ["bf16", "bf16"])):
        monkeypatch.setattr(dipddpm, "about_cpu", lambda key, flags=flags: flags)
        assert fits == [dipddpm.pick_precision("auto", torch.device("cpu"), photos)
                        for photos in (False, True)]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    bare_run(tmp_path / "r")
    assert not torch.backends.cudnn.allow_tf32


def test_graphs_are_recorded_where_the_kernels_serve_and_calls_repay_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "a stream")
    streams = []
    for served in True, False:  # without Triton the references stand in, which wait
        monkeypatch.setattr(rng, "fused", lambda device: served and device.type == "cuda")
        streams += [dipddpm.Graphed(print, torch.device(device), calls).stream
                    for device, calls in (("cuda", 1000), ("cuda", 10), ("cpu", 1000))]
    assert streams == ["a stream"] + 5 * [None]


@pytest.mark.parametrize("device, local, said", [
    ("cuda:1", 0, "--device cuda:1: torchrun gives each process a device of its own"),
    ("auto", 1, "torchrun started more processes than the 1 GPUs here; lower --nproc-per-node")])
def test_processes_without_a_device_each_are_refused(device, local, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(local))
    status, _, err = run_main(["--mode", "ddpm", "--device", device], capsys)
    assert status == 2 and err.startswith("dipddpm: " + said) and err.count("\n") == 1


# settings that may be null: they were not used; two are used by dip and guide alone
UNUSED = {"data_dir", "size", "crop", "limit", "resume", "mask", "minutes"}
FITS_OWN = {"sigma", "pictures"}
FIELDS = {"--" + f.name.replace("_", "-"): f for f in dataclasses.fields(dipddpm.Config)}


def test_settings_are_flags_and_the_help_shows_their_values_as_they_are_read():
    parser = dipddpm.parser()
    for flag, f in FIELDS.items():
        assert (flag in parser.format_help().split()) == bool(f.metadata)
        if f.metadata and f.default not in (None, dataclasses.MISSING):
            given = parser.parse_args([flag, dipddpm.show(f.default)])
            assert vars(given) == {f.name: f.default}


@pytest.mark.parametrize("mode", dipddpm.MODES)
def test_a_resolved_config_holds_every_value_that_is_used(mode):
    cfg = dipddpm.resolve(dipddpm.resolve(config(mode=mode)), (5, 1, 28, 28))
    unset = {name for name, value in vars(cfg).items() if value is None}
    assert unset == UNUSED | {"out"} | (set() if mode in ("dip", "guide") else FITS_OWN)
    assert cfg.samples == 5
    given = dict(dip_iters=7, dip_width=3, dip_lr=0.5, patience=9, samples=2, sigma=0.3)
    given |= dict(t_start=(4,))
    kept = dipddpm.resolve(config(mode=mode, **given), (5, 1, 28, 28))
    assert vars(kept).items() >= given.items()


@pytest.mark.parametrize("argv, says", [
    ("", "--mode"),
    ("--mode banana", "banana"),
    ("--mode prior --epochs 0", "--epochs"),
    ("--mode prior --lr nan", "--lr"),
    ("--mode prior --lr 0", "--lr"),
    ("--mode prior --width 20", "--width"),
    ("--mode prior --eta 2", "--eta"),
    ("--mode prior --t-start 1001", "--t-start 1001 is beyond"),
    ("--mode prior --t-start 700,40 --nfe 3,50", "--nfe 50 is more than the 40 steps from where"),
    ("--mode prior --t-start 900 --nfe 700", "--nfe 700 is more than the 600 steps from where"),
    ("--mode ddpm --timesteps 20 --nfe 50", "--nfe 50 is more than the 20 steps from where"),
    ("--mode prior --nfe 3,,5", "--nfe: invalid list of int value: '3,,5'"),
    ("--mode prior --dip-source code", "code is none of codes, bridge"),
    ("--mode guide --replicas 0", "--replicas must be at least 1, not 0"),
    ("--mode guide --sigma banana", "banana"), ("--mode ddpm --eta nan", "--eta must be at most 1"),
    ("--mode dip --sigma 25", "of 255 grey values it would be --sigma 0.098"),
    ("--mode guide --data digits --pictures own", "--pictures own is for --mode dip"),
    ("--mode dip --data digits --pictures own", "digits: own pictures are image files"),
    *(("--mode dip --data " + flags, "--mask and --task inpaint belong together") for flags in (
        "{tmp}/9x8.png --mask {tmp}/9x8.png", "{tmp}/9x8.png --task inpaint-box",
        "digits --task inpaint --mask {tmp}/9x8.png --pictures test")),
    ("--mode dip --data {tmp}/9x8.png --task inpaint --mask {tmp}/9x8.png", "9x8.png is all dark"),
    ("--mode dip --data {tmp}/9x8.png --task inpaint --mask {tmp}/8x8.png --crop 7",
     "8x8.png: 8x8 pixels, but the picture has 9x8"),
    ("--mode dip --data digits --size 9 --task sr", "9x9 pixels; sizes must be multiples of 2"),
    ("--mode dip --data digits --crop 40", "digits: no middle of 40×40 in 28×28 pixels"),
    ("--mode dip --data digits --size 9999", "digits: 9999×9999 is more than 89478485 pixels"),
    ("--mode prior --no-such-flag", "--no-such-flag"),
    ("--mode prior --epoch 3", "--epoch"),
    ("--mode prior --device tpu9", "--device tpu9: cpu, cuda"),
    *((f"--mode dip --data digits --device {name}", f"--device {name}: cpu, cuda")
      for name in ("mps", "meta")),
    ("--mode dip --data {tmp}/1x1.png", "noise cannot be estimated in 1x1 pixels: say --sigma"),
    *((f"--mode dip --data {{tmp}}/{size}.png --sigma 0.1", f"images of {size} pixels: a DIP")
      for size in ("1x1", "2x2")),
    ("--mode prior --data /no/such/folder", "/no/such/folder"),
    ("--mode prior --data mnist --data-dir {tmp}/damaged", "train-images-idx3-ubyte"),
    ("--mode ddpm --resume {tmp}", "no run there"),
    ("--mode sample --resume {tmp}", "no run there"),
    ("--mode sample", "needs a trained network: none in runs/"),
    ("--mode ddpm --out {tmp}", "not empty"),
    *(("--mode ddpm --data digits --out {tmp}/" + out, "is no folder")
      for out in ("file", "file/sub", "link/sub")),
])
def test_misuse_is_one_line_and_status_2(argv, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "damaged" / "mnist").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for W, H in (1, 1), (2, 2), (8, 8), (9, 8):
        Image.new("L", (W, H)).save(tmp_path / f"{W}x{H}.png")
    for file in data.FILES:
        (tmp_path / "damaged" / "mnist" / file).write_bytes(b"\0\0\x08\x03\0\0")  # a cut header
    monkeypatch.chdir(tmp_path)
    status, _, err = run_main(argv.format(tmp=tmp_path).split(), capsys)
    assert status == 2 and says in err and err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()  # misuse leaves no empty run behind


def test_defaults_that_do_not_fit_are_left_out_and_that_is_said(capsys):
    for argv, nfe in (("ddpm --timesteps 20", (3, 5, 10, 20)), ("prior --timesteps 20", (3, 5, 10)),
                      ("ddpm --timesteps 2", (2,)), ("ddpm", (3, 5, 10, 20, 50))):
        assert dipddpm.read_config(["--mode", *argv.split()]).nfe == nfe
        said = capsys.readouterr().err
        assert said.count("\n") == (len(nfe) < 5) and dipddpm.show(nfe) in said + "3,5,10,20,50"


def test_a_photo_that_memory_cannot_hold_is_refused_before_it_is_begun(tmp_path, monkeypatch,
                                                                         capsys):
    picture(tmp_path / "photo.png")
    monkeypatch.setattr(dipddpm, "memory", lambda: 110 * 16 * 4 * 24 - 1)
    assert f"lower {SHRINKING}" in refused(capsys, mode="dip", data=tmp_path / "photo.png",
                                           out=tmp_path / "r")
    run("dip", tmp_path / "r", data=tmp_path / "photo.png", replicas=3, dip_iters=10)


@pytest.mark.parametrize("pixel, flags", [
    (3100 * 2, {}), (3100 * 2, dict(patch=32)), (3100 * 2, dict(dip_width=99)),
    (4 * 110 * 2 * 4, dict(dip_width=2, task="sr")), (3100 * 4, dict(mode="guide")),
    (110 * 99 * 4, dict(mode="guide", dip_width=99))])
def test_memory_is_what_the_largest_arm_needs(pixel, flags, tmp_path, monkeypatch, capsys):
    Image.new("L", (65, 65), 9).save(tmp_path / "large.png")
    flags = dict(mode="dip", data=tmp_path / "large.png", sigma=0.1, out=tmp_path / "r") | flags
    patch = flags.pop("patch", 256)  # two of them are the most that is seen as a whole
    monkeypatch.setattr(dipddpm, "PATCH", patch)
    need = pixel * min(65**2, 2 * patch**2)
    monkeypatch.setattr(dipddpm, "memory", lambda: need - 1)
    assert f"lower {SHRINKING}" in refused(capsys, **flags)
    monkeypatch.setattr(dipddpm, "memory", lambda: need)
    monkeypatch.setattr(dipddpm.Run, "begin", lambda *_: 1 / 0)  # enough: no further
    with pytest.raises(ZeroDivisionError):
        dipddpm.main(words(**flags))


SHRINKING = "--size, --crop, --dip-width or --replicas"


@pytest.mark.parametrize("mode, says", [("dip", SHRINKING), ("ddpm", "--batch")])
def test_out_of_memory_names_the_flags_that_help(mode, says, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")

    monkeypatch.setitem(dipddpm.MODES, mode, full)
    err = refused(capsys, status=1, mode=mode, data="digits", out=tmp_path / "r")
    assert err.startswith("dipddpm: out of memory: lower ") and says in err


SAYING = """
import sys, threading
import dipddpm, eval, data
print(data.__file__, eval.__file__)
worker = threading.Thread(target=dipddpm.main, args=(sys.argv[1:],))
worker.start()
worker.join()
print("after")
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_no_terminal_no_thread_and_no_module_of_the_users_ends_a_run(encoding, tmp_path):
    for name in ("data.py", "eval.py"):
        (tmp_path / name).write_text("raise SystemExit('not this one')")
    (tmp_path / "say.py").write_text(SAYING)
    measures.save_png(measures.grid(random_images(1, 1, 8, 8)), tmp_path / "日本ü.png")
    here = dict(cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding=encoding,
                env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(HERE)})
    said = ended_well([sys.executable, "say.py", *words(
        mode="dip", data="日本ü.png", out="日本", dip_iters=10, dip_width=4, replicas=1)], here)
    assert said.startswith(f"{HERE / 'data.py'} {HERE / 'eval.py'}") and said.endswith("after\n")
    assert (tmp_path / "日本" / "report.html").exists() and r"\u65e5" in said
    for command in ["-m", "dipddpm", "-h"], [EVAL, "-h"]:
        ended_well([sys.executable, *command], here)


FLAGS = int(os.environ.get("FLAGS", 60))
EXTREME = {int: ["0", "-1", "1", "1000000000000", str(10**25), "nan", "1.5", ""],
           float: ["0", "-1", "1e-30", "1e30", "nan", "inf", "-inf", ""]}
SHORT = ("--mode prior --epochs 1 --width 8 --batch 15 --timesteps 40 --samples 4 --nfe 2 "
         "--dip-iters 2 --dip-width 4", "--mode guide --samples 1 --sigma 0.1 --dip-iters 20 "
         "--dip-width 4 --replicas 2")


def test_a_number_beyond_all_bounds_is_obeyed_or_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(70):
        Image.new("L", (12, 12), i).save(tmp_path / "data" / f"{i:02}.png")
    kinds = {flag: f.metadata.get("of", f.type) for flag, f in FIELDS.items() if f.metadata}
    cases = [(run, f"{flag}={value}") for run in SHORT
             for flag, kind in (kinds | {"--sigma": float}).items()
             for value in EXTREME.get(kind, ())]
    for i, (run, flag) in enumerate(random.Random(6).sample(cases, min(FLAGS, len(cases)))):
        argv = [*run.split(), "--data", tmp_path / "data", flag, "--out", tmp_path / str(i)]
        # who asks for a trillion waits for ever
        interrupt = threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        try:
            status, _, err = run_main(argv, capsys)
        finally:
            interrupt.cancel()
        assert status in (0, 1, 2, 130) and err.count("\n") == (status != 0), (argv, err)
        assert status != 2 or not (tmp_path / str(i)).exists(), argv


# ------------------------------------------------------------------ schedule and tables


@pytest.mark.parametrize("T", [2, 100, 1000])
def test_schedules_are_the_papers_with_beta_clipped(T):
    beta = torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64).clamp(max=0.999)
    torch.testing.assert_close(dipddpm.linear_schedule(T).alpha_bar, (1 - beta).cumprod(0))
    f = [math.cos(math.pi / 2 * (t / T + 0.008) / 1.008) ** 2 for t in range(T + 1)]
    want = torch.tensor([*f[1:-1], 0.001 * f[-2]], dtype=torch.float64) / f[0]
    torch.testing.assert_close(dipddpm.cosine_schedule(T).alpha_bar, want)


def test_tables_keep_precision_where_alpha_bar_is_nearly_one():
    table = dipddpm.forward_table(config(schedule="linear"))
    assert table[0, 1].item() == pytest.approx(0.01, rel=1e-6)  # sqrt(1 - alpha_bar) = sqrt(1e-4)


@pytest.mark.parametrize("predict, target", [("eps", (0, 1)), ("v", (-0.8, 0.6)), ("x0", (1, 0))])
def test_every_prediction_is_the_published_one_and_gives_back_x_0(predict, target):
    published, _, _ = dipddpm.prediction(predict, torch.tensor(0.36, dtype=torch.float64))
    assert [v.item() for v in published] == pytest.approx(target)
    ab = dipddpm.cosine_schedule(50).alpha_bar[:49, None]
    x_0, eps = torch.linspace(-1, 1, 9).double(), torch.linspace(2, -2, 9).double()
    (p, q), (a, b), weight = dipddpm.prediction(predict, ab)
    x_t = ab.sqrt() * x_0 + (1 - ab).sqrt() * eps
    torch.testing.assert_close(a * x_t + b * (p * x_0 + q * eps), x_0.expand(49, 9))
    # an error d in x_0 is d / b in the target: min-SNR is one objective in three scales
    torch.testing.assert_close(weight / b**2, (ab / (1 - ab)).clamp(max=5))


def test_posterior_at_eta_one_is_ddpm():
    cfg = config(schedule="linear", timesteps=200)
    ab = dipddpm.schedule_of(cfg).alpha_bar.flip(0)
    ab_t, ab_s = ab, torch.cat([ab[1:], torch.ones(1, dtype=torch.float64)])
    alpha, beta = ab_t / ab_s, 1 - ab_t / ab_s
    _, _, c0, ct, sigma, *_ = dipddpm.reverse_table(cfg, list(range(200, -1, -1)), eta=1).T.double()
    # Ho et al. 2020, eq. 7
    for got, want in ((c0, ab_s.sqrt() * beta / (1 - ab_t)),
                      (ct, alpha.sqrt() * (1 - ab_s) / (1 - ab_t)),
                      (sigma**2, (1 - ab_s) / (1 - ab_t) * beta)):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("predict", dipddpm.PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_reverse_step_has_the_marginal_of_the_forward_process(eta, predict):
    # With x0_hat = x_0: the signal's share is sqrt(ab_s), the noise's variance 1 - ab_s.
    cfg = config(timesteps=100, predict=predict)
    schedule, taus = dipddpm.schedule_of(cfg), dipddpm.time_grid(90, 7)
    rows = dipddpm.reverse_table(cfg, taus, eta).double()
    for (a, b, c0, ct, sigma, *_), tau, next_tau in zip(rows, taus, taus[1:]):
        ab_t, ab_s = schedule.at(tau), schedule.at(next_tau)
        (p, q), _, _ = dipddpm.prediction(predict, torch.tensor(ab_t).double())
        signal, noise = math.sqrt(ab_t), math.sqrt(1 - ab_t)
        assert [a * signal + b * p, a * noise + b * q] == pytest.approx([1, 0], abs=1e-6)
        assert c0 + ct * signal == pytest.approx(math.sqrt(ab_s), rel=1e-6)
        assert ct**2 * (1 - ab_t) + sigma**2 == pytest.approx(1 - ab_s, abs=1e-6)
    assert rows[-1, [2, 3, 4, 6]].tolist() == [1, 0, 0, 0]  # the last step adds no noise
    ddpm = dipddpm.reverse_table(cfg, taus, 1.0).double()
    torch.testing.assert_close(rows[:, 4], eta * ddpm[:, 4])  # Song et al. 2021, eq. 16


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_bridge_goes_from_the_noised_prior_to_the_image_and_each_step_keeps_its_marginal(eta):
    cfg = config(timesteps=100)
    schedule, taus = dipddpm.schedule_of(cfg), dipddpm.time_grid(60, 7)
    table = dipddpm.forward_table(cfg, 60).double()
    assert table.shape == (60, 6) and table[-1, 5] == 1 and table[0, 5] < 1e-3
    assert torch.equal(table[:, :2], dipddpm.forward_table(cfg)[:60, :2].double())
    # the target is x_0 - prior in other units, its error counts in these
    assert table[:, 2:5].unique(dim=0).tolist() == [[4, 0, 1 / 16]]
    # x_t given x_0 and the end signal prior + noise eps', whose eps' is then drawn as well
    ab = schedule.alpha_bar[:60]
    torch.testing.assert_close(table[:, 5], ab[-1] / (1 - ab[-1]) * (1 - ab) / ab)
    rows = dipddpm.reverse_table(cfg, taus, eta, bridge=True).double()
    plain = dipddpm.reverse_table(cfg, taus, eta).double()
    assert torch.equal(rows[:, 3:5], plain[:, 3:5])
    at = [(0.0, 1.0) if tau == 0 else (table[tau - 1, 5].item(), schedule.at(tau)) for tau in taus]
    for (a, b, c0, ct, sigma, _, cp), (kappa_t, ab_t), (kappa_s, ab_s) in zip(
            rows.tolist(), at, at[1:]):
        assert (a, b) == (0, 1 / 4)  # x0_hat is the prior and what the network adds
        # with x0_hat = x_0: shares of x_0 and of the prior, and the noise's variance
        assert c0 + ct * ab_t**0.5 * (1 - kappa_t) == pytest.approx(
            ab_s**0.5 * (1 - kappa_s), abs=1e-6)
        assert cp + ct * ab_t**0.5 * kappa_t == pytest.approx(ab_s**0.5 * kappa_s, abs=1e-6)
        assert ct**2 * (1 - ab_t) + sigma**2 == pytest.approx(1 - ab_s, abs=1e-6)
    assert rows[-1, [2, 3, 4, 6]].tolist() == [1, 0, 0, 0]  # the last step gives x0_hat


def test_second_order_weighs_the_change_by_the_ratio_of_the_steps():
    cfg, taus = config(), [900, 700, 400, 150, 0]
    table, ab = dipddpm.reverse_table(cfg, taus, 0.0), dipddpm.schedule_of(cfg).at
    h = np.diff([0.5 * math.log(ab(tau) / (1 - ab(tau))) for tau in taus[:-1]])
    k = [0, h[1] / (2 * h[0]), h[2] / (2 * h[1])]
    np.testing.assert_allclose(table[:, 5], [*k, 0], rtol=1e-6)
    # a bridge's last step goes on to where all is reached
    w = [dipddpm.reached(ab(tau), ab(900)) for tau in (900, 400, 150)]
    bridge = dipddpm.reverse_table(cfg, taus, 0.0, bridge=True)
    np.testing.assert_allclose(bridge[:, 5], [*k, (1 - w[2]) / (w[2] - w[1])], rtol=1e-6)
    assert w[0] == 0 and dipddpm.reached(1 - 1e-9, ab(900)) == pytest.approx(1, abs=1e-6)
    # a signal of sqrt(0.8) (1 - kappa) / 4 beside noise of sqrt(0.2), kappa = (1/3) / 4
    assert dipddpm.reached(0.8, 0.25) == pytest.approx(0.41665, abs=1e-5)
    assert dipddpm.reverse_table(cfg, [500, 0], 0.0, bridge=True)[0, 5] == 0  # nothing changed yet


def test_time_grid_is_uniform_holds_both_ends_and_never_stands_still():
    assert dipddpm.time_grid(1000, 4) == [1000, 750, 500, 250, 0]
    for t_start in (1, 2, 7, 600, 1000):
        for nfe in {1, 2, 3, 5, 50, t_start} & set(range(1, t_start + 1)):
            taus = dipddpm.time_grid(t_start, nfe)
            assert (taus[0], taus[-1], len(taus)) == (t_start, 0, nfe + 1)
            assert all(s < t for t, s in zip(taus, taus[1:]))
            assert np.abs(taus - np.linspace(t_start, 0, nfe + 1)).max() <= 0.5


# ------------------------------------------------------------------ U-Net


@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (1, 3, 32, 32), (3, 1, 8, 12), (2, 1, 7, 7),
                                   (1, 3, 18, 33)])
def test_unet_keeps_shape_and_starts_at_zero(shape):
    net = dipddpm.make_unet(config(width=8), shape[1], "cpu")
    out = net(torch.randn(shape), torch.arange(shape[0]))
    assert out.shape == shape and (out == 0).all()


def test_unet_weights_are_drawn_from_the_seed_with_the_default_distribution():
    before = torch.get_rng_state()
    net, again, other = (dipddpm.make_unet(config(seed=s), 1, "cpu") for s in (0, 0, 1))
    for layer in (net.shrink, net.embed[0], net.middle.conv1):
        bound = layer.weight[0].numel() ** -0.5  # uniform between its two signs
        assert layer.weight.std().item() == pytest.approx(3**-0.5 * bound, rel=0.05)
        for p in layer.weight, layer.bias:
            assert 0.9 * bound < p.max() <= bound and -bound <= p.min() < -0.9 * bound
    assert net.leave.weight.count_nonzero() == net.middle.conv2.bias.count_nonzero() == 0
    assert net.norm.weight.eq(1).all() and net.norm.bias.eq(0).all()
    assert torch.equal(net.enter.weight, again.enter.weight)
    assert not torch.equal(net.enter.weight, other.enter.weight)
    assert torch.equal(before, torch.get_rng_state())


def shaken(net):
    """The network with small random numbers in every weight: none is at its first value."""
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def group_norm(x, layer):
    return F.group_norm(x, 8, layer.weight, layer.bias)


def same(x, layer, stride=1):
    return F.conv2d(x, layer.weight, layer.bias, stride, padding=1)


def residual_block(x, emb, block):
    h = same(F.silu(group_norm(x, block.norm1)), block.conv1)
    scale, shift = block.time(emb)[:, :, None, None].split(x.shape[1], 1)
    return x + same(F.silu(group_norm(h, block.norm2) * (1 + scale) + shift), block.conv2)


def test_attention_is_a_softmax_of_scaled_products():
    layer, x = shaken(dipddpm.Attention(16, heads=4)), torch.randn(2, 16, 3, 5)
    qkv = F.conv2d(group_norm(x, layer.norm), layer.qkv.weight, layer.qkv.bias)
    q, k, v = qkv.reshape(2, 3, 4, 4, 15).unbind(1)  # [B, heads, C / heads, HW] each
    share = (torch.einsum("bhcq,bhck->bhqk", q, k) / 2).softmax(-1)  # sqrt(C / heads) = 2
    y = torch.einsum("bhqk,bhck->bhcq", share, v).reshape(2, 16, 3, 5)
    torch.testing.assert_close(layer(x), x + F.conv2d(y, layer.out.weight, layer.out.bias))


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (10, 8), (8, 10)])
def test_the_unet_is_two_levels_with_added_skips(size):
    net, (H, W) = shaken(dipddpm.UNet(2, 8)), size
    x, t = torch.randn(3, 2, H, W), torch.tensor([0, 40, 999])
    angle = t[:, None] * 10_000.0 ** (-torch.arange(4) / 4)
    emb = net.embed(torch.cat([angle.sin(), angle.cos()], 1).float())
    padded = F.pad(x, (0, -W % 4, 0, -H % 4), mode="replicate")
    deep = torch.stack([padded[:, c, i::2, j::2]
                        for c, i, j in itertools.product((0, 1), repeat=3)], 1)
    high = residual_block(same(deep, net.enter), emb, net.down1[0])
    first = residual_block(same(high, net.shrink, 2), emb, net.down2[0])
    second = residual_block(first, emb, net.down2[1])
    assert high.shape[1:] == (8, -(-H // 4) * 2, -(-W // 4) * 2)
    assert second.shape[1:] == (16, -(-H // 4), -(-W // 4))
    h = residual_block(net.attention(second), emb, net.middle)
    h = residual_block(residual_block(h + second, emb, net.up2[0]) + first, emb, net.up2[1])
    h = F.pixel_shuffle(F.conv2d(h, net.grow.weight, net.grow.bias), 2)
    h = same(F.silu(group_norm(residual_block(h + high, emb, net.up1[0]), net.norm)), net.leave)
    torch.testing.assert_close(net(x, t), F.pixel_shuffle(h, 2)[..., :H, :W], rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in dipddpm.UNet(1).parameters()) == 573_604  # as README has it


def test_a_bridges_unet_adds_nothing_at_first_and_sees_both_its_images():
    net, prior = dipddpm.make_unet(config(width=8), 2, "cpu", bridge=True), torch.randn(3, 2, 8, 8)
    x_t, t = torch.randn(3, 2, 8, 8), torch.tensor([0, 40, 999])
    assert net(x_t, t, prior).count_nonzero() == 0
    plain = dipddpm.make_unet(config(width=8), 2, "cpu")
    assert not torch.equal(net.shrink.weight, plain.shrink.weight)
    out = shaken(net)(x_t, t, prior)
    assert out.shape == x_t.shape
    assert not out.allclose(net(x_t, t, -prior)) and not out.allclose(net(-x_t, t, prior))


# ------------------------------------------------------------------ DDPM training


def test_epoch_order_is_a_new_permutation_each_epoch():
    orders = [dipddpm.epoch_order(config(), 1000, epoch, "cpu") for epoch in (0, 1)]
    assert all(torch.equal(o.sort().values, torch.arange(1000)) for o in orders)
    assert (orders[0] == orders[1]).float().mean() < 0.02


def test_timesteps_put_one_draw_in_each_stratum_and_reach_both_ends():
    numbers, cfg = torch.arange(100), config()
    t = torch.stack([dipddpm.draw_t(cfg, 500, numbers, 100, step) for step in range(40)])
    assert torch.equal(t // 5, numbers.expand(40, -1))
    assert t.unique().tolist() == list(range(500))


class Gain(torch.nn.Module):
    """out = gain_t x_t, and what it was last asked. gain is float32 [T]."""

    def __init__(self, gain):
        super().__init__()
        self.gain = torch.nn.Parameter(gain)

    def forward(self, x_t, t):
        self.asked = x_t, t
        return self.gain[t].view(-1, 1, 1, 1) * x_t


@pytest.mark.parametrize("predict", dipddpm.PREDICTIONS)
def test_a_training_step_is_algorithm_1_with_a_clipped_gradient_and_an_average(predict):
    cfg = config(epochs=20, batch=5, timesteps=20, lr=1.0, predict=predict)
    x_0, numbers, norms = pixels(22, 1, 8, 8).cpu(), torch.arange(5), []
    net, ema = Gain(torch.full((20,), 6.0)), Gain(torch.full((20,), 6.0))
    gain, average = torch.full((2, 20), 6.0, dtype=torch.float64)
    sgd = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.0))
    for n, (done, loss) in enumerate(dipddpm.train_steps(cfg, x_0, net, ema, [sgd])):
        assert done == n + 1
        # the images of this step, each noised to its t
        index = dipddpm.epoch_order(cfg, 22, n // 4, "cpu")[n % 4 * 5:][:5]
        t = dipddpm.draw_t(cfg, cfg.timesteps, numbers, 5, n)
        ab = dipddpm.cosine_schedule(20).alpha_bar[t].view(5, 1, 1, 1)
        x = x_0[index] / 127.5 - 1
        eps = kernels.normal(x.shape, 0, numbers, n, kernels.TRAIN_NOISE)
        x_t = ab.sqrt() * x + (1 - ab).sqrt() * eps
        torch.testing.assert_close(net.asked, (x_t.float(), t))
        # the loss
        (p, q), _, weight = dipddpm.prediction(predict, ab)
        error = gain[t].view(5, 1, 1, 1) * x_t - p * x - q * eps
        assert loss.item() == pytest.approx((weight * error.square()).mean().item(), rel=1e-4)
        # one step down its slope, at a rate that is a ramp times half a cosine
        slope = torch.zeros_like(gain).index_add(
            0, t, (2 * weight * error * x_t).mean((1, 2, 3)) / 5)
        norms.append(slope.norm().item())
        lr = min(1, (n + 1) / 2) * (1 + math.cos(math.pi * n / 80)) / 2
        gain -= lr * slope / max(1, norms[-1])
        average += (1 - (1 + n) / (10 + n)) * (gain - average)
        torch.testing.assert_close((net.gain.data, ema.gain.data), (gain.float(), average.float()),
                                   rtol=1e-4, atol=1e-4)
    assert len(norms) == 80 and min(norms) < 1 < max(norms)


def test_late_in_a_training_its_average_follows_slowly():
    ema = Gain(torch.zeros(1))
    dipddpm.update_average(ema, Gain(torch.ones(1)), torch.tensor(10**6))
    assert ema.gain.item() == pytest.approx(0.001, rel=1e-4)


def test_a_training_is_its_optimizers_steps_and_its_log_their_mean_loss_and_rate(tmp_path):
    run = bare_run(tmp_path, epochs=14, batch=8, width=8, timesteps=20, lr=5e-3)
    x_0, cfg = pixels(70, 1, 8, 8).cpu(), run.cfg  # 8 steps an epoch, 112 in all
    net = dipddpm.make_unet(cfg, 1, "cpu")
    ema, optimizers = copy.deepcopy(net), dipddpm.optimizers_of(net, torch.tensor(0.0))
    losses = [loss.item() for _, loss in dipddpm.train_steps(cfg, x_0, net, ema, optimizers)]
    trained, rows, seconds = dipddpm.train_network(cfg, x_0, run)
    assert [row[1:3] for row in rows] == [[50, 6.25], [100, 12.5], [112, 14.0]]
    for begin, (_, step, _, at, loss, lr) in zip((0, 50, 100), rows):
        assert loss == pytest.approx(np.mean(losses[begin:step]), rel=1e-3)
        assert lr == dipddpm.learning_rate(cfg, step - 1, 112) and 0 < at <= seconds + 0.01
    for name in "enter.weight", "leave.weight":
        torch.testing.assert_close(trained.get_parameter(name), ema.get_parameter(name), rtol=1e-3,
                                   atol=1e-4)


def tiny_images(n=64):
    """Uint8 [n, 1, 8, 8]: dark with one bright quarter."""
    x = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    for i in range(n):
        x[i, 0, 4 * (i % 2):4 * (i % 2) + 4, 4 * (i // 2 % 2):4 * (i // 2 % 2) + 4] = 255
    return x


TINY_TRAINING = dict(width=8, batch=16, epochs=25, timesteps=50, lr=5e-3)


def train(folder, each=None, **changes):
    """A training on tiny images, begun or continued in the folder: `train_network`'s result."""
    run = bare_run(folder, **TINY_TRAINING | changes)
    each = each and functools.partial(each, run)
    return dipddpm.train_network(run.cfg, tiny_images(), run, each=each)


def stop_at_step_38(run, done, ema, seconds):
    run.stop = signal.SIGINT if done == 38 else 0


def halves_of(images):
    """A coding of tiny images: each its own code, whose decoding loses half of the contrast."""
    return dipddpm.Coding(lambda code: 0.25 + code.view(-1, 1, 8, 8) / 2,
                          images.flatten(1).float() / 255, torch.full((64,), 0.05))


def test_a_bridge_learns_what_its_prior_lacks_and_samples_it_in_three_steps(tmp_path):
    x_0, numbers = tiny_images(), torch.arange(32)
    run, coding = bare_run(tmp_path, **TINY_TRAINING, bridge_start=30), halves_of(tiny_images())
    net, rows, _ = dipddpm.train_network(run.cfg, x_0, run, "dip-bridge", coding.priors)
    assert rows[-1][0] == "dip-bridge" and rows[-1][4] < 0.01 < rows[0][4]
    prior = coding.decode(coding.codes[:32]) * 2 - 1
    start = dipddpm.start_from_prior(run.cfg, prior, 30, numbers)
    x = dipddpm.sample(run.cfg, net, start, 30, 3, 0.0, numbers, prior)
    assert x.abs().max() == 1  # the last step goes on and beyond
    assert (x - x_0[:32] / 127.5 + 1).square().mean() < 0.1 * (prior - x).square().mean()


def test_a_bridges_training_and_sampling_do_not_depend_on_how_a_batch_is_split(monkeypatch):
    cfg, x_0, step = config(timesteps=20, bridge_start=12), tiny_images(), torch.tensor(7)
    net, coding = shaken(dipddpm.UNet(1, 8, bridge=True)), halves_of(x_0)
    table, index = dipddpm.forward_table(cfg, 12), torch.arange(40, 24, -1)
    whole, parts = ([dipddpm.denoising_loss(
        cfg, net, x_0, index[numbers], numbers, 16, table, step, contextlib.nullcontext,
        coding.priors) for numbers in torch.arange(16).split(n)] for n in (16, 4))
    torch.testing.assert_close(torch.cat(parts), whole[0])
    numbers, prior = torch.arange(20), coding.decode(coding.codes[:20]) * 2 - 1
    start = dipddpm.start_from_prior(cfg, prior, 12, numbers)
    many = dipddpm.sample(cfg, net, start, 12, 4, 1.0, numbers, prior)
    monkeypatch.setattr(dipddpm, "at_once", lambda x: 7)
    torch.testing.assert_close(dipddpm.sample(cfg, net, start, 12, 4, 1.0, numbers, prior), many)


def test_training_learns_and_sampling_returns_the_data(tmp_path):
    cfg = config(**TINY_TRAINING | dict(epochs=100))
    net, rows, _ = train(tmp_path, epochs=100)
    assert rows[-1][4] < 0.5 * rows[0][4]
    numbers = torch.arange(32)
    x = dipddpm.noise_start(cfg, (32, 1, 8, 8), numbers)
    x = dipddpm.sample(cfg, net, x, 50, 25, 0.0, numbers)
    nearest = torch.cdist(x.flatten(1), tiny_images(4).flatten(1) / 127.5 - 1).min(1)
    assert nearest.values.median() < 3  # two unrelated ones are 11.3 apart, noise is 8 from any
    assert len(nearest.indices.unique()) == 4


def test_weights_that_are_not_finite_end_a_training_and_leave_its_last_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at_step_38)
    good = (tmp_path / "checkpoint.pt").read_bytes()
    for stop, n in (None, 50), (lambda run, *_: setattr(run, "stop", signal.SIGINT), 39):
        error_line(RuntimeError, lambda stop=stop: train(tmp_path, stop, lr=1e30),
                   f"not finite after {n} steps with --lr 1e+30")
        assert (tmp_path / "checkpoint.pt").read_bytes() == good


def test_more_epochs_go_on_from_a_runs_weights_in_a_new_folder(whole_run, tmp_path, capsys):
    folder, _ = whole_run
    before, weights = contents(folder), dipddpm.load_checkpoint(folder)["net"]
    assert "with --out NEW its weights begin such a run" in refused(
        capsys, resume=folder, epochs=3)
    goes_on = dipddpm.read_config(words(mode="ddpm", resume=folder, epochs=3, out=tmp_path / "n"))
    begun = dipddpm.Run(goes_on, [])
    begun.begin_anew()
    assert begun.saved["ddpm"]["step"] == 0 and not begun.saved["ddpm"]["rows"]
    assert all(torch.equal(w, begun.saved["ddpm"]["net"][k]) for k, w in weights.items())
    result = run("ddpm", tmp_path / "whole", resume=folder, epochs=3)
    assert [row[1:3] for row in log_of(tmp_path / "whole")] == [["12", "3.0000"]]
    assert result["config"]["epochs"] == 3 and before == contents(folder)
    assert dipddpm.read_config(words(resume=tmp_path / "whole")).epochs == 3  # a run like others


def sgd(net, lr):
    return [torch.optim.SGD(net.parameters(), lr)]


def steps_by(optimizers, device="cpu"):
    """A hundred training steps, or this process's part of them: losses and weights."""
    cfg = config(**TINY_TRAINING | dict(lr=0.1 if optimizers is sgd else 5e-3))
    net, lr = dipddpm.make_unet(cfg, 1, device), torch.tensor(0.0, device=device)
    steps = dipddpm.train_steps(cfg, tiny_images().to(device), net, copy.deepcopy(net),
                                optimizers(net, lr))
    return [torch.stack([loss.clone() for _, loss in steps]), *net.state_dict().values()]


@pytest.mark.parametrize("shape", [(8, 2, 3, 3), (4, 8, 3, 3), (12, 3, 1, 1)])
def test_muon_is_newton_and_schulz_on_nesterovs_momentum(shape):
    p, mean = torch.nn.Parameter(torch.zeros(shape)), torch.zeros(shape, dtype=torch.float64)
    muon, expected = dipddpm.Muon([p], torch.tensor(0.01)), 0.0
    for i in range(3):
        p.grad = random_images(*shape, seed=i) - 0.5
        mean = 0.95 * mean + 0.05 * p.grad.double()
        x = (0.05 * p.grad.double() + 0.95 * mean).flatten(1)
        x = x / x.norm()
        for _ in range(5):  # on x itself
            A = x @ x.T
            x = 3.4445 * x - 4.775 * A @ x + 2.0315 * A @ A @ x
        expected = expected - 0.025 * max(1, len(x) / x.shape[1])**0.5 * x.view(shape)
        muon.step()
    torch.testing.assert_close(p.data.double(), expected, rtol=1e-3, atol=1e-5)


def test_muon_is_torchs_on_convolutions_read_as_matrices():
    shapes = (8, 2, 3, 3), (8, 2, 3, 3), (4, 8, 3, 3), (12, 3, 1, 1)
    weights = [random_images(*shape) - 0.5 for shape in shapes]
    ours = [torch.nn.Parameter(w.clone()) for w in weights]
    theirs = [torch.nn.Parameter(w.flatten(1).clone()) for w in weights]
    optimizers = (dipddpm.Muon(ours, torch.tensor(0.01)),
                  torch.optim.Muon(theirs, lr=0.025, weight_decay=0.0, momentum=0.95))
    for i in range(3):
        for p, q in zip(ours, theirs):
            p.grad = random_images(*p.shape, seed=i) - 0.5
            q.grad, before = p.grad.flatten(1).clone(), p.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
        values = torch.linalg.svdvals((before - p).flatten(1) / 0.025) / 2  # sqrt(12 / 3)
        assert 0.6 < values.min() and values.max() < 1.3
    for w, p, q in zip(weights, ours, theirs):  # in bfloat16
        assert (p.flatten(1) - q).norm() < 0.05 * (w.flatten(1) - q).norm()


def test_muon_and_adamw_share_a_unets_weights():
    net = dipddpm.make_unet(config(width=8), 1, "cpu")
    muon, adamw = ([p for group in optimizer.param_groups for p in group["params"]]
                   for optimizer in dipddpm.optimizers_of(net, torch.ones(())))
    assert sorted(map(id, muon + adamw)) == sorted(map(id, net.parameters()))
    inner = [p for name, p in net.named_parameters()
             if p.dim() == 4 and name not in ("enter.weight", "leave.weight")]
    assert set(map(id, muon)) == set(map(id, inner)) and len(inner) == 18


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                         world_size=2)
    torch.save(steps_by(sgd), folder / f"{rank}.pt")


def test_a_hundred_steps_split_over_two_processes_are_those_of_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    losses, *weights = steps_by(sgd)
    (half, *these), (other, *those) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(half + other, losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(these, weights, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, these, those))


# ------------------------------------------------------------------ sampling


def oracle(cfg, s):
    """E[x_0 | x_t] for x_0 ~ N(0, s^2), in closed form, as an x_0 prediction."""
    ab = dipddpm.schedule_of(cfg).alpha_bar
    return Gain((ab.sqrt() * s**2 / (ab * s**2 + 1 - ab)).float())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_exact_denoiser_of_a_gaussian_samples_that_gaussian(eta):
    cfg, numbers = config(predict="x0", timesteps=200), torch.arange(500)
    x = dipddpm.noise_start(cfg, (500, 1, 4, 4), numbers)
    x = dipddpm.sample(cfg, oracle(cfg, 0.2), x, 200, 200, eta, numbers)
    assert x.std().item() == pytest.approx(0.2, rel=0.05) and abs(x.mean()) < 0.01


def test_a_sample_is_the_end_of_its_way_and_does_not_depend_on_its_batch(monkeypatch):
    monkeypatch.setattr(dipddpm, "at_once", lambda x: 250)
    cfg, numbers = config(timesteps=20), torch.arange(300)
    net, x = oracle(cfg, 0.5), dipddpm.noise_start(cfg, (300, 1, 4, 4), numbers)
    x_T = x.clone()
    many = dipddpm.sample(cfg, net, x, 20, 5, 1.0, numbers)
    assert torch.equal(x, x_T)  # what it was given is left alone
    way = [x_t.clone() for x_t in dipddpm.reverse(cfg, net, x[270:271].clone(), 20, 5, 1.0,
                                                  numbers[270:271])]
    assert len(way) == 6 and torch.equal(way[0], x[270:271])
    torch.testing.assert_close(way[-1], many[270:271])


def test_with_half_the_step_the_error_halves_at_first_order_and_quarters_at_second():
    cfg, numbers = config(predict="x0"), torch.arange(64)
    net, ab = oracle(cfg, 0.2), dipddpm.schedule_of(cfg).at(900)
    x = kernels.normal((64, 1, 4, 4), 5, numbers, 0, kernels.INIT_NOISE)
    exact = x * 0.2 / math.sqrt(ab * 0.2**2 + 1 - ab)

    def ends(nfe, order, eta=0.0):
        return dipddpm.sample(dataclasses.replace(cfg, order=order), net, x, 900, nfe, eta, numbers)

    def error(nfe, order):
        return (ends(nfe, order) - exact).square().mean().sqrt().item()

    assert error(40, 1) == pytest.approx(2 * error(80, 1), rel=0.1)
    assert error(20, 2) > 4 * error(40, 2) > 16 * error(80, 2)
    assert torch.equal(ends(20, 1, eta=1.0), ends(20, 2, eta=1.0))  # for steps without noise only


def test_the_exact_denoiser_of_gaussian_residuals_crosses_a_bridge_at_either_order():
    cfg, numbers, prior = config(bridge_start=600), torch.arange(64), torch.zeros(64, 1, 4, 4)
    schedule = dipddpm.schedule_of(cfg)
    signal, noise = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
    A = signal * (1 - dipddpm.kappa_of(schedule.alpha_bar, schedule.at(600)))
    start = dipddpm.start_from_prior(cfg, prior, 600, numbers)

    def ends(nfe, order, s, eta=0.0):
        gain = A * s**2 / (A**2 * s**2 + noise**2)  # E[x_0 | x_t] by x_t

        def net(x_t, t, prior):
            return gain[t].float().view(-1, 1, 1, 1) * x_t / dipddpm.RESIDUAL
        return dipddpm.sample(dataclasses.replace(cfg, order=order), net, start, 600, nfe, eta,
                              numbers, prior)

    def error(nfe, order, s=0.1):
        return (ends(nfe, order, s) - s / noise[599] * start).square().mean().sqrt().item() / s

    assert error(40, 1) == pytest.approx(2 * error(80, 1), rel=0.1)
    assert error(20, 2) > 2.5 * error(40, 2) and error(80, 2) < 0.01
    # a few are enough where the residual is as large as the table takes it to be
    assert error(2, 2, dipddpm.RESIDUAL) < 0.08 and error(2, 1, dipddpm.RESIDUAL) > 0.6
    assert ends(300, 2, 0.1, eta=1.0).std().item() == pytest.approx(0.1, rel=0.05)


class Operations(TorchDispatchMode):
    """Within it, the names of all operations and the arguments of each."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.append((operation.name().split("::")[1].split(".")[0], args))
        return operation(*args, **(kwargs or {}))

    def waits(self):
        """How often a GPU's host would wait for a value: for a number, or for how many are true."""
        return sum(name in ("_local_scalar_dense", "nonzero") or name.startswith("index")
                   and any(i is not None and i.dtype == torch.bool for i in args[1])
                   for name, args in self.seen)


def test_a_bf16_network_casts_its_input_and_no_more(tmp_path):
    net = shaken(dipddpm.make_unet(config(width=8), 1, "cpu"))
    x, t = kernels.normal((4, 1, 8, 8), 0, 0, 0, 0), torch.tensor([1, 300, 700, 999])
    exact, run = net(x, t), bare_run(tmp_path / "r")
    assert run.as_sampled(net) is net and torch.equal(net(x, t), exact)
    run.precision = "bf16"
    net = run.as_sampled(net)
    with torch.no_grad(), Operations() as done:
        out = net(x, t)
    assert sum(name == "_to_copy" for name, _ in done.seen) <= 2
    assert out.dtype == torch.bfloat16 and (out - exact).std() < 0.02 * exact.std()


needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


@needs_cuda
def test_recorded_steps_equal_the_eager_ones_and_neither_waits(monkeypatch):
    cfg, numbers = config(predict="x0", timesteps=50), torch.arange(16, device=DEVICE)
    x, net = dipddpm.noise_start(cfg, (16, 1, 8, 8), numbers), oracle(cfg, 0.5).to(DEVICE)

    def work():
        losses, *_ = steps_by(dipddpm.optimizers_of, DEVICE)
        known = dipddpm.exact(torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0),
                                         dtype=torch.float64).to(DEVICE))
        return (dipddpm.sample(cfg, net, x, 50, 20, 1.0, numbers), losses.view(4, 25).mean(1),
                *(dipddpm.fit_dips(fit_config(muon=muon), known, numbers[:2], 25)
                  for muon in (False, True)),
                *(dipddpm.fit_denoisers(fit_config(dip_iters=25, replicas=1, precision=precision),
                                        known._replace(sigma=0.1), numbers[:2])[0]
                  for precision in ("fp32", "bf16")))

    def call_without_waiting(graphed):
        torch.cuda.set_sync_debug_mode("error")
        graphed.work()
        torch.cuda.set_sync_debug_mode("default")

    recorded = work()
    monkeypatch.setattr(dipddpm.Graphed, "__call__", call_without_waiting)
    torch.testing.assert_close(recorded, work(), rtol=1e-2, atol=1e-4)


# ------------------------------------------------------------------ DIP


def fit_config(size=8, **changes):
    """The Config of a fit to images of size x size pixels, by tiny DIPs unless asked otherwise."""
    return dipddpm.resolve(config(**{"dip_width": 4} | changes), (16, 1, size, size))


def measured(task, n=3, sigma=0.0, size=8, dtype=torch.float32):
    """Drawn images, or digits of 28 pixels, in [0, 1], and what a fit is given of them. (Adam
    divides by the gradient's size, so in float32 rounding grows by itself.)"""
    images = data.load("digits", limit=n).pixels if size == 28 else tiny_images(n)
    truth = images.to(dtype) / 255
    return truth, dipddpm.corrupt(fit_config(size), task, truth, sigma, torch.arange(n))


@pytest.mark.parametrize("task, muon", [*((task, False) for task in dipddpm.TASKS),
                                        ("inpaint", True)])
def test_batched_dips_equal_separate_fits_to_what_is_given(task, muon):
    _, known = measured(task, 4, dtype=torch.float64)
    cfg, numbers = fit_config(muon=muon), torch.tensor([0, 1, 2, 17])
    together = dipddpm.fit_dips(cfg, known, numbers, 5)
    for k in range(4):
        alone = dipddpm.fit_dips(cfg, known.part(slice(k, k + 1)), numbers[k:k + 1], 5)
        torch.testing.assert_close(together[k:k + 1], alone, rtol=1e-6, atol=1e-8)
    # nothing that is not given, and no other member's image, has any part in a fit
    other = known.y + 5 * (1 - known.given())
    other[1:] = 1 - other[1:]
    other = dipddpm.fit_dips(cfg, known._replace(y=other), numbers, 5)
    assert torch.equal(other[0], together[0]) and not torch.allclose(other[1], together[1])
    for seed, number in (0, 5), (1, 0):  # but its number and the seed have
        other = dipddpm.fit_dips(dataclasses.replace(cfg, seed=seed), known.part([0]),
                                 torch.tensor([number]), 5)
        assert not torch.allclose(other, together[:1])


def test_muon_fits_a_dips_convolutions_of_3x3_and_adam_the_rest():
    group = dipddpm.DIPGroup(fit_config(muon=True), torch.arange(2), 1, 8, 8)
    adam, muon = group.optimizers
    theirs, inner = ([p for part in optimizer.param_groups for p in part["params"]]
                     for optimizer in (adam, muon))
    assert sorted(map(id, theirs + inner)) == sorted(map(id, group.net.parameters()))
    assert {p.shape[-1] for p in inner} == {3} and len(inner) == 3 * group.net.scales
    assert all(p.dim() == 1 or p.shape[-1] == 1 for p in theirs) and muon.groups == 2
    assert all(part["lr"] == 0.01 for part in adam.param_groups + muon.param_groups)


@pytest.mark.parametrize("muon", [False, True])
def test_a_fit_in_bf16_calculates_in_it_and_is_the_same_picture(muon):
    _, known = measured("inpaint", 1)
    short, long = (dipddpm.fit_dips(fit_config(muon=muon, precision=precision), known,
                                    torch.arange(1), 10) for precision in ("bf16", "fp32"))
    assert 1e-5 < (short - long).abs().max() < 0.1 and short.dtype == torch.float32


def test_a_dips_input_is_its_code_and_a_thirtieth_of_fresh_noise_that_all_share():
    group, inputs = dipddpm.DIPGroup(fit_config(dip_width=16), torch.arange(2), 1, 8, 8), []
    assert 0 <= group.z.min() < 0.001 and 0.099 < group.z.max() < 0.1  # U(0, 0.1)
    group.net.register_forward_pre_hook(lambda net, args: inputs.append(args[0]))
    for i in (0, 7):
        group.steps.fill_(i)
        group.iterate(torch.zeros(2, 1, 8, 8), torch.ones(()) / 64, lambda x: x)
        noise = kernels.normal((1, 16, 8, 8), 0, 0, i, kernels.DIP_JITTER)
        torch.testing.assert_close(inputs[-1], (group.z + noise / 30).view(1, 32, 8, 8))


def test_layers_of_a_grouped_dip_start_as_pytorchs_do():
    layer, r = dipddpm.Grouped(torch.arange(200), 0).conv(3, 5, 4, 2), 48**-0.5  # U(-r, r)
    assert layer.weight.shape == (1000, 3, 4, 4) and layer.bias.shape == (1000,)
    for values in layer.weight, layer.bias:
        assert values.abs().max().item() == pytest.approx(r, rel=0.02)
        assert values.std().item() == pytest.approx(r / 3**0.5, rel=0.05)


@pytest.mark.parametrize("size, scales", [((7, 30), 1), ((15, 15), 1), ((16, 33), 2), ((31, 28), 2),
                                          ((32, 32), 3), ((128, 512), 5)])
def test_skip_has_as_many_scales_as_leave_four_pixels_and_keeps_odd_sizes(size, scales):
    net = dipddpm.Skip(dipddpm.Grouped(torch.arange(2), 0), 2, 3, *size, 2)
    assert net.scales == scales == len(net.downs)
    assert net(torch.rand(1, 4, *size)).shape == (1, 6, *size)


def test_skip_is_the_hourglass_of_the_paper():
    net = dipddpm.Skip(dipddpm.Grouped(torch.arange(1), 0), 6, 2, 16, 24, 8)

    def conv(x, layer, size, stride=1):
        assert layer.weight.shape[2:] == (size, size)
        x = F.pad(x, ((size - 1) // 2,) * 4, mode="reflect") if size > 1 else x
        return F.conv2d(x, layer.weight, layer.bias, stride)

    def unit(x, parts, size, stride=1):
        return F.leaky_relu(F.instance_norm(conv(x, parts[0], size, stride)), 0.2)

    x = torch.randn(1, 6, 16, 24)
    skips, h = [], x
    for skip, down in zip(net.skips, net.downs):
        skips.append(unit(h, skip, 1))
        h = unit(unit(h, down[0], 3, 2), down[1], 3)
    assert h.shape == (1, 8, 4, 6) and skips[1].shape == (1, 4, 8, 12)
    for skip, up in zip(reversed(skips), reversed(net.ups)):
        h = torch.cat([skip, F.interpolate(h, scale_factor=2, mode="bilinear")], 1)
        h = unit(unit(F.instance_norm(h), up[0], 3), up[1], 1)
    torch.testing.assert_close(net(x), conv(h, net.last, 1).sigmoid(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("H, W", [(1, 5), (5, 1), (2, 2)])
def test_a_map_with_nothing_to_reflect_continues_its_border(H, W):
    layer = dipddpm.Grouped(torch.arange(1), 0).conv(1, 1, 3)
    x = torch.rand(1, 1, H, W)
    padded = np.pad(x[0, 0].numpy(), 1, mode="edge" if min(H, W) == 1 else "reflect")
    torch.testing.assert_close(layer(x), F.conv2d(torch.tensor(padded)[None, None], layer.weight,
                                                  layer.bias))


def test_a_fit_gets_nearer_and_returns_the_average_of_its_outputs():
    (x, known), looks, average = measured("denoise", 2), [], 0
    cfg = fit_config(dip_width=16, window=0.5)
    result = dipddpm.fit_dips(cfg, known, torch.arange(2), 63,
                              look=lambda i, *now: looks.append((i, *(v.clone() for v in now))))
    for n, (i, output, ours) in enumerate(looks):
        average += (1 - min(0.5, (1 + n) / (10 + n))) * (output - average)
        torch.testing.assert_close(ours, average)
        assert i == n + 1
    assert len(looks) == 63 and torch.equal(result, looks[-1][2])
    psnr = [measures.psnr(now, x) for *_, now in looks]
    assert (psnr[-1] > psnr[9] + 3).all() and 0 <= result.min() <= result.max() <= 1


def test_the_oracle_is_each_images_best_look_and_the_curve_keeps_who_has_ended():
    truth, x = random_images(2, 1, 8, 8), random_images(3, 2, 1, 8, 8, seed=1)
    follow = dipddpm.Follow(truth)
    for k, (i, rows) in enumerate(((10, [0, 1]), (50, [0]), (60, [0]))):
        follow(i, torch.tensor(rows), x[k, rows])
    psnr = torch.stack([measures.psnr(output, truth) for output in x])  # [look, image]
    psnr[1:, 1] = psnr[0, 1]
    assert follow.curve() == [[i, pytest.approx(row.mean().item())]
                              for i, row in zip((10, 50, 60), psnr)]
    best = psnr.max(0)
    assert torch.equal(follow.psnr, best.values) and len(best.indices.unique()) == 2
    assert torch.equal(measures.psnr(follow.best, truth), best.values)
    assert follow.when.tolist() == [(10, 50, 60)[k] for k in best.indices]


@pytest.mark.parametrize("fit", [dipddpm.fit_plain, dipddpm.fit_guided, dipddpm.fit_denoisers])
def test_a_fit_that_leaves_the_finite_numbers_says_so(fit, monkeypatch):
    _, known = measured("denoise", 1, 0.1)
    monkeypatch.setattr(dipddpm, "DENOISER_RATE", 1e30)
    with pytest.raises(RuntimeError, match="a fit is not finite after [1-9]0? iterations"):
        fit(fit_config(dip_lr=1e30, replicas=2, patience=10), known, torch.arange(1))


@pytest.mark.parametrize("task", dipddpm.TASKS)
def test_back_is_the_pseudo_inverse_of_a(task):
    x, known = measured(task)
    y, other = known.A(x), random_images(3, 1, 8, 8)
    torch.testing.assert_close(known.A(known.back(y)), y)  # A A+ A = A
    torch.testing.assert_close(known.back(known.A(known.back(y))), known.back(y))  # A+ A A+ = A+
    left, right = (known.back(known.A(x)) * other).sum(), (x * known.back(known.A(other))).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-5)  # A+ A is symmetric
    assert (task == "denoise") == torch.equal(known.back(known.A(other)), other)


def test_noise_is_the_streams_and_lies_only_where_something_is_seen():
    x, numbers = torch.full((200, 1, 8, 12), 0.5), torch.arange(200)
    eps = kernels.normal(x.shape, 0, numbers, 0, kernels.CORRUPTION)
    known = {task: dipddpm.corrupt(fit_config(), task, x, 0.3, numbers) for task in dipddpm.TASKS}
    torch.testing.assert_close(known["denoise"].y, x + 0.3 * eps)
    torch.testing.assert_close(known["inpaint"].y, (x + 0.3 * eps) * known["inpaint"].mask)
    assert known["inpaint"].mask.mean() == pytest.approx(0.5, abs=0.02)
    box = torch.ones(200, 1, 8, 12)
    box[:, :, 2:6, 3:9] = 0
    assert torch.equal(known["inpaint-box"].mask, box)
    assert known["sr"].y.shape == (200, 1, 4, 6) and known["sr-4"].y.shape == (200, 1, 2, 3)
    with pytest.raises(ValueError, match="sr-4: images of 8x6 pixels; .* multiples of 4"):
        dipddpm.corrupt(fit_config(), "sr-4", torch.rand(1, 1, 6, 8), 0.0, numbers[:1])


def test_draws_of_one_stream_have_numbers_of_their_own():
    for names in ("MASK_DRAW", "HELD_DRAW", "SPLIT_DRAW"), ("CENTRE_DRAW", "CODE_DRAW"):
        assert len({0, *(getattr(dipddpm, name) for name in names)}) == 1 + len(names)


# ------------------------------------------------------------------ codes


def test_new_codes_are_any_images_with_noise_of_their_own():
    codes, noise = torch.arange(40.0)[:, None].expand(40, 3) * 100, torch.tensor([0.5, 1.0, 2.0])
    coding = dipddpm.Coding(lambda code: code, codes, noise)
    new = (coding.new(5, 8000) + 1) / 2
    index = (new / 100).round()
    assert (index == index[:, :1]).all()  # one image's code each, and each as often
    assert (torch.bincount(index[:, 0].long(), minlength=40) / 200 - 1).abs().max() < 0.3
    z = (new - 100 * index) / noise
    torch.testing.assert_close(z.T.cov(), torch.eye(3), atol=0.06, rtol=0)
    assert z.mean(0).abs().max() < 0.05
    # the same however many are drawn, of a seed
    assert torch.equal(coding.new(5, 1300), coding.new(5, 8000)[:1300])
    assert not torch.equal(coding.new(6, 7), coding.new(5, 7))


def test_priors_in_training_are_drawn_as_new_images_are():
    codes, noise = kernels.normal((200, 32), 1, 0, 0, 0) * 3, torch.linspace(0.5, 1.5, 32)
    coding, index = dipddpm.Coding(lambda code: code, codes, noise), torch.arange(199, 99, -1)
    numbers = torch.arange(100)
    z, later = (((coding.priors(0, index, numbers, torch.tensor(step)) + 1) / 2 - codes[index])
                / noise for step in (5, 6))
    assert z.mean().abs() < 0.05 and z.std() == pytest.approx(1, abs=0.05)
    assert (z * later).mean().abs() < 0.05 and not z.allclose(later)
    part = coding.priors(0, index[30:], numbers[30:], torch.tensor(5))
    assert torch.equal(part, coding.priors(0, index, numbers, torch.tensor(5))[30:])


@pytest.mark.parametrize("N, D", [(300, 3), (6, 5)])  # more images than pixels, and fewer
def test_principal_components_are_white_and_hold_what_lies_in_their_span(N, D):
    z = kernels.normal((N, D), 1, 0, 0, 0) * torch.linspace(40, 10, D)
    axes = torch.linalg.qr(kernels.normal((16, D), 2, 0, 0, 0)).Q.T
    x = (128 + z @ axes).round().clamp(0, 255).byte().view(-1, 1, 4, 4)
    scores, mean, axes = dipddpm.principal_components(x, D)
    torch.testing.assert_close(scores.T @ scores / N, torch.eye(D), atol=1e-4, rtol=0)
    left = 3 / 255 if N > 16 else 1e-4  # rounding has no span of its own in six images
    assert (mean + scores @ axes - x.flatten(1) / 255).abs().max() < left
    torch.testing.assert_close(mean, x.flatten(1).double().mean(0).float() / 255)
    assert (axes.norm(dim=1).diff() < 0).all()  # the largest first


def test_the_decoder_of_codes_doubles_twice():
    net = dipddpm.CodeDecoder(3, 10, 13, 8).eval()
    code = torch.randn(4, dipddpm.CODE)
    h = (code @ net.enter.weight.T + net.enter.bias).view(4, 16, 3, 4)
    h = F.leaky_relu(h / (1 + 1e-5) ** 0.5, 0.2)  # norms that have seen nothing only divide
    for conv, width in (net.conv1, 8), (net.conv2, 4):
        h = F.interpolate(h, scale_factor=2, mode="bilinear")
        h = F.leaky_relu(same(h, conv) / (1 + 1e-5) ** 0.5, 0.2)
        assert h.shape[1] == width
    torch.testing.assert_close(net(code), same(h, net.last).sigmoid()[..., :10, :13])


def test_codes_are_learned_with_their_decoder_and_give_new_images():
    x, asked = tiny_images(250), []
    cfg = fit_config(decoder_width=8, code_epochs=10, batch=16)
    coding = dipddpm.fit_codes(cfg, x, lambda steps, *_: asked.append(steps) or steps)
    decoder, codes, noise = coding
    again = dipddpm.fit_codes(cfg, x).decode
    assert all(torch.equal(p, q) for p, q in zip(decoder.parameters(), again.parameters()))
    assert (decoder(codes) - x / 255).square().mean() < 0.1 * (x / 255).var()
    assert len(asked[0]) == 10 * 15  # passes, without the last ten images
    torch.testing.assert_close(noise, dipddpm.CODE_SPREAD * codes.std(0))
    # the prior decodes new codes, to [-1, 1]
    new = coding.new(0, 40)
    assert new.shape == (40, 1, 8, 8) and new.min() < -0.9 and new.std(0).max() > 0.1


# ------------------------------------------------------------------ method 1


def test_gauss_prior_has_the_datas_mean_and_covariance():
    torch.manual_seed(0)
    basis = torch.randn(4, 16)
    x = (128 + 20 * torch.randn(5000, 4) @ basis).clamp(0, 255).to(torch.uint8).view(-1, 1, 4, 4)
    drawn = dipddpm.gaussian_codes(None, x).new(0, 5000).flatten(1)
    real = x.flatten(1).float() / 127.5 - 1
    torch.testing.assert_close(drawn.mean(0), real.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(real.T), atol=0.03, rtol=0)


def test_which_code_is_chosen_says_nothing_of_its_noise():
    codes = torch.arange(4000.0)[:, None]
    coding = dipddpm.Coding(lambda code: code.view(-1, 1, 1, 1), codes, torch.tensor([0.1]))
    x = (coding.new(0, 4000).flatten().double() + 1) / 2
    noise = x - x.round()
    seen = torch.corrcoef(torch.stack([x.round(), noise, noise.abs()]))[0, 1:]
    assert seen.abs().max() < 0.06 and noise.std().item() == pytest.approx(0.1, rel=0.05)


def test_principal_components_give_back_what_is_skewed():
    x = torch.zeros(400, 1, 3, 3, dtype=torch.uint8)
    x[::4] = 255  # a quarter is white: with the wrong sign it would be black, and grey the rest
    coding = dipddpm.principal_codes(None, x)
    torch.testing.assert_close(coding.noise, dipddpm.CODE_SPREAD * coding.codes.std(0))
    made = coding._replace(noise=coding.noise * 0.2).new(0, 300)
    assert made.shape == (300, 1, 3, 3) and made.abs().max() <= 1
    level = (made.flatten(1).mean(1) + 1) / 2
    assert ((level < 0.15) | (level > 0.85)).float().mean() > 0.95
    assert (level > 0.85).float().mean() == pytest.approx(0.25, abs=0.08)


def test_a_bridge_starts_where_it_ends_from_the_new_images_of_its_coding(tmp_path):
    x, numbers = tiny_images(), torch.arange(64)
    cfg = fit_config(out=str(tmp_path / "run"), timesteps=10, t_start=(1,), bridge_start=6,
                     dip_source=("bridge",))
    fitted = {"dip-codes": (halves_of(x), 5.0)}
    first, bridge, *rest = dipddpm.starts(
        cfg, dipddpm.Run(cfg, []), {"ddpm": "net", "dip-bridge": "other"}, fitted, x, numbers)
    assert [(start.arm, start.t_start, start.net) for start in (bridge, *rest)] == [
        ("dip-bridge", 6, "other"), *((arm, 1, "net") for arm in ("gauss", "pca"))]
    prior = fitted["dip-codes"][0].new(0, 64)
    assert torch.equal(bridge.prior, prior) and bridge.seconds >= 5
    assert torch.equal(bridge.x_init, dipddpm.start_from_prior(cfg, prior, 6, numbers))


def test_every_arm_starts_from_its_prior_with_the_marginal_at_t_start(tmp_path):
    x, numbers = tiny_images(500), torch.arange(500)
    cfg = fit_config(out=str(tmp_path / "run"), code_epochs=1, timesteps=10, t_start=(1, 6),
                     dip_source=("codes",))
    run, eps = dipddpm.Run(cfg, []), kernels.normal(x.shape, 0, numbers, 0, kernels.INIT_NOISE)
    first, *arms = dipddpm.starts(cfg, run, {"ddpm": "net"}, {}, x, numbers)
    assert first[:2] == ("ddpm", "net") and first[3:] == (10, None, 0.0)
    assert torch.equal(first.x_init, eps)
    assert [(start.arm, start.t_start) for start in arms] == [
        (arm, t) for arm in ("dip-codes", "gauss", "pca") for t in (1, 6)]
    for arm, net, x_init, t_start, prior, seconds in arms:
        assert net == "net"
        ab = dipddpm.cosine_schedule(10).at(t_start)
        torch.testing.assert_close(x_init, ab**0.5 * prior + (1 - ab) ** 0.5 * eps)
        assert torch.equal(prior, dipddpm.CODINGS[arm](cfg, x).new(0, 500)) and seconds > 0
        assert (x_init - ab**0.5 * prior).var().item() == pytest.approx(1 - ab, rel=0.05)


# ------------------------------------------------------------------ method 2


def test_halves_have_independent_noises_and_replicas_that_average_to_y():
    y = 0.3 * kernels.normal((60, 1, 16, 16), 9, 0, 0, 0)
    for M in (1, 2, 4):
        plus, minus = dipddpm.split(y, torch.ones_like(y), 0.3, 0.5, torch.arange(60 * M), M, 0)
        assert plus.std() == pytest.approx(0.3 * 1.25**0.5, rel=0.02)
        assert minus.std() == pytest.approx(0.3 * 5**0.5, rel=0.02)
        correlation = (plus * minus).mean() / (plus.std() * minus.std())
        assert correlation.abs() < 4 / (60 * M) ** 0.5 / 16
        if M > 1:
            torch.testing.assert_close(plus.view(60, M, 1, 16, 16).mean(1), y, atol=1e-6, rtol=0)


@pytest.mark.parametrize("task", ["denoise", "inpaint", "sr"])
def test_the_risk_is_the_error_without_the_truth(task):
    truth, known = measured(task, 2000, 0.3)  # 2000 draws
    numbers = dipddpm.replicas_of(torch.arange(2000), 2)
    half = dipddpm.halves(fit_config(replicas=2), known, numbers)
    output = 0.7 * half.y_plus + 0.1  # as a fit is made from it
    risk = half.risk(output, 2)
    error = (output - known.A(truth).repeat_interleave(2, 0)).square() * half.judged
    error = error.sum((1, 2, 3)).view(-1, 2).mean(1)
    assert (risk - error).mean().abs() < 4 * (risk - error).std() / 2000**0.5
    assert (risk - error).mean().abs() < 0.2 * error.mean()


@pytest.mark.parametrize("task", ["denoise", "inpaint", "sr"])
def test_outputs_weigh_as_much_as_they_make_the_other_half_likely(task):
    truth, known = measured(task, 5, 0.3)
    half = dipddpm.halves(fit_config(replicas=1), known, torch.arange(5))
    noise = torch.distributions.Normal(0, math.sqrt(half.variance))
    likely, risks = [], []
    for output in (known.A(truth), known.A(0.8 * truth + 0.1)):
        likely.append(((half.judged > 0) * noise.log_prob(half.y_minus - output)).sum((1, 2, 3)))
        risks.append(half.risk(output, 1))
    least = torch.minimum(*risks)
    ratio = half.weights(risks[1], least, 1) / half.weights(risks[0], least, 1)
    torch.testing.assert_close(ratio, (likely[1] - likely[0]).exp(), rtol=1e-3, atol=1e-30)
    four = [half._replace(judged=half.judged.repeat_interleave(4, 0)).weights(r, least, 4)
            for r in risks]  # count as two
    torch.testing.assert_close(four[1] / four[0], ratio**2, rtol=1e-3, atol=1e-30)


@pytest.mark.parametrize("M", [1, 4, 12])
def test_without_noise_each_replica_judges_by_a_tenth_that_it_alone_is_not_fitted_to(M):
    x = torch.rand(3, 1, 40, 40)
    known = dipddpm.corrupt(fit_config(), "inpaint", x, 0.0, torch.arange(3))
    half = dipddpm.held_out(fit_config(replicas=M), known,
                            dipddpm.replicas_of(torch.arange(3), M))
    fitted, judged = half.fitted > 0, half.judged > 0
    given = known.given().bool().repeat_interleave(M, 0)
    assert torch.equal(fitted | judged, given) and not (fitted & judged).any()
    for share in half.fitted, half.judged:
        torch.testing.assert_close(share.sum(dim=(1, 2, 3)), torch.ones(3 * M))
    assert judged.view(3, M, -1).sum(1).max() == 1  # no two replicas of one image judge by the same
    part = judged.float().sum() / given.float().sum()
    assert part == pytest.approx(1 / max(10, M), rel=0.1) and half.variance == 0
    assert torch.equal(half.y_plus, half.y_minus)
    assert torch.equal(half.y_minus, known.y.repeat_interleave(M, 0))


def stopped_by_hand(cfg, known, number):
    """`fit_guided` of one image in a plain loop: its result and iterations."""
    M = cfg.replicas
    replicas = number * M + torch.arange(M)
    half = (dipddpm.halves if known.sigma else dipddpm.held_out)(cfg, known, replicas)
    group = dipddpm.DIPGroup(cfg, replicas, 1, *known.mask.shape[2:], known.y.dtype)
    since, best, risks, outputs = 0, math.inf, [], []
    for i in range(1, cfg.dip_iters + 1):
        group.iterate(half.y_plus, half.fitted, known.A)
        if i % 10 and i < cfg.dip_iters:
            continue
        risks.append(half.risk(known.A(group.average), M))
        outputs.append(group.average.mean(0))
        since += 10
        if risks[-1] < best:
            best, since = risks[-1], 0
        if since >= cfg.patience:
            break
    weights = torch.stack([half.weights(risk, min(risks), M) for risk in risks])
    return (weights[..., None, None] * torch.stack(outputs)).sum(0) / weights.sum(), i


@pytest.mark.parametrize("task, sigma", [("denoise", 0.6), ("inpaint", 0.6), ("sr", 0.0)])
def test_images_end_when_they_would_alone_whatever_shares_their_group(task, sigma):
    truth, known = measured(task, 4, sigma, dtype=torch.float64)
    cfg = fit_config(seed=1, patience=20, replicas=2, dip_iters=105)
    x, ends = zip(*(stopped_by_hand(cfg, known.part([k]), k) for k in range(4)))
    assert len(set(ends)) > 1  # some before others
    seen = dipddpm.Observed(truth, known, torch.arange(4), {}, {})
    run = SimpleNamespace(track=lambda steps, *_, keeps: steps, stop=0)
    for K in (1, 4, 64):  # images one by one, in twos, all together
        ours, took = dipddpm.fit_in_groups(dataclasses.replace(cfg, dip_group=K), seen, run,
                                           dipddpm.fit_guided, 2)
        assert took.tolist() == list(ends)
        torch.testing.assert_close(ours, torch.stack(x).clamp(0, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [28, 65])
def test_nothing_that_an_honest_arm_returns_depends_on_the_truth(size, tmp_path, monkeypatch):
    observe, outputs, rows = dipddpm.observe, [], []

    def altered(cfg, run):
        cfg, seen = observe(cfg, run)
        return cfg, seen._replace(truth=1 - seen.truth)

    monkeypatch.setattr(measures, "measures", lambda x, truth: outputs.append(x) or {})
    for folder in tmp_path / "a", tmp_path / "b":
        cfg = dataclasses.replace(fit_config(mode="guide", samples=2, sigma=0.3, dip_iters=60,
                                             patience=10, replicas=2, out=str(folder)), size=size)
        dipddpm.run_fits(cfg, dipddpm.Run(cfg, []))
        rows += json.loads((folder / "results.json").read_text())["arms"]
        monkeypatch.setattr(dipddpm, "observe", altered)  # the second time
    names = ["corrupted", "plain", "oracle", "split", *["denoiser"] * (size > 64)]
    for k, name in enumerate(names):
        assert rows[k]["name"] == name
        same = torch.equal(outputs[k], outputs[len(names) + k])
        steps = [row.get("iterations") for row in rows[k::len(names)]]
        assert same == (steps[0] == steps[1]) == (name != "oracle")


def test_a_guided_stop_is_near_its_own_oracle_and_far_above_the_end():
    truth, known = measured("denoise", 2, 0.3, size=28)
    cfg = fit_config(28, dip_width=8, replicas=2, dip_iters=500)
    follow, ended = dipddpm.Follow(truth), dipddpm.Follow(truth)
    rows = torch.arange(2)
    x, iterations = dipddpm.fit_guided(cfg, known, rows, look=lambda i, x: follow(i, rows, x))
    end, all_of_them = dipddpm.fit_plain(cfg, known, rows, look=lambda i, x: ended(i, rows, x))
    psnr = measures.psnr(x.clamp(0, 1), truth)
    assert (follow.psnr - psnr).max() < 1 and (iterations < 500).all()
    assert psnr.mean() > measures.psnr(end.clamp(0, 1), truth).mean() + 1.5
    # what nothing stops has its best moment long before
    assert all_of_them.tolist() == [500, 500] and sorted(ended.looks) == [*range(10, 501, 10)]
    assert (ended.psnr > ended.looks[500] + 1).all() and (ended.when < 400).all()


@pytest.mark.parametrize("fit", [dipddpm.fit_guided, dipddpm.fit_denoisers])
def test_a_look_waits_for_the_device_once_and_an_iteration_never(fit):
    (truth, known), numbers = measured("denoise", 2, 0.2), torch.arange(2)
    cfg, follow = fit_config(dip_iters=60, replicas=2, patience=20), dipddpm.Follow(truth)
    counts = []

    def track(steps, *_):
        for step in steps:
            with Operations() as done:
                yield step
            counts.append(done.waits())

    fit(cfg, known, numbers, track, lambda i, x: follow(i, numbers, x))
    assert len(counts) >= 20 and max(counts) == 0  # but for one tolist, which is no operation here


def test_a_denoisers_input_and_target_are_noised_independently_of_each_other(monkeypatch):
    x, numbers, seen = random_images(40, 1, 16, 16), torch.arange(40), []
    level = 0.3 * math.sqrt(1 + 0.35**2)
    plus, _ = dipddpm.split(x + 0.3 * kernels.normal(x.shape, 9, 0, 0, 0), torch.ones_like(x), 0.3,
                            0.35, numbers, 1, 0)
    group = dipddpm.Denoisers(fit_config(dip_iters=100), numbers, 1, 16, 16, x.dtype, level)
    monkeypatch.setattr(group, "learn", lambda *given: seen.append(given) or group.steps.add_(1))
    for _ in range(3):
        group.iterate(plus, None, None)
    u, v = (torch.stack([given[k] for given in seen]).detach() - x for k in (0, 1))  # net is 0 yet
    a = dipddpm.INNER
    assert u.std() == pytest.approx(level * math.sqrt(1 + a**2), rel=0.03)
    assert v.std() == pytest.approx(level * math.sqrt(1 + 1 / a**2), rel=0.03)
    each = (u * v).mean(dim=(1, 2, 3, 4)) / (u.std() * v.std())
    assert each.abs().max() < 0.03  # in every iteration
    shared = (u + a**2 * v) / (1 + a**2)  # y_plus
    torch.testing.assert_close(shared[0], shared[2], atol=1e-5, rtol=0)
    assert not torch.equal(u[0], u[1])
    assert group.rate == pytest.approx(dipddpm.DENOISER_RATE * dipddpm.half_cosine(2, 100))


def test_denoisers_are_turned_in_eight_ways_as_if_their_picture_were(monkeypatch):
    group = dipddpm.Denoisers(fit_config(dip_iters=100), torch.arange(2), 3, 12, 16, torch.float32,
                              0.0)
    torch.nn.init.normal_(group.net.layers[-1].weight)
    y, outputs = random_images(2, 3, 12, 16), []
    monkeypatch.setattr(group, "learn", lambda x, *_: outputs.append(x) or group.steps.add_(1))
    for _ in range(40):
        group.iterate(y, None, None)

    ways = []
    for axes, transposed in itertools.product(((), (2,), (3,), (2, 3)), (False, True)):
        x = (y.mT if transposed else y).flip(axes)
        noise = group.net(x, lambda weight: weight).flip(axes)
        want = y - (noise.mT if transposed else noise)
        ways.append(sum(torch.allclose(x, want, atol=1e-5) for x in outputs))
    assert sum(ways) == 40 and min(ways) > 0


def test_denoisers_are_told_the_noise_that_they_see_and_have_iterations_of_their_own(monkeypatch):
    (_, known), told = measured("denoise", 1, 0.2), []
    monkeypatch.setattr(dipddpm, "Denoisers", lambda *_, level: told.append(level))
    monkeypatch.setattr(dipddpm, "fit_guided", lambda cfg, *given, make: (
        told.append((cfg.dip_iters, cfg.window)), make(), (known.y, None))[-1])
    for mode, iters in ("dip", 700), ("guide", 700), ("guide", 70):
        cfg = fit_config(mode=mode, alpha=0.5, dip_iters=iters)
        dipddpm.fit_denoisers(cfg, known, torch.arange(1))
    level = pytest.approx(0.2 * 1.25**0.5)
    assert told == [(700, 0.97), level, (500, 0.97), level, (70, 0.97), level]


@pytest.mark.parametrize("levels, cut, pictures, evened", [
    ((0.1, 0.1, 0.15), 0, "own", True), ((0.1, 0.1, 0.12), 0, "own", False),
    ((0.1, 0.1, 0.01), 0, "own", True), ((0.1, 0.1, 0.0), 0, "own", False),
    ((0.1, 0.1, 0.15), 7, "own", True), ((0.1, 0.1, 0.15), 9, "own", False),
    ((0.1, 0.1, 0.15), 0, "test", False)])
def test_denoisers_are_given_channels_of_one_noise_and_give_the_picture_back(levels, cut, pictures,
                                                                            evened, monkeypatch):
    given, seen = [], []

    def fit(cfg, known, numbers, track, look, make):
        given.append(known.y)
        look(10, known.y)
        return known.y, torch.tensor([10])

    monkeypatch.setattr(dipddpm, "fit_guided", fit)
    noise = kernels.normal((1, 3, 80, 80), 3, torch.arange(1), 0, 0).double()
    y = 0.5 + torch.tensor(levels).view(3, 1, 1) * noise
    y[:, 1, :cut] = 1.0
    known, cfg = dipddpm.exact(y)._replace(sigma=0.2), fit_config(mode="dip", pictures=pictures)
    made, _ = dipddpm.fit_denoisers(cfg, known, torch.arange(1), look=lambda i, x: seen.append(x))
    for x in made, *seen:
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
    assert torch.equal(given[0], y) != evened
    now, whole = dipddpm.noise_level(given[0])[0], dipddpm.noise_level(y).square().mean().sqrt()
    assert (now - whole).abs().max() < 1e-6 or not evened


def test_denoisers_denoise_and_do_not_depend_on_who_shares_their_group():
    x = torch.linspace(0, 40, 64, dtype=torch.float64)  # in which rounding stays small
    x = 0.5 + 0.3 * torch.sin(x) * torch.cos(x[:, None] / 2) * torch.ones(2, 1, 1, 1)
    known = dipddpm.corrupt(fit_config(), "denoise", x, 0.2, torch.arange(2))
    cfg = fit_config(64, replicas=2, dip_iters=60)
    made, took = dipddpm.fit_denoisers(cfg, known, torch.arange(2))
    gain = measures.psnr(made.clamp(0, 1), x) - measures.psnr(known.y.clamp(0, 1), x)
    assert (gain > 6).all() and took.tolist() == [60, 60]
    alone, _ = dipddpm.fit_denoisers(cfg, known.part([1]), torch.arange(1, 2))
    torch.testing.assert_close(alone, made[1:], atol=1e-6, rtol=0)
    known = known.part([0])._replace(y=known.y[:1].float())
    short, long = (dipddpm.fit_denoisers(dataclasses.replace(cfg, precision=precision), known,
                                         torch.arange(1))[0] for precision in ("bf16", "fp32"))
    assert 1e-4 < (short - long).abs().max() < 0.05  # another arithmetic, the same picture
    assert short.dtype == torch.float32


def test_large_pictures_are_learned_by_patches_and_denoised_as_a_whole(monkeypatch):
    monkeypatch.setattr(dipddpm, "PATCH", 32)
    x, y = torch.linspace(0, 40, 70), torch.linspace(0, 30, 61)[:, None]
    truth = 0.5 + 0.3 * torch.sin(x) * torch.cos(y) * torch.ones(1, 3, 1, 1)
    cfg, seen = fit_config(70, mode="dip", replicas=2, dip_iters=90), []
    known = dipddpm.corrupt(cfg, "denoise", truth, 0.2, torch.arange(1))

    def fit(track=lambda steps, *_: steps):
        made, took = dipddpm.fit_denoisers(cfg, known, torch.arange(1), track,
                                           lambda *at: seen.append(at))
        return made, took.tolist(), (made - truth).square().mean().sqrt().item()

    made, took, error = fit()
    assert made.shape == truth.shape and took == [90] and error < 0.1  # of 0.2
    assert [i for i, _ in seen] == [90] and torch.equal(seen[0][1], made)
    assert torch.equal(fit()[0], made)
    once = fit(lambda steps, label, _: steps if label == "fit" else steps[:1])
    assert error < 0.95 * once[2]  # the mean of many draws is better than one
    short = fit(lambda steps, *_: steps[:20])  # stopped: what they make of it by then
    assert short[1] == [20] and 0.05 < short[2] < 0.25


@pytest.mark.parametrize("H, W, size", [(61, 70, (32, 32)), (8, 300, (8, 128)),
                                        (3000, 8, (128, 8)), (20, 200, (20, 51))])
def test_patches_lie_anywhere_and_are_not_small_in_long_pictures(H, W, size, monkeypatch):
    monkeypatch.setattr(dipddpm, "PATCH", 32)
    place = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"))[None]
    known, seen = dipddpm.exact(place.float()), []

    def iterate(group, y, share, A):
        seen.append(y.clone())
        group.losses = torch.zeros(1)

    monkeypatch.setattr(dipddpm.Denoisers, "iterate", iterate)
    cfg = fit_config(70, mode="dip", replicas=2, dip_iters=200)
    made, _ = dipddpm.fit_by_patches(cfg, known._replace(sigma=0.3), torch.arange(1))
    added = made - known.y  # no network has learned: the mean of two networks' noise, 16 times
    assert added.std().item() == pytest.approx(dipddpm.INNER * 0.3 / 32**0.5, rel=0.05)
    assert {y.shape[2:] for y in seen} == {size}
    for y in seen[:3]:
        assert torch.equal(y[0], y[1])
        assert torch.equal(y[0] - y[0, :, :1, :1], known.y[0, :, :size[0], :size[1]])
    corners = torch.stack([y[0, :, 0, 0] for y in seen])
    room = torch.tensor([H - size[0], W - size[1]])
    assert (corners.amax(0) >= 0.95 * room).all() and (corners.amin(0) <= 0.05 * room).all()


def test_more_than_two_patches_have_twice_the_iterations():
    cfg = config(mode="dip", sigma=0.1)
    for H, W, iters in (65, 65, 500), (256, 512, 500), (257, 512, 1000), (9000, 4000, 1000):
        assert dipddpm.resolve(cfg, (1, 3, H, W)).dip_iters == iters


def test_what_denoisers_make_of_a_whole_does_not_depend_on_its_patches(monkeypatch):
    x = random_images(2, 3, 50, 20)
    group = dipddpm.Denoisers(fit_config(), torch.arange(4), 3, 16, 16, x.dtype, 0.0)
    torch.nn.init.normal_(group.net.layers[-1].weight)
    whole, each = group.whole(x, 1), x.repeat_interleave(2, 0)
    want = (each - group.outputs(each)).detach().unflatten(0, (2, 2)).mean(1)
    torch.testing.assert_close(whole, want)
    for side in 16, 15, 49:
        monkeypatch.setattr(dipddpm, "PATCH", side)
        torch.testing.assert_close(group.whole(x, 1), want, rtol=1e-5, atol=1e-5)
    group.level = 0.1
    noisy = [group.whole(x, draw) for draw in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])


def test_a_replica_that_forgets_everything_costs_only_what_was_still_to_come():
    (truth, known), calls = measured("denoise", 2, 0.1, size=28), itertools.count(1)
    cfg = fit_config(28, dip_width=8, replicas=2, dip_iters=120)

    def forget(net, _):  # one replica of the second image, at the 81st step
        if isinstance(net, dipddpm.Skip) and next(calls) == 81:
            for p in net.parameters():
                p.data.view(4, -1)[2] = 0

    def psnr(cfg):
        return measures.psnr(dipddpm.fit_guided(cfg, known, torch.arange(2))[0], truth).tolist()

    until_then, whole = psnr(dataclasses.replace(cfg, dip_iters=80)), psnr(cfg)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(forget)
    made = psnr(cfg)
    hook.remove()
    assert made[0] == pytest.approx(whole[0], abs=0.5) and made[1] != whole[1]
    assert made[1] == pytest.approx(until_then[1], abs=1e-6) and until_then[1] < whole[1]


def test_observing_takes_the_middle_and_adds_the_noise_asked_for(tmp_path):
    pixels = data.load("digits", split="test", limit=3).pixels
    middle = pixels[:, :, 4:24, 4:24].float() / 255
    cfg = config(mode="dip", crop=20, samples=3, sigma=0.2, out=str(tmp_path / "r"))
    _, (truth, known, *_) = dipddpm.observe(dipddpm.resolve(cfg), dipddpm.Run(cfg, []))
    assert torch.equal(truth, middle) and known.sigma == 0.2
    assert (known.y - middle).std() == pytest.approx(0.2, rel=0.1)


def test_noise_level_is_found_in_flat_images():
    x = data.load("digits", limit=20).pixels.float() / 255
    noise = 0.2 * kernels.normal((20, 3, 64, 64), 3, torch.arange(20), 0, 0)
    assert dipddpm.noise_level(x + noise[:, :1, :28, :28]).mean() == pytest.approx(0.2, rel=0.1)
    each = torch.tensor([0.5, 1, 2]).view(3, 1, 1)
    levels = dipddpm.noise_level(0.5 + noise * each).mean(0)
    torch.testing.assert_close(levels, 0.2 * each.flatten(), rtol=0.02, atol=0)
    for H, W in ((63, 58), (58, 63)):  # an odd last row or column is left out
        odd, even = noise[..., :H, :W], noise[..., :H // 2 * 2, :W // 2 * 2]
        assert torch.equal(dipddpm.noise_level(odd), dipddpm.noise_level(even))


def test_noise_of_neighbours_is_alike_or_not_whatever_the_picture():
    x = 0.5 + 0.1 * torch.sin(torch.arange(72) / 12)[:, None] * torch.ones(4, 3, 72, 80)
    x[..., 40:] = random_images(4, 3, 72, 40)  # a part with the noise's own texture
    noise = kernels.normal((4, 3, 73, 81), 3, torch.arange(4), 0, 0)
    box = F.avg_pool2d(noise, 2, 1)  # neighbours share half
    for level in 0.05, 0.2:
        assert dipddpm.noise_correlation(x + level * noise[..., 1:, 1:]).abs().max() < 0.06
        alike = dipddpm.noise_correlation(x + level * box)
        assert ((0.3 < alike) & (alike < 0.5)).all()
    across = dipddpm.noise_correlation(x + 0.1 * (noise[..., 1:, 1:] + noise[..., 1:, :-1]))
    assert across.mean() == pytest.approx(0.2, abs=0.05)  # below 0.5 one way, 0 the other
    assert (dipddpm.noise_correlation(torch.zeros(2, 1, 9, 8)) == 0).all()
    dark = (x + 0.1 * box).clamp(0.01)
    dark[:, :, :40] = 0  # where no noise is seen
    alike = dipddpm.noise_correlation(dark)
    assert ((0.3 < alike) & (alike < 0.65)).all()


@pytest.mark.parametrize("shared, cut, sigma, said", [
    (0.0, 0.0, None, ""), (1.0, 0.0, None, "similar noise (correlation 0.39)"),
    (0.0, 0.3, None, "30% of the values are black"), (0.0, 0.3, 0.1, "")])
def test_a_photos_noise_is_doubted_before_it_is_fitted(shared, cut, sigma, said, tmp_path, capsys):
    noise = torch.randn(1, 3, 81, 81, generator=torch.Generator().manual_seed(0))
    noise = F.avg_pool2d(noise, 2, 1) * 2 if shared else noise[..., 1:, 1:]
    x = 0.5 + 0.1 * noise
    x[..., :round(cut * 80), :] = 0
    measures.save_png(measures.grid(x.clamp(0, 1), pad=0), tmp_path / "photo.png")
    more = {} if sigma is None else {"sigma": sigma}
    run("dip", tmp_path / "r", data=tmp_path / "photo.png", dip_iters=1, **more)
    out = capsys.readouterr().out
    doubts = [line for line in out.splitlines() if "similar noise" in line or "black or" in line]
    assert len(doubts) == bool(said) and all(said in line for line in doubts)
    assert not doubts or out.index(doubts[0]) < out.index("data: ")


# ------------------------------------------------------------------ whole runs


ARMS = {"ddpm", "dip-codes", "dip-bridge", "gauss", "pca"}
TINY = dict(data="digits", limit=128, epochs=2, width=8, batch=32, timesteps=40, samples=8,
            dip_iters=3, dip_width=4, nfe="2,4", eta="0,1")
FIT = dict(data="digits", samples=1, dip_iters=60, dip_width=4, replicas=2)


def words(**flags):
    """words(dip_iters=3) -> ["--dip-iters", "3"]"""
    return [word for name, value in flags.items()
            for word in ("--" + name.replace("_", "-"), str(value))]


def run(mode, out, **flags):
    """A run from its command line to its results.json, which has what every mode promises."""
    dipddpm.main(words(mode=mode, out=out, **flags))
    result = json.loads((out / "results.json").read_text())
    assert set(result) >= {"mode", "config", "command", "data", "device", "precision", "torch",
                           "commit", "seconds", "arms", "curves"}
    assert set(result["data"]) == {"name", "train", "test", "sha256"}
    # config.json says what ran: null is only what was not used
    assert result["config"] == json.loads((out / "config.json").read_text())
    assert mode not in ("dip", "guide") or result["config"]["precision"] == result["precision"]
    unused = UNUSED | (set() if mode in ("dip", "guide") else FITS_OWN)
    assert {name for name, value in result["config"].items() if value is None} <= unused
    # seconds add up, every file is whole
    parts, whole = result["seconds"], result["seconds"]["total"] + 0.01
    assert set(parts) == {"dip", "train", "sample", "eval", "total"}
    assert all(0 <= part <= whole for part in parts.values())
    assert all(0 <= row.get("prior_seconds", 0) <= row.get("seconds", whole) <= whole
               for row in result["arms"])
    files = ["report.html", *(picture["file"] for picture in result["pictures"])]
    assert all((out / file).stat().st_size for file in files) and not list(out.glob("*.tmp"))
    return result


def refused(capsys, status=2, **flags):
    """The one line in which a command is refused."""
    ended, _, err = run_main(words(**flags), capsys)
    assert ended == status and err.count("\n") == 1, err
    return err


def contents(folder):
    return {file: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """--mode prior to its end, once, on few and small things: its folder and results."""
    folder = tmp_path_factory.mktemp("a run") / "prüfung"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIPDDPM_DATA", str(folder.parent))
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        yield folder, run("prior", folder, **TINY)


def test_a_prior_run_leaves_results_of_every_arm(whole_run):
    folder, result = whole_run
    rows = {(row["name"], row["nfe"], row["eta"]): row for row in result["arms"]}
    assert set(rows) == {(arm, nfe, eta) for arm in ARMS for nfe in (2, 4) for eta in (0, 1)}
    for (arm, *_), row in rows.items():
        assert math.isfinite(row["fid_lenet"]) and row["nearest"] > row["nearest_5"] >= 0
        assert row["t_start"] == (40 if arm == "ddpm" else 24)
        assert arm != "ddpm" or row["prior_seconds"] == 0
    assert result["parameters"] > 0 and result["floor"]["fid_lenet"] > 0 and result["real"]
    assert {"log.csv", "checkpoint.pt", "dip-bridge.pt", "priors.png", "samples-nfe4.png"} <= {
        path.name for path in folder.iterdir()}
    # what can be made again lies in the cache, and the folder of data is left alone
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "cache"}
    assert any((folder.parent / "cache" / "dipddpm").glob("features-digits-*"))


def test_a_runs_network_serves_another_run_and_its_own_stays_as_it_is(whole_run, tmp_path):
    folder, result = whole_run
    before, weights = contents(folder), dipddpm.load_checkpoint(folder)["ema"]
    again = run("ddpm", tmp_path / "again", resume=folder)
    assert before == contents(folder)
    kept = dipddpm.load_checkpoint(tmp_path / "again")["ema"]
    assert all(torch.equal(w, kept[k]) for k, w in weights.items())
    rows = [[{key: row[key] for key in row if "seconds" not in key} for row in r["arms"]]
            for r in (result, again)]  # the same pictures, and so the same measures
    assert rows[1] == [row for row in rows[0] if row["name"] == "ddpm"]


def test_the_newest_run_is_sampled_without_data_whatever_the_batch(whole_run, tmp_path,
                                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIPDDPM_DATA", str(tmp_path / "nothing"))
    shutil.copytree(whole_run[0], "runs/new")
    shutil.copytree(whole_run[0], "runs/old")
    Path("runs/old/checkpoint.pt").write_bytes(b"not this one")
    os.utime("runs/old/checkpoint.pt", (1, 1))
    sheets = []
    for batch in 250, 2:
        monkeypatch.setattr(dipddpm, "at_once", lambda x, batch=batch: batch)
        run("sample", tmp_path / str(batch), samples=5, nfe=3, eta=0)
        sheets.append(Image.open(tmp_path / str(batch) / "samples-nfe3.png"))
    # they are of the run's averaged network and of its noise
    net = dipddpm.make_unet(config(width=8), 1, "cpu")
    net.load_state_dict(dipddpm.load_checkpoint("runs/new")["ema"])
    cfg, numbers = config(timesteps=40), torch.arange(5)
    x = dipddpm.noise_start(cfg, (5, 1, 28, 28), numbers)
    x = (dipddpm.sample(cfg, net, x, 40, 3, 0, numbers) + 1) / 2
    want = np.asarray(measures.grid(x.clamp(0, 1), scale=measures.zoom(x)), float)
    assert all(np.abs(np.asarray(sheet, float) - want).max() <= 1 for sheet in sheets)


@pytest.mark.parametrize("task, sigma, size, arms", [
    ("denoise", 0.3, 28, ["corrupted", "plain", "oracle", "split"]),
    ("denoise", 0.3, 65, ["corrupted", "plain", "oracle", "split", "denoiser"]),
    ("inpaint", 0, 65, ["corrupted", "plain", "oracle", "split"])])
def test_guide_compares_its_arms(task, sigma, size, arms, tmp_path):
    result = run("guide", tmp_path / "g", task=task, sigma=sigma, size=size, **FIT)
    rows = {row["name"]: row for row in result["arms"]}
    assert list(rows) == arms
    assert (result["data"]["train"], result["data"]["test"]) == (0, 1)
    bound = rows["plain"]["psnr_oracle"]
    assert rows["oracle"]["psnr"] == pytest.approx(bound, abs=2e-3)
    assert rows["plain"]["iterations"] == 60 >= rows["oracle"]["iterations"]
    for name, row in list(rows.items())[1:2] + list(rows.items())[3:]:
        networks = 1 if name == "plain" else 2
        assert row["network_steps"] == networks * row["iterations"]
        assert row["gap"] == pytest.approx(bound - row["psnr"], abs=2e-3)
        # of one image the best look can be read off the curve
        best = max(psnr for _, psnr in result["curves"][f"psnr/{name}"])
        assert row["own_gap"] == pytest.approx(max(0, best - row["psnr"]), abs=2e-3)


@pytest.mark.parametrize("task, sigma, H, W, learns", [
    ("denoise", 0.1, 65, 65, True), ("denoise", 0.1, 64, 64, False),
    ("denoise", 0.0, 65, 65, False), ("sr", 0.1, 65, 65, False),
    ("denoise", 0.1, 7, 900, False), ("denoise", 0.1, 900, 8, True)])
def test_who_learns_from_a_picture_and_who_is_a_dip(task, sigma, H, W, learns):
    known = dipddpm.Measurement(task, None, torch.ones(1, 1, H, W), sigma)
    fits = [dipddpm.fits_of(config(mode=mode, task=task), known) for mode in ("dip", "guide")]
    assert fits[0] == {"dip": dipddpm.fit_denoisers if learns else dipddpm.fit_guided}
    assert ("denoiser" in fits[1]) == learns


def test_grey_that_is_kept_as_colour_is_one_channel(tmp_path, capsys):
    x = (128 + 20 * torch.randn(1, 1, 70, 70)).clamp(1, 254).round() / 255
    measures.save_png(measures.grid(x.expand(1, 3, -1, -1), pad=0), tmp_path / "grey.png")
    Image.open(tmp_path / "grey.png").convert("RGB").save(tmp_path / "grey.png")
    run("dip", tmp_path / "r", data=tmp_path / "grey.png", dip_iters=1)
    assert "1 own image of 1x70x70" in capsys.readouterr().out


@pytest.fixture
def noisy(tmp_path):
    """A folder with twelve colour pictures, 48 x 40, alike but for their noise of 0.1."""
    x = torch.linspace(0.2, 0.8, 40)[:, None] * torch.ones(12, 3, 40, 48)
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    (tmp_path / "noisy").mkdir()
    for k, image in enumerate(x):
        measures.save_png(measures.grid(image[None]), tmp_path / "noisy" / f"{k:02}.png")
    mask = np.full((40, 48), 255, np.uint8)
    mask[10:20, 16:32], mask[30, 30] = 0, 128
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "noisy"


def own_row(out, capsys, **flags):
    """A run on one's own pictures, in which nothing is compared: its row, its pictures."""
    result = run("dip", out, **FIT | dict(dip_width=8, samples=99, dip_iters=30) | flags)
    said, (_, row) = capsys.readouterr().out, result["arms"]
    assert " own image" in said and "psnr" not in said + " ".join(row) and not result["curves"]
    assert ("(estimated)" in said) == ("sigma_estimate" in row)
    files = sorted(out.glob("restored-*.png"))
    assert all(f"restored: {file}" in said for file in files)
    return row, [np.asarray(Image.open(file)) for file in files]


def test_own_pictures_are_denoised_as_they_came_by_a_given_or_estimated_level(noisy, tmp_path,
                                                                              capsys):
    row, (x,) = own_row(tmp_path / "1", capsys, data=noisy / "00.png", crop=32, dip_iters=110)
    assert row["sigma_estimate"] == pytest.approx(0.1, rel=0.15) and x.shape == (32, 32, 3)
    assert (x - np.linspace(0.2, 0.8, 40)[4:36, None, None] * 255).std() < 0.08 * 255
    row, (same,) = own_row(tmp_path / "2", capsys, data=noisy / "00.png", sigma=0.3)
    assert row["sigma"] == 0.3
    # of a folder, too, where it is said whose the pictures are; and one may be a test picture
    row, every = own_row(tmp_path / "3", capsys, data=noisy, pictures="own")
    assert row["sigma_estimate"] == pytest.approx(0.1, rel=0.15) and len(every) == 12
    for k, what in enumerate((dict(data=noisy), dict(data=noisy / "00.png", pictures="test"))):
        corrupted, dip = run("dip", tmp_path / f"test{k}", **FIT | what | dict(sigma=0.2))["arms"]
        assert corrupted["psnr"] == pytest.approx(-20 * math.log10(0.2), abs=1)
        assert -1e-3 <= dip["psnr_oracle"] - dip["psnr"] < 5 and dip["iterations"] <= 60


def test_own_holes_are_filled_and_what_is_given_is_kept(noisy, tmp_path, capsys):
    mask = np.asarray(Image.open(tmp_path / "mask.png")) == 255
    before = np.asarray(Image.open(noisy / "00.png"))
    flags = dict(data=noisy / "00.png", task="inpaint", mask=tmp_path / "mask.png")
    row, (x,) = own_row(tmp_path / "1", capsys, **flags)
    assert row["sigma"] == 0 and (x[mask] == before[mask]).all()
    assert (x[~mask] != before[~mask]).mean() > 0.9
    # with noise nothing is kept; and a mask is made smaller as its picture is
    _, (noised,) = own_row(tmp_path / "2", capsys, sigma=0.1, **flags)
    assert (noised[mask] != before[mask]).mean() > 0.5
    assert own_row(tmp_path / "3", capsys, size=20, **flags)[1][0].shape == (20, 24, 3)
    # what lies in holes is no part of the fit
    Image.fromarray(np.where(mask[..., None], before, 255 - before)).save(noisy / "00.png")
    np.testing.assert_array_equal(own_row(tmp_path / "4", capsys, **flags)[1][0], x)


@pytest.mark.parametrize("task, factor", dipddpm.FACTORS.items())
def test_a_small_picture_is_enlarged(task, factor, noisy, tmp_path, capsys):
    row, (x,) = own_row(tmp_path / "r", capsys, data=noisy / "00.png", task=task, crop=16,
                        dip_iters=200)
    assert row["sigma"] == 0 and x.shape == (16 * factor, 16 * factor, 3)
    small = torch.tensor(np.asarray(Image.open(noisy / "00.png")))[12:28, 16:32].permute(2, 0, 1)
    means = F.avg_pool2d(torch.tensor(x).permute(2, 0, 1).float(), factor)
    assert (means - small).abs().mean() < 0.12 * 255


@pytest.mark.parametrize("mode", ["dip", "guide"])
def test_an_interrupted_fit_keeps_what_it_has(mode, tmp_path, monkeypatch, capsys):
    track = dipddpm.Run.track

    def stopped(run, steps, *about, keeps):
        for step in track(run, steps, *about, keeps):
            run.stop = signal.SIGTERM if step == 25 else 0
            yield step

    def one_by_one(cfg, shape=None, resolve=dipddpm.resolve):
        return dataclasses.replace(resolve(cfg, shape), dip_group=1)

    monkeypatch.setattr(dipddpm.Run, "track", stopped)
    monkeypatch.setattr(dipddpm, "resolve", one_by_one)
    flags = FIT | dict(samples=3, sigma=0.3)
    status, out, err = run_main(words(mode=mode, out=tmp_path / "r", **flags), capsys)
    assert status == 143 and "interrupted after 25 of at most 60 iterations" in err
    assert "report: " in out and err.count("\n") == 1
    _, fitted, *oracle = results_of(tmp_path / "r")
    assert fitted["name"] == ("dip" if mode == "dip" else "plain") and len(oracle) < 2
    assert round(3 * fitted["iterations"]) == 25 and (tmp_path / "r" / f"{mode}.png").exists()
    if mode == "dip":  # of the first image the mean over two looks, and the others as they were
        monkeypatch.undo()
        run("dip", tmp_path / "s", **flags | dict(samples=1, dip_iters=20))
        pictures = [np.asarray(Image.open(tmp_path / file), int) for file in
                    ("r/restored-00.png", "s/restored-00.png", "r/restored-01.png", "r/dip.png")]
        assert abs(pictures[0] - pictures[1]).max() <= 1
        shown = pictures[3][60:116:2, 60:116:2]  # the second row: what was given
        assert abs(pictures[2] - shown).max() <= 1
    for flags in dict(resume=tmp_path / "r"), dict(resume=tmp_path / "r", mode=mode, out="x"):
        assert "cannot be continued" in refused(capsys, **flags)


def test_minutes_end_a_fit_and_its_length_is_foretold(tmp_path, monkeypatch, capsys):
    clock = itertools.count(0, 5)  # seconds, five for each look at the clock
    run_of_it = bare_run(tmp_path / "r", mode="dip", minutes=2.0)
    monkeypatch.setattr(dipddpm.time, "time", lambda: next(clock))
    taken = list(run_of_it.track(range(1, 1000), "fit", 1, keeps=True))
    assert 5 < len(taken) < 25 and run_of_it.early == "2 minutes are spent" and not run_of_it.stop
    said = capsys.readouterr().out
    assert "a fit takes at most 2 minutes, " in said and "--minutes, --dip-iters" in said


def test_a_photo_on_a_cpu_ends_in_minutes_unless_its_iterations_are_said(monkeypatch):
    def resolved(size, **said):
        cfg = dipddpm.resolve(config(mode="dip", **said), (3, 3, size, size))
        return cfg.minutes, cfg.dip_iters, cfg.dip_width, cfg.dip_group, cfg.replicas

    assert resolved(64) == (None, 1000, 16, 64, 4) and resolved(65) == (None, 500, 16, 1, 2)
    assert resolved(65, task="sr") == (10, 3000, 16, 1, 4)
    assert resolved(65, task="sr", dip_iters=70)[:2] == (None, 70)
    assert resolved(65, task="sr", minutes=3.0)[0] == 3
    monkeypatch.setattr(dipddpm, "pick_device", lambda name: torch.device("cuda"))
    assert resolved(65, task="sr") == (None, 3000, 128, 1, 4)


# ---- misuse and damage ---------------------------------------------------------------------------


@pytest.mark.parametrize("says, flags", [
    ("--width was 8 and cannot become 16", dict(resume="RUN", width=16)),
    ("--data was digits and cannot become mnist", dict(resume="RUN", data="mnist")),
    ("--timesteps was 40 and cannot become 50", dict(resume="RUN", mode="sample", timesteps=50)),
    ("the data was", dict(resume="RUN")),
    ("RUN exists and is not empty", dict(mode="ddpm", out="RUN")),
    ("runs in one process", dict(mode="guide", processes=2)),
])
def test_what_cannot_go_on_is_one_line_and_touches_nothing(says, flags, whole_run, tmp_path, capsys,
                                                           monkeypatch):
    folder, _ = whole_run
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DIGITS", {"train": 1000, "test": 999})
    monkeypatch.setenv("WORLD_SIZE", str(flags.get("processes", 1)))
    flags = {k: folder if v == "RUN" else v for k, v in flags.items() if k != "processes"}
    before = contents(folder)
    assert says.replace("RUN", str(folder)) in refused(capsys, **flags)
    assert before == contents(folder) and not contents(tmp_path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_damaged_checkpoint_is_one_line(whole_run, tmp_path, capsys):
    saved, good = dipddpm.load_checkpoint(whole_run[0]), tmp_path / "checkpoint.pt"
    wide = dipddpm.make_unet(config(width=16), 1, "cpu").state_dict()
    shutil.copy(whole_run[0] / "config.json", tmp_path)
    torch.save(saved, good)
    whole = good.read_bytes()
    for content in (b"", b"not a checkpoint", whole[:5000], whole[:-100], [saved],
                    saved | {"format": 1}, {"format": saved["format"]}, saved | {"ema": wide},
                    saved | {"ema": Malicious(tmp_path / "ran")}):
        if isinstance(content, bytes):
            good.write_bytes(content)
        else:
            torch.save(content, good)
        err = refused(capsys, mode="sample", resume=tmp_path, out=tmp_path / "s")
        assert "checkpoint.pt: not a" in err or "its network has another architecture" in err
        assert not (tmp_path / "s").exists() and not (tmp_path / "ran").exists()
    assert "checkpoint.pt: not a" in refused(capsys, resume=tmp_path)
    torch.load(good, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("damage", [
    "", "{", "[]", '{"mode": "dip"', {"dip_source": ["network"]}, {"sweep": ["seed=1,2"]},
    {"mode": None}, {"epochs": "2"}, {"epochs": None}, {"epochs": 2.5}, {"nfe": 3}, {"nfe": ["3"]},
    {"lr": "fast"}, {"data": 3}, {"seed": -1}])
def test_a_damaged_config_is_one_line(damage, whole_run, tmp_path, capsys):
    if isinstance(damage, dict):
        damage = json.dumps(whole_run[1]["config"] | damage)
    (tmp_path / "config.json").write_text(damage)
    assert "config.json is damaged or of another version" in refused(capsys, resume=tmp_path)


def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(tmp_path, capsys):
    import resource
    flags, good = little_training(tmp_path)[0] | dict(epochs=1), tmp_path / "checkpoint.pt"
    dipddpm.save({"step": 1}, good)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        refused(capsys, status=1, out=tmp_path / "r", **flags)
        with pytest.raises((OSError, RuntimeError)):
            dipddpm.save({"step": 2, "net": torch.zeros(100_000)}, good)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert torch.load(good) == {"step": 1} and not list(tmp_path.glob("*.tmp"))
    assert [file.name for file in (tmp_path / "r").iterdir()] == ["config.json"]
    assert run_main(words(resume=tmp_path / "r"), capsys)[0] == 0


# ---- ends and new beginnings ---------------------------------------------------------------------


def little_training(tmp_path):
    """600 quick steps on pictures that are quickly there: flags, and where to run them."""
    (tmp_path / "data").mkdir()
    for i in range(70):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 12)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i:02}.png")
    flags = dict(mode="prior", data=tmp_path / "data", epochs=150, width=8, batch=15, timesteps=40,
                 samples=4, nfe=2, dip_iters=3, dip_width=4)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path),
                                "CUDA_VISIBLE_DEVICES": ""}  # two processes would want two
    return flags, dict(cwd=HERE, env=environment, text=True, stdout=subprocess.PIPE,
                       stderr=subprocess.PIPE)


def one_process(**flags):
    return [sys.executable, "dipddpm.py", *words(**flags)]


def two_processes(**flags):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "dipddpm.py", *words(**flags)]


def ended_well(command, here):
    done = subprocess.run(command, **here)
    assert done.returncode == 0, done.stderr
    return done.stdout


def begun(command, folder, here):
    """A command's process, once it trains in this folder."""
    config, process = folder / "config.json", subprocess.Popen(command, **here)
    before = config.exists() and config.stat().st_mtime_ns
    while not config.exists() or config.stat().st_mtime_ns == before:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    time.sleep(0.5)
    return process


def results_of(folder):
    return json.loads((folder / "results.json").read_text())["arms"]


def log_of(folder):
    """log.csv without its heading and seconds."""
    rows = [row.split(",") for row in (folder / "log.csv").read_text().splitlines()[1:]]
    return [row[:3] + row[4:] for row in rows]


def losses_of(folder):
    return [float(row[3]) for row in log_of(folder)]


@pytest.fixture(scope="module")
def little_run(tmp_path_factory):
    """A little training that nothing stopped: its flags, where it ran, its folder."""
    flags, here = little_training(tmp_path_factory.mktemp("little"))
    folder = flags["data"].parent / "whole"
    ended_well(one_process(out=folder, **flags), here)
    return flags, here, folder


STOPPED = """
import os, random, signal, sys, time
import dipddpm

folder, *words = sys.argv[1:]
dipddpm.CHECKPOINT_SECONDS, chance, ends = 0, random.Random(5), []
sys.stdout, said = open(os.devnull, "w"), sys.stdout
for number in [signal.SIGKILL, signal.SIGINT, signal.SIGTERM] * 4 + [0]:
    goes_on = os.path.exists(os.path.join(folder, "config.json"))
    pid = os.fork()
    if pid == 0:
        dipddpm.main(["--resume", folder] if goes_on else [*words, "--out", folder])
        os._exit(0)
    if number:
        time.sleep(chance.uniform(0.1, 1.0))
        os.kill(pid, number)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(*ends, file=said)
"""


def test_a_training_stopped_again_and_again_ends_in_the_same_bits(little_run, tmp_path):
    flags, here, whole = little_run
    folder = tmp_path / "r"
    done = subprocess.run([sys.executable, "-c", STOPPED, folder, *words(**flags)], **here)
    *ends, last = map(int, done.stdout.split())
    assert last == 0 and {-signal.SIGKILL, 130, 143} <= set(ends), (ends, done.stderr)
    assert f"dipddpm: interrupted; continue with --resume {folder}\n" in done.stderr
    assert log_of(whole) == log_of(folder) and len(log_of(whole)) == 24
    assert (whole / "samples-nfe2.png").read_bytes() == (folder / "samples-nfe2.png").read_bytes()
    for network in "ddpm", "dip-bridge":
        weights = dipddpm.load_checkpoint(folder, network)["ema"]
        for name, weight in dipddpm.load_checkpoint(whole, network)["ema"].items():
            assert torch.equal(weight, weights[name])


def test_one_process_or_two_stop_or_die_and_others_go_on(little_run, tmp_path):
    flags, here, whole = little_run
    first, second, third = (tmp_path / name for name in "123")
    # one is stopped between two rows of its log
    process = begun(one_process(out=first, **flags), first, here)
    process.send_signal(signal.SIGINT)
    assert process.communicate() and process.returncode == 130
    # two go on and stop together
    process = begun(two_processes(resume=first, out=second), second, here)
    process.send_signal(signal.SIGTERM)
    assert process.communicate() and process.returncode != 0
    steps = [dipddpm.load_checkpoint(folder)["step"] for folder in (first, second)]
    assert 0 < steps[0] < steps[1] < 600 and steps[1] % 50 == 0
    # of two that go on one dies: the other ends, and says so
    process = begun(two_processes(resume=second, out=third), third, here)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = process.communicate()
    said = [line for line in err.splitlines() if line.startswith("dipddpm: ")]  # among torchrun's
    assert said == [f"dipddpm: another process ended; continue with --resume {third}"]
    assert process.returncode and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    # two or one go on to the end, and one process speaks
    for folder, command in (second, two_processes), (third, one_process):
        said = ended_well(command(resume=folder), here)
        assert said.count("data: ") == said.count("report: ") == 1
        assert losses_of(folder) == pytest.approx(losses_of(whole), rel=0.02)
        assert {row["name"] for row in results_of(folder)} == ARMS


# ---- golden numbers ------------------------------------------------------------------------------
#
# `python test_dipddpm.py` prints this table anew. A number that changes without a reason that you
# can name is a fault.

GOLDEN = {
    "losses of 8 training steps": (0.243, 0.2428, 0.2158, 0.2323, 0.2428, 0.2582, 0.2374, 0.2461),
    "eps: DDIM, 2M, DDPM": (0.8233, 0.834, 0.8412),
    "v: DDIM, 2M, DDPM": (0.6674, 0.6827, 0.739),
    "x0: DDIM, 2M, DDPM": (0.5651, 0.5799, 0.6127),
    "a DIP after 20 iterations": 0.1261,
    "one by Muon": 0.1113,
    "codes: decoded, noise, new": (0.1627, 0.505, 0.4003),
    "noise level": (0.1863, 0.1977),
    "y+, y-": (0.6972, 0.9161),
    "risk of a flat output": (0.1537, 0.09205),
    "split, and iterations": (0.09638, 30, 100),
    "denoiser, and iterations": (0.1164, 30, 50),
    "t_start": (600, 600, 600, 600),
    "samples": (1000, 16, 16, 64),
    "dip_width": (16, 16, 16, 16),
    "dip_iters": (60, 1000, 3000, 60),
    "sigma": (0.1, 0.1),
    "replicas": (4, 4, 4, 4),
    "bridge_start": (600, 600, 600, 600),
    "dip_lr": (0.01, 0.05, 0.01, 0.01),
    "muon": (False, False, True, False),
    "dip_group": (64, 64, 1, 64),
    "patience": (50, 50, 100, 50),
}
RUNS = (("prior", 28), ("dip", 28), ("guide", 100), ("sample", 28))  # modes and sizes of images


def rms(x):
    return x.double().square().mean().sqrt().item()


def golden():
    """What the method gives for little images, waves and noise: {what: number or numbers}."""
    cfg = config(width=8, batch=20, epochs=4, timesteps=40, dip_width=4, dip_lr=0.05, patience=10,
                 dip_iters=150, replicas=2, code_epochs=20)
    i, y, x = torch.meshgrid(torch.arange(40), torch.arange(12), torch.arange(12), indexing="ij")
    noise = kernels.uniform((40, 12, 12), 0, 0, 0, kernels.INIT_NOISE)
    wave = 0.5 + 0.5 * torch.sin((x * (1 + i % 4) + y * (1 + i // 4)) / 5)
    pixels = (255 * (0.8 * wave + 0.2 * noise)).byte()[:, None]
    x, numbers, found = pixels[:2].double() / 255, torch.arange(2), {}
    # training, and three evaluations of a network that anybody can write down
    net = dipddpm.make_unet(cfg, 1, "cpu")
    optimizers = dipddpm.optimizers_of(net, torch.zeros(()))
    steps = dipddpm.train_steps(cfg, pixels, net, copy.deepcopy(net), optimizers)
    found["losses of 8 training steps"] = [loss.item() for _, loss in steps]
    start = dipddpm.start_from_prior(cfg, 2 * x.float() - 1, 24, numbers)
    for predict in dipddpm.PREDICTIONS:
        ends = [dipddpm.sample(dataclasses.replace(cfg, predict=predict, order=order),
                               lambda x_t, t: torch.sin(3 * x_t + t[:, None, None, None]) / 2,
                               start, 24, 3, eta, numbers)
                for order, eta in ((1, 0), (2, 0), (1, 1))]
        found[f"{predict}: DDIM, 2M, DDPM"] = [rms(end - 2 * x + 1) for end in ends]
    # a DIP, codes, and new ones
    end = dipddpm.fit_dips(cfg, dipddpm.exact(x), numbers, 20)
    found["a DIP after 20 iterations"] = rms(end - x)
    muon = dataclasses.replace(cfg, muon=True)
    found["one by Muon"] = rms(dipddpm.fit_dips(muon, dipddpm.exact(x), numbers, 20) - x)
    coding = dipddpm.fit_codes(cfg, pixels)
    decoder, codes, _ = coding
    found["codes: decoded, noise, new"] = [
        rms(decoder(codes) - pixels / 255), rms(coding.noise), rms(coding.new(0, 40))]
    # halves of noisy images, and the fits that they stop
    known = dipddpm.corrupt(cfg, "denoise", x, 0.2, numbers)
    half = dipddpm.halves(cfg, known, dipddpm.replicas_of(numbers, 2))
    found["noise level"] = dipddpm.noise_level(known.y).flatten().tolist()
    found["y+, y-"] = [rms(half.y_plus), rms(half.y_minus)]
    found["risk of a flat output"] = half.risk(torch.full_like(half.y_minus, 0.5), 2).tolist()
    for name, fit in ("split", dipddpm.fit_guided), ("denoiser", dipddpm.fit_denoisers):
        end, took = fit(cfg, known, numbers)
        found[f"{name}, and iterations"] = [rms(end - x), *took.tolist()]
    # what a run takes where nothing is said
    given = [dipddpm.resolve(config(mode=mode), (5000, 1, size, size)) for mode, size in RUNS]
    for f in dataclasses.fields(dipddpm.Config):
        values = [v for cfg in given if (v := getattr(cfg, f.name)) is not None]
        if f.default is None and f.type is not str and len(values) > 1:
            found[f.name] = [v[0] if isinstance(v, tuple) else v for v in values]
    return found


def test_golden_numbers():
    found = golden()
    assert list(found) == list(GOLDEN)
    for what, numbers in found.items():
        assert numbers == pytest.approx(GOLDEN[what], rel=0.01), what


# ================================================================== eval

EVAL = Path(measures.__file__)


def random_images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_features(n, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- image against image


def ssim_of_windows(a, b, size):
    """Wang et al. 2004, eq. 13, of all whole windows of two channels, numpy [H, W]."""
    r = np.arange(size) - size // 2
    w = np.exp(-(r[:, None]**2 + r**2) / (2 * 1.5**2))
    p, q = (np.lib.stride_tricks.sliding_window_view(x, (size, size)) for x in (a, b))

    def mean(x):
        return (w / w.sum() * x).sum((2, 3))

    mp, mq = mean(p), mean(q)
    vp, vq, cov = mean(p * p) - mp**2, mean(q * q) - mq**2, mean(p * q) - mp * mq
    return np.mean((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                   / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))


@pytest.mark.parametrize("shape, size", [((2, 3, 15, 13), 11), ((1, 1, 8, 20), 7),
                                         ((1, 2, 1, 4), 1)])
def test_ssim_is_the_mean_over_whole_windows(shape, size):
    a = random_images(*shape).double()
    b = (0.7 * a + 0.3 * random_images(*shape, seed=1)).double()
    expected = [np.mean([ssim_of_windows(p, q, size) for p, q in zip(x, y)])
                for x, y in zip(a.numpy(), b.numpy())]
    assert measures.ssim(a, b).numpy() == pytest.approx(expected, abs=1e-6)


def test_pixel_errors_are_their_definitions():
    a, b = random_images(3, 2, 5, 4), random_images(3, 2, 5, 4, seed=1)
    d = (a.double() - b.double()).numpy()
    square = [np.mean(x**2) for x in d]
    assert measures.mse(a, b).numpy() == pytest.approx(square)
    assert measures.mae(a, b).numpy() == pytest.approx([np.mean(abs(x)) for x in d])
    assert measures.psnr(a, b).numpy() == pytest.approx([10 * math.log10(1 / s) for s in square])
    assert str(measures.psnr(0 * a, 0 * a + 1)[0].item()) == "0.0"  # and not -0


IMAGE_MEASURES = {"mse": 0, "mae": 0, "psnr": math.inf, "ssim": 1, "delta_e": 0}  # of equal images


@pytest.mark.parametrize("name, of_equal", IMAGE_MEASURES.items())
def test_image_measures_are_symmetric_know_their_range_and_equal_images(name, of_equal):
    measure = getattr(measures, name)
    a, b = random_images(2, 3, 16, 16), random_images(2, 3, 16, 16, seed=1)
    assert torch.allclose(measure(a, b), measure(b, a), rtol=1e-12)
    assert torch.allclose(measure(255 * a, 255 * b, data_range=255), measure(a, b), atol=1e-4)
    assert measure(a, a).tolist() == pytest.approx([of_equal] * 2)
    each, row = measure(a, b).numpy(), measures.measures(a, b)
    assert (row[name], row[f"{name}_std"]) == pytest.approx((each.mean(), each.std()))


def test_a_large_photo_is_the_mean_of_its_parts(monkeypatch):
    photos = torch.zeros(2, 1, 750, 1000)
    photos[0, :, :250], photos[1] = 1, 1
    black_and_white = measures.delta_e(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)).item()
    assert measures.delta_e(*photos[:, None]).item() == pytest.approx(black_and_white * 2 / 3)
    a, b = random_images(2, 2, 3, 40, 30)
    whole = [getattr(measures, name)(a, b) for name in IMAGE_MEASURES]
    monkeypatch.setattr(measures, "BLOCK", 500)  # five rows, and what a window needs beside them
    for name, expected in zip(IMAGE_MEASURES, whole):
        torch.testing.assert_close(getattr(measures, name)(a, b), expected)


@pytest.mark.parametrize("b, word", [
    (torch.zeros(1, 1, 4, 5), r"\[1, 1, 4, 4\] and \[1, 1, 4, 5\]"),
    (torch.full((1, 1, 4, 4), math.nan), "second images lie in .nan, nan"),
    (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "second images are torch.uint8"),
    (torch.full((1, 1, 4, 4), 200.), r"second images lie in \[200, 200\], not in \[0, 1\]"),
    (torch.full((1, 1, 4, 4), -1.), r"second images lie in \[-1, -1\], not in \[0, 1\]")])
def test_what_cannot_be_compared_is_named(b, word):
    with pytest.raises(ValueError, match=word):
        measures.psnr(torch.zeros(1, 1, 4, 4), b)


def test_colour_difference_of_two_channels_is_refused():
    with pytest.raises(ValueError, match="1 or 3 channels, not 2"):
        measures.delta_e(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("size", [(7, 7), (28, 28), (512, 512)])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_measures_are_those_of_scikit_image(size, channels):
    color, metrics = pytest.importorskip("skimage.color"), pytest.importorskip("skimage.metrics")
    x = random_images(1, channels, *size).double()
    y = (x + 0.2 * (random_images(1, channels, *size, seed=1) - 0.5)).clamp(0, 1)
    for a, b in ((x, y), (0 * x + 0.3, 0 * x + 0.6), (0 * x, y)):
        p, q = (v[0].permute(1, 2, 0).numpy() for v in (a, b))
        assert measures.psnr(a, b).item() == pytest.approx(
            metrics.peak_signal_noise_ratio(p, q, data_range=1), abs=1e-6)
        if min(size) >= 11:  # scikit-image does not shrink its window
            assert measures.ssim(a, b).item() == pytest.approx(metrics.structural_similarity(
                p, q, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                channel_axis=2), abs=1e-6)
        p, q = (color.rgb2lab(np.broadcast_to(v, (*size, 3))) for v in (p, q))
        assert measures.delta_e(a, b).item() == pytest.approx(
            color.deltaE_ciede2000(p, q).mean(), abs=1e-6)


SHARMA = """
50 2.6772 -79.7751 50 0 -82.7485 2.0425 | 50 3.1571 -77.2803 50 0 -82.7485 2.8615
50 2.8361 -74.02 50 0 -82.7485 3.4412 | 50 -1.3802 -84.2814 50 0 -82.7485 1
50 -1.1848 -84.8006 50 0 -82.7485 1 | 50 -0.9009 -85.5211 50 0 -82.7485 1
50 0 0 50 -1 2 2.3669 | 50 -1 2 50 0 0 2.3669
50 2.49 -0.001 50 -2.49 0.0009 7.1792 | 50 2.49 -0.001 50 -2.49 0.001 7.1792
50 2.49 -0.001 50 -2.49 0.0011 7.2195 | 50 2.49 -0.001 50 -2.49 0.0012 7.2195
50 -0.001 2.49 50 0.0009 -2.49 4.8045 | 50 -0.001 2.49 50 0.001 -2.49 4.8045
50 -0.001 2.49 50 0.0011 -2.49 4.7461 | 50 2.5 0 50 0 -2.5 4.3065
50 2.5 0 73 25 -18 27.1492 | 50 2.5 0 61 -5 29 22.8977
50 2.5 0 56 -27 -3 31.9030 | 50 2.5 0 58 24 15 19.4535
50 2.5 0 50 3.1736 0.5854 1 | 50 2.5 0 50 3.2972 0 1
50 2.5 0 50 1.8634 0.5757 1 | 50 2.5 0 50 3.2592 0.335 1
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731
35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""


def test_ciede2000_gives_the_published_differences():
    """Sharma et al. 2005, table 1."""
    pairs = [line.split() for line in SHARMA.strip().replace("|", "\n").splitlines()]
    pairs = torch.tensor([[float(v) for v in pair] for pair in pairs], dtype=torch.float64)
    assert pairs.shape == (34, 7)
    for p, q in ((pairs[:, :3], pairs[:, 3:6]), (pairs[:, 3:6], pairs[:, :3])):
        assert (measures.ciede2000(p, q) - pairs[:, 6]).abs().max() < 1e-4


# ---------------------------------------------------------------- set against set


def test_frechet_distance_of_moved_and_stretched_sets_is_known():
    f = random_features(500).double()
    f = f - f.mean(0)
    # f and 2 f + 3 commute: |mean difference|² + tr (S + 4 S - 2 · 2 S) = 9 D + tr S
    expected = 9 * 5 + torch.cov(f.T).trace().item()
    assert measures.frechet_distance(f, 2 * f + 3) == pytest.approx(expected, rel=1e-9)
    one, two = torch.tensor([[0.], [2.]]), torch.tensor([[1.], [7.]])  # D = 1: (μ-μ)² + (σ-σ)²
    assert measures.frechet_distance(one, two) == pytest.approx(9 + (2**.5 - 18**.5)**2)


@pytest.mark.parametrize("n, d, rank", [(500, 20, 20), (500, 20, 7), (15, 20, 20), (21, 20, 20)])
def test_frechet_distance_is_that_of_the_unsymmetric_root(n, d, rank):
    linalg = pytest.importorskip("scipy.linalg")
    f = random_features(n, rank).double() @ random_features(rank, d, seed=1).double()
    g = 0.5 + random_features(n + 3, rank, seed=2).double() @ random_features(
        rank, d, seed=3).double()
    S_f, S_g = np.cov(f.numpy().T), np.cov(g.numpy().T)
    # the root of a product of full rank is exact; a singular one needs the usual small addition
    nudge = 1e-10 * np.eye(d) if min(n - 1, rank) < d else 0
    root = linalg.sqrtm((S_f + nudge) @ (S_g + nudge)).real
    expected = (((f.mean(0) - g.mean(0))**2).sum().item() + np.trace(S_f + S_g)
                - 2 * np.trace(root))
    assert measures.frechet_distance(f, g) == pytest.approx(expected, rel=1e-6)
    assert measures.frechet_distance(f, f) == pytest.approx(0, abs=1e-6)


def test_features_that_cannot_be_compared_are_refused():
    f = random_features(10)
    error_line(ValueError, lambda: measures.frechet_distance(f, f[:, :4]), "10, 5", "10, 4")
    error_line(ValueError, lambda: measures.frechet_distance(f, f * math.nan), "second", "NaN")
    error_line(ValueError, lambda: measures.kid(f[:3], f), "N >= 4")
    error_line(ValueError, lambda: measures.precision_recall(f[:3], f, k=3), "N >= 4")


def test_kid_of_one_law_is_zero_within_its_spread_and_grows_with_a_shift():
    x = random_features(1200, 8)
    mean, std = measures.kid(x[:600], x[600:])
    assert std > 0 and abs(mean) < std
    assert measures.kid(x[:600], x[600:] + 1)[0] > 20 * std
    assert measures.kid(x[:600], x[600:]) == (mean, std)  # nothing is drawn from a global generator


@pytest.mark.parametrize("n, m", [(6, 6), (6, 40), (40, 6)])
def test_kid_of_two_constant_sets_is_known(n, m):
    f, g = torch.tensor([[1., 1.]]).expand(n, 2), torch.tensor([[2., 0.]]).expand(m, 2)
    # k(x, y) = (x·y / 2 + 1)³: 2³ + 3³ - 2 · 2³, whatever the subsets
    assert measures.kid(f, g) == pytest.approx((19, 0))


def test_kid_is_unbiased_where_its_biased_form_is_not():
    # the mean over many pairs of tiny sets of one law: the diagonal would add about 2 k(x, x) / m
    estimates = [measures.kid(random_features(8, seed=2 * i), random_features(8, seed=2 * i + 1),
                              subsets=2)[0] for i in range(300)]
    assert abs(np.mean(estimates)) < 4 * np.std(estimates) / 300**.5
    assert np.std(estimates) / 300**.5 < 1  # the bias of the biased form is above 4


def test_precision_and_recall_of_constructed_sets():
    real = torch.cat([random_features(100), random_features(100, seed=1) + 100])  # two far modes
    assert measures.precision_recall(real, real) == (1, 1)
    precision, recall = measures.precision_recall(random_features(100, seed=2), real)
    assert precision > 0.8 and 0.4 < recall <= 0.5  # good pictures of one mode
    broad = torch.cat([real, real + 1000])  # all modes, and as much rubbish
    assert measures.precision_recall(broad, real) == (0.5, 1)
    g = torch.tensor([[0.], [1.], [3.]])  # radii for k = 1: 1, 1, 2
    f = torch.tensor([[-0.9], [5.1]])     # radii for k = 1: 6, 6
    assert measures.precision_recall(f, g, k=1) == (0.5, 1)


def test_precision_and_recall_of_more_than_a_block():
    f, g = torch.rand(1100, 2), torch.rand(1200, 2)
    far = torch.cat([f[:1050], f[1050:] + 9])
    reach = [torch.cdist(x, x).topk(4, largest=False).values[:, 3] for x in (far, g)]
    near = torch.cdist(far, g)
    assert measures.precision_recall(far, g) == pytest.approx((
        (near <= reach[1]).any(1).float().mean().item(),
        (near <= reach[0][:, None]).any(0).float().mean().item()))


def test_equal_points_are_inside_however_they_are_ordered():
    g = random_features(50, 84).repeat(4, 1) + 100  # radii of zero, far from the origin
    f = g[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    assert measures.precision_recall(f, g) == (1, 1)
    assert measures.precision_recall(f + 1e-3, g) == (0, 0)


def test_nearest_finds_the_copy_in_any_block():
    others = random_images(25, 1, 6, 6)
    images = torch.cat([others[[19]], others[[3]] + 0.01])
    others[3] = others[3].clamp(max=0.99)
    distance = measures.nearest(images.clamp(0, 1), others)
    brute = (images.clamp(0, 1)[:, None] - others).flatten(2).norm(dim=2).min(1).values
    assert distance[0] == 0 and torch.allclose(distance, brute)
    for bad in (-images, images * math.nan):
        error_line(ValueError, lambda bad=bad: measures.nearest(bad, others), "[0, 1]")


# ---------------------------------------------------------------- LeNet features


@pytest.fixture(scope="module")
def striped():
    """Two classes of tiny images, with horizontal and with vertical stripes."""
    pixels = (60 * random_images(80, 1, 8, 8)).byte()
    pixels[:40, :, ::2] += 150
    pixels[40:, :, :, ::2] += 150
    return pixels, torch.arange(80) // 40


def weights(net):
    return measures.checksum(net.state_dict())


def test_features_are_learned_once_and_read_back(striped, tmp_path, monkeypatch):
    pixels, labels = striped
    monkeypatch.setattr(measures, "LENET_STEPS", 40)
    unwritable = tmp_path / "file"
    unwritable.write_text("")
    folders, state = [unwritable / "sub", tmp_path / "cache"], torch.get_rng_state()

    def made():
        return measures.feature_network(pixels, labels, "stripes", folders, epochs=1)

    # trained from a seed of its own, and kept where that is possible
    net = made()
    f = measures.features(net, pixels)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(net.fc2(f.relu()).argmax(1), labels)
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name.startswith("features-stripes-") and file.suffix == ".pt"

    # a damaged file is made again: same seed, same weights
    file.write_bytes(file.read_bytes()[:1000])
    assert weights(made()) == weights(net)

    # a whole one is read: its weights are others than training would give
    altered = measures.LeNet(1, 2)
    torch.save({"state": altered.state_dict()}, file)
    assert weights(made()) == weights(altered) != weights(net)

    assert f.shape == (80, 84) and f.dtype == torch.float32
    assert torch.equal(f, measures.features(net, pixels.float() / 255))
    # rounding may differ with the batch's shape, nothing else may
    assert torch.allclose(f, measures.features(net, pixels, batch=7), atol=1e-5)


def test_floor_takes_images_from_the_whole_split(striped):
    pixels, net = striped[0], measures.LeNet(1, 2)
    real = measures.features(net, pixels)
    sets = [measures.features(net, pixels[measures.subset(80, 40, i)]) for i in range(5)]
    each = [measures.frechet_distance(f, real) for f in sets]
    precision, recall = zip(*(measures.precision_recall(f, real[::2]) for f in sets))
    assert measures.floor(net, pixels, real, real[::2], 40) == pytest.approx({
        "fid_lenet": np.mean(each), "std": np.std(each, ddof=1), "precision": np.mean(precision),
        "recall": np.mean(recall), "samples": 40})
    for count in (3, 81):
        error_line(ValueError, lambda n=count: measures.floor(net, pixels, real, real, n),
                   f"{count} images from a split of 80")


def test_a_subset_holds_every_class_of_a_set_that_stores_them_in_turn():
    index = measures.subset(10_000, 400)
    assert len(index.unique()) == 400 and 0 <= index.min() <= index.max() < 10_000
    assert (torch.bincount(index % 10) > 20).all()


def test_features_refuse_the_wrong_range_and_missing_labels(striped):
    for bad in (-random_images(1, 1, 8, 8), torch.full((1, 1, 8, 8), math.nan)):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            measures.features(measures.LeNet(1, 2), bad)
    for labels in (None, striped[1][:9], striped[1] - 1):
        error_line(ValueError, lambda labels=labels: measures.feature_network(
            striped[0], labels, "none", []), "a label from 0 on")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Drawn digits, and the distance of a set of images to them in a LeNet's features."""
    train, test = (data.load("digits", split=split, limit=1000) for split in ("train", "test"))
    net = measures.feature_network(train.pixels, train.labels, "digits",
                                   [tmp_path_factory.mktemp("lenet")])
    x, real = test.pixels.float() / 255, measures.features(net, test.pixels)
    return x, test.labels, lambda images: measures.frechet_distance(measures.features(net, images),
                                                                    real)


@pytest.mark.parametrize("worse, strengths", [
    (lambda x, labels, s: (x + s * (random_images(*x.shape, seed=3) - 0.5)).clamp(0, 1),
     (0, 0.1, 0.2, 0.4, 0.8, 1.6)),
    (lambda x, labels, k: F.avg_pool2d(x, k, 1, k // 2, count_include_pad=True), (1, 3, 5, 7, 9)),
    (lambda x, labels, lost: x[labels >= lost], (0, 1, 3, 5, 8))],
    ids=["noise", "blur", "missing classes"])
def test_fid_of_a_set_to_itself_is_zero_and_rises(judged, worse, strengths):
    x, labels, distance = judged
    found = [distance(worse(x, labels, strength)) for strength in strengths]
    assert found == sorted(found) and found[0] == pytest.approx(0, abs=1e-4)
    assert found[-1] > 5 * found[1]


@needs("mnist")
def test_the_judge_reads_mnist():
    train, test = (data.load("mnist", REAL, split) for split in ("train", "test"))
    judge = measures.Judge(train, train.pixels[:100], test, 2000, [data.cache_root()])
    assert (judge.lenet.fc2(judge.features.relu()).argmax(1) == test.labels).sum() >= 9880
    assert 0.3 < judge.summary()["floor"]["fid_lenet"] < 3


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 5, 9)])
def test_the_lenet_is_its_layers_at_any_size(shape):
    net, x = measures.LeNet(shape[0], 7), torch.rand(2, *shape)
    h = F.conv2d(2 * x - 1, net.conv1.weight, net.conv1.bias, padding=2)
    h = F.max_pool2d(h, 2).relu()  # [2, 8, H/2, W/2]
    h = F.conv2d(h, net.conv2.weight, net.conv2.bias, padding=1)
    h = F.adaptive_max_pool2d(h, 7).relu()  # [2, 24, 7, 7]
    wanted = h.flatten(1) @ net.fc1.weight.T + net.fc1.bias
    feature, logits = net(x)
    torch.testing.assert_close(feature, wanted)
    torch.testing.assert_close(logits, wanted.relu() @ net.fc2.weight.T + net.fc2.bias)


# ---------------------------------------------------------------- a set's judge


def test_a_set_is_told_by_its_distances_to_training_images_and_sources():
    train = data.Images(torch.zeros(2, 1, 5, 4, dtype=torch.uint8), None, "zeros", "")
    test = data.Images(torch.full((3, 1, 5, 4), 51, dtype=torch.uint8), None, "zeros", "")
    judge = measures.Judge(train, train.pixels, test, 3, [])
    assert judge.real == pytest.approx({"nearest": 0.2 * 20**0.5, "nearest_5": 0.2 * 20**0.5})
    assert "no fid_lenet" in judge.summary()["notes"][1]
    x = torch.linspace(0, 1, 101)[:, None, None, None].expand(-1, 1, 5, 4)  # 0, 0.01 ... from them
    row = judge(2 * x - 1, torch.full((101, 1, 5, 4), 255, dtype=torch.uint8))
    assert row == pytest.approx({"nearest": 0.5 * 20**0.5, "nearest_5": 0.05 * 20**0.5,
                                 "own_source": 0.5 * 20**0.5})


def test_a_judge_with_labels_measures_in_the_features_of_the_whole_split(striped, tmp_path,
                                                                         monkeypatch):
    monkeypatch.setattr(measures, "LENET_STEPS", 40)
    images = data.Images(*striped, "stripes", "")
    judge = measures.Judge(images, images.pixels[:50], images, 60, [tmp_path])
    chosen = measures.subset(80, 60)
    x = images.pixels[chosen]
    row = judge(x.float() / 127.5 - 1)
    f, real = (measures.features(judge.lenet, part) for part in (x, images.pixels))
    assert row["fid_lenet"] == pytest.approx(measures.frechet_distance(f, real), abs=1e-3)
    assert (row["kid"], row["kid_std"]) == pytest.approx(measures.kid(f, real), rel=1e-3)
    assert row["precision"] == row["recall"] == 1  # the manifold is of as many real images
    summary = judge.summary()
    assert summary["features"]["checksum"] == weights(judge.lenet)
    assert summary["floor"]["samples"] == 60
    assert summary["floor"] == measures.floor(judge.lenet, images.pixels, real, judge.manifold, 60)
    few = measures.Judge(images, images.pixels, images, 3, [tmp_path])
    assert few.lenet is None  # recall needs three neighbours and the image itself


# ---------------------------------------------------------------- files and report


def test_grid_places_images_row_by_row():
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 1, 2, 3).byte()
    sheet = np.array(measures.grid(images, columns=3, pad=1, scale=2))
    assert sheet.shape == (2 * (2 * 2 + 1), 2 * (3 * 3 + 2))
    assert sheet[0, 0] == 0 and sheet[0, 8] == 1 and sheet[6, 8] == 4
    assert sheet[0, 6] == 127 and sheet[6, 16] == 127  # between images, and where there is none
    assert measures.grid(torch.rand(3, 3, 4, 4)).mode == "RGB"
    assert np.array(measures.grid(torch.tensor([-1., 0.5, 2.]).view(1, 1, 1, 3))).tolist() == [
        [0, 128, 255]]
    with pytest.raises(ValueError, match=r"\[1, 2, 4, 4\]"):
        measures.grid(torch.rand(1, 2, 4, 4))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    measures.write_json({"x": [1.5, math.inf, math.nan, 1 / 3, 10**9]}, file)
    assert json.loads(file.read_text()) == {"x": [1.5, None, None, 0.333333, 10**9]}
    old = file.read_bytes()
    with pytest.raises(TypeError):
        measures.write_bytes(file, "no bytes")
    for step, error in (("replace", OSError("full")), ("fsync", KeyboardInterrupt())):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(measures.os, step, lambda *_, e=error: (_ for _ in ()).throw(e))
            measures.write_bytes(file, b"new")
    assert file.read_bytes() == old and list(tmp_path.iterdir()) == [file]
    measures.write_bytes(file, memoryview(bytes(10**7)))
    assert file.stat().st_size == 10**7 and list(tmp_path.iterdir()) == [file]


def written(seed=0, **changes):
    """What a run might have written."""
    return {
        "mode": "prior", "config": {"epochs": 3, "seed": seed, "out": f"<i>{seed}"},
        "data": {"name": "digits & <b>", "train": 100, "test": 50}, "device": "cpu",
        "floor": {"fid_lenet": 6.25, "recall": 0.5, "samples": 100},
        "arms": [{"name": "<dip>", "seed": seed, "nfe": n, "seconds": n / 10,
                  "fid_lenet": 100 / n + seed} for n in (10, 5)],
        "curves": {"loss/l": [], "loss/train": [[i, 1 / (i + 1)] for i in range(1000)],
                   "loss/zero": [[1, 0]], "other": [[1, 1], [1, 1], [2, None]]},
        "pictures": [{"file": "a.png", "caption": 'a "picture"', "rows": ["<up>", "down"]}],
        "notes": ["a < b"]} | changes


def runs_of(tmp_path, *each):
    """Their folders."""
    for i, results in enumerate(each):
        folder = tmp_path / f"run{i}"
        folder.mkdir(exist_ok=True)
        measures.write_json(results, folder / "results.json")
        measures.save_png(measures.grid(torch.zeros(4, 1, 3, 3)), folder / "a.png")
    return [tmp_path / f"run{i}" for i in range(len(each))]


def page_of(tmp_path, *each):
    measures.compare(runs_of(tmp_path, *each), tmp_path / "page.html")
    return (tmp_path / "page.html").read_text()


def test_report_is_one_file_that_fetches_nothing_and_escapes_what_it_is_given(tmp_path):
    page = page_of(tmp_path, written())
    assert "data:image/png;base64," in page
    for title in ("quality", "loss", "other"):
        assert f'font-weight="600">{title}</text>' in page
    for word in ("http:", "https:", "<script", "<link", "url(", "@import", "src=\"a.png",
                 "<dip>", "& <b>", "<i>", "<up>", "a < b", 'a "picture"'):
        assert word not in page
    for word in ("&lt;dip&gt;", "digits &amp; &lt;b&gt;", "&lt;i&gt;", "&lt;up&gt;", "a &lt; b"):
        assert word in page
    assert "nan" not in page.lower() and "inf" not in page.lower()


def test_report_shows_the_mean_over_seeds_not_the_best_seed(tmp_path):
    page = page_of(tmp_path, written(0), written(1))
    assert "10.5 ± 0.707 (1 s)" in page and "floor 6.25" in page and "run0, run1" in page
    assert page.count("data:image/png") == 1  # the first seed's stand for all
    arms = [{"name": "ladder", "psnr": 24.0, "ssim": 0.9}]
    page = page_of(tmp_path, {"arms": arms})  # of a restoration, every measure
    assert ">24<" in page and "ssim" in page


@pytest.mark.parametrize("left_out", [*written(), None])
def test_report_survives_missing_keys(tmp_path, left_out):
    results = {k: v for k, v in written().items() if left_out not in (k, None)}
    assert "</html>" in page_of(tmp_path, results)


def test_tables_of_runs_that_differ_in_their_seed_are_of_means(tmp_path):
    folders = runs_of(tmp_path, written(0), written(1))
    table = ["fid_lenet, floor 6.25, mean ± standard deviation over 2 seeds", "",
             "| evaluations |                    5 |                 10 |",
             "|-------------|---------------------:|-------------------:|",
             "| <dip>       | 20.5 ± 0.707 (0.5 s) | 10.5 ± 0.707 (1 s) |"]
    assert measures.text_tables(folders).splitlines() == ["", *table]
    recalled = written(arms=[{"name": "a", "seed": 0, "nfe": 2, "recall": 0.4}])
    assert [title for title, _ in measures.tables([(tmp_path, recalled)], ["recall"])] == [
        "recall, real images 0.5, one seed"]
    assert "±" not in measures.text_tables([folders[0]] * 2)  # a seed that comes twice counts once
    runs_of(tmp_path, written(0, arms=[{"name": "<dip>", "nfe": 5, "fid_lenet": None}]))
    assert measures.text_tables(folders).splitlines()[-1] == "| <dip>       | – | 11 (1 s) |"


@pytest.mark.parametrize("change", [
    {"config": {"epochs": 4, "seed": 1}}, {"data": {"name": "mnist"}},
    {"features": {"checksum": "abcdef"}}, {"device": "H200"}, {"mode": "ddpm"}])
def test_runs_of_other_settings_data_or_features_are_never_averaged(change, tmp_path):
    runs = written(0), written(1) | change
    page, text = page_of(tmp_path, *runs), measures.text_tables(runs_of(tmp_path, *runs))
    assert "±" not in page + text and page.count("data:image/png") == 2
    assert "<h1>run0</h1>" in page and "<h1>run1</h1>" in page
    assert f"{tmp_path / 'run0'}: fid_lenet" in text and f"{tmp_path / 'run1'}: fid_lenet" in text


def test_a_row_is_told_by_what_differs_between_the_rows_of_its_arm():
    rows = [{"name": "gauss", "nfe": 3, "t_start": t, "eta": 0.0} for t in (300, 600)]
    rows += [{"name": "ddpm", "nfe": 3, "t_start": 1000, "eta": 0.0}]
    rows += [{"name": "gauss", "nfe": 3, "t_start": 300, "eta": 1.0, "task": "sr"}]
    found = measures.rows_of([("", {"arms": rows})])
    assert found == {"": {"gauss t_start 300": [rows[0]], "gauss t_start 600": [rows[1]],
                          "ddpm": [rows[2]]}, "sr": {"gauss": [rows[3]]}}


def test_curves_come_from_the_rows_with_a_line_for_each_seed():
    arms = [{"name": "ddpm", "nfe": nfe, "seconds": nfe / 2, "fid_lenet": 9.0} for nfe in (20, 3)]
    arms += [{"name": "pca", "nfe": 5, "seconds": 2.0, "fid_lenet": None}]
    arms += [{"name": name, "nfe": nfe, "psnr": 20.0, "task": "sr"}
             for name, nfe in (("ddpm", 3), ("ddpm", 2))] + [
                 {"name": "dip", "psnr": 20.0, "task": "sr"}]
    drawn = measures.curves_of([("", {"arms": arms, "curves": {"loss/a": [[1, 2]]}})] * 2)
    assert drawn == {
        "quality": {"ddpm": [[[3, 9.0], [20, 9.0]]] * 2},
        "restored sr": {"ddpm": [[[2, 20.0], [3, 20.0]]] * 2}, "loss": {"a": [[[1, 2]]] * 2}}


@pytest.mark.parametrize("low, high", [(6.1, 9.2), (2.3, 4.4), (0.21, 0.45), (1, 1), (3, 3000)])
def test_every_axis_has_numbers(low, high):
    for log in (False, True):
        _, ticks = measures.place([low, high, (low + high) / 2.1], log, 0, 100)
        assert len(ticks) >= 2


@pytest.mark.parametrize("change", [
    {"config": 7}, {"arms": {"a": 1}}, {"floor": "x"}, {"curves": [1]}, {"curves": {"a": [[1]]}},
    {"curves": {"loss/b": [[1, -1e308], [2, 1e308]]}}, {"pictures": ["a.png"]}, [1]])
def test_damaged_results_are_one_line_that_names_the_file(change, tmp_path, capsys):
    content = written() | change if isinstance(change, dict) else change
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert measures.main([tmp_path]) == 2
    err = capsys.readouterr().err
    assert "results.json" in err and err.count("\n") == 1


# ---------------------------------------------------------------- command line


def test_command_compares_two_pictures_of_any_depth_colour_and_turn(tmp_path, capsys):
    grey = np.arange(144, dtype=np.uint16).reshape(12, 12)
    rgb = Image.fromarray(np.repeat(grey.astype(np.uint8)[..., None], 3, 2))
    turned, exif = rgb.rotate(90), Image.Exif()
    exif[0x112] = 6  # turn by 270 degrees to be upright
    turned.save(tmp_path / "turned.png", exif=exif)
    for name, image in (("grey", grey.astype(np.uint8)), ("deep", grey * 257), ("rgb", rgb),
                        ("light", (grey + 51).astype(np.uint8)), ("low", grey[:11] * 257)):
        Image.fromarray(np.asarray(image)).save(tmp_path / f"{name}.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tiff")

    def said(name):
        status = measures.main([tmp_path / "grey.png", tmp_path / name])
        out, err = capsys.readouterr()
        assert bool(status) == bool(err) and status == 2 * err.count("\n")
        return err or dict(line.split() for line in out.splitlines())

    for name in ("deep.png", "rgb.png", "turned.png"):
        assert said(name)["psnr"] == "inf"
    found = said("light.png")
    assert list(found) == ["mse", "mae", "psnr", "ssim", "delta_e"]
    assert float(found["mse"]) == pytest.approx(0.04) and float(found["mae"]) == pytest.approx(0.2)
    assert "float.tiff" in said("float.tiff") and "mode F" in said("float.tiff")
    assert "[1, 1, 12, 12] and [1, 1, 11, 12]" in said("low.png")


def test_command_fails_in_one_line(tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "results.json").write_text("{")
    for bad in ([tmp_path / "none"], [tmp_path / "text.png"] * 2, [tmp_path],
                [tmp_path / "text.png"]):
        assert measures.main(bad) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("eval: ") and err.count("\n") == 1
    run = subprocess.run([sys.executable, EVAL, "none"], capture_output=True, text=True,
                         check=False)
    assert run.returncode == 2 and "none/results.json" in run.stderr


# ------------------------------------------------------------------ README, and the shape


TEXTS = {name: (HERE / name).read_text() for name in ("README.md", "studies/RESULTS.md")
         if (HERE / name).exists()}


def commands_in(text, folder):
    """The commands of a text's blocks and inline code as lists of words, each as a shell expands
    it: bash runs them in an empty folder where no program is found, and is asked what it missed."""
    pieces = re.findall(r"(?ms)^```\n(?!# at [0-9a-f]{7}\n)(.*?)^```", text)
    shell = "command_not_found_handle() { printf '%s\\037' \"$@\"; printf '\\036'; }\n"
    for piece in [*pieces, *re.findall(r"`([^`\n]+)`", text)]:
        if re.search(r"(?m)(^ *|[\"=])(python|torchrun|make) ", piece):
            nothing = {"PATH": "/nowhere", "DIPDDPM_DATA": "data"}
            done = subprocess.run(["/bin/bash", "-c", shell + piece], cwd=folder, env=nothing,
                                  text=True, capture_output=True)
            assert "syntax error" not in done.stderr, piece
            yield from (line.split("\037")[:-1] for line in done.stdout.split("\036")[:-1])


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_that_is_told_can_be_given(name, tmp_path):
    targets = re.findall(r"(?m)^([a-z%-]+):", (HERE / "Makefile").read_text())
    told = list(commands_in(TEXTS[name], tmp_path))
    assert len(told) > 10
    for command in told:
        if "dipddpm.py" in command:  # the parser exits where it does not parse
            dipddpm.parser().parse_args(command[command.index("dipddpm.py") + 1:])
        elif command[0] == "make":
            assert set(command[1:]) <= set(targets), command
        elif command[0] == "python":
            name = command[2].replace(".", "/") + ".py" if command[1] == "-m" else command[1]
            assert (HERE / name).exists() or not (HERE / name).parent.exists(), command


def test_the_readme_is_short_and_quotes_the_code():
    text = TEXTS["README.md"]
    assert len(text.encode()) <= 12_000
    code = "".join(path.read_text() for path in [HERE / "dipddpm.py", *HERE.glob("kernels/*.py")])
    quotes = re.findall(r"(?s)```python\n(.*?)```", text)
    assert len(quotes) >= 3 and all(quote in code for quote in quotes)
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - {"--help", "--nproc-per-node"}
    assert len(told) > 5 and told <= set(FIELDS)


@pytest.mark.skipif(not (HERE / "studies").is_dir(), reason="no studies/")
def test_links_lead_somewhere():
    links = [(HERE / name, link) for name, text in TEXTS.items()
             for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 10
    for path, link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        titles = re.findall(r"(?m)^#+ (.*)$", target.read_text()) if anchor else ()
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, link


def test_nothing_needs_the_studies():
    for path in [*HERE.glob("*.py"), *HERE.glob("kernels/*.py")]:
        assert not re.search(r"(?m)^\s*(import|from)\s+studies\b", path.read_text()), path.name


if __name__ == "__main__":
    torch.set_num_threads(1)
    for what, numbers in golden().items():
        several = isinstance(numbers, list)
        told = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (
            numbers if several else [numbers])]
        print(f'    "{what}": ' + (f"({', '.join(told)})," if several else f"{told[0]},"))

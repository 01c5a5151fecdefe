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
import http.server
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
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels imports Triton

import data
import dipddpm
import edge
import eval as measures
import kernels
import reproduce
from kernels import noising, posterior, rng


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only wait for each other on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def few_digits():
    """Drawing 12,000 takes half a minute; of fewer each is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DIGITS", {"train": 1000, "test": 1000})
        yield


# ================================================================== data

REAL = Path(os.environ.get("DIPDDPM_DATA") or "/nonexistent")
needs_data = pytest.mark.skipif(not os.environ.get("DIPDDPM_DATA"), reason="no DIPDDPM_DATA")


def needs(folder):
    return pytest.mark.skipif(not (REAL / folder).is_dir(), reason=f"no {folder} in DIPDDPM_DATA")


IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array):
    array = np.asarray(array)
    header = bytes([0, 0, IDX_CODES[array.dtype.str[1:]], array.ndim])
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(
        array.dtype.newbyteorder(">")
    ).tobytes()


def error_line(kind, action, *parts):
    """The message of the error that `action` raises: one line that contains every part."""
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


def picture(path, size=(6, 4), mode="RGB", value=7, **options):
    colour = value if mode in ("L", "I;16") else (value,) * len(mode)
    Image.new(mode, size, colour).save(path, **options)
    return path


@pytest.fixture
def mnist(tmp_path):
    """A folder with a small data set in MNIST's format, and its four files' contents."""
    rng = np.random.default_rng(0)
    files = {}
    for prefix, n in (("train", 5), ("t10k", 3)):
        files[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        files[f"{prefix}-labels-idx1-ubyte"] = np.arange(n, dtype=np.uint8)
    (tmp_path / "mnist").mkdir()
    for file, array in files.items():
        (tmp_path / "mnist" / file).write_bytes(idx_bytes(array))
    return tmp_path, files


# ---- IDX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", IDX_CODES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (1, 2, 3, 2), (0, 3)])
def test_idx_round_trip(tmp_path, dtype, shape, packed):
    want = np.random.default_rng(1).normal(0, 50, shape)
    want = np.asarray(want.astype("i1") if dtype == "u1" else want).astype(dtype)
    path = tmp_path / ("a.gz" if packed else "a")
    path.write_bytes(gzip.compress(idx_bytes(want)) if packed else idx_bytes(want))
    got = data.read_idx(path)
    assert got.dtype == want.dtype and got.dtype.isnative and got.shape == shape
    np.testing.assert_array_equal(got, want)


def test_idx_is_told_from_gzip_by_content(tmp_path):
    want = np.arange(6, dtype=np.uint8).reshape(2, 3)
    (tmp_path / "plain.gz").write_bytes(idx_bytes(want))
    (tmp_path / "packed").write_bytes(gzip.compress(idx_bytes(want)))
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(data.read_idx(path), want)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_cut_anywhere_is_an_error(tmp_path, packed):
    path, whole = tmp_path / "a", idx_bytes(np.ones((2, 2, 2), np.uint8))
    for size in range(len(whole)):
        path.write_bytes(gzip.compress(whole[:size]) if packed else whole[:size])
        reason = "truncated IDX header" if size < 16 else f"only {size - 16}"
        error_line(ValueError, lambda: data.read_idx(path), path, reason)


def test_idx_trailing_bytes_are_an_error(tmp_path):
    path, whole = tmp_path / "a", idx_bytes(np.ones((2, 2), np.uint8)) + b"\0"
    for content in (whole, gzip.compress(whole)):
        path.write_bytes(content)
        error_line(ValueError, lambda: data.read_idx(path), path, "4 bytes, the file holds more")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("01000801", "not an IDX file"),
        ("00010801", "not an IDX file"),
        ("00000a01", "unknown IDX type 0x0a"),
        ("00000801ffffffff", "more than"),
        ("00000803ffffffffffffffffffffffff", "more than"),
        ("0000080300000000ffffffffffffffff", "more than"),
        ("00000e014000", "truncated IDX header (6 of 8 bytes)"),
        ("000008ff" + "00000001" * 255, "rank 255"),
        ("0000080170000000", "only 0"),
    ],
)
def test_idx_header_is_checked(tmp_path, header, reason):
    path = tmp_path / "a"
    path.write_bytes(bytes.fromhex(header))
    error_line(ValueError, lambda: data.read_idx(path), path, reason)


def test_idx_gzip_cut_anywhere_or_corrupt_is_an_error(tmp_path):
    path, whole = tmp_path / "a.gz", gzip.compress(idx_bytes(np.arange(40, dtype=np.uint8)))
    for size in range(2, len(whole)):
        path.write_bytes(whole[:size])
        error_line(ValueError, lambda: data.read_idx(path), path, "gzip")
    for position in range(10, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        error_line(ValueError, lambda: data.read_idx(path), path)


def test_idx_missing_file_is_an_oserror(tmp_path):
    error_line(FileNotFoundError, lambda: data.read_idx(tmp_path / "none"), tmp_path / "none")


# ---- MNIST's format ------------------------------------------------------------------------------


def test_load_keeps_order_and_hashes_pixels(mnist):
    root, files = mnist
    for split, prefix in (("train", "train"), ("test", "t10k")):
        want = files[f"{prefix}-images-idx3-ubyte"]
        images = data.load("mnist", root, split)
        np.testing.assert_array_equal(images.pixels[:, 0], want)
        assert images.pixels.dtype == torch.uint8 and images.pixels.is_contiguous()
        assert images.labels.dtype == torch.int64
        assert images.labels.tolist() == list(range(len(want)))
        assert images.name == "mnist"
        assert images.sha256 == hashlib.sha256(want.tobytes()).hexdigest()


def test_limit_keeps_the_first(mnist):
    root, _ = mnist
    images = data.load("mnist", root)
    for limit in (1, 3, 99):
        first = data.load("mnist", root, limit=limit)
        assert torch.equal(first.pixels, images.pixels[:limit])
        assert torch.equal(first.labels, images.labels[:limit])
    for limit in (0, -1):
        error_line(ValueError, lambda limit=limit: data.load("mnist", root, limit=limit), "limit")


@pytest.mark.parametrize(
    ("file", "array"),
    [
        ("train-images-idx3-ubyte", np.zeros((5, 28), np.uint8)),
        ("train-images-idx3-ubyte", np.zeros((5, 28, 28), "i2")),
        ("train-images-idx3-ubyte", np.zeros((0, 28, 28), np.uint8)),
        ("train-labels-idx1-ubyte", np.zeros(4, np.uint8)),
        ("train-labels-idx1-ubyte", np.zeros((5, 1), np.uint8)),
        ("train-labels-idx1-ubyte", np.zeros(5, "i4")),
    ],
)
def test_images_and_labels_that_do_not_match_are_an_error(mnist, file, array):
    root, _ = mnist
    (root / "mnist" / file).write_bytes(idx_bytes(array))
    error_line(ValueError, lambda: data.load("mnist", root), root / "mnist" / file)


def test_a_folder_of_idx_files_is_a_data_set(mnist):
    root, files = mnist
    images = data.load(root / "mnist", None, "test")
    np.testing.assert_array_equal(images.pixels[:, 0], files["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(images.labels, files["t10k-labels-idx1-ubyte"])
    (root / "mnist" / "t10k-labels-idx1-ubyte").unlink()  # a user's own files are never mixed
    error_line(FileNotFoundError, lambda: data.load(root / "mnist", None, "test"),
               root / "mnist" / "t10k-labels-idx1-ubyte", "no mirror is known")


def test_auto_never_hides_a_damaged_mnist(mnist):
    root, _ = mnist
    assert data.load("auto", root).name == "mnist"
    (root / "mnist" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08")
    error_line(ValueError, lambda: data.load("auto", root), "train-images-idx3-ubyte")


@needs_data
@pytest.mark.parametrize(("split", "n"), [("train", 60000), ("test", 10000)])
def test_real_mnist_has_the_published_content(split, n):
    images = data.load("mnist", REAL, split)
    assert images.pixels.shape == (n, 1, 28, 28) and len(images.labels) == n
    header = struct.pack(">4I", 0x803, n, 28, 28)
    content = hashlib.sha256(header + images.pixels.numpy().tobytes()).hexdigest()
    file = f"{'train' if split == 'train' else 't10k'}-images-idx3-ubyte"
    assert content == data.DIGESTS["mnist"][file]


# ---- downloads -----------------------------------------------------------------------------------


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves `files`; of those in `cut` only half of what it announces, of those in `slow` a byte
    now and then, and those in `moved` from where it says."""

    slow, moved = set(), {}

    def __init__(self, files, cut, *arguments):
        self.files, self.cut = files, cut
        super().__init__(*arguments)

    def do_GET(self):
        file = self.path.strip("/")
        content = self.files.get(file)
        if file in self.moved:
            self.send_response(302)
            self.send_header("Location", self.moved[file])
            return self.end_headers()
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if file in self.slow:
            with contextlib.suppress(OSError):  # whoever waited has gone
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.02)
            return
        self.wfile.write(content[: len(content) // 2] if file in self.cut else content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(mnist, monkeypatch):
    """A mirror of the small data set: (an empty root, the files it serves, the names it cuts)."""
    root, files = mnist
    contents = {file: (root / "mnist" / file).read_bytes() for file in files}
    served = {f"{file}.gz": gzip.compress(content) for file, content in contents.items()}
    cut = set()
    handler = functools.partial(Mirror, served, cut)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(data.MIRRORS, "mnist", (url + "nowhere/", url))
    monkeypatch.setitem(data.DIGESTS, "mnist", digests)
    monkeypatch.setitem(data.MIRRORS, "fashion", (url,))
    md5 = {file: hashlib.md5(served[f"{file}.gz"]).hexdigest() for file in files}
    monkeypatch.setitem(data.DIGESTS, "fashion", md5)
    yield root / "empty", served, cut
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_download_falls_to_the_next_mirror_and_is_kept(mirror, mnist, name):
    root, served, _ = mirror
    images = data.load(name, root)
    np.testing.assert_array_equal(images.pixels[:, 0], mnist[1]["train-images-idx3-ubyte"])
    served.clear()
    assert data.load(name, root).sha256 == images.sha256
    kept = sorted(path.name for path in (root / name).iterdir())
    assert kept == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]


@pytest.mark.parametrize("name", ["mnist", "fashion"])
@pytest.mark.parametrize("damage", ["cut", "other", "half", "text", "empty", "bomb"])
def test_wrong_download_never_counts_as_data(mirror, monkeypatch, name, damage):
    root, served, cut = mirror
    file = "train-images-idx3-ubyte.gz"
    whole = served[file]
    served[file] = {
        "cut": whole,
        "other": gzip.compress(b"other"),
        "half": whole[: len(whole) // 2],
        "text": b"<html>",
        "empty": b"",
        "bomb": gzip.compress(bytes(10**6)),
    }[damage]
    monkeypatch.setattr(data, "DOWNLOAD_LIMIT", 10**5)
    if damage == "cut":
        cut.add(file)
    action = functools.partial(data.load, name, root)
    error_line(FileNotFoundError, action, root / name, "train-labels-idx1-ubyte", "127.0.0.1: ")
    assert not list(root.rglob("*.*"))
    served[file] = whole
    cut.clear()
    assert len(action().pixels) == 5


def test_a_download_follows_a_redirect_but_not_in_circles(mirror, monkeypatch):
    root, served, _ = mirror
    file = "train-images-idx3-ubyte.gz"
    monkeypatch.setattr(Mirror, "moved", {file: f"/{file}"})
    error_line(FileNotFoundError, lambda: data.load("mnist", root), "127.0.0.1: ", "loop")
    assert not list(root.rglob("*.*"))
    served["elsewhere"] = served.pop(file)
    monkeypatch.setattr(Mirror, "moved", {file: "/elsewhere"})
    assert len(data.load("mnist", root).pixels) == 5


def test_a_download_that_drips_is_given_up(mirror, monkeypatch):
    root = mirror[0]
    monkeypatch.setattr(Mirror, "slow", {"train-images-idx3-ubyte.gz"})
    monkeypatch.setattr(data, "DOWNLOAD_SECONDS", 0.3)
    error_line(FileNotFoundError, lambda: data.load("mnist", root), "not complete after 0.3 s")
    assert not list(root.rglob("*.*"))


def test_several_may_download_into_one_folder_at_once(mirror):
    root = mirror[0]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda _: data.load("mnist", root).sha256, range(8)))
    assert len(digests) == 1 and len(list((root / "mnist").iterdir())) == 2


def test_endless_download_is_refused(mirror, monkeypatch):
    root = mirror[0]
    monkeypatch.setattr(data, "DOWNLOAD_LIMIT", 100)
    error_line(FileNotFoundError, lambda: data.load("fashion", root), "more than 100 bytes")


def test_auto_takes_both_splits_from_one_data_set(mirror, capsys):
    root, served, _ = mirror
    assert data.load("auto", root, limit=2).name == "mnist"
    assert len(list((root / "mnist").iterdir())) == 4
    (root / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    served.clear()
    assert capsys.readouterr().err == ""
    for split in ("train", "test"):
        assert data.load("auto", root, split, limit=2).name == "digits"
        notice = capsys.readouterr().err
        assert notice.count("\n") == 1 and "built-in digits" in notice
    assert data.load("mnist", root, limit=2).name == "mnist"


def test_silent_mirrors_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ANSWER_SECONDS", 0.1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setitem(data.MIRRORS, "mnist", (url, url))
        error_line(FileNotFoundError, lambda: data.load("mnist", tmp_path), "no answer")
    assert list(tmp_path.iterdir()) == []


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
    error_line(FileNotFoundError, lambda: data.load("cifar10", tmp_path, "test"), "test_batch.bin")


@pytest.mark.parametrize("content", [b"", bytes(3072), bytes(3074), b"\x0a" + bytes(3072)])
def test_cifar_damage_names_the_file(tmp_path, content):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "data_batch_1.bin").write_bytes(bytes(3073))
    (folder / "data_batch_2.bin").write_bytes(content)
    error_line(ValueError, lambda: data.load("cifar10", tmp_path), folder / "data_batch_2.bin")


@needs("cifar-10-batches-bin")
def test_real_cifar_is_read_in_order():
    images = data.load("cifar10", REAL, "test", limit=64)
    content = (REAL / "cifar-10-batches-bin" / "test_batch.bin").read_bytes()
    assert images.labels.tolist() == list(content[: 64 * 3073 : 3073])
    # Neighbouring pixels of photographs resemble one another in every channel: right planes.
    pixels = images.pixels.float()
    assert (pixels.diff(dim=3).abs().mean((0, 2, 3)) < 20).all()
    assert (pixels.diff(dim=2).abs().mean((0, 2, 3)) < 20).all()


def test_stl_goes_down_columns_and_counts_labels_from_one(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    stored = np.random.default_rng(3).integers(0, 256, (3, 3, 96, 96)).astype(np.uint8)
    (folder / "test_X.bin").write_bytes(stored.tobytes())
    (folder / "test_y.bin").write_bytes(bytes([1, 10, 2]))
    images = data.load("stl10", tmp_path, "test")
    np.testing.assert_array_equal(images.pixels, stored.transpose(0, 1, 3, 2))
    assert images.pixels.is_contiguous() and images.labels.tolist() == [0, 9, 1]
    assert len(data.load("stl10", tmp_path, "test", limit=2).labels) == 2
    for labels in (bytes([1, 2]), bytes([0, 1, 2]), bytes([1, 2, 11])):
        (folder / "test_y.bin").write_bytes(labels)
        error_line(ValueError, lambda: data.load("stl10", tmp_path, "test"), folder / "test_y.bin")
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


def test_one_image_is_both_splits(tmp_path):
    path = picture(tmp_path / "a.png")
    train, test = (data.load(path, split=split) for split in ("train", "test"))
    assert train.pixels.shape == (1, 3, 4, 6) and train.sha256 == test.sha256


@pytest.mark.parametrize("form", ["JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_format_is_told_from_content(tmp_path, form):
    path = picture(tmp_path / "lies.png", format=form)
    assert data.load(path).pixels.float().sub(7).abs().max() <= 2


@needs("photos")
def test_real_jpeg_under_a_png_name():
    images = data.load(REAL / "photos" / "labi.png")
    assert images.pixels.shape[:2] == (1, 3) and images.pixels.float().std() > 10


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", exif=exif)
    assert data.load(tmp_path / "a.jpg").pixels.shape == (1, 3, 6, 4)


def test_second_size_is_an_error_with_both_sizes(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png", size=(6, 5) if i >= 2 else (6, 4))
    error_line(ValueError, lambda: data.load(tmp_path), tmp_path / "2.png", "6×5", "6×4", "--size")


def test_images_of_several_sizes_are_resized_and_cropped_to_one(tmp_path):
    stripes = np.arange(64) // 16 % 2 * 200  # their edges are at 16, 32 and 48
    for name, (height, width) in {"a": (64, 64), "b": (32, 48), "c": (96, 64)}.items():
        pixels = np.broadcast_to(stripes[:width], (height, width)).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(tmp_path / f"{name}.png")
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


def test_damaged_image_is_named(tmp_path):
    bad = tmp_path / "b.png"
    noise = np.random.default_rng(4).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(bad)
    whole = bad.read_bytes()
    for content in (b"just text\nof two lines", b"", whole[:20], whole[: len(whole) // 2]):
        bad.write_bytes(content)
        error_line(ValueError, lambda: data.load(bad), bad)
        error_line(ValueError, lambda: data.load(tmp_path), bad)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png", size=(30, 30))
    for limit in (100, 800):  # Pillow's error, and what it would only warn about
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        error_line(ValueError, lambda: data.load(path), path, "bomb")


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


def originals(folder):
    """{name: (bytes of a good file, how its mutant is loaded from a path)}."""
    idx = idx_bytes(np.random.default_rng(2).integers(0, 256, (3, 28, 28)).astype(np.uint8))
    rgb = np.random.default_rng(1).integers(0, 256, (9, 11, 3)).astype(np.uint8)
    files = {"images.idx": (idx, data.read_idx), "packed.idx.gz": (gzip.compress(idx),
                                                                   data.read_idx)}
    stored = {"cifar-10-batches-bin/test_batch.bin": ("cifar10", bytes(3073 * 2)),
              "stl10_binary/test_X.bin": ("stl10", bytes(27648 * 2)),
              "stl10_binary/test_y.bin": ("stl10", b"\1\2")}
    for name, (which, content) in stored.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        files[name] = (content, lambda path, which=which: data.load(which, folder, "test"))
    for suffix, form in ((".png", {}), (".jpg", {}), (".gif", {}), (".bmp", {}), (".webp", {}),
                         (".tif", {})):
        content = io.BytesIO()
        Image.fromarray(rgb).save(content, Image.registered_extensions()[suffix], **form)
        files["a" + suffix] = (content.getvalue(), data.load)
    return files


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what is damaged
def test_a_mutated_file_loads_or_is_named_in_one_line(tmp_path):
    import resource
    rng, tried = np.random.default_rng(0), 0
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    for name, (content, load) in originals(tmp_path).items():
        path = tmp_path / name
        for _ in range(FUZZED):
            path.write_bytes(mutant(rng, content))
            tried += 1
            try:
                load(path)
            except (ValueError, OSError) as error:
                named = str(error)
                assert path.name in named or path.parent.name in named, named
                assert "\n" not in named, named
        path.write_bytes(content)
        load(path)
    assert tried >= 11 * FUZZED and time.time() - began < 0.1 * tried
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 512 * 1024  # KiB


def test_nothing_to_load_is_said_clearly(tmp_path):
    error_line(FileNotFoundError, lambda: data.load(tmp_path), tmp_path, "no images")
    error_line(ValueError, lambda: data.load("minst"), "'minst'", "auto, mnist, fashion, cifar10")
    error_line(ValueError, lambda: data.load("two\nlines"))
    error_line(ValueError, lambda: data.load("digits", split="valid"), "valid")


def test_root_is_argument_then_variable_then_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIPDDPM_DATA", str(tmp_path / "a"))
    assert data.default_root() == tmp_path / "a"
    error_line(FileNotFoundError, lambda: data.load("stl10"), tmp_path / "a")
    error_line(FileNotFoundError, lambda: data.load("stl10", tmp_path / "b"), tmp_path / "b")
    monkeypatch.delenv("DIPDDPM_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert data.default_root() == tmp_path / "c" / "dipddpm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.default_root() == tmp_path / ".cache" / "dipddpm"


# ---- digits --------------------------------------------------------------------------------------


def test_digit_is_a_pure_function_of_seed_index_and_split():
    forward = [data.draw_digit(3, i) for i in range(12)]
    for i in reversed(range(12)):
        np.testing.assert_array_equal(data.draw_digit(3, i), forward[i])
        assert (data.draw_digit(4, i) != forward[i]).any()
        assert (data.draw_digit(3, i, "test") != forward[i]).any()


def test_digits_limit_is_a_prefix_and_draws_no_more(monkeypatch):
    images = data.load("digits", limit=30)
    drawn = []
    draw = data.draw_digit
    monkeypatch.setattr(data, "draw_digit", lambda *a: drawn.append(a) or draw(*a))
    assert torch.equal(data.load("digits", limit=11).pixels, images.pixels[:11])
    assert len(drawn) == 11


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


def some_table(columns=5):
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
def test_normals_of_the_kernel_are_those_of_the_reference_to_2_ulp():
    ours = rng.normal_triton((4, 25_000), SEED, 0, 0, 0, DEVICE).cpu()
    theirs = rng.normal_ref((4, 25_000), SEED, 0, 0, 0)
    apart = ours.view(torch.int32).long() - theirs.view(torch.int32).long()  # of one sign: in ulp
    assert (ours * theirs >= 0).all() and apart.abs().max() <= 2


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


def noised(q_sample, shape, dtype):
    x_0, index, *rest = training_batch(shape)
    scaled = x_0[: shape[0]].to(dtype) / 255
    return [q_sample(x_0, index, *rest, dtype=dtype), q_sample(scaled, None, *rest, dtype=dtype)]


def losses_and_gradients(noise_loss, shape, dtype):
    x_0, index, *rest = training_batch(shape)
    scaled, out = x_0[: shape[0]] / 255, kernels.normal(shape, 1, 0, 0, 0, DEVICE).to(dtype)
    return [*noise_loss(out, x_0, index, *rest), *noise_loss(out, scaled, None, *rest)]


def steps(posterior_step, shape, dtype):
    """With noise, and without (sigma = 0); each also in place and of second order."""
    x_t, out = (kernels.normal(shape, 1, 0, draw, 0, DEVICE) for draw in (0, 1))
    table, some = some_table(columns=6), torch.arange(shape[0], device=DEVICE) * 3
    table[2, 4] = 0
    found = []
    for step, sample in (1, 4), (2, 4), (torch.tensor(3, device=DEVICE), some):
        for inplace, second in itertools.product((False, True), repeat=2):
            x, x0_prev = x_t.clone(), -x_t if second else None
            found += [posterior_step(x, out.to(dtype), table, step, SEED, sample,
                                     rng.STEP_NOISE, inplace, x0_prev), x, *[x0_prev] * second]
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
    plain = table[t, 0].view(-1, 1, 1, 1) * x + table[t, 1].view(-1, 1, 1, 1) * eps
    x_t = kernels.q_sample(x_0, index, t, table, *where)
    assert (x_t - plain).abs().max() < 1e-6
    scaled = x_0.float() / 127.5 - 1
    before = scaled.clone()
    assert (kernels.q_sample(scaled, index, t, table, *where) - x_t).abs().max() < 1e-6
    everything = torch.arange(6, device=DEVICE)
    rest = everything, table, SEED, 2, 5
    in_order = kernels.q_sample(x_0, everything, *rest)
    assert torch.equal(kernels.q_sample(x_0, None, *rest), in_order)
    kernels.q_sample(scaled, None, *rest)
    assert torch.equal(scaled, before)  # the data are never written to


@pytest.mark.parametrize("dtype", TYPES)
def test_noise_loss_and_its_gradient_are_those_of_the_formula(dtype):
    x_0, index, t, table, *where = training_batch((4, 3, 5, 5))
    out = kernels.normal((4, 3, 5, 5), 1, 0, 0, 0, DEVICE).to(dtype).requires_grad_()
    by = torch.tensor([0.5, -1.0, 2.0, 0.25], device=DEVICE)
    loss = kernels.noise_loss(out, x_0, index, t, table, *where)
    (gradient,) = torch.autograd.grad((loss * by).sum(), out)

    plain_out = out.detach().double().requires_grad_()
    eps = kernels.normal(out.shape, *where, kernels.TRAIN_NOISE, DEVICE).double()
    _, _, target_x0, target_eps, weight = table.double()[t].view(4, 5, 1, 1, 1).unbind(1)
    target = target_x0 * (x_0[index].double() / 127.5 - 1) + target_eps * eps
    plain = (weight * (plain_out - target) ** 2).mean((1, 2, 3))
    (plain_gradient,) = torch.autograd.grad((plain * by).sum(), plain_out)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert (loss - plain).abs().max() < 1e-5
    assert (gradient - plain_gradient).abs().max() < 1e-6 + 0.1 * torch.finfo(dtype).eps


def test_loss_draws_the_noise_that_q_sample_added():
    x_0, index, t, table, *where = training_batch((4, 1, 7, 3))
    table[:] = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], device=DEVICE)  # x_t = eps = target
    eps = kernels.q_sample(x_0, index, t, table, *where)
    assert kernels.noise_loss(eps, x_0, index, t, table, *where).max() < 1e-12
    assert kernels.noise_loss(eps, x_0, index, t, table, *where, kernels.WEIGHTS).min() > 1


@pytest.mark.parametrize("second", [False, True])
def test_posterior_step_is_its_formula_and_clips(second):
    shape, table = (4, 1, 7, 3), some_table(columns=6)
    x_t, out = (2 * kernels.normal(shape, 1, 0, draw, 0, DEVICE) for draw in (0, 1))
    z = kernels.normal(shape, SEED, 6, 3, kernels.STEP_NOISE, DEVICE)
    a, b, c0, ct, sigma, k = table[3].double()
    x0_hat, x0_prev = (a * x_t + b * out).clamp(-1, 1), out.clone() if second else None
    plain = c0 * (x0_hat + k * (x0_hat - out) * second) + ct * x_t + sigma * z
    found = kernels.posterior_step(x_t, out, table, 3, SEED, 6, x0_prev=x0_prev)
    assert (found - plain).abs().max() < 3e-6
    assert not second or (x0_prev - x0_hat).abs().max() < 1e-6
    same, x0_prev = x_t.clone(), out.clone() if second else None
    assert same is kernels.posterior_step(same, out, table, 3, SEED, 6, inplace=True,
                                          x0_prev=x0_prev)
    assert torch.equal(same, found)


def test_step_with_sigma_zero_adds_no_noise():
    x_t, out = pixels(2, 1, 5, 5).float() / 99, pixels(2, 1, 5, 5).float() / 300
    table = torch.tensor([[0, 1, 1, 0, 0, 0.0]], device=DEVICE)  # x_s = x0_hat = out
    assert torch.equal(kernels.posterior_step(x_t, out, table, 0, SEED, 0), out)


@pytest.mark.parametrize("form", ["ref", pytest.param("triton", marks=needs_triton)])
def test_a_step_lets_the_networks_nan_be_seen(form):
    step = getattr(posterior, f"posterior_step_{form}")
    x_t, out = kernels.normal((2, 2, 1, 5, 5), 1, 0, 0, 0, DEVICE)
    out[1, 0, 2, 3] = math.nan
    assert torch.equal(step(x_t, out, some_table(columns=6), 3, SEED, 0).isnan(), out.isnan())


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

print(json.dumps({f"{case.name}, sm_{chip}": bench.static(case, chip)
                  for chip in bench.CHIPS for case in bench.CASES}))
"""


@needs_triton
def test_machine_code_of_the_kernels_keeps_its_promises(tmp_path):
    """No local memory; 32-bit accesses for uint8 and 128-bit ones for float32, but for the scalars
    of a sample; at most 50 instructions an element where noising and the reverse step are plain."""
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
        if name.startswith(("normal", "uniform", "q_sample", "posterior_step fp32")):
            assert row["instructions"] <= 50, (name, row)
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


def bare_run(folder):
    """What train_ddpm needs of a Run, without a command line."""
    return SimpleNamespace(folder=Path(folder), device=torch.device("cpu"), stop=False, state={},
                           about={}, autocast=contextlib.nullcontext,
                           seconds=dict.fromkeys(("dip", "train", "sample", "eval", "total"), 0.0))


def test_every_field_of_config_is_a_flag():
    shown = dipddpm.parser().format_help()
    for f in dataclasses.fields(dipddpm.Config):
        assert "--" + f.name.replace("_", "-") in shown


@pytest.mark.parametrize("argv, says", [
    ("", "--mode"),
    ("--mode banana", "banana"),
    ("--mode prior --epochs 0", "--epochs"),
    ("--mode prior --epochs many", "many"),
    ("--mode prior --lr nan", "--lr"),
    ("--mode prior --lr 0", "--lr"),
    ("--mode prior --width 20", "--width"),
    ("--mode guide --alpha 0", "--alpha must be at least 0.01, not 0"),
    ("--mode guide --window 1", "--window must be below 1"),
    ("--mode guide --data digits --task sr,inpaint", "--mode guide takes one task"),
    ("--mode dip --data digits --dip-arch resnet18", "resnet18 makes one pixel of 28x28"),
    ("--mode prior --eta 2", "--eta"),
    ("--mode prior --t-start 1001", "--t-start 1001 is beyond"),
    ("--mode prior --order 3", "--order must be at most 2, not 3"),
    ("--mode prior --grid banana", "banana is none of uniform"),
    ("--mode guide --data digits --noise own", "--noise own is for --mode dip"),
    ("--mode dip --data digits --noise own --sigma 0.1", "--noise own is for --mode dip without"),
    ("--mode dip --data digits --noise estimated --task sr", "no noise level can be told from sr"),
    ("--mode dip --data digits --crop 40", "digits: no middle of 40×40 in 28×28 pixels"),
    ("--mode dip --data digits --size 9999", "digits: 9999×9999 is more than 33554432 pixels"),
    ("--mode guide --data digits --arms split,es-wmv", "es-wmv is none of plain, mean, split"),
    ("--mode guide --data digits --sigma 0 --arms ladder", "--arms ladder: there is no noise"),
    ("--mode prior --dip-source code", "code is none of images, network"),
    ("--mode prior --task deblur", "deblur is none of generate, denoise"),
    ("--mode prior --train smoothed --dip-source codes", "smoothed needs --dip-source network"),
    ("--mode prior --t-start 700,40 --nfe 3,50", "--nfe 50 is above --t-start 40"),
    ("--mode ddpm --timesteps 20", "--nfe 50 is above --t-start 20"),
    ("--mode prior --nfe 3,,5", "--nfe: '3,,5' is no list of int"),
    ("--mode prior --no-such-flag", "--no-such-flag"),
    ("--mode prior --device tpu9", "tpu9"),
    ("--mode prior --data /no/such/folder", "/no/such/folder"),
    ("--mode prior --data mnist --data-dir {tmp}/damaged", "train-images-idx3-ubyte"),
    ("--mode ddpm --resume {tmp}", "no run there"),
    ("--mode sample --resume {tmp}", "no run there"),
    ("--mode ddpm --out {tmp}", "not empty"),
    ("--mode ddpm --sweep banana=1,2", "banana"),
    ("--mode ddpm --sweep seed=1,2 --sweep banana=1", "banana"),
    ("--mode ddpm --overwrite", "--overwrite needs --out"),
    ("--mode ddpm --sweep seed=0,1 --sweep seed=2", "with NAME a flag's name, once"),
    ("--mode guide --arms mean --replicas 1", "--arms mean needs --replicas of at least 2"),
    ("--mode prior --sweep train=full,banana", "banana is none of"),
    ("--mode prior --sweep epochs=1,0", "--epochs must be at least 1"),
])
def test_misuse_is_one_line_and_status_2(argv, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "damaged" / "mnist").mkdir(parents=True)
    for file in data.DIGESTS["mnist"]:
        (tmp_path / "damaged" / "mnist" / file).write_bytes(b"\0\0\x08\x03\0\0")  # a cut header
    monkeypatch.chdir(tmp_path)
    status, _, err = run_main(argv.format(tmp=tmp_path).split(), capsys)
    assert status == 2 and says in err and err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()  # misuse leaves no empty run behind


FLAGS = int(os.environ.get("FLAGS", 60))
EXTREME = {int: ["0", "-1", "1", "1000000000000", str(10**25), "nan", "1.5", ""],
           float: ["0", "-1", "1e-30", "1e30", "nan", "inf", "-inf", ""]}


def extreme_flags():
    """Every number of the command line at each of its extremes, with short runs that use it."""
    runs = ("--mode prior --epochs 1 --width 8 --batch 15 --timesteps 40 --samples 4 --nfe 2 "
            "--dip-iters 2 --dip-width 4", "--mode guide --samples 1 --sigma 0.1 --dip-iters 20 "
            "--dip-width 4 --replicas 2")
    numbers = [(f.name, f.type) for f in dataclasses.fields(dipddpm.Config)
               if f.type in (int, float)]
    numbers += [("eta", float), ("order", int), ("nfe", int), ("t_start", int)]
    return [(run, f"--{name.replace('_', '-')}={value}") for run in runs for name, kind in numbers
            for value in EXTREME[kind]]


def test_a_number_beyond_all_bounds_is_obeyed_or_refused_in_one_line(tmp_path, capsys):
    pictures, _ = little_training(tmp_path)
    cases = extreme_flags()
    chosen = random.Random(6).sample(cases, min(FLAGS, len(cases)))
    old = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        for i, (run, flag) in enumerate(chosen):
            signal.setitimer(signal.ITIMER_REAL, 3, 2)  # who asks for a trillion waits for ever
            status, _, err = run_main([*run.split(), "--data", pictures[-1], flag, "--out",
                                       tmp_path / str(i)], capsys)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert status in (0, 1, 2, 130), (run, flag, status)
            assert err.count("\n") == (status != 0), (run, flag, err)
            assert status != 2 or not (tmp_path / str(i)).exists(), (run, flag)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_sweep_gives_one_config_for_each_value():
    swept = dipddpm.configs("--mode prior --sweep seed=0,1,2 --out here".split())
    assert [(c.seed, c.out, c.sweep) for c in swept] == [
        (i, str(Path("here") / f"seed={i}"), ()) for i in range(3)]
    swept = dipddpm.configs("--mode dip --sweep dip-lr=0.1,0.2 --sweep seed=3,4 --out here".split())
    assert [(c.dip_lr, c.seed, c.out) for c in swept] == [
        (lr, i, str(Path("here") / f"dip-lr={lr}-seed={i}")) for lr in (0.1, 0.2) for i in (3, 4)]


# ------------------------------------------------------------------ schedule and tables


def test_linear_schedule_is_the_papers():
    ab = dipddpm.linear_schedule(1000).alpha_bar
    beta = 1 - ab / torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]])
    torch.testing.assert_close(beta, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    ab = dipddpm.linear_schedule(100).alpha_bar  # as much noise in fewer steps
    beta = 1 - ab / torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]])
    torch.testing.assert_close(beta, torch.linspace(1e-3, 0.2, 100, dtype=torch.float64))


def test_cosine_schedule_is_f_of_t_until_beta_is_clipped():
    ab = dipddpm.cosine_schedule(100).alpha_bar
    f = [math.cos(math.pi / 2 * (t / 100 + 0.008) / 1.008) ** 2 for t in range(101)]
    assert torch.allclose(ab[:98], torch.tensor(f[1:99], dtype=torch.float64) / f[0], rtol=1e-12)
    assert ab[99] == pytest.approx(ab[98].item() * 0.001)  # beta clipped at 0.999


@pytest.mark.parametrize("T", [2, 100, 1000])
@pytest.mark.parametrize("name", dipddpm.SCHEDULES)
def test_alpha_bar_falls_from_nearly_one_to_nearly_zero(name, T):
    ab = dipddpm.SCHEDULES[name](T).alpha_bar
    assert ab.dtype == torch.float64 and len(ab) == T and (ab.diff() < 0).all() and (ab > 0).all()
    assert ab[0] > 0.3 and ab[-1] < 2e-3 or T == 2


def test_tables_keep_precision_where_alpha_bar_is_nearly_one():
    table = dipddpm.forward_table(dipddpm.linear_schedule(1000), "eps")
    assert table[0, 1].item() == pytest.approx(0.01, rel=1e-6)  # sqrt(1 - alpha_bar) = sqrt(1e-4)


@pytest.mark.parametrize("predict", dipddpm.PREDICTIONS)
def test_every_prediction_gives_back_x_0(predict):
    schedule = dipddpm.cosine_schedule(50)
    x_0, eps = torch.linspace(-1, 1, 9).double(), torch.linspace(2, -2, 9).double()
    for t in (0, 7, 30, 48):
        ab = schedule.alpha_bar[t]
        (p, q), (a, b), _ = dipddpm.PREDICTIONS[predict](ab)
        x_t = ab.sqrt() * x_0 + (1 - ab).sqrt() * eps
        torch.testing.assert_close(a * x_t + b * (p * x_0 + q * eps), x_0)


def test_v_is_the_published_combination():
    ab = torch.tensor(0.36, dtype=torch.float64)
    (p, q), _, _ = dipddpm.predict_v(ab)
    assert (p.item(), q.item()) == pytest.approx((-0.8, 0.6))  # v = 0.6 eps - 0.8 x_0


def test_min_snr_weights_are_one_objective_in_three_scales():
    # An error d in x_0 is d / b in the target, so weight / b^2 must be min(S, 5) for all three.
    ab = dipddpm.cosine_schedule(20).alpha_bar
    S = ab / (1 - ab)
    for predict in dipddpm.PREDICTIONS.values():
        _, (_, b), weight = predict(ab)
        torch.testing.assert_close(weight / b**2, S.clamp(max=5))


@pytest.mark.parametrize("predict", dipddpm.PREDICTIONS)
def test_posterior_at_eta_one_is_ddpm(predict):
    schedule = dipddpm.linear_schedule(200)
    ab = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar])
    rows = dipddpm.reverse_table(schedule, predict, list(range(200, -1, -1)), eta=1)
    for tau in (200, 77, 2, 1):
        alpha, beta = ab[tau] / ab[tau - 1], 1 - ab[tau] / ab[tau - 1]
        _, _, c0, ct, sigma, _, _ = rows[200 - tau].double()
        # Ho et al. 2020, eq. 7
        assert c0 == pytest.approx((ab[tau - 1].sqrt() * beta / (1 - ab[tau])).item(), rel=2e-5)
        assert ct == pytest.approx((alpha.sqrt() * (1 - ab[tau - 1]) / (1 - ab[tau])).item(),
                                   rel=2e-5, abs=1e-9)
        assert sigma**2 == pytest.approx(((1 - ab[tau - 1]) / (1 - ab[tau]) * beta).item(),
                                         rel=2e-5, abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_reverse_step_has_the_marginal_of_the_forward_process(eta):
    # With x0_hat = x_0: the signal's share is sqrt(ab_s), the noise's variance 1 - ab_s.
    schedule = dipddpm.cosine_schedule(100)
    taus = dipddpm.time_grid(schedule, 90, 7)
    rows = dipddpm.reverse_table(schedule, "x0", taus, eta).double()
    for row, tau, next_tau in zip(rows, taus, taus[1:]):
        ab_t, ab_s = schedule.at(tau), schedule.at(next_tau)
        _, _, c0, ct, sigma, _, w = row
        assert w == pytest.approx(math.sqrt(ab_s), rel=1e-6)
        assert c0 + ct * math.sqrt(ab_t) == pytest.approx(math.sqrt(ab_s), rel=1e-6)
        assert ct**2 * (1 - ab_t) + sigma**2 == pytest.approx(1 - ab_s, abs=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_last_step_adds_no_noise(eta):
    rows = dipddpm.reverse_table(dipddpm.cosine_schedule(100), "v", [60, 20, 0], eta)
    assert rows[-1, 2:].tolist() == [1, 0, 0, 0, 1]


@pytest.mark.parametrize("grid", dipddpm.GRIDS)
def test_time_grid_holds_both_ends_and_never_stands_still(grid):
    schedule = dipddpm.cosine_schedule(1000)
    for t_start in (1, 2, 7, 600, 1000):
        for nfe in {1, 2, 3, 5, 50, t_start} & set(range(1, t_start + 1)):
            taus = dipddpm.time_grid(schedule, t_start, nfe, grid)
            assert (taus[0], taus[-1], len(taus)) == (t_start, 0, nfe + 1)
            assert all(s < t for t, s in zip(taus, taus[1:]))


def test_time_grids_are_even_in_what_they_are_named_for():
    schedule = dipddpm.cosine_schedule(1000)
    quadratic = np.sqrt(dipddpm.time_grid(schedule, 900, 10, "quadratic"))
    assert np.diff(quadratic) == pytest.approx(-3, abs=0.1)
    taus = dipddpm.time_grid(schedule, 900, 10, "logsnr")[:-1]
    snr = torch.tensor([schedule.at(tau) for tau in taus]).logit()
    assert taus[-1] == 1 and snr.diff().std() < 0.05 * snr.diff().mean()
    snr = schedule.alpha_bar.logit().numpy()  # from the last step's, which lies far below the rest
    even = np.linspace(snr[999], snr[0], 5)
    assert dipddpm.time_grid(schedule, 1000, 5, "logsnr")[:-1] == [
        1 + np.abs(snr - v).argmin() for v in even]


@pytest.mark.parametrize("grid", dipddpm.GRIDS)
def test_a_grid_takes_what_it_asks_for_wherever_that_is_free(grid):
    schedule, taken = dipddpm.cosine_schedule(60), 0
    for t_start, nfe in itertools.product((60, 52), (2, 5, 12, 20, 40, 50)):
        wanted = [round(tau) for tau in dipddpm.GRIDS[grid](schedule, t_start, nfe)]
        taus = dipddpm.time_grid(schedule, t_start, nfe, grid)
        for i in range(1, nfe):
            if nfe - i <= wanted[i] < taus[i - 1]:
                assert taus[i] == wanted[i]
                taken += nfe - i < taus[i] == taus[i - 1] - 1
    assert taken or grid == "quadratic"  # some of them just free


# ------------------------------------------------------------------ U-Net


@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (1, 3, 32, 32), (3, 1, 8, 12), (2, 1, 7, 7),
                                   (1, 3, 18, 33)])
def test_unet_keeps_shape_and_starts_at_zero(shape):
    net = dipddpm.make_unet(config(width=8), shape[1], "cpu")
    out = net(torch.randn(shape), torch.arange(shape[0]))
    assert out.shape == shape and (out == 0).all()


def test_unet_hears_the_time_in_every_block():
    torch.manual_seed(0)
    net = dipddpm.UNet(1, width=8)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(2, 1, 8, 8)
    net(x, torch.tensor([3, 800])).square().sum().backward()
    assert not torch.equal(net(x, torch.tensor([3, 3])), net(x, torch.tensor([800, 800])))
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_unet_weights_depend_on_the_seed_and_leave_global_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    nets = [dipddpm.make_unet(config(seed=s, width=8), 1, "cpu") for s in (0, 0, 1)]
    first, again, other = (n.enter.weight for n in nets)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_unet_weights_have_the_default_distribution_and_zeros_where_wanted():
    net = dipddpm.make_unet(config(width=32), 1, "cpu")
    for layer in (net.shrink, net.embed[0], net.middle.conv1):
        bound = layer.weight[0].numel() ** -0.5  # uniform between its two signs
        assert layer.weight.std().item() == pytest.approx(3**-0.5 * bound, rel=0.05)
        for p in layer.weight, layer.bias:
            assert 0.9 * bound < p.max() <= bound and -bound <= p.min() < -0.9 * bound
    assert net.leave.weight.count_nonzero() == net.middle.conv2.bias.count_nonzero() == 0
    assert net.norm.weight.eq(1).all() and net.norm.bias.eq(0).all()


def shaken(net):
    """The network with small random numbers in every weight: none is at its first value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return net


def group_norm(x, layer):
    """GroupNorm in 8 groups by its definition."""
    B, C, H, W = x.shape
    g = x.reshape(B, 8, -1)
    g = (g - g.mean(2, keepdim=True)) / (g.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return g.view_as(x) * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)


def same(x, layer, stride=1):
    """A 3x3 convolution with a border of zeros."""
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), layer.weight, layer.bias, stride)


def residual_block(x, emb, block):
    h = same(F.silu(group_norm(x, block.norm1)), block.conv1)
    scale, shift = (emb @ block.time.weight.T + block.time.bias)[:, :, None, None].split(
        x.shape[1], 1)
    return x + same(F.silu(group_norm(h, block.norm2) * (1 + scale) + shift), block.conv2)


def test_the_time_embedding_has_geometric_frequencies():
    t, net = torch.tensor([0, 1, 250, 999]), dipddpm.UNet(1, 16)
    k = torch.arange(8)
    angle = t[:, None] * 10_000.0 ** (-k / 8)
    torch.testing.assert_close(net.time_embedding(t),
                               torch.cat([angle.sin(), angle.cos()], 1).float())


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
    emb = net.embed(net.time_embedding(t))
    assert emb.shape == (3, 32)
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


# ------------------------------------------------------------------ DDPM training


def test_epoch_order_is_a_new_permutation_each_epoch():
    orders = [dipddpm.epoch_order(config(), 1000, epoch, "cpu") for epoch in (0, 1)]
    assert all(torch.equal(o.sort().values, torch.arange(1000)) for o in orders)
    assert (orders[0] == orders[1]).float().mean() < 0.02


def test_a_logs_rows_are_its_steps_mean_loss_and_rate(tmp_path, monkeypatch):
    cfg, losses = config(epochs=14, batch=8, width=8, timesteps=20, lr=1e-3), []
    real = dipddpm.denoising_loss

    def told(*args):
        loss = real(*args)
        losses.append(loss.sum().item() / 8)
        return loss

    monkeypatch.setattr(dipddpm, "denoising_loss", told)
    x_0 = pixels(70, 1, 8, 8).cpu()  # 8 steps an epoch, 112 in all
    _, rows, seconds = dipddpm.train_ddpm(cfg, x_0, 20, bare_run(tmp_path), "full")
    assert [row[1:3] for row in rows] == [[50, 6.25], [100, 12.5], [112, 14.0]]
    begin = 0
    for _, step, _, at, loss, lr in rows:
        assert loss == pytest.approx(np.mean(losses[begin:step]), rel=1e-5)
        assert lr == dipddpm.learning_rate(cfg, step - 1, 112)
        assert 0 < at <= seconds + 0.01
        begin = step


def test_training_steps_are_adamws_with_a_clipped_gradient(tmp_path, monkeypatch):
    cfg, x_0 = config(epochs=3, batch=6, width=8, timesteps=20, lr=0.1), pixels(6, 1, 8, 8).cpu()
    run, net, real = bare_run(tmp_path), dipddpm.make_unet(cfg, 1, "cpu"), dipddpm.denoising_loss
    monkeypatch.setattr(dipddpm, "denoising_loss", lambda *a: real(*a) * (1, 30, 3)[a[8].item()])
    dipddpm.train_ddpm(cfg, x_0, 20, run, "full")
    coef = dipddpm.forward_table(dipddpm.cosine_schedule(20), cfg.predict)
    mean, square, norms = {}, {}, []
    for n in range(3):
        net.zero_grad()
        index = dipddpm.epoch_order(cfg, 6, n, "cpu")
        dipddpm.denoising_loss(cfg, net, x_0, index, torch.arange(6), 6, 20, coef, torch.tensor(n),
                               contextlib.nullcontext).mean().backward()
        norms.append(sum(p.grad.square().sum() for p in net.parameters()) ** 0.5)
        lr = dipddpm.learning_rate(cfg, n, 3)
        for name, p in net.named_parameters():
            g = p.grad / max(1, norms[-1])
            mean[name] = 0.9 * mean.get(name, 0) + 0.1 * g
            square[name] = 0.99 * square.get(name, 0) + 0.01 * g**2
            m, v = mean[name] / (1 - 0.9**(n + 1)), square[name] / (1 - 0.99**(n + 1))
            p.data = p.data * (1 - lr * 0.01) - lr * m / (v.sqrt() + 1e-8)
    assert norms[0] < 1 < norms[1]
    for name in "leave.weight", "leave.bias":  # a bias before a norm has rounding for a gradient
        torch.testing.assert_close(run.state["full"]["net"][name], net.get_parameter(name),
                                   rtol=1e-4, atol=1e-5)


def test_an_epoch_of_training_sees_every_image_once(tmp_path, monkeypatch):
    seen, real = [], dipddpm.denoising_loss
    monkeypatch.setattr(dipddpm, "denoising_loss", lambda cfg, net, x_0, index, *a: (
        seen.append(index.tolist()), real(cfg, net, x_0, index, *a))[1])
    cfg = config(epochs=3, batch=5, width=8, timesteps=20)
    dipddpm.train_ddpm(cfg, pixels(20, 1, 8, 8).cpu(), 20, bare_run(tmp_path), "full")
    epochs = [sum(seen[k:k + 4], []) for k in (0, 4, 8)]
    assert epochs == [dipddpm.epoch_order(cfg, 20, e, "cpu").tolist() for e in range(3)]


def test_timesteps_put_one_draw_in_each_stratum():
    position = torch.arange(100)
    for step in range(20):
        t = dipddpm.draw_t(config(), position, 100, 500, step)
        assert torch.equal(t // 5, position)


def test_timesteps_reach_both_ends():
    t = torch.stack([dipddpm.draw_t(config(), torch.arange(4), 4, 12, s) for s in range(100)])
    assert t.unique().tolist() == list(range(12))


def test_learning_rate_warms_up_and_ends_at_zero():
    cfg = config(lr=1.0)
    rates = [dipddpm.learning_rate(cfg, s, 1000) for s in range(1000)]
    assert rates[0] < 0.04 and max(rates) > 0.99 and rates[-1] < 1e-5


def test_average_follows_closely_at_first_and_slowly_later():
    ema, net = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for n, share in ((0, 0.9), (90, 1 - 91 / 100), (10**6, 0.001)):
        torch.nn.init.zeros_(ema.weight), torch.nn.init.ones_(net.weight)
        dipddpm.update_average(ema, net, torch.tensor(n))
        assert ema.weight.item() == pytest.approx(share, rel=1e-4)


def tiny_images(n=64):
    """Uint8 [n, 1, 8, 8]: dark with one bright quarter."""
    x = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    for i in range(n):
        x[i, 0, 4 * (i % 2):4 * (i % 2) + 4, 4 * (i // 2 % 2):4 * (i // 2 % 2) + 4] = 255
    return x


TINY = dict(width=8, batch=16, epochs=25, timesteps=50, lr=5e-3)


def test_training_learns_and_sampling_returns_the_data(tmp_path):
    cfg = config(**TINY | dict(epochs=100))
    net, rows, _ = dipddpm.train_ddpm(cfg, tiny_images(), 50, bare_run(tmp_path), "full")
    assert rows[-1][4] < 0.5 * rows[0][4]
    numbers = torch.arange(32)
    x = kernels.normal((32, 1, 8, 8), 0, numbers, 0, kernels.INIT_NOISE)
    x = dipddpm.sample(cfg, net, x, 50, 25, 0.0, numbers, contextlib.nullcontext)
    nearest = torch.cdist(x.flatten(1), tiny_images(4).flatten(1) / 127.5 - 1).min(1)
    assert nearest.values.median() < 3  # two unrelated ones are 11.3 apart, noise is 8 from any
    assert len(nearest.indices.unique()) == 4


def test_truncated_training_never_asks_about_larger_t(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(dipddpm.UNet, "time_embedding",
                        lambda self, t: asked.append(t) or torch.zeros(len(t), self.width))
    cfg = config(**TINY | dict(epochs=5))
    dipddpm.train_ddpm(cfg, tiny_images(), 30, bare_run(tmp_path), "truncated")
    assert 25 <= torch.cat(asked).max() < 30


def test_a_stopped_and_continued_training_ends_in_the_same_bits(tmp_path):
    cfg, x = config(**TINY), tiny_images()
    whole, rows, _ = dipddpm.train_ddpm(cfg, x, 50, bare_run(tmp_path), "full")

    run = bare_run(tmp_path / "stopped")
    run.folder.mkdir()
    real = kernels.q_sample

    def stop_at_step_37(*args):
        run.stop = args[6] == 37
        return real(*args)

    dipddpm.kernels.q_sample = stop_at_step_37
    try:
        with pytest.raises(KeyboardInterrupt):
            dipddpm.train_ddpm(cfg, x, 50, run, "full")
    finally:
        dipddpm.kernels.q_sample = real
    again = bare_run(run.folder)
    again.state = edge.load_checkpoint(run.folder)["networks"]
    assert again.state["full"]["step"] == 38
    continued, log, _ = dipddpm.train_ddpm(cfg, x, 50, again, "full")
    for p, q in zip(whole.parameters(), continued.parameters()):
        assert torch.equal(p, q)
    assert [row[:3] + row[4:] for row in rows] == [row[:3] + row[4:] for row in log]  # but seconds


SPLIT = """
import contextlib, sys
import torch
import torch.distributed as dist
import dipddpm, test_dipddpm

rank, world = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
cfg, x_0 = test_dipddpm.config(**test_dipddpm.TINY), test_dipddpm.tiny_images()
B, coef = 16, dipddpm.forward_table(dipddpm.cosine_schedule(50), "v")
net = dipddpm.make_unet(cfg, 1, "cpu")
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank,
                            world_size=world)
    net = torch.nn.parallel.DistributedDataParallel(net)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
position, losses = torch.arange(B).chunk(world)[rank], []
for step in range(100):
    order = dipddpm.epoch_order(cfg, len(x_0), step // 4, "cpu")
    loss = dipddpm.denoising_loss(cfg, net, x_0, order[step % 4 * B + position], position, B, 50,
                                  coef, step, contextlib.nullcontext)
    optimizer.zero_grad()
    loss.mean().backward()
    optimizer.step()
    losses.append(loss.detach())
torch.save([torch.stack(losses), *net.parameters()], sys.argv[4])
"""


def test_a_hundred_steps_split_over_two_processes_are_those_of_one(tmp_path):
    results = {}
    for world in (1, 2):
        store = str(tmp_path / f"store{world}")
        files = [tmp_path / f"{world}-{rank}.pt" for rank in range(world)]
        workers = [subprocess.Popen([sys.executable, "-c", SPLIT, str(rank), str(world), store,
                                     str(files[rank])], cwd=Path(__file__).parent)
                   for rank in range(world)]
        assert [w.wait(timeout=120) for w in workers] == [0] * world
        results[world] = [torch.load(file) for file in files]
    (alone,), (half, other) = results[1], results[2]
    losses = torch.cat([half[0], other[0]], dim=1)  # [step, position]
    torch.testing.assert_close(losses, alone[0], rtol=1e-4, atol=1e-5)
    for p, q, r in zip(alone[1:], half[1:], other[1:]):
        assert torch.equal(q, r)
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_snapshots_are_the_averages_of_their_moments(tmp_path):
    net, _, _ = dipddpm.train_ddpm(config(**TINY | dict(epochs=3, snapshots=4)), tiny_images(), 50,
                                   bare_run(tmp_path), "full")
    files = sorted((tmp_path / "snapshots").glob("*.pt"))
    assert [f.name for f in files] == [f"full-{n:06d}.pt" for n in (3, 6, 9, 12)]
    last = torch.load(files[-1])
    assert last["step"] == 12
    assert all(torch.equal(v, last["ema"][k]) for k, v in net.state_dict().items())


def test_a_training_stopped_between_two_rows_logs_what_it_would_have(tmp_path, monkeypatch):
    cfg, steps, real = config(**TINY), itertools.count(1), dipddpm.denoising_loss
    _, whole, _ = dipddpm.train_ddpm(cfg, tiny_images(), 50, bare_run(tmp_path), "full")
    run = bare_run(tmp_path)

    def stopping(*args):
        run.stop = next(steps) == 30
        return real(*args)

    monkeypatch.setattr(dipddpm, "denoising_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        dipddpm.train_ddpm(cfg, tiny_images(), 50, run, "full")
    _, rows, _ = dipddpm.train_ddpm(cfg, tiny_images(), 50, run, "full")
    assert [row[:3] + row[4:] for row in rows] == [row[:3] + row[4:] for row in whole]


def test_gradients_that_are_never_finite_end_the_run_and_say_so(tmp_path):
    with pytest.raises(RuntimeError, match="no finite gradient in 50 steps .* --lr 1e\\+30"):
        dipddpm.train_ddpm(config(**TINY | dict(lr=1e30)), tiny_images(), 50, bare_run(tmp_path),
                           "full")


def test_gradients_that_are_no_longer_finite_end_the_run_at_the_next_row(tmp_path, monkeypatch):
    real, steps = dipddpm.denoising_loss, itertools.count(1)
    monkeypatch.setattr(dipddpm, "denoising_loss", lambda *a: real(*a) * (
        math.nan if next(steps) > 50 else 1))
    with pytest.raises(RuntimeError, match="no finite gradient in 50 steps up to 100"):
        dipddpm.train_ddpm(config(**TINY | dict(epochs=40)), tiny_images(), 50,
                           bare_run(tmp_path), "full")


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_told(tmp_path, monkeypatch,
                                                                      capsys):
    real, weights = dipddpm.denoising_loss, []

    def spoiled(cfg, net, *a):
        weights.append(copy.deepcopy(net.state_dict()))
        return real(cfg, net, *a) * (math.nan if len(weights) in (30, 31) else 1)

    monkeypatch.setattr(dipddpm, "denoising_loss", spoiled)
    _, rows, _ = dipddpm.train_ddpm(config(**TINY), tiny_images(), 50, bare_run(tmp_path), "full")
    same = [all(torch.equal(v, after[k]) for k, v in before.items())
            for before, after in zip(weights, weights[1:])]
    assert [i for i, unchanged in enumerate(same, 1) if unchanged] == [30, 31]
    assert "2 steps before 50 skipped" in capsys.readouterr().out
    assert all(math.isfinite(row[4]) for row in rows)


def test_the_learning_rate_is_a_ramp_times_half_a_cosine():
    cfg, steps = config(lr=0.5), 200  # 6 of them warm up
    for step in (0, 2, 5, 6, 7, 100, 199):
        ramp = min(1, (step + 1) / 6)
        assert dipddpm.learning_rate(cfg, step, steps) == pytest.approx(
            0.5 * ramp * (1 + math.cos(math.pi * step / steps)) / 2)
    assert dipddpm.learning_rate(cfg, 0, 10) == 0.5  # at least one step of warm-up


def test_every_batch_is_whole():
    some = list(itertools.islice(dipddpm.batches(config(batch=4), 10, "cpu"), 6))
    assert [len(index) for index in some] == [4] * 6
    for epoch in range(3):  # two batches each, of different images
        assert torch.cat(some[2 * epoch:2 * epoch + 2]).unique().numel() == 8
    assert [len(i) for i in itertools.islice(dipddpm.batches(config(), 10, "cpu"), 2)] == [10, 10]


# ------------------------------------------------------------------ sampling


class Oracle(torch.nn.Module):
    """E[x_0 | x_t] for x_0 ~ N(0, s^2), in closed form, as an x_0 prediction."""

    def __init__(self, schedule, s):
        super().__init__()
        ab = schedule.alpha_bar
        self.gain = (ab.sqrt() * s**2 / (ab * s**2 + 1 - ab)).float()

    def forward(self, x_t, t):
        return self.gain[t][:, None, None, None] * x_t


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_exact_denoiser_of_a_gaussian_samples_that_gaussian(eta):
    cfg = config(predict="x0", timesteps=200)
    numbers = torch.arange(500)
    x = kernels.normal((500, 1, 4, 4), 0, numbers, 0, kernels.INIT_NOISE)
    net = Oracle(dipddpm.cosine_schedule(200), 0.2)
    x = dipddpm.sample(cfg, net, x, 200, 200, eta, numbers, contextlib.nullcontext)
    assert x.std().item() == pytest.approx(0.2, rel=0.05) and abs(x.mean()) < 0.01


def test_a_sample_does_not_depend_on_its_batch():
    cfg, net = config(timesteps=20, width=8), Oracle(dipddpm.cosine_schedule(20), 0.5)
    numbers = torch.arange(300)
    x = kernels.normal((300, 1, 4, 4), 0, numbers, 0, kernels.INIT_NOISE)
    many = dipddpm.sample(cfg, net, x, 20, 5, 1.0, numbers, contextlib.nullcontext)
    one = dipddpm.sample(cfg, net, x[270:271], 20, 5, 1.0, numbers[270:271],
                         contextlib.nullcontext)
    torch.testing.assert_close(many[270:271], one)


def test_second_order_is_for_steps_without_noise():
    cfg = dipddpm.Config("prior", eta=(0.0, 1.0), order=(1, 2))
    assert dipddpm.samplers(cfg) == [(0, 1, "uniform"), (0, 2, "uniform"), (1, 1, "uniform")]
    assert dipddpm.samplers(cfg, noisy=True) == [(0, 1, "uniform"), (1, 1, "uniform")]


def test_with_half_the_step_the_error_halves_at_first_order_and_quarters_at_second():
    schedule = dipddpm.cosine_schedule(1000)
    cfg, net = config(predict="x0"), Oracle(schedule, 0.2)
    numbers = torch.arange(64)
    x = kernels.normal((64, 1, 4, 4), 5, numbers, 0, kernels.INIT_NOISE)
    exact = x * 0.2 / math.sqrt(schedule.at(900) * 0.2**2 + 1 - schedule.at(900))

    def error(nfe, order):
        x_0 = dipddpm.sample(cfg, net, x, 900, nfe, 0.0, numbers, contextlib.nullcontext, order)
        return (x_0 - exact).square().mean().sqrt().item()

    assert error(40, 1) == pytest.approx(2 * error(80, 1), rel=0.1)
    assert error(20, 2) > 4 * error(40, 2) > 16 * error(80, 2)


def test_second_order_weighs_the_change_by_the_ratio_of_the_steps():
    schedule, taus = dipddpm.cosine_schedule(1000), [900, 700, 400, 150, 0]
    coef = dipddpm.reverse_table(schedule, "v", taus, 0.0)
    half_log_snr = [0.5 * math.log(schedule.at(tau) / (1 - schedule.at(tau))) for tau in taus[:-1]]
    h = np.diff(half_log_snr)
    np.testing.assert_allclose(coef[:, 5], [0, h[1] / (2 * h[0]), h[2] / (2 * h[1]), 0], rtol=1e-6)


needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


def call_without_waiting(graphed):
    """A call of Graphed that is not recorded and may not wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed.work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_recorded_sampling_equals_the_eager_one_and_neither_waits(monkeypatch):
    cfg, numbers = config(timesteps=50, width=8), torch.arange(16, device=DEVICE)
    net = dipddpm.make_unet(cfg, 1, DEVICE)
    torch.nn.init.normal_(net.leave.weight, std=0.1)
    x = kernels.normal((16, 1, 8, 8), 0, numbers, 0, kernels.INIT_NOISE, DEVICE)
    arguments = cfg, net, x, 50, 20, 1.0, numbers, contextlib.nullcontext
    recorded = dipddpm.sample(*arguments)
    monkeypatch.setattr(edge.Graphed, "__call__", call_without_waiting)
    assert (recorded - dipddpm.sample(*arguments)).abs().max() < 1e-4


@needs_cuda
def test_recorded_training_equals_the_eager_one_and_neither_waits(tmp_path, monkeypatch):
    def losses():
        run = bare_run(tmp_path)
        run.device = torch.device(DEVICE)
        _, rows, _ = dipddpm.train_ddpm(config(**TINY), tiny_images().to(DEVICE), 50, run, "full")
        return [row[4] for row in rows]

    recorded = losses()
    monkeypatch.setattr(edge.Graphed, "__call__", call_without_waiting)
    np.testing.assert_allclose(recorded, losses(), rtol=1e-2)


# ------------------------------------------------------------------ DIP


@pytest.mark.parametrize("arch", dipddpm.ARCHS)
def test_batched_dips_equal_separate_fits(arch):
    # In float64: Adam divides by the gradient's size, so rounding grows by itself in float32.
    y = tiny_images(4).double() / 255
    if arch == "resnet18":  # which narrows what is smaller to one pixel
        y = y.repeat(1, 1, 5, 5)[..., :36, :33]
    cfg = config(dip_width=4, dip_arch=arch)
    members = torch.tensor([0, 1, 2, 17])
    together = dipddpm.fit_dips(cfg, y, members, 5, lambda i: None)
    for k in range(4):
        alone = dipddpm.fit_dips(cfg, y[k:k + 1], members[k:k + 1], 5, lambda i: None)
        torch.testing.assert_close(together[k:k + 1], alone, rtol=1e-6, atol=1e-8)


def test_a_dips_input_is_a_fixed_code_with_fresh_jitter_and_its_output_is_averaged():
    y, codes, outputs, averages = tiny_images(2).float() / 255, [], [], []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: codes.append(args[0]) if isinstance(module, dipddpm.Skip) else None)
    dipddpm.fit_dips(config(dip_width=16, window=0.5), y, torch.arange(2), 20, lambda i: None,
                     watch=lambda i, *now: [kept.append(x.clone()) for kept, x in
                                            zip((outputs, averages), now)])
    hook.remove()
    z = dipddpm.DIPGroup(config(dip_width=16), torch.arange(2), 1, 8, 8).z
    assert 0 <= z.min() < 0.001 and 0.099 < z.max() < 0.1  # U(0, 0.1)
    jitter = torch.cat(codes).view(20, 2, 16, 8, 8) - z
    assert torch.allclose(jitter[:, 0], jitter[:, 1], atol=1e-6)  # shared
    assert jitter[:, 0].std().item() == pytest.approx(1 / 30, rel=0.03)
    assert (jitter[0, 0] * jitter[1, 0]).mean().abs() < 4 / 900 / 1024**0.5
    average = 0
    for n, x in enumerate(outputs):
        average += (1 - min(0.5, (1 + n) / (10 + n))) * (x - average)
        torch.testing.assert_close(averages[n], average)


def test_dips_of_other_numbers_or_seeds_differ():
    y = tiny_images(1).float() / 255
    fits = [dipddpm.fit_dips(config(dip_width=4, seed=seed), y, torch.tensor([member]), 2,
                             lambda i: None) for seed, member in ((0, 0), (0, 1), (1, 0))]
    assert not torch.allclose(fits[0], fits[1]) and not torch.allclose(fits[0], fits[2])
    z = dipddpm.DIPGroup(config(dip_width=4), torch.tensor([0, 1]), 1, 8, 8).z
    assert not torch.allclose(z[0], z[1])


@pytest.mark.parametrize("layer", ["conv", "up"])
def test_layers_of_a_grouped_dip_start_as_pytorchs_do(layer):
    members = torch.arange(200)
    grouped = getattr(dipddpm.Grouped(members, 0), layer)(3, 5, 4, 2)
    torch.manual_seed(0)
    single = [getattr(dipddpm.Single(), layer)(3, 5, 4, 2) for _ in range(200)]
    for name in "weight", "bias":
        ours = getattr(grouped, name)
        theirs = torch.cat([getattr(one, name) for one in single])
        assert ours.shape == theirs.shape
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.02)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)


@pytest.mark.parametrize("size, scales", [((28, 28), 2), ((256, 256), 5), ((9, 30), 1)])
def test_dip_has_the_scales_that_its_image_allows_and_keeps_odd_sizes(size, scales):
    net = dipddpm.Skip(dipddpm.Grouped(torch.arange(2), 0), 2, 3, *size, 4)
    assert net.scales == scales
    if max(size) < 100:
        assert net(torch.rand(1, 4, *size)).shape == (1, 6, *size)


def test_dip_fits_and_its_psnr_is_followed():
    x = tiny_images(2).float() / 255
    curve = []
    average = dipddpm.fit_dips(config(), x, torch.arange(2), 60, lambda i: None,
                               watch=lambda i, _, now: curve.append(measures.psnr(now, x)))
    assert len(curve) == 60
    assert (curve[-1] > curve[9] + 3).all() and 0 <= average.min() <= average.max() <= 1


def measured(task, n=3, sigma=0.0, size=8):
    """Drawn images and what a restoration of them knows."""
    images = data.load("digits", limit=n).pixels if size == 28 else tiny_images(n)
    truth = images.float() / 255
    return truth, dipddpm.corrupt(config(sigma=sigma), task, truth, torch.arange(n))


def test_super_resolution_wants_sizes_that_it_can_divide():
    dipddpm.check_size("inpaint", 7, 9)
    dipddpm.check_size("sr", 6, 8)
    with pytest.raises(ValueError, match="sr-4: images of 8x6 pixels; .* multiples of 4"):
        dipddpm.check_size("sr-4", 6, 8)


@pytest.mark.parametrize("task", dipddpm.TASKS)
def test_back_is_the_pseudo_inverse_of_a(task):
    x, m = measured(task)
    y = m.A(x)
    torch.testing.assert_close(m.A(m.back(y)), y)  # A A+ A = A
    other = random_images(3, 1, 8, 8)
    torch.testing.assert_close(m.back(m.A(m.back(y))), m.back(y))  # A+ A A+ = A+
    left, right = (m.back(m.A(x)) * other).sum(), (x * m.back(m.A(other))).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-5)  # A+ A is symmetric
    assert (task == "denoise") == torch.equal(m.back(m.A(other)), other)


@pytest.mark.parametrize("task", dipddpm.TASKS)
def test_what_is_known_exactly_is_kept_and_what_is_not_is_left(task):
    x, m = measured(task)
    x0_hat = random_images(3, 1, 8, 8) * 2 - 1
    corrected = m.consistent(x0_hat)
    torch.testing.assert_close(m.A((corrected + 1) / 2), m.y)
    change = corrected - x0_hat  # lies in A's range: nothing else moves
    torch.testing.assert_close(m.back(m.A(change)), change)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("tau", [(700, 500), (300, 100), (60, 0)])
@pytest.mark.parametrize("task", ["denoise", "inpaint"])
def test_a_step_from_a_noisy_y_leaves_no_more_noise_than_its_level(task, tau, eta):
    truth = torch.full((400, 1, 8, 8), 0.7)
    m = dipddpm.corrupt(config(sigma=0.25), task, truth, torch.arange(400))
    schedule = dipddpm.cosine_schedule(1000)
    ab_t, ab_s = (torch.tensor(schedule.at(t)) for t in tau)
    sigma = torch.tensor(dipddpm.reverse_table(schedule, "v", tau, eta)[0, 4].item())
    eps, z = (kernels.normal(truth.shape, 5, torch.arange(400), draw, 0) for draw in (0, 1))
    x_0 = truth * 2 - 1
    x_t = ab_t.sqrt() * x_0 + (1 - ab_t).sqrt() * eps
    x_s = m.noisy_step(x_t, x_0, ab_t, ab_s, sigma, z)  # with a perfect x0_hat
    assert (x_s - ab_s.sqrt() * x_0).mean().abs() < 0.02
    noise = (x_s - ab_s.sqrt() * x_0).square().mean()
    assert noise.item() == pytest.approx(1 - ab_s.item(), rel=0.03, abs=1e-6)


def test_a_step_takes_all_of_a_y_whose_noise_is_less_than_its_own():
    x_0, y, z = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.9), torch.ones(1, 1, 2, 2)
    m = dipddpm.Measurement("denoise", y, torch.ones_like(y), 0.1)
    ab_t, ab_s, sigma = torch.tensor([0.3, 0.5, 0.2])
    x_s = m.noisy_step(ab_t.sqrt() * x_0 + (1 - ab_t).sqrt() * 2, x_0, ab_t, ab_s, sigma, z)
    left = 1 - 0.5 - 0.5 * 0.2**2  # of x_s's noise, when y has brought its own: twice 0.1, scaled
    torch.testing.assert_close(x_s, torch.full_like(
        x_s, 0.5**0.5 * 0.8 + (left - 0.2**2) ** 0.5 * 2 + 0.2))


def test_corruption_has_its_noise_only_where_something_is_seen():
    x = torch.full((200, 1, 8, 8), 0.5)
    m = dipddpm.corrupt(config(sigma=0.3), "inpaint", x, torch.arange(200))
    seen = m.mask.bool()
    assert seen.float().mean() == pytest.approx(0.5, abs=0.02) and (m.y[~seen] == 0).all()
    assert m.y[seen].mean() == pytest.approx(0.5, abs=0.02)
    assert m.y[seen].std() == pytest.approx(0.3, rel=0.03)
    assert dipddpm.corrupt(config(), "denoise", x, torch.arange(200)).sigma == 0.1
    assert dipddpm.corrupt(config(), "sr", x, torch.arange(200)).y.shape == (200, 1, 4, 4)


@pytest.mark.parametrize("task", dipddpm.TASKS)
def test_a_restored_image_agrees_with_what_was_measured(task):
    truth, m = measured(task)
    cfg = config(timesteps=40, width=8)
    net = dipddpm.make_unet(cfg, 1, "cpu").eval()
    x_init = kernels.normal((3, 1, 8, 8), 0, torch.arange(3), 0, kernels.INIT_NOISE)
    for order in (1, 2):
        x = dipddpm.sample(cfg, net, x_init, 40, 5, 0.0, torch.arange(3), contextlib.nullcontext,
                           order, measured=m)
        torch.testing.assert_close(m.A((x + 1) / 2), m.y)


def test_a_restoring_step_takes_the_known_image_and_the_networks_noise():
    truth, m = measured("inpaint")
    cfg = config(timesteps=40, width=8, predict="x0")
    net = dipddpm.make_unet(cfg, 1, "cpu").eval()
    x_t = kernels.normal((3, 1, 8, 8), 0, torch.arange(3), 0, kernels.INIT_NOISE)
    film = []
    dipddpm.sample(cfg, net, x_t, 40, 2, 0.0, torch.arange(3), contextlib.nullcontext, film=film,
                   measured=m)
    with torch.no_grad():
        x0_hat = net(x_t, torch.full((3,), 39)).clamp(-1, 1)
    schedule = dipddpm.SCHEDULES[cfg.schedule](40)
    ab_t, ab_s = schedule.at(40), schedule.at(20)
    eps_hat = (x_t - ab_t**0.5 * x0_hat) / (1 - ab_t) ** 0.5
    x_s = ab_s**0.5 * m.consistent(x0_hat) + (1 - ab_s) ** 0.5 * eps_hat
    torch.testing.assert_close(film[1], x_s[:1].float(), rtol=1e-4, atol=1e-4)


def test_held_out_values_decide_the_stop_and_nothing_else():
    truth, m = measured("inpaint", sigma=0.2)
    cfg, members = config(dip_width=4), torch.arange(3)
    u = kernels.uniform(m.y.shape, 0, members, dipddpm.HELD_DRAW, kernels.CORRUPTION)
    spoilt = m._replace(y=torch.where(u < 0.1, torch.full_like(m.y, 9.0), m.y))
    for iters in (1, 10):  # one snapshot: there is nothing to choose
        fits = [dipddpm.fit_dips(cfg, v.y, members, iters, lambda i: None, measured=v)
                for v in (m, spoilt)]
        assert torch.equal(*fits)


def test_a_held_out_stop_is_nearer_to_the_truth_than_the_end():
    truth, m = measured("denoise", n=4, sigma=0.3, size=28)
    stopped = dipddpm.fit_dips(config(dip_width=8), m.y, torch.arange(4), 400, lambda i: None,
                               measured=m)
    curve = []
    ended = dipddpm.fit_dips(config(dip_width=8), m.y, torch.arange(4), 400, lambda i: None,
                             watch=lambda i, _, now: curve.append(measures.psnr(now, truth)))
    oracle = torch.stack(curve).max(0).values.mean()
    assert measures.psnr(stopped, truth).mean() > measures.psnr(ended, truth).mean() + 0.5
    # over seeds it ends 1.7 +- 0.3 dB above the end and 1.5 +- 0.3 dB below the best moment: it
    # sees a tenth less
    assert measures.psnr(stopped, truth).mean() > oracle - 2.5


def test_members_that_leave_a_group_are_not_missed_by_the_others():
    y = tiny_images(4).double() / 255
    share, same = torch.full_like(y, 1 / 64), lambda x: x
    group = dipddpm.DIPGroup(config(dip_width=4), torch.arange(4), 1, 8, 8, y.dtype)
    alone = dipddpm.DIPGroup(config(dip_width=4), torch.tensor([1, 3]), 1, 8, 8, y.dtype)
    which = torch.tensor([False, True, False, True])
    for i in range(3):
        group.iterate(i, y, share, same)
        alone.iterate(i, y[which], share[which], same)
    group.save(torch.ones(4, dtype=torch.bool))
    alone.save(torch.ones(2, dtype=torch.bool))
    group.keep(which)
    for i in range(3, 6):
        x, _ = group.iterate(i, y[which], share[which], same)
        expected, _ = alone.iterate(i, y[which], share[which], same)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-8)
    for g in (group, alone):
        g.rewind(torch.tensor([True, False]))  # the first goes back three iterations
        g.iterate(6, y[which], share[which], same)
    torch.testing.assert_close(group.average, alone.average, rtol=1e-6, atol=1e-8)
    assert (group.age == torch.tensor([4, 7])).all()


def test_the_defaults_of_dips_are_those_that_the_help_tells(tmp_path, monkeypatch):
    seen, run = {}, bare_run(tmp_path)
    x_0 = pixels(8, 1, 8, 8).cpu()
    for arch, make in dipddpm.ARCHS.items():
        monkeypatch.setitem(dipddpm.ARCHS, arch, lambda *a, arch=arch, make=make: (
            seen.update({arch: a[-1]}), make(*a))[1])
    monkeypatch.setattr(dipddpm, "NETWORK_ITERS", 2)
    dipddpm.fit_network(config(), x_0, run)
    assert seen == {"autoencoder": 64}
    decoder, codes = dipddpm.fit_codes(config(batch=4), x_0, run)
    assert decoder.conv1.weight.shape[:2] == (32, 64) and codes.shape == (8, 32)
    members = torch.arange(1)
    for size, mode, width, lr in ((64, "prior", 16, 0.01), (65, "prior", 128, 0.01),
                                  (64, "guide", 16, 0.05), (64, "dip", 16, 0.05),
                                  (65, "dip", 128, 0.01)):
        group = dipddpm.DIPGroup(config(mode=mode), members, 1, 7, size)
        assert (seen["skip"], group.lr, group.Cz) == (width, lr, min(32, width))
        assert group.optimizer.param_groups[0]["lr"] == lr
    asked = []
    monkeypatch.setattr(dipddpm, "fit_in_groups", lambda cfg, y, members, iters, run: (
        asked.append(iters), y)[1])
    x = dipddpm.prior_dip_images(config(), x_0, x_0, run)
    torch.testing.assert_close(x, x_0.float() / 127.5 - 1)
    dipddpm.prior_dip_images(config(dip_iters=7), x_0, x_0, run)
    assert asked == [60, 7]
    assert dipddpm.steps_of_prior(config()) == (600,)
    assert dipddpm.steps_of_prior(config(timesteps=2)) == (1,)


def test_a_dips_input_is_its_code_and_a_thirtieth_of_fresh_noise():
    group, seen = dipddpm.DIPGroup(config(dip_width=4), torch.arange(3), 1, 8, 8), []
    assert 0 <= group.z.min() and 0.09 < group.z.max() <= 0.1
    group.net.register_forward_pre_hook(lambda net, x: seen.append(x[0]))
    for i in (0, 7):
        group.iterate(i, torch.zeros(3, 1, 8, 8), torch.ones(()) / 64, lambda x: x)
        jitter = kernels.normal((1, 4, 8, 8), 0, 0, i, kernels.DIP_JITTER)
        torch.testing.assert_close(seen[-1], (group.z + jitter / 30).view(1, 12, 8, 8))


def test_the_last_iteration_is_looked_at_whatever_its_number():
    averages, y = {}, torch.full((2, 1, 8, 8), 0.8)
    x = dipddpm.fit_dips(config(mode="dip", dip_width=4), y, torch.arange(2), 13, lambda i: None,
                         dipddpm.corrupt(config(sigma=0.0), "denoise", y, torch.arange(2)),
                         watch=lambda i, x, average: averages.update({i: average.clone()}))
    assert torch.equal(x, averages[12]) and not torch.equal(x, averages[9])  # it still gets better


def test_a_held_out_stop_takes_the_look_that_is_nearest_to_what_it_was_not_shown():
    truth, members, looks = random_images(4, 3, 8, 8), torch.arange(4), {}
    m = dipddpm.corrupt(config(sigma=0.5), "denoise", truth, members)
    x = dipddpm.fit_dips(config(mode="dip", dip_width=8), m.y, members, 95, lambda i: None, m,
                         watch=lambda i, x, average: looks.update({i + 1: average.clone()}))
    u = kernels.uniform((4, 1, 8, 8), 0, members, dipddpm.HELD_DRAW, kernels.CORRUPTION)
    times = [*range(10, 100, 10), 95]
    risks = torch.stack([((looks[i] - m.y).square() * (u < 0.1)).sum((1, 2, 3)) for i in times])
    chosen = [times[k] for k in risks.argmin(0)]
    assert min(chosen) < 95  # at this noise some are best before the end
    assert all(torch.equal(x[k], looks[i][k]) for k, i in enumerate(chosen))


@pytest.mark.parametrize("task", [None, "sr"])
def test_fits_in_groups_are_put_where_they_belong(task, tmp_path, monkeypatch):
    asked, told = [], []

    def fit(cfg, y, members, iters, progress, part):
        asked.append((y, members.tolist(), iters, part))
        progress(2)
        return members[:, None, None, None] - 1.5 + torch.zeros(len(y), 1, 8, 8)

    monkeypatch.setattr(dipddpm, "fit_dips", fit)
    monkeypatch.setattr(edge, "Progress", lambda name, steps, per_step: (
        told.append((steps, per_step)), told.append)[1])
    members, truth = torch.tensor([1, 2, 3, 1, 2]), random_images(5, 1, 8, 8)
    m = task and dipddpm.corrupt(config(), task, truth, members)
    y = m.y if task else truth
    x = dipddpm.fit_in_groups(config(dip_group=2), y, members, 7, bare_run(tmp_path), m)
    assert x.shape == (5, 1, 8, 8) and x[:, 0, 3, 4].tolist() == [0, 0.5, 1, 0, 0.5]
    assert [a[1:3] for a in asked] == [([1, 2], 7), ([3, 1], 7), ([2], 7)]
    assert torch.equal(torch.cat([a[0] for a in asked]), y) and told == [(21, 2), 2, 9, 16]
    assert not task or torch.equal(torch.cat([a[3].y for a in asked]), y)


def test_what_a_fit_is_not_shown_does_not_move_it():
    y, members, averages = torch.rand(2, 1, 8, 8), torch.arange(2), []
    u = kernels.uniform((2, 1, 8, 8), 0, members, dipddpm.HELD_DRAW, kernels.CORRUPTION)
    m = dipddpm.corrupt(config(sigma=0.0), "denoise", y, members)
    for shown in (y, torch.where(u < 0.1, y + 5, y), torch.where((0.1 < u) & (u < 0.15), y + 5, y)):
        dipddpm.fit_dips(config(mode="dip", dip_width=4), shown, members, 6, lambda i: None, m,
                         watch=lambda i, x, average: averages.append(average.clone()))
    assert torch.equal(averages[5], averages[11]) and not torch.equal(averages[5], averages[17])


# ------------------------------------------------------------------ network


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (64, 96)])
@pytest.mark.parametrize("arch", dipddpm.ARCHS)
def test_network_dips_keep_the_size_of_an_image(arch, size):
    f = dipddpm.ARCHS[arch](dipddpm.Single(), 3, 3, *size, 8).eval()
    assert f(torch.rand(2, 3, *size)).shape == (2, 3, *size)


def test_resnet18_has_the_papers_parameters():
    encoder = dipddpm.ResNet18(dipddpm.Single(), 3, 3, 32, 32, 64)
    count = sum(p.numel() for part in (encoder.enter, encoder.blocks) for p in part.parameters())
    # 11,689,512 of the published one, without its classifier; its convolutions have no biases
    biases = sum(m.bias.numel() for part in (encoder.enter, encoder.blocks) for m in part.modules()
                 if isinstance(m, torch.nn.Conv2d))
    assert count - biases == 11_689_512 - 513_000


def test_a_network_dip_sees_pixels_in_0_to_1_and_answers_in_minus_1_to_1(tmp_path, monkeypatch):
    x, seen = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8), []

    class Copies(torch.nn.Conv2d):
        def forward(self, x):
            seen.append(x)
            return x + 0 * self.weight.sum()

    monkeypatch.setitem(dipddpm.ARCHS, "conv2", lambda make, *_: Copies(1, 1, 1))
    prior = dipddpm.prior_dip_network(config(dip_arch="conv2", dip_iters=1, batch=1), x, x,
                                      bare_run(tmp_path))
    torch.testing.assert_close(prior.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    assert len(seen) == 2 and all(torch.equal(s, x / 255) for s in seen)


def test_the_tables_were_made_with_these_settings():
    assert (dipddpm.NETWORK_ITERS, dipddpm.NETWORK_RATE) == (300, 1e-3)
    assert (dipddpm.CODE_EPOCHS, dipddpm.CODE_RATES) == (3, (2e-3, 1e-2))


def test_draws_of_one_stream_have_numbers_of_their_own():
    for names in (("MASK_DRAW", "HELD_DRAW", "SPLIT_DRAW", "RUNG_DRAW"),
                  ("CELL_DRAW", "CODE_DRAW", "CENTRE_DRAW", "GAUSS_DRAW")):
        assert len({0, *(getattr(dipddpm, name) for name in names)}) == 5


@pytest.mark.parametrize("arch", dipddpm.ARCHS)
def test_a_network_dip_learns_its_data_set_and_is_a_function_of_the_seed(arch, tmp_path):
    cfg = config(dip_arch=arch, dip_width=8, dip_iters=200, batch=16)
    x, run = tiny_images(64), bare_run(tmp_path)
    prior = dipddpm.prior_dip_network(cfg, x, x, run)
    assert torch.equal(prior, dipddpm.prior_dip_network(cfg, x, x, run))
    start = dipddpm.prior_dip_network(config(dip_arch=arch, dip_width=8, dip_iters=1, batch=16), x,
                                      x, run)
    real = x / 127.5 - 1
    assert prior.abs().max() <= 1
    assert (prior - real).square().mean() < 0.8 * (start - real).square().mean()


# ------------------------------------------------------------------ codes


def blobs(n):
    """Codes [n, 2] of two far groups with unlike shares, means and covariances."""
    z = kernels.normal((n, 2), 1, 0, 0, 0)
    first = torch.arange(n) % 4 > 0
    turn = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
    return torch.where(first[:, None], z @ turn + 50, z / 3), first


def test_new_codes_have_the_groups_shares_means_and_covariances():
    codes, first = blobs(8000)
    shares, means, _ = mixture = dipddpm.fit_mixture(codes, 0)
    assert len(means) == 4000 and shares.sum() == pytest.approx(1, abs=1e-5)
    new = dipddpm.draw_codes(mixture, 8000, 5)
    new_first = new[:, 0] > 25
    assert new_first.float().mean() == pytest.approx(0.75, abs=0.02)
    for group, new_group in ((codes[first], new[new_first]), (codes[~first], new[~new_first])):
        torch.testing.assert_close(new_group.mean(0), group.mean(0), atol=0.1, rtol=0)
        torch.testing.assert_close(new_group.T.cov(), group.T.cov(), atol=0.25, rtol=0.1)


def test_one_cell_is_one_gaussian():
    codes = kernels.normal((3, 2), 1, 0, 0, 0)
    shares, means, factors = dipddpm.fit_mixture(codes, 0)
    assert shares.tolist() == [1] and torch.allclose(means[0], codes.mean(0))
    covariance = codes.T.cov(correction=0)
    ridge = 1e-3 * covariance.trace() / 2 + 1e-6
    torch.testing.assert_close(factors[0] @ factors[0].T, covariance + ridge * torch.eye(2))


def test_a_cell_of_one_code_is_that_code():
    codes = torch.tensor([[0.0], [100.0], [200.0]])  # as many cells as codes, for D = 1
    shares, means, factors = mixture = dipddpm.fit_mixture(codes, 0)
    assert shares.tolist() == pytest.approx([1 / 3] * 3) and set(means[:, 0].tolist()) == {
        0, 100, 200}
    assert (factors**2).flatten().tolist() == pytest.approx([1e-6] * 3)
    drawn = dipddpm.draw_codes(mixture, 3000, 0).div(100).round().flatten()
    assert (torch.bincount(drawn.long()) / 3000).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)


def test_a_new_code_does_not_depend_on_how_many_are_drawn():
    mixture = dipddpm.fit_mixture(blobs(400)[0], 0)
    many = dipddpm.draw_codes(mixture, 50, 5)
    torch.testing.assert_close(dipddpm.draw_codes(mixture, 7, 5), many[:7])
    assert not torch.equal(dipddpm.draw_codes(mixture, 7, 6), many[:7])


def test_principal_components_are_white_and_hold_what_lies_in_their_span():
    z = kernels.normal((300, 3), 1, 0, 0, 0) * torch.tensor([40.0, 20.0, 10.0])
    axes = torch.linalg.qr(kernels.normal((16, 3), 2, 0, 0, 0)).Q.T
    x = (128 + z @ axes).round().clamp(0, 255).byte().view(-1, 1, 4, 4)
    scores, mean, axes = dipddpm.principal_components(x, 3)
    torch.testing.assert_close(scores.T @ scores / 300, torch.eye(3), atol=1e-4, rtol=0)
    assert (mean + scores @ axes - x.flatten(1) / 255).abs().max() < 3 / 255  # rounding is left
    torch.testing.assert_close(mean, x.flatten(1).double().mean(0).float() / 255)


def test_principal_components_of_fewer_images_than_pixels():
    x = pixels(6, 1, 4, 4).cpu()
    scores, mean, axes = dipddpm.principal_components(x, 5)
    torch.testing.assert_close(scores.T @ scores / 6, torch.eye(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(mean + scores @ axes, x.flatten(1) / 255, atol=1e-4, rtol=0)


def batch_norm(x):
    """Each channel of one image by its own mean and deviation."""
    mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize("make, border", [(dipddpm.Grouped(torch.arange(1), 0), "reflect"),
                                          (dipddpm.Single(), "constant")])
def test_skip_is_the_hourglass_of_the_paper(make, border):
    net = dipddpm.Skip(make, 6, 2, 16, 24, 8)
    assert net.scales == 2

    def conv(x, layer, size, stride=1):
        assert layer.weight.shape[2:] == (size, size)
        pad = (size - 1) // 2
        x = F.pad(x, (pad,) * 4, mode=border) if pad else x
        return F.conv2d(x, layer.weight, layer.bias, stride)

    def unit(x, parts, size, stride=1):
        return F.leaky_relu(batch_norm(conv(x, parts[0], size, stride)), 0.2)

    x = torch.randn(1, 6, 16, 24)
    skips, h = [], x
    for skip, down in zip(net.skips, net.downs):
        skips.append(unit(h, skip, 1))
        h = unit(unit(h, down[0], 3, 2), down[1], 3)
    assert h.shape == (1, 8, 4, 6) and skips[1].shape == (1, 4, 8, 12)
    for skip, up in zip(reversed(skips), reversed(net.ups)):
        h = torch.cat([skip, F.interpolate(h, scale_factor=2, mode="bilinear")], 1)
        h = unit(unit(batch_norm(h), up[0], 3), up[1], 1)
    torch.testing.assert_close(net(x), conv(h, net.last, 1).sigmoid(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("H, W", [(1, 5), (5, 1), (2, 2)])
def test_a_map_with_nothing_to_reflect_continues_its_border(H, W):
    layer = dipddpm.Grouped(torch.arange(1), 0).conv(1, 1, 3)
    x = torch.rand(1, 1, H, W)
    padded = np.pad(x[0, 0].numpy(), 1, mode="edge" if min(H, W) == 1 else "reflect")
    torch.testing.assert_close(layer(x), F.conv2d(torch.tensor(padded)[None, None], layer.weight,
                                                  layer.bias))


@pytest.mark.parametrize("size, scales", [(7, 1), (15, 1), (16, 2), (28, 2), (32, 3), (64, 4),
                                          (128, 5), (512, 5)])
def test_skip_has_as_many_scales_as_leave_four_pixels(size, scales):
    net = dipddpm.Skip(dipddpm.Single(), 1, 1, size, 2 * size, 2)
    assert net.scales == scales == len(net.downs)


def test_the_other_dips_are_their_layers():
    x = torch.randn(2, 3, 32, 40)
    two = dipddpm.conv2(dipddpm.Single(), 3, 3, 32, 40, 5)
    h = F.relu(same(x, two[0]))
    torch.testing.assert_close(two(x), same(h, two[2]).sigmoid())
    four = dipddpm.autoencoder(dipddpm.Single(), 3, 3, 32, 40, 5)
    h = x
    for k in (0, 2, 4, 6):
        h = same(h, four[k])
        h = h.relu() if k < 6 else h.tanh()
    torch.testing.assert_close(four(x), h)
    alone = dipddpm.ResNet18(dipddpm.Grouped(torch.arange(1), 0), 3, 3, 33, 33, 1)
    assert alone.last(torch.zeros(1, 1, 64, 64)).shape == (1, 3, 64, 64)
    net = dipddpm.ResNet18(dipddpm.Single(), 3, 3, 32, 40, 4)
    shapes = [net.enter[0](x).shape[1:], net.enter(x).shape[1:], net.blocks(net.enter(x)).shape[1:]]
    assert shapes == [(4, 16, 20), (4, 8, 10), (32, 1, 2)]
    h = net.enter(x)
    for block, enters in zip(net.blocks[:3], (h, net.blocks[0](h), net.blocks[:2](h))):
        def unit(x, conv, size):  # training's: by the mean and deviation of the batch
            x = F.conv2d(x, conv.weight, conv.bias, conv.stride, padding=size // 2)
            return F.batch_norm(x, None, None, training=True)
        inner = unit(unit(enters, block.conv1, 3).relu(), block.conv2, 3)
        beside = enters if block is not net.blocks[2] else unit(enters, block.shortcut[0], 1)
        torch.testing.assert_close(block(enters), (beside + inner).relu(), rtol=1e-4, atol=1e-5)
    h = net.blocks(net.enter(x))
    for up, width in zip(net.ups, (16, 8, 4, 4, 4)):
        h = up(h)
        assert h.shape[1] == width
    assert h.shape[2:] == (32, 64)
    assert net.last(h).shape == (2, 3, 32, 64)
    torch.testing.assert_close(net(x), net.last(h).sigmoid()[..., :32, :40])


def test_the_decoder_of_codes_doubles_twice():
    net = dipddpm.CodeDecoder(3, 10, 13, 8).eval()
    code = torch.randn(4, 32)
    h = (code @ net.enter.weight.T + net.enter.bias).view(4, 16, 3, 4)
    h = F.leaky_relu(h / (1 + 1e-5) ** 0.5, 0.2)  # norms that have seen nothing only divide
    for conv, width in (net.conv1, 8), (net.conv2, 4):
        h = F.interpolate(h, scale_factor=2, mode="bilinear")
        h = F.leaky_relu(same(h, conv) / (1 + 1e-5) ** 0.5, 0.2)
        assert h.shape[1] == width
    torch.testing.assert_close(net(code), same(h, net.last).sigmoid()[..., :10, :13])
    assert dipddpm.CodeDecoder(1, 8, 8, 2).conv2.weight.shape[0] == 1


def test_a_decoders_images_become_a_prior_in_minus_1_to_1(monkeypatch):
    codes = kernels.normal((40, 32), 1, 0, 0, 0)
    monkeypatch.setattr(dipddpm, "fit_codes", lambda *_: (lambda c: (c * 0.1 + 0.5)[:, :4], codes))
    new = dipddpm.draw_codes(dipddpm.fit_mixture(codes, 0), 5, 0)
    torch.testing.assert_close(dipddpm.prior_dip_codes(config(), None, torch.zeros(5), None),
                               0.2 * new[:, :4])


def test_codes_are_learned_with_their_decoder_and_give_new_images(tmp_path):
    cfg, x = config(dip_width=8, dip_iters=300, batch=16), tiny_images(256)
    run = bare_run(tmp_path)
    decoder, codes = dipddpm.fit_codes(cfg, x, run)
    again, _ = dipddpm.fit_codes(cfg, x, run)
    assert all(torch.equal(p, q) for p, q in zip(decoder.parameters(), again.parameters()))
    error = (decoder(codes) - x / 255).square().mean()
    assert error < 0.1 * (x / 255).var()
    new = dipddpm.prior_dip_codes(cfg, x, x[:40], run)
    assert new.shape == (40, 1, 8, 8) and new.abs().max() <= 1 and new.std(0).max() > 0.1


def test_a_decoder_gives_any_size():
    decoder = dipddpm.CodeDecoder(3, 7, 18, 8)
    assert decoder(torch.zeros(2, dipddpm.CODE)).shape == (2, 3, 7, 18)


def test_pca_prior_has_the_datas_mean():
    x = tiny_images(256)
    new = dipddpm.prior_pca(config(), x, x.expand(-1, -1, -1, -1)[:200], None)
    assert new.shape == (200, 1, 8, 8)
    assert (new.mean(0) - (x / 127.5 - 1).mean(0)).abs().max() < 0.3


def test_principal_components_give_back_what_is_skewed():
    x_0 = torch.zeros(400, 1, 3, 3, dtype=torch.uint8)
    x_0[::4] = 255  # a quarter is white: with the wrong sign it would be black, and grey the rest
    made = dipddpm.prior_pca(config(), x_0, x_0[:300], None)
    assert made.abs().max() <= 1
    level = (made.flatten(1).mean(1) + 1) / 2
    assert ((level < 0.15) | (level > 0.85)).float().mean() > 0.95
    assert (level > 0.85).float().mean() == pytest.approx(0.25, abs=0.08)
    made = dipddpm.prior_gauss(config(), x_0, x_0[:300], None).flatten(1)
    assert made.mean() == pytest.approx(-0.5, abs=0.12) and made.std() == pytest.approx(
        0.75**0.5, rel=0.1)


def test_codes_take_as_many_steps_as_their_passes_have(tmp_path, monkeypatch):
    steps, real = [], edge.Progress
    monkeypatch.setattr(edge, "Progress", lambda *a: (steps.append(a[1]), real(*a))[1])
    x_0 = pixels(10, 1, 8, 8).cpu()
    dipddpm.fit_codes(config(batch=4), x_0, bare_run(tmp_path))
    dipddpm.fit_codes(config(batch=4, dip_iters=5), x_0, bare_run(tmp_path))
    assert steps == [dipddpm.CODE_EPOCHS * 2, 5]


# ------------------------------------------------------------------ method 1


def test_gauss_prior_has_the_datas_mean_and_covariance():
    torch.manual_seed(0)
    basis = torch.randn(4, 16)
    x = (128 + 20 * torch.randn(5000, 4) @ basis).clamp(0, 255).to(torch.uint8).view(-1, 1, 4, 4)
    drawn = dipddpm.prior_gauss(config(), x, x[:5000], None).flatten(1)
    real = x.flatten(1).float() / 127.5 - 1
    torch.testing.assert_close(drawn.mean(0), real.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(real.T), atol=0.03, rtol=0)


def test_blur_prior_is_the_mean_of_five_by_five_pixels():
    x = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    blurred = dipddpm.prior_blur(config(), x, x[:2], None)
    assert blurred.shape == (2, 1, 8, 8)
    assert blurred[1, 0, 4, 3] == pytest.approx((x[1, 0, 2:7, 1:6] / 127.5 - 1).mean().item())


def test_start_from_prior_has_the_marginal_at_t_start():
    cfg = config(timesteps=100)
    prior = torch.full((2000, 1, 2, 2), 0.5)
    x = dipddpm.start_from_prior(cfg, prior, 60, torch.arange(2000))
    ab = dipddpm.cosine_schedule(100).at(60)
    assert x.mean().item() == pytest.approx(0.5 * math.sqrt(ab), abs=0.03)
    assert x.var().item() == pytest.approx(1 - ab, rel=0.05)


def test_smoothed_images_are_a_dips_outputs_in_256_steps(tmp_path, monkeypatch):
    seen, x = {}, torch.tensor([-1.2, -1.0, -0.5, 0.0, 0.5, 1.0, 1.2]).view(1, 1, 1, 7)
    monkeypatch.setitem(dipddpm.PRIORS, "dip-images", lambda *_: x)
    monkeypatch.setattr(dipddpm, "train_ddpm", lambda cfg, images, t_max, run, name: (
        seen.update({name: (images.flatten().tolist(), t_max)}), ("net", [], 0.0))[1])
    cfg = config(train=("full", "truncated", "smoothed"), t_start=(30, 70), timesteps=100)
    dipddpm.train_networks(cfg, torch.zeros(1, 1, 1, 7, dtype=torch.uint8), bare_run(tmp_path))
    assert seen == {"full": ([0] * 7, 100), "truncated": ([0] * 7, 70),
                    "smoothed": ([0, 0, 64, 128, 191, 255, 255], 100)}


def test_the_box_is_the_middle_half_and_noise_is_the_streams():
    x = torch.full((2, 1, 8, 12), 0.5)
    box = dipddpm.corrupt(config(), "inpaint-box", x, torch.arange(2))
    expected = torch.ones(2, 1, 8, 12)
    expected[:, :, 2:6, 3:9] = 0
    assert torch.equal(box.mask, expected) and torch.equal(box.y, 0.5 * expected)
    noisy = dipddpm.corrupt(config(sigma=0.2), "denoise", x, torch.arange(2))
    eps = kernels.normal(x.shape, 0, torch.arange(2), 0, kernels.CORRUPTION)
    torch.testing.assert_close(noisy.y, x + 0.2 * eps)


@pytest.mark.parametrize("task, sigma", [("denoise", 0.2), ("inpaint", 0.0), ("sr", 0.1)])
def test_a_restorations_arms_start_where_they_say(task, sigma, tmp_path, monkeypatch):
    cfg = config(mode="prior", task=(task,), sigma=sigma, samples=5, timesteps=100, nfe=(4, 90),
                 t_start=(30, 60), order=(2,), dip_iters=9)
    test = data.Images(pixels(9, 1, 8, 8).cpu(), None, "noise", "")
    chosen, numbers = measures.subset(9, 5), torch.arange(5)
    truth = test.pixels[chosen].float() / 255
    m = dipddpm.corrupt(cfg, task, truth, numbers)
    guess, asked, sampled = random_images(5, 1, 8, 8), [], []
    monkeypatch.setattr(dipddpm, "fit_in_groups", lambda cfg, y, members, iters, run, known: (
        asked.append((y, members, iters, known.sigma)), time.sleep(0.02), guess)[2])

    def timed_sample(cfg, run, arm, net, x_init, t_start, nfe, setting, numbers, measured):
        sampled.append((arm, net, x_init, t_start, nfe, setting, measured is None))
        return x_init * 0.5, {"name": arm, "nfe": nfe, "t_start": t_start, "eta": setting[0],
                              "order": setting[1], "grid": setting[2], "seconds": 2.0}

    monkeypatch.setattr(dipddpm, "timed_sample", timed_sample)
    result, run = {"arms": [], "curves": {}, "pictures": []}, bare_run(tmp_path)
    dipddpm.restore(cfg, run, {"full": "f", "truncated": "t"}, task, test, result)
    (y, members, iters, known), = asked
    assert torch.equal(y, m.y) and torch.equal(members, numbers) and (iters, known) == (9, sigma)
    corrupted = m.back(m.y).clamp(0, 1)
    dip = guess if sigma else ((m.consistent(guess * 2 - 1) + 1) / 2).clamp(0, 1)
    rows = result["arms"]
    for row, x in zip(rows, (corrupted, dip)):
        assert row["psnr"] == pytest.approx(measures.psnr(x, truth).mean().item(), abs=1e-3)
    starts = {"ddpm": [(kernels.normal(truth.shape, 0, numbers, 0, kernels.INIT_NOISE), 100)],
              "dip-images": [(dipddpm.start_from_prior(cfg, dip * 2 - 1, t, numbers), t)
                             for t in (30, 60)],
              "pinv": [(dipddpm.start_from_prior(cfg, corrupted * 2 - 1, t, numbers), t)
                       for t in (30, 60)]}
    if task == "denoise":
        starts["ddpm-y"] = [dipddpm.start_from_noisy(cfg, m)]
    wanted = [(arm, t, nfe) for arm in ("ddpm",) for _, t in starts[arm] for nfe in (4, 90)]
    wanted += [(arm, t, 4) for t in (30, 60) for arm in ("dip-images", "pinv")]  # 90 > 60
    wanted += [("ddpm-y", t, 4) for _, t in starts.get("ddpm-y", ())]
    assert [(arm, t, nfe) for arm, _, _, t, nfe, _, _ in sampled] == wanted
    for (arm, net, x_init, t, _, setting, free), row in zip(sampled, rows[2:]):
        assert net == ("f" if arm.startswith("ddpm") else "t") and free == (arm == "ddpm-y")
        torch.testing.assert_close(x_init, dict((b, a) for a, b in starts[arm])[t])
        assert setting == (0.0, 1 if sigma and arm != "ddpm-y" else 2, "uniform")
        x = ((x_init * 0.5 + 1) / 2).clamp(0, 1)
        assert row["psnr"] == pytest.approx(measures.psnr(x, truth).mean().item(), abs=1e-3)
        prior = rows[1]["seconds"] if arm == "dip-images" else 0.0
        assert (row["seconds"], row["prior_seconds"]) == (round(2 + prior, 3), prior)
    assert run.seconds["dip"] == rows[1]["seconds"] < 60 and len(result["pictures"]) == 1


def test_a_prior_is_noised_to_the_step_that_was_asked_for():
    cfg, numbers, prior = config(timesteps=10), torch.arange(4), random_images(4, 1, 5, 5) * 2 - 1
    eps = kernels.normal(prior.shape, 0, numbers, 0, kernels.INIT_NOISE)
    for t_start in (1, 6, 10):
        ab = dipddpm.cosine_schedule(10).at(t_start)
        torch.testing.assert_close(dipddpm.start_from_prior(cfg, prior, t_start, numbers),
                                   ab**0.5 * prior + (1 - ab) ** 0.5 * eps)


def test_a_sampler_asks_at_the_grids_steps_and_films_the_first_image():
    cfg, x_init, asked, film = config(timesteps=20), random_images(3, 1, 4, 4), [], []

    def net(x_t, t):
        asked.append((t.unique().item(), x_t[:1].clone()))
        return 0.1 * x_t

    x = dipddpm.sample(cfg, net, x_init, 15, 4, 0.0, torch.arange(3), contextlib.nullcontext,
                       film=film)
    taus = dipddpm.time_grid(dipddpm.cosine_schedule(20), 15, 4)
    assert [t for t, _ in asked] == [tau - 1 for tau in taus[:-1]]  # the table's rows begin at 0
    assert all(torch.equal(a, b) for a, b in zip(film, [x for _, x in asked] + [x[:1]]))
    assert len(film) == 5


def test_a_restoring_step_clips_as_others_do():
    cfg = config(timesteps=20, predict="x0")
    m = dipddpm.corrupt(cfg, "inpaint", torch.full((2, 1, 6, 6), 0.5), torch.arange(2))
    for level in (5.0, -5.0):
        x = dipddpm.sample(cfg, lambda x_t, t, level=level: torch.full_like(x_t, level),
                           torch.zeros(2, 1, 6, 6), 20, 4, 0.0, torch.arange(2),
                           contextlib.nullcontext, measured=m)
        expected = torch.where(m.mask == 1, 0.0, math.copysign(1, level))
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("samples, n", [(None, 256), (5, 5), (900, 300)])
def test_a_restoration_takes_as_many_images_as_asked_or_there_are(samples, n, tmp_path,
                                                                  monkeypatch):
    iterations = []
    monkeypatch.setattr(dipddpm, "fit_in_groups", lambda cfg, y, members, iters, *_: (
        iterations.append(iters), torch.zeros(len(y), 1, 4, 4))[1])
    monkeypatch.setattr(dipddpm, "timed_sample", lambda cfg, run, arm, net, x, t_start, nfe, s, *_,
                        measured: (x, {"name": arm, "nfe": nfe, "seconds": 0.0, "t_start": t_start,
                                       "eta": 0.0, "order": 2, "grid": "uniform"}))
    test = data.Images(pixels(300, 1, 4, 4).cpu(), None, "some", "")
    result = {"arms": [], "curves": {}, "pictures": []}
    counted, real, drawn = [], measures.measures, []
    monkeypatch.setattr(measures, "measures", lambda x, y: (counted.append(len(x)), real(x, y))[1])
    monkeypatch.setattr(measures, "draw", lambda path, caption, rows: drawn.extend(rows.values()))
    dipddpm.restore(config(samples=samples, nfe=(2,), timesteps=20), bare_run(tmp_path),
                    {"full": None}, "sr", test, result)
    assert iterations == [300] and set(counted) == {n} and {len(x) for x in drawn} == {min(16, n)}


@pytest.mark.parametrize("T", [3, 10, 1000])
def test_losses_on_held_out_images_are_at_times_that_exist(T):
    asked = []
    losses = dipddpm.held_out_losses(
        config(timesteps=T, predict="x0"), lambda x_t, t: (asked.extend(t.tolist()), 0 * x_t)[1],
        torch.zeros(1002, 1, 4, 4, dtype=torch.uint8), T,
        SimpleNamespace(device="cpu", autocast=contextlib.nullcontext))
    assert len(asked) == 5 * 1000  # images at five t
    assert sorted(set(asked)) == sorted({max(1, round(s * T)) - 1 for s in (.1, .3, .5, .7, .9)})
    assert losses == pytest.approx(dict.fromkeys(losses, 1.0)) and len(losses) == 5  # (0 - -1)^2


# ------------------------------------------------------------------ method 2


def test_halves_have_independent_noises_and_replicas_that_average_to_y():
    y = torch.zeros(60, 1, 16, 16) + 0.3 * kernels.normal((60, 1, 16, 16), 9, 0, 0, 0)
    plus, minus = dipddpm.split(y, torch.ones_like(y), 0.3, 0.5, torch.arange(240), 4, 0)
    assert plus.std() == pytest.approx(0.3 * 1.25**0.5, rel=0.01)
    assert minus.std() == pytest.approx(0.3 * 5**0.5, rel=0.01)
    correlation = (plus * minus).mean() / (plus.std() * minus.std())
    assert correlation.abs() < 4 / 240**0.5 / 16
    torch.testing.assert_close(plus.view(60, 4, 1, 16, 16).mean(1), y, atol=1e-6, rtol=0)
    two, _ = dipddpm.split(y, torch.ones_like(y), 0.3, 0.5, torch.arange(120), 2, 0)
    torch.testing.assert_close(two.view(60, 2, 1, 16, 16).mean(1), y, atol=1e-6, rtol=0)
    assert two.std() == pytest.approx(0.3 * 1.25**0.5, rel=0.02)
    alone, _ = dipddpm.split(y, torch.ones_like(y), 0.3, 0.5, torch.arange(60), 1, 0)
    assert alone.std() == pytest.approx(0.3 * 1.25**0.5, rel=0.02)


@pytest.mark.parametrize("task", ["denoise", "inpaint", "sr"])
def test_the_risk_is_the_error_without_the_truth(task):
    truth = tiny_images(2000).float() / 255  # 2000 draws
    cfg, members = config(replicas=2, sigma=0.3), torch.arange(2000)
    m = dipddpm.corrupt(cfg, task, truth, members)
    half = dipddpm.halves(cfg, m, dipddpm.replicas_of(members, 2), 3)
    output = 0.7 * half.targets[-1] + 0.1  # made from y_plus, as a fit is
    risk = half.risk(output, 2)
    error = (output - m.A(truth).repeat_interleave(2, 0)).square() * half.judged
    error = error.sum((1, 2, 3)).view(-1, 2).mean(1)
    assert (risk - error).mean().abs() < 4 * (risk - error).std() / 2000**0.5
    assert (risk - error).mean().abs() < 0.2 * error.mean()


@pytest.mark.parametrize("task", ["denoise", "inpaint", "sr"])
def test_outputs_weigh_as_much_as_they_make_the_other_half_likely(task):
    truth, m = measured(task, n=5, sigma=0.3)
    half = dipddpm.halves(config(replicas=1, sigma=0.3), m, torch.arange(5), 1)
    noise = torch.distributions.Normal(0, math.sqrt(half.noise))
    likely, risks = [], []
    for output in (m.A(truth), m.A(0.8 * truth + 0.1)):
        likely.append(((half.judged > 0) * noise.log_prob(half.judge - output)).sum((1, 2, 3)))
        risks.append(half.risk(output, 1))
    least = torch.minimum(*risks)
    ratio = half.weights(risks[1], least, 1) / half.weights(risks[0], least, 1)
    torch.testing.assert_close(ratio, (likely[1] - likely[0]).exp(), rtol=1e-3, atol=1e-30)
    four = [half._replace(judged=half.judged.repeat_interleave(4, 0)).weights(r, least, 4)
            for r in risks]  # count as two
    torch.testing.assert_close(four[1] / four[0], ratio**2, rtol=1e-3, atol=1e-30)


@pytest.mark.parametrize("sigma", [1.5, 0.0])
def test_a_guided_result_is_the_mean_of_its_outputs_by_weight(sigma, tmp_path):
    task = "denoise" if sigma else "inpaint"
    truth, m = measured(task, n=2, sigma=sigma, size=28)
    cfg, looks = config(dip_width=4, replicas=1, patience=1000), []
    x, _ = dipddpm.fit_guided(cfg, m, torch.arange(2), 1, 60, bare_run(tmp_path),
                              lambda i, x: looks.append(x))
    half = (dipddpm.halves if sigma else dipddpm.held_out)(cfg, m, torch.arange(2), 1)
    risk = torch.stack([half.risk(m.A(look), 1) for look in looks])
    weight = torch.stack([half.weights(r, risk.min(0).values, 1) for r in risk])
    weight = (weight / weight.sum(0))[:, :, None, None, None]
    torch.testing.assert_close(x, (weight * torch.stack(looks)).sum(0), rtol=1e-4, atol=1e-5)
    assert (weight > 1e-3).sum() > 4 if sigma else (weight > 0).sum() == 2


def test_rungs_fall_from_four_times_the_noise_of_y_plus_to_just_that():
    assert [dipddpm.rung_levels(n) for n in (1, 2, 3)] == [[1], [4, 1], [4, 2, 1]]
    y = torch.zeros(50, 1, 16, 16)
    m = dipddpm.Measurement("denoise", y, torch.ones_like(y), 0.2)
    targets, *_ = dipddpm.halves(config(alpha=0.5), m, dipddpm.replicas_of(torch.arange(50), 4),
                                   3)
    plus = 0.2 * 0.5 * torch.ones(())  # y itself is clean here: y_plus has alpha sigma alone
    for target, level in zip(targets, (4, 2, 1)):
        extra = 0.2**2 * 1.25 * (level**2 - 1)
        assert target.std() == pytest.approx((plus.item()**2 + extra) ** 0.5, rel=0.02)


def test_without_noise_every_replica_judges_by_values_that_it_never_sees():
    truth, m = measured("inpaint")
    targets, fit, y, judge, noise = dipddpm.held_out(
        config(), m, dipddpm.replicas_of(torch.arange(3), 4), 5)
    assert len(targets) == 1 and noise == 0 and torch.equal(targets[0], y)
    assert not (fit * judge).any() and not fit[~m.mask.bool().repeat_interleave(4, 0)].any()
    shares = (judge > 0).view(3, 4, -1).sum(1)
    assert shares.max() == 1  # disjoint among the replicas


def test_nothing_that_an_honest_arm_returns_depends_on_the_truth(tmp_path, monkeypatch):
    observe, outputs = dipddpm.observe, {}

    def altered(cfg, run):
        seen = observe(cfg, run)
        return seen._replace(truth=1 - seen.truth)

    def caught(x, truth):
        outputs.setdefault(folder, []).append(x)
        return {}

    monkeypatch.setattr(measures, "measures", caught)
    for folder, source in (tmp_path / "a", observe), (tmp_path / "b", altered):
        monkeypatch.setattr(dipddpm, "observe", source)
        dipddpm.main(["--mode", "guide", "--data", "digits", "--samples", "2", "--sigma", "0.3",
                      "--dip-iters", "40", "--dip-width", "4", "--patience", "20", "--rungs", "2",
                      "--replicas", "2", "--out", str(folder)])
        rows = json.loads((folder / "results.json").read_text())["arms"]
        outputs[folder] = dict(zip([row["name"] for row in rows], outputs[folder]))
        outputs[folder]["iterations"] = torch.tensor([
            row["iterations"] for row in rows if "oracle" not in row["name"]])
    first, second = outputs.values()
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same == {"plain", "es-wmv", "plain-mean", "es-wmv-mean", "split", "ladder", "iterations"}


def test_guided_images_do_not_depend_on_their_group(tmp_path):
    truth, m = measured("denoise", n=3, sigma=0.3)
    m, members = m._replace(y=m.y.double(), mask=m.mask.double()), torch.arange(3)
    cfg, run = config(dip_width=4, patience=20, replicas=2), bare_run(tmp_path)
    together = dipddpm.fit_guided(cfg, m, members, 2, 80, run)
    for k in range(3):
        one = dipddpm.fit_guided(cfg, m.part(slice(k, k + 1)), members[k:k + 1], 2, 80, run)
        torch.testing.assert_close(one[0], together[0][k:k + 1], rtol=1e-5, atol=1e-7)
        assert one[1] == together[1][k]


def test_a_guided_stop_is_near_its_own_oracle_and_far_above_the_end(tmp_path):
    truth, m = measured("denoise", n=2, sigma=0.3, size=28)
    cfg = config(dip_width=8, replicas=2)
    looks = []
    x, iterations = dipddpm.fit_guided(cfg, m, torch.arange(2), 1, 500, bare_run(tmp_path),
                                       lambda i, x: looks.append(measures.psnr(x, truth)))
    ended = dipddpm.fit_dips(cfg, m.y, torch.arange(2), 500, lambda i: None)
    psnr = measures.psnr(x, truth)
    assert (torch.stack(looks).max(0).values - psnr).max() < 1 and (iterations < 500).all()
    assert psnr.mean() > measures.psnr(ended.clamp(0, 1), truth).mean() + 1.5


def test_a_collapsed_replica_goes_back_to_where_it_was_best(tmp_path, monkeypatch):
    truth, m = measured("denoise", n=2, sigma=0.1, size=28)
    cfg, members = config(dip_width=8, replicas=2), torch.arange(2)
    iterate = dipddpm.DIPGroup.iterate

    def fit():
        return dipddpm.fit_guided(cfg, m, members, 1, 120, bare_run(tmp_path))[0]

    def spoilt(group, i, *rest):
        if i == 79:  # one replica of the second image forgets everything
            for p in group.net.parameters():
                p.data.view(4, -1)[2] = 0
        return iterate(group, i, *rest)

    whole = measures.psnr(fit(), truth)
    monkeypatch.setattr(dipddpm.DIPGroup, "iterate", spoilt)
    mended = measures.psnr(fit(), truth)
    monkeypatch.setattr(dipddpm.DIPGroup, "rewind", lambda *_: None)
    lost = measures.psnr(fit(), truth)
    assert (mended > whole - 1).all() and lost[1] < whole[1] - 2


@pytest.mark.parametrize("part, collapsed", [(0.45, False), (0.55, True)])
def test_a_collapse_is_a_loss_that_jumps_half_of_the_way_to_a_flat_outputs(
        part, collapsed, tmp_path, monkeypatch):
    truth, m = measured("denoise", n=1, sigma=0.1, size=28)
    cfg, back = config(dip_width=4, replicas=2, patience=1000), []
    iterate, rewind = dipddpm.DIPGroup.iterate, dipddpm.DIPGroup.rewind

    def jumps(group, i, y, share, A):
        x, losses = iterate(group, i, y, share, A)
        flat = (y - y.mean((1, 2, 3), keepdim=True)).square().mean((1, 2, 3))
        return x, flat * (part if i >= 15 else 0) * torch.tensor([0, 1])  # the least was 0

    monkeypatch.setattr(dipddpm.DIPGroup, "iterate", jumps)
    monkeypatch.setattr(dipddpm.DIPGroup, "rewind", lambda group, which: (
        back.append(which.tolist()), rewind(group, which)))
    dipddpm.fit_guided(cfg, m, torch.arange(1), 1, 20, bare_run(tmp_path))
    assert back == [[False, False], [False, collapsed]]


def test_a_rung_begins_at_the_last_ones_best_and_the_ladder_ends_where_none_is_better(
        tmp_path, monkeypatch):
    truth, m = measured("denoise", n=1, sigma=0.3)
    risks = iter([0.1, 0.2, 0.2, 0.3, 0.2, 0.2, 0.2, 0.1])  # at each look
    iterate, rewind, seen = dipddpm.DIPGroup.iterate, dipddpm.DIPGroup.rewind, {}

    def look(group, i, *rest):
        result = iterate(group, i, *rest)
        seen[i + 1] = group.age[0].item(), [p.detach().clone() for p in group.net.parameters()]
        return result

    def back(group, which):
        rewind(group, which)
        if which.any():
            seen["back"] = group.steps, [p.detach().clone() for p in group.net.parameters()]

    monkeypatch.setattr(dipddpm.DIPGroup, "iterate", look)
    monkeypatch.setattr(dipddpm.DIPGroup, "rewind", back)
    monkeypatch.setattr(dipddpm.Halves, "risk", lambda *_: torch.tensor([next(risks)]))
    cfg = config(dip_width=4, replicas=2, patience=20)
    _, iterations = dipddpm.fit_guided(cfg, m, torch.arange(1), 3, 200, bare_run(tmp_path))
    assert iterations == 70  # 30 on the first rung, 40 on the second, which is no better
    steps, weights = seen["back"]
    assert steps == 30 and all(torch.equal(p, q) for p, q in zip(weights, seen[10][1]))
    assert seen[30][0] == 30 and seen[31][0] == 1  # the average of outputs begins anew


def test_images_climb_each_to_its_own_rung(tmp_path, monkeypatch):
    _, m = measured("denoise", n=2, sigma=0.3)
    risks = iter([[5, 5], [4, 6], [3, 4], [9, 9], [1, 1]])  # the second image climbs at 20 and 40
    halves, iterate, seen, rungs = dipddpm.halves, dipddpm.DIPGroup.iterate, {}, []
    monkeypatch.setattr(dipddpm, "halves", lambda *a: (rungs.append(halves(*a)), rungs[-1])[1])
    monkeypatch.setattr(dipddpm.Halves, "risk", lambda *_: torch.tensor(next(risks)).float())
    monkeypatch.setattr(dipddpm.DIPGroup, "iterate", lambda group, i, target, *a: (
        seen.update({i + 1: target}), iterate(group, i, target, *a))[1])
    cfg = config(dip_width=4, replicas=2, patience=10)
    dipddpm.fit_guided(cfg, m, torch.arange(2), 4, 41, bare_run(tmp_path))
    assert next(risks, None) is None  # the last iteration was looked at, whatever its number
    for i, (first, second) in {20: (0, 0), 21: (0, 1), 40: (0, 1), 41: (1, 2)}.items():
        assert torch.equal(seen[i][:2], rungs[0].targets[first][:2])
        assert torch.equal(seen[i][2:], rungs[0].targets[second][2:])


def test_a_member_that_goes_back_goes_on_as_if_it_had_never_left():
    y = tiny_images(2).double() / 255
    share, same = torch.full_like(y, 1 / 64), lambda x: x
    group, other = (dipddpm.DIPGroup(config(dip_width=4), torch.arange(2), 1, 8, 8, y.dtype)
                    for _ in range(2))
    for i in range(30):
        group.iterate(i, y, share, same), other.iterate(i, y, share, same)
    group.save(torch.tensor([True, True]))
    for i in range(30, 130):
        group.iterate(i, y, share, same)
    group.rewind(torch.tensor([True, False]))
    before = [p.view(2, -1)[0].clone() for p in group.net.parameters()]
    group.iterate(30, y, share, same), other.iterate(30, y, share, same)
    step, expected = (torch.cat([p.view(2, -1)[0] - q for p, q in
                                 zip(g.net.parameters(), before)]) for g in (group, other))
    assert (step - expected).norm() < 0.1 * expected.norm()
    assert group.age.tolist() == [31, 131]


def test_windowed_variance_is_that_of_the_last_outputs():
    outputs = [random_images(3, 1, 4, 4, seed=i) * (1 if i < 12 else 3) for i in range(40)]
    stop = dipddpm.WindowedVariance(5, 10)
    brute = []
    for i, x in enumerate(outputs):
        stop(i, x.clone(), x)
        if i >= 4:
            brute.append(torch.stack(outputs[i - 4:i + 1]).var(0, correction=0).sum((1, 2, 3)))
    least = torch.stack(brute)[:12 - 4].min(0)  # before the outputs become restless
    torch.testing.assert_close(stop.least.float(), least.values)
    best = least.indices + 4
    assert torch.equal(stop.best.long(), best)
    assert torch.equal(stop.stopped.long(), best + 11)  # as many have then been seen
    assert all(torch.equal(stop.x[k], outputs[best[k]][k]) for k in range(3))


@pytest.mark.parametrize("size, window, patience", [(32, 30, 300), (33, 100, 1000)])
def test_photos_have_the_longer_window(size, window, patience, tmp_path, monkeypatch):
    stops, real = [], dipddpm.WindowedVariance
    monkeypatch.setattr(dipddpm, "WindowedVariance", lambda *a: (stops.append(a), real(*a))[1])
    truth = random_images(1, 1, size, 8)
    m = dipddpm.corrupt(config(sigma=0.1), "denoise", truth, torch.arange(1))
    dipddpm.fit_plain(config(dip_width=2), m, torch.arange(1), 1, [m.y], truth, 2,
                      bare_run(tmp_path))
    assert stops == [(window, patience)]


def test_observing_takes_the_middle_and_adds_the_noise_asked_for(tmp_path):
    run = bare_run(tmp_path)
    run.begin = lambda: None
    seen = dipddpm.observe(config(data="digits", crop=20, samples=3, sigma=0.2), run)
    middle = data.load("digits", split="test", limit=3).pixels[:, :, 4:24, 4:24].float() / 255
    assert torch.equal(seen.truth, middle) and seen.measured.sigma == 0.2
    assert (seen.measured.y - middle).std() == pytest.approx(0.2, rel=0.1)


def test_noise_level_is_found_in_flat_images():
    x = data.load("digits", limit=20).pixels.float() / 255
    noise = 0.2 * kernels.normal((20, 3, 64, 64), 3, torch.arange(20), 0, 0)
    assert dipddpm.noise_level(x + noise[:, :1, :28, :28]).mean() == pytest.approx(0.2, rel=0.1)
    assert dipddpm.noise_level(0.5 + noise).mean() == pytest.approx(0.2, rel=0.02)
    odd = dipddpm.noise_level(0.5 + noise[..., :63, :58])  # the last row is left out
    assert torch.equal(odd, dipddpm.noise_level(0.5 + noise[..., :62, :58]))
    assert torch.equal(dipddpm.noise_level(noise[..., :58, :63]),
                       dipddpm.noise_level(noise[..., :58, :62]))
    assert torch.equal(dipddpm.noise_level(noise[..., :57]), dipddpm.noise_level(noise[..., :56]))


def test_a_curve_holds_each_images_last_look(tmp_path, monkeypatch, capsys):
    truth, x = random_images(2, 1, 8, 8), random_images(6, 1, 8, 8, seed=1)
    seen = SimpleNamespace(truth=truth, members=torch.arange(2), budget=70,
                           measured=dipddpm.corrupt(config(), "denoise", truth, torch.arange(2)))

    def fit(cfg, measured, rows, rungs, budget, run, watch):
        for i, k in ((10, 0), (50, 1), (60, 2))[:3 - 2 * rows.item()]:  # one look at the second
            watch(i, x[3 * rows + k])
        return x[2:3] * 0 + truth[rows] + 0.5, torch.tensor([i])

    monkeypatch.setattr(dipddpm, "fit_guided", fit)
    result, iterations, best, curve = dipddpm.fit_guided_in_groups(
        config(dip_group=1, replicas=1), seen, 1, bare_run(tmp_path), tell=True)
    psnr = measures.psnr(x, truth.repeat_interleave(3, 0)).tolist()
    assert curve == [[i, pytest.approx((psnr[k] + psnr[3]) / 2, abs=6e-4)]
                     for k, i in enumerate((10, 50, 60))]
    ends = measures.psnr((truth + 0.5).clamp(0, 1), truth).tolist()
    assert best.tolist() == pytest.approx([max(*psnr[:3], ends[0]), max(psnr[3], ends[1])])
    assert iterations.tolist() == [60, 10]
    ssim = measures.ssim(x[1:2], truth[:1]).item()
    assert capsys.readouterr().out.strip() == f"iteration 50: psnr {psnr[1]:.2f}, ssim {ssim:.4f}"


def test_a_group_has_a_whole_image_even_if_it_is_larger_than_asked():
    members = torch.arange(5)
    sizes = {K: [len(g) for g in dipddpm.in_groups(config(dip_group=K), members, 4)]
             for K in (1, 4, 8, 64)}
    assert sizes == {1: [1] * 5, 4: [1] * 5, 8: [2, 2, 1], 64: [5]}


@pytest.mark.parametrize("size, budget", [(64, 1000), (65, 3000)])
def test_a_fit_may_take_more_iterations_on_photos(size, budget, tmp_path, monkeypatch):
    images = data.Images(torch.full((2, 1, 7, size), 99, dtype=torch.uint8), None, "grey", "")
    limits = []
    monkeypatch.setattr(dipddpm, "load_images", lambda cfg, split, limit: (
        limits.append(limit), images)[1])
    run = SimpleNamespace(**vars(bare_run(tmp_path)), begin=lambda: None)
    cfg = config(mode="dip", dip_width=2)
    seen = dipddpm.observe(cfg, run)
    assert seen.budget == budget and seen.measured.sigma == 0.1 and len(seen.members) == 2
    torch.testing.assert_close(seen.truth, torch.full((2, 1, 7, size), 99 / 255))
    assert dipddpm.observe(dataclasses.replace(cfg, dip_iters=7), run).budget == 7
    own = dipddpm.observe(dataclasses.replace(cfg, noise="own"), run)
    assert own.truth is None and own.measured.sigma == 0.0 and "sigma" not in own.about
    assert set(limits) == {16}


@pytest.mark.parametrize("size, iterations", [(64, 60), (65, 210)])
def test_a_stop_waits_for_fifty_iterations_on_photos_for_two_hundred(size, iterations, tmp_path,
                                                                    monkeypatch):
    monkeypatch.setattr(dipddpm.Halves, "risk", lambda half, A_x, M: torch.ones(len(A_x) // M))
    m = dipddpm.corrupt(config(sigma=0.1), "denoise", torch.rand(1, 1, 8, size), torch.arange(1))
    _, took = dipddpm.fit_guided(config(mode="dip", dip_width=2, dip_arch="conv2", replicas=1), m,
                                 torch.arange(1), 1, 300, bare_run(tmp_path))
    assert took.tolist() == [iterations]  # the first look's risk is the least


@pytest.mark.parametrize("M", [1, 4, 12])
def test_each_replica_judges_by_a_tenth_that_it_alone_is_not_fitted_to(M):
    cfg, x = config(replicas=M), torch.rand(3, 1, 40, 40)
    m = dipddpm.corrupt(config(), "inpaint", x, torch.arange(3))
    numbers = dipddpm.replicas_of(torch.arange(3), M)
    half = dipddpm.held_out(cfg, m, numbers, 1)
    fitted, judged = half.fitted > 0, half.judged > 0
    given = m.given().bool().repeat_interleave(M, 0)
    assert torch.equal(fitted | judged, given) and not (fitted & judged).any()
    for share in half.fitted, half.judged:
        torch.testing.assert_close(share.sum(dim=(1, 2, 3)), torch.ones(3 * M))
        assert all(row[row > 0].unique().numel() == 1 for row in share)
    assert judged.view(3, M, -1).sum(1).max() == 1  # no two replicas of one image judge by the same
    part = judged.float().sum() / given.float().sum()
    assert part == pytest.approx(1 / max(10, M), rel=0.1) and half.noise == 0
    u = kernels.uniform((3, 1, 40, 40), 0, torch.arange(3), dipddpm.HELD_DRAW, kernels.CORRUPTION)
    for r in range(M):
        whose = (u * max(10, M)).long() == r
        assert torch.equal(judged.view(3, M, 40, 40)[:, r], (whose & m.given().bool())[:, 0])
    alone = dipddpm.held_out(cfg, m.part(slice(2, 3)), numbers[2 * M:], 1)
    assert torch.equal(alone.judged, half.judged[2 * M:])  # whatever shares its group
    assert torch.equal(half.targets[0], m.y.repeat_interleave(M, 0))
    assert torch.equal(half.judge, half.targets[0])


def test_a_plain_fit_holds_nothing_out_and_early_stops_cost_their_share(tmp_path, monkeypatch):
    asked, real = [], dipddpm.fit_dips
    monkeypatch.setattr(dipddpm, "fit_dips", lambda *a: (asked.append(a[6]), real(*a))[1])
    truth = random_images(2, 1, 8, 8)
    m = dipddpm.corrupt(config(sigma=0.1), "denoise", truth, torch.arange(2))
    arms, curve = dipddpm.fit_plain(config(mode="guide", dip_width=4), m, torch.arange(2), 2,
                                    [m.y], truth, 35, bare_run(tmp_path))
    assert asked == [0.0] and [i for i, _ in curve] == [10, 20, 30, 35]
    best = torch.stack([psnr for _, psnr in curve]).max(0)
    x, when = arms["oracle"]
    torch.testing.assert_close(measures.psnr(x.clamp(0, 1), truth), best.values)
    assert when.tolist() == [[10, 20, 30, 35][k] for k in best.indices]
    torch.testing.assert_close(measures.psnr(arms["plain"][0].clamp(0, 1), truth), curve[-1][1])


# ------------------------------------------------------------------ whole runs


FAST = ("--data digits --limit 128 --epochs 2 --width 8 --batch 32 --timesteps 40 --samples 8 "
        "--dip-iters 3 --dip-width 4 --nfe 2,4 --eta 0,1 --train truncated,smoothed --snapshots 2 "
        "--dip-source images,network,codes --dip-arch conv2")


def assert_no_more_digits_than_promised(rows):
    for row in rows:
        for key, x in row.items():
            if key.removesuffix("_std") in ("psnr", "ssim", "mse", "mae", "delta_e", "kid"):
                places = 5
            else:
                places = {"iterations": 1, "recall": 4, "precision": 4, "class_gap": 4,
                          "prior_square_error": 4}.get(key, 3)
            assert not isinstance(x, float) or x == round(x, places), (key, x)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """--mode prior to its end, once, on few and small things."""
    folder = tmp_path_factory.mktemp("a run") / "prüfung"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DIPDDPM_DATA", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        dipddpm.main(["--mode", "prior", *FAST.split(), "--out", str(folder)])
    return folder


def test_prior_run_leaves_results_of_every_arm(whole_run):
    result = json.loads((whole_run / "results.json").read_text())
    assert result["seconds"]["total"] >= result["seconds"]["train"] > 0
    assert set(result) >= {"mode", "config", "data", "device", "precision", "torch", "commit",
                           "parameters", "seconds", "arms", "floor", "curves"}
    assert set(result["seconds"]) == {"dip", "train", "sample", "eval", "total"}
    assert set(result["data"]) == {"name", "train", "test", "sha256"}
    rows = {(r["name"], r["train"], r["nfe"], r["eta"]): r for r in result["arms"]}
    nets = {arm: ("truncated", "smoothed") for arm in dipddpm.PRIORS} | {"ddpm": ("full",)}
    assert set(rows) == {(a, t, n, e) for a in nets for t in nets[a] for n in (2, 4)
                         for e in (0, 1)}
    assert all(("own_source" in r) == ("prior_square_error" in r) for r in rows.values())
    assert {r["name"] for r in rows.values() if "own_source" in r} == {
        "dip-images", "dip-network", "blur"}
    x_0 = data.load("digits", split="train", limit=128).pixels
    sources = x_0[measures.subset(128, 8)].float() / 127.5 - 1
    blurred = dipddpm.prior_blur(None, None, x_0[measures.subset(128, 8)], None)
    assert rows["blur", "truncated", 2, 0]["prior_square_error"] == pytest.approx(
        (blurred - sources).square().sum().item() / 8, abs=1e-3)
    for series in ("ddpm, 4", "dip-codes smoothed, 4", "dip-images truncated, 4"):
        (early, _), (late, _) = result["curves"][f"training/{series} evaluations"]
        assert 0 < early < late
        arm, trained, _ = (series + " full 4").replace(",", "").split(maxsplit=2)
        prior = 0 if arm == "ddpm" else rows[arm, trained, 4, 0]["prior_seconds"]
        assert late - early == pytest.approx(early - prior, abs=0.02)  # half of the steps each
        assert late - prior <= 3 * result["seconds"]["train"]
    assert result["curves"]["held-out/truncated t = 0.5 T"][1][0] == 8  # the last step
    assert all(r["nearest"] > r["nearest_5"] >= 0 for r in rows.values()) and result["real"]
    assert all(math.isfinite(r["fid_lenet"]) and r["seconds"] >= r["prior_seconds"] >= 0
               for r in rows.values())
    assert {r["t_start"] for r in rows.values()} == {40, 24}
    assert_no_more_digits_than_promised(result["arms"])
    assert result["floor"]["fid_lenet"] == round(result["floor"]["fid_lenet"], 3)
    for file in ("config.json", "log.csv", "checkpoint.pt", "report.html", "priors.png"):
        assert (whole_run / file).stat().st_size > 0
    assert not list(whole_run.glob("*.tmp"))


def test_restoring_with_a_runs_networks_leaves_the_run_as_it_is(whole_run, tmp_path, capsys):
    before = {file: file.read_bytes() for file in whole_run.glob("*.*")}
    out = tmp_path / "restored"
    status, _, err = run_main(["--resume", whole_run, "--out", out, "--eta", 0, "--train",
                               "full,truncated", "--task", ",".join(dipddpm.TASKS)], capsys)
    assert status == 0, err
    assert before == {file: file.read_bytes() for file in whole_run.glob("*.*")}
    result = json.loads((out / "results.json").read_text())
    for task in dipddpm.TASKS:
        rows = {(r["name"], r.get("nfe")) for r in result["arms"] if r["task"] == task}
        starts = ["ddpm", "dip-images", "pinv"] + ["ddpm-y"] * (task == "denoise")
        assert rows == {("corrupted", None), ("dip", None)} | {
            (name, nfe) for name in starts for nfe in (2, 4)}
        assert (out / f"{task}.png").exists()
        assert result["curves"][f"restored {task}/dip"][0][0] == 0
    page = (out / "report.html").read_text()
    assert all(f"<h2>{task}, sigma" in page for task in dipddpm.TASKS)
    saved = [edge.load_checkpoint(folder)["networks"]["full"] for folder in (whole_run, out)]
    assert all(torch.equal(saved[0]["ema"][k], saved[1]["ema"][k]) for k in saved[0]["ema"])


def test_a_sweep_over_a_runs_networks_trains_nothing(whole_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dipddpm, "denoising_loss", None)  # a training step would fail
    status, _, err = run_main(["--resume", whole_run, "--out", tmp_path / "s", "--sweep",
                               "dip-iters=2,3", "--dip-source", "images", "--nfe", 2, "--train",
                               "truncated"], capsys)
    assert status == 0, err
    assert (tmp_path / "s" / "comparison.html").exists()
    folders = sorted(path.name for path in (tmp_path / "s").iterdir() if path.is_dir())
    assert folders == ["dip-iters=2", "dip-iters=3"]


def test_a_truncated_network_serves_no_later_start(whole_run, tmp_path, capsys):
    status, _, err = run_main(["--resume", whole_run, "--t-start", 30], capsys)
    assert status == 2 and "trained for t < 24" in err and err.count("\n") == 1


def test_one_network_is_never_swept_as_several_seeds(whole_run, tmp_path, capsys):
    for flag in ("seed=0,1", "predict=eps,v", "epochs=2,3"):
        status, _, err = run_main(["--resume", whole_run, "--out", tmp_path / "s", "--sweep", flag],
                                  capsys)
        assert status == 2 and "cannot become" in err and err.count("\n") == 1
        assert not (tmp_path / "s").exists()


def test_a_setting_is_told_by_what_differs_in_its_run():
    row = {"name": "pca", "train": "full", "t_start": 600, "eta": 1.0, "order": 2}
    assert dipddpm.setting_of(row, config()) == "pca"
    assert dipddpm.setting_of(row, config(eta=(0.0, 1.0), order=(1, 2))) == "pca eta 1 order 2"
    several = config(train=("full", "truncated"), t_start=(300, 600))
    assert dipddpm.setting_of(row, several) == "pca train full t_start 600"
    assert dipddpm.setting_of(row | {"name": "ddpm"}, several) == "ddpm"


def test_headlines_say_with_how_few_evaluations_and_when_a_prior_is_paid_back():
    def row(name, nfe, fid, seconds, prior=0.0):
        return {"name": name, "train": "full", "nfe": nfe, "t_start": 600, "eta": 0.0, "order": 1,
                "grid": "uniform", "fid_lenet": fid, "recall": 0.5, "seconds": seconds + prior,
                "prior_seconds": prior}
    arms = [row("ddpm", 3, 50, 2), row("ddpm", 50, 10, 32), row("dip-codes", 3, 10.4, 2, 45),
            row("dip-codes", 50, 9, 32, 45), row("gauss", 3, 70, 2), row("gauss", 50, 60, 32),
            row("dip-images", 3, 10, 2, 75), row("dip-images", 50, 9, 32, 75)]
    codes, gauss, images = dipddpm.headlines(config(nfe=(3, 50)), arms, 100)
    assert "with 3;" in codes and "paid back from 150 images" in codes  # 45 s of 0.3 s an image
    assert "does not reach" in gauss and "60.00" in gauss
    assert "never paid back" in images  # each image pays for its own


def test_class_gap_is_the_share_of_samples_in_a_wrong_class():
    a, b = torch.tensor([5, 5]), torch.tensor([2, 4, 4])
    assert measures.total_variation(a, b) == pytest.approx(0.4)
    assert measures.total_variation(b, b) == 0


def test_seconds_of_a_step_are_not_bent_by_a_pause():
    rows = [["full", 50 * n, 0, 10.0 * n + (1000 if n > 3 else 0), 0, 0] for n in range(1, 9)]
    assert dipddpm.median_step(rows) == pytest.approx(0.2)


def test_sampling_from_a_run_needs_no_data(whole_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIPDDPM_DATA", str(tmp_path / "nothing"))
    starts, ends, real = [], [], dipddpm.sample

    def sample(cfg, net, x, *args):
        starts.append(x.clone())
        ends.append(real(cfg, net, x, *args))
        return ends[-1]

    monkeypatch.setattr(dipddpm, "sample", sample)
    status, _, err = run_main(["--mode", "sample", "--resume", whole_run, "--samples", 5, "--nfe",
                               3, "--out", tmp_path / "s"], capsys)
    assert status == 0, err
    assert (tmp_path / "s" / "samples-nfe3-eta-0.png").exists()
    noise = kernels.normal((5, 1, 28, 28), 0, torch.arange(5), 0, kernels.INIT_NOISE)
    assert all(torch.equal(x, noise) for x in starts) and starts  # where the run's own began
    sheet = measures.grid(((ends[0] + 1) / 2).clamp(0, 1), scale=measures.zoom(noise))
    assert sheet.tobytes() == Image.open(tmp_path / "s" / "samples-nfe3-eta-0.png").tobytes()


def test_resuming_with_other_training_flags_or_data_is_refused_in_one_line(
        whole_run, capsys, monkeypatch):
    status, _, err = run_main(["--resume", whole_run, "--width", 16], capsys)
    assert status == 2 and "--width was 8" in err and err.count("\n") == 1
    real = data.load
    monkeypatch.setattr(data, "load", lambda *a, **b: real(*a, **b)._replace(sha256="another"))
    status, _, err = run_main(["--resume", whole_run], capsys)
    assert status == 2 and "the data was" in err and err.count("\n") == 1 and str(whole_run) in err


def test_a_damaged_checkpoint_is_one_line(whole_run, tmp_path, capsys):
    for content in (b"", b"not a checkpoint", (whole_run / "checkpoint.pt").read_bytes()[:5000]):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        (tmp_path / "config.json").write_text((whole_run / "config.json").read_text())
        status, _, err = run_main(["--mode", "sample", "--resume", tmp_path, "--out",
                                   tmp_path / "s"], capsys)
        assert status == 2 and "checkpoint.pt" in err and err.count("\n") == 1
        (tmp_path / "s").exists() and shutil.rmtree(tmp_path / "s")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"format": 1, "networks": Malicious(tmp_path / "ran")}, tmp_path / "checkpoint.pt")
    error_line(ValueError, lambda: edge.load_checkpoint(tmp_path), tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def test_a_checkpoint_of_another_format_or_architecture_says_so(tmp_path):
    torch.save({"format": 2, "networks": {}}, tmp_path / "checkpoint.pt")
    error_line(ValueError, lambda: edge.load_checkpoint(tmp_path), "checkpoint of format 1")
    wide, narrow = (dipddpm.make_unet(config(width=width), 1, "cpu") for width in (16, 8))
    error_line(ValueError, lambda: edge.load_weights(narrow, wide.state_dict(), "there"),
               "there: its network has another architecture")


def test_the_checkpoint_before_serves_where_the_newest_is_damaged(tmp_path, capsys):
    run = bare_run(tmp_path)
    run.about = {"data": {}, "shape": []}
    for step in (1, 2):
        run.state = {"full": {"step": step}}
        edge.save_checkpoint(run)
    assert edge.load_checkpoint(tmp_path)["networks"]["full"]["step"] == 2
    newest = tmp_path / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert edge.load_checkpoint(tmp_path)["networks"]["full"]["step"] == 1
    assert "going on from checkpoint-previous.pt" in capsys.readouterr().out
    newest.unlink()  # killed between the two renames
    assert edge.load_checkpoint(tmp_path)["networks"]["full"]["step"] == 1


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    import resource
    run = bare_run(tmp_path)
    run.about = {"data": {}, "shape": []}
    run.state = {"full": {"step": 1}}
    edge.save_checkpoint(run)
    run.state = {"full": {"step": 2, "net": torch.zeros(100_000)}}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            edge.save_checkpoint(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert edge.load_checkpoint(tmp_path)["networks"]["full"]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_folder_is_one_processs(tmp_path):
    held = edge.lock(tmp_path)
    code = "import edge, pathlib, sys; edge.lock(pathlib.Path(sys.argv[1]))"
    other = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(other, cwd=EVAL.parent, capture_output=True, text=True)
    assert "another run is writing there" in done.stderr
    held.close()
    assert subprocess.run(other, cwd=EVAL.parent).returncode == 0


def test_a_saved_flag_that_is_no_choice_any_more_is_one_line(whole_run, tmp_path, capsys):
    saved = json.loads((whole_run / "config.json").read_text()) | {"dip_arch": "unet"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    shutil.copy(whole_run / "checkpoint.pt", tmp_path)
    status, _, err = run_main(["--resume", tmp_path], capsys)
    assert status == 2 and "--dip-arch unet is none of skip" in err and err.count("\n") == 1


def test_a_sweep_that_is_given_again_does_only_what_is_missing(tmp_path, capsys):
    argv = ["--mode", "dip", "--data", "digits", "--samples", 1, "--dip-iters", 20, "--dip-width",
            4, "--replicas", 1, "--sweep", "seed=0,1", "--sweep", "sigma=0.1,0.2", "--out",
            tmp_path / "s"]
    assert run_main(argv, capsys)[0] == 0
    runs = sorted(p for p in (tmp_path / "s").iterdir() if p.is_dir())
    assert [p.name for p in runs] == [f"seed={i}-sigma=0.{k}" for i in (0, 1) for k in (1, 2)]
    before = [(p / "results.json").read_bytes() for p in runs]
    (runs[2] / "results.json").unlink()
    status, out, err = run_main(argv, capsys)
    assert status == 0 and out.count("finished before") == 3, err
    after = [(p / "results.json").read_bytes() for p in runs]
    assert [a == b for a, b in zip(before, after)] == [True, True, False, True]
    assert "| dip" in out and (tmp_path / "s" / "comparison.html").exists()
    status, _, err = run_main([*argv, "--dip-iters", 30], capsys)
    assert status == 2 and "another --dip-iters" in err and err.count("\n") == 1
    shutil.rmtree(runs[0])  # and nothing is begun where a later one cannot go on
    status, _, err = run_main([*argv, "--dip-iters", 30], capsys)
    assert status == 2 and "another --dip-iters" in err and not runs[0].exists()
    assert [(p / "results.json").read_bytes() for p in runs[1:]] == after[1:]


def test_a_stopped_sweep_of_trainings_goes_on(tmp_path, capsys, monkeypatch):
    argv = [*little_training(tmp_path)[0], "--epochs", 30, "--sweep", "seed=0,1", "--out"]
    assert run_main([*argv, tmp_path / "whole"], capsys)[0] == 0
    monkeypatch.setattr(dipddpm, "CHECKPOINT_SECONDS", 0)
    real, stopped = edge.save_checkpoint, []

    def stop_the_second(run):
        real(run)
        if run.config["seed"] == 1 and not stopped:
            stopped.append(copy.deepcopy(run.state["full"]["rows"]))
            raise KeyboardInterrupt

    monkeypatch.setattr(edge, "save_checkpoint", stop_the_second)
    assert run_main([*argv, tmp_path / "s"], capsys)[0] == 130
    assert stopped[0][-1][1] == 50  # of 120 steps
    status, out, err = run_main([*argv, tmp_path / "s"], capsys)
    assert status == 0 and "seed=0: finished before" in out, err
    whole, again = (edge.load_checkpoint(tmp_path / name / "seed=1")["networks"]["full"]
                    for name in ("whole", "s"))
    assert again["rows"][:1] == stopped[0]  # its seconds as well: it was not done again
    assert all(torch.equal(w, again["ema"][k]) for k, w in whole["ema"].items())


def test_only_a_run_is_overwritten_and_only_when_asked(tmp_path, capsys):
    argv = ["--mode", "dip", "--data", "digits", "--samples", 2, "--dip-iters", 10, "--dip-width",
            4, "--replicas", 1, "--out", tmp_path / "d"]
    assert run_main(argv, capsys)[0] == 0
    files = {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    status, _, err = run_main([*argv, "--seed", 1], capsys)
    assert status == 2 and "--overwrite" in err and err.count("\n") == 1
    status, _, err = run_main([*argv, "--seed", 1, "--data", "nowhere", "--overwrite"], capsys)
    assert status == 2 and "nowhere" in err
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    status, _, err = run_main([*argv, "--samples", 1, "--overwrite"], capsys)
    assert status == 0 and not (tmp_path / "d" / "restored-01.png").exists(), err
    for name, line in ("thesis.txt", "no run there"), ("config.json", "damaged or of another"):
        (tmp_path / name[0]).mkdir()
        (tmp_path / name[0] / name).write_text("years of work")
        status, _, err = run_main([*argv[:-1], tmp_path / name[0], "--overwrite"], capsys)
        assert status == 2 and line in err and (tmp_path / name[0] / name).exists()
    for name in "d/.git", "d/seed=1":  # what is no file of the run's own stays
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text("")
    assert run_main([*argv, "--overwrite"], capsys)[0] == 0
    assert (tmp_path / "d/.git/kept").exists() and (tmp_path / "d/seed=1/kept").exists()


def test_dip_run_stops_by_itself_and_tells_how_well(tmp_path, capsys, monkeypatch):
    rungs, real = [], dipddpm.fit_guided_in_groups
    monkeypatch.setattr(dipddpm, "fit_guided_in_groups", lambda cfg, seen, n, run, tell: (
        rungs.append(n), real(cfg, seen, n, run, tell))[1])
    status, out, err = run_main([
        "--mode", "dip", "--data", "digits", "--samples", 3, "--dip-group", 4, "--replicas", 2,
        "--dip-iters", 110, "--dip-width", 4, "--patience", 20, "--out", tmp_path / "d"], capsys)
    assert status == 0, err
    result = json.loads((tmp_path / "d" / "results.json").read_text())
    corrupted, dip = result["arms"]
    curve, mark = dict(result["curves"]["psnr/mean over images"]), result["marks"]["psnr"]
    assert curve[mark["best"]] == max(curve.values()) and mark["end"] == max(curve)
    assert rungs == [1] and result["data"]["train"] == 0 and result["data"]["test"] == 3
    assert dip["seconds"] <= result["seconds"]["total"] < 300
    assert corrupted["name"] == "corrupted" and 18 < corrupted["psnr"] < 24  # 20 dB but for clips
    assert dip["name"] == "dip" and -1e-3 <= dip["psnr_oracle"] - dip["psnr"] < 5
    assert dip["iterations"] <= 110
    assert_no_more_digits_than_promised(result["arms"])
    assert out.count("iteration 50: psnr ") == 2  # two images a group
    assert len(list((tmp_path / "d").glob("restored-*.png"))) == 3


def test_dip_finds_the_noise_of_a_photo_that_has_no_truth(tmp_path, capsys):
    x = torch.linspace(0.2, 0.8, 40)[:, None] * torch.ones(3, 40, 48)
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    measures.save_png(measures.grid(x[None]), tmp_path / "noisy.png")
    status, out, err = run_main([
        "--mode", "dip", "--data", tmp_path / "noisy.png", "--noise", "own", "--crop", 32,
        "--dip-iters", 60, "--dip-width", 8, "--replicas", 2, "--out", tmp_path / "d"], capsys)
    assert status == 0, err
    corrupted, dip = json.loads((tmp_path / "d" / "results.json").read_text())["arms"]
    assert dip["sigma_estimate"] == pytest.approx(0.1, rel=0.15) and "psnr" not in dip
    assert "(estimated)" in out and "psnr" not in out
    assert Image.open(tmp_path / "d" / "restored-00.png").size == (32, 32)


def test_a_dip_that_answers_beyond_an_image_is_clipped_before_it_is_measured(tmp_path, capsys):
    status, out, err = run_main([
        "--mode", "dip", "--data", "digits", "--samples", 2, "--sigma", 0.3, "--dip-iters", 20,
        "--dip-width", 4, "--dip-arch", "autoencoder", "--out", tmp_path / "d"], capsys)
    assert status == 0, err
    result = json.loads((tmp_path / "d" / "results.json").read_text())
    assert math.isfinite(result["arms"][1]["psnr"])


def test_guide_run_compares_its_arms_and_marks_what_leaks(tmp_path, capsys):
    status, _, err = run_main(["--mode", "guide", "--data", "digits", "--samples", 2, "--sigma",
                               0.3, "--dip-iters", 60, "--dip-width", 4, "--patience", 20, "--out",
                               tmp_path / "g"], capsys)
    assert status == 0, err
    result = json.loads((tmp_path / "g" / "results.json").read_text())
    rows = {row["name"]: row for row in result["arms"]}
    assert list(rows) == ["plain", "oracle", "es-wmv", "plain-mean", "oracle-mean", "es-wmv-mean",
                          "split", "ladder", "literal", "literal-mean"]
    assert all(row["network_steps"] == pytest.approx(row["networks"] * row["iterations"], abs=0.5)
               for row in rows.values())
    assert {name for name, row in rows.items() if row.get("leaks")} == {"literal", "literal-mean"}
    assert_no_more_digits_than_promised(result["arms"])
    assert [row["networks"] for row in rows.values()] == [1, 1, 1, 4, 4, 4, 4, 4, 1, 1]
    assert all(abs(rows[name]["own_gap"]) < 5 for name in ("split", "ladder"))
    assert all(row.get("seconds", 0) <= result["seconds"]["total"] for row in rows.values())
    assert rows["es-wmv"]["seconds"] == pytest.approx(
        rows["plain"]["seconds"] * rows["es-wmv"]["iterations"] / 60, abs=0.02)
    assert result["seconds"]["dip"] <= result["seconds"]["total"]
    for name in "literal", "literal-mean":
        assert rows[name]["psnr_oracle"] >= rows[name]["psnr"] - 1e-3
    assert result["data"]["train"] == 0 and result["data"]["test"] == 2
    assert rows["oracle"]["gap"] == 0 and rows["plain"]["psnr"] <= rows["oracle"]["psnr"] + 1e-3
    assert "leak" in (tmp_path / "g" / "report.html").read_text()


def test_what_leaks_has_the_precision_of_all_its_rungs(tmp_path, capsys, monkeypatch):
    plain, fitted, replicas = dipddpm.fit_plain, [], []
    monkeypatch.setattr(dipddpm, "fit_plain", lambda *a: (
        fitted.append(a[4]), replicas.append(a[3]), plain(*a))[2])
    status, _, err = run_main(["--mode", "guide", "--data", "digits", "--samples", 9, "--sigma",
                               0.2, "--dip-iters", 10, "--dip-width", 2, "--rungs", 3, "--arms",
                               "literal", "--out", tmp_path / "g"], capsys)
    assert status == 0, err
    clean = data.load("digits", split="test", limit=9).pixels.float() / 255
    assert replicas == [1, 1]
    levels = [(y - clean).std().item() for y in fitted[0]]
    assert levels == pytest.approx([0.8, 0.4, 0.2], rel=0.04)
    best = sum(level**-2 for level in (0.8, 0.4, 0.2)) ** -0.5  # of any mean of the three
    assert [(y - clean).std().item() for y in fitted[1]] == pytest.approx([best], rel=0.03)


def test_an_arms_own_best_is_that_of_its_looks_and_its_result(tmp_path):
    run = bare_run(tmp_path)
    run.begin = lambda: None
    cfg = config(mode="dip", data="digits", samples=1, sigma=0.3, dip_iters=150, dip_width=8,
                 replicas=1, patience=40)
    seen = dipddpm.observe(cfg, run)
    x, _, best, curve = dipddpm.fit_guided_in_groups(cfg, seen, 1, run)
    result = measures.psnr(x.clamp(0, 1), seen.truth).item()
    assert curve[-1][1] == pytest.approx(result, abs=3)  # the mean of the looks against the last
    assert best.item() == pytest.approx(max([result] + [psnr for _, psnr in curve]), abs=2e-3)


def test_guide_runs_the_arms_that_were_asked_for(tmp_path, capsys):
    command = ["--mode", "guide", "--data", "digits", "--samples", 1, "--dip-iters", 20,
               "--dip-width", 4, "--replicas", 2, "--arms"]
    some = {"split,mean": ["plain-mean", "oracle-mean", "es-wmv-mean", "split"],
            "plain": ["plain", "oracle", "es-wmv"]}
    for arms, names in some.items():
        status, _, err = run_main([*command, arms, "--out", tmp_path / arms], capsys)
        assert status == 0, err
        rows = json.loads((tmp_path / arms / "results.json").read_text())["arms"]
        assert [row["name"] for row in rows] == names
        assert all(("gap" in row) == (arms == "plain") for row in rows)  # to the plain oracle


def test_guide_fills_what_is_missing_where_there_is_no_noise(tmp_path, capsys):
    status, _, err = run_main(["--mode", "guide", "--data", "digits", "--samples", 2, "--task",
                               "inpaint", "--dip-iters", 40, "--dip-width", 4, "--out",
                               tmp_path / "g"], capsys)
    assert status == 0, err
    rows = json.loads((tmp_path / "g" / "results.json").read_text())["arms"]
    assert [row["name"] for row in rows] == [
        "plain", "oracle", "es-wmv", "plain-mean", "oracle-mean", "es-wmv-mean", "split"]
    assert all(math.isfinite(row["psnr"]) for row in rows)


def test_an_interrupt_keeps_a_checkpoint_and_ends_with_130(tmp_path):
    flags, here = little_training(tmp_path)
    command = [sys.executable, "dipddpm.py", *flags, "--epochs", "100000", "--out", tmp_path / "r"]
    process = subprocess.Popen(command, **here, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(600):
        if (tmp_path / "r" / "config.json").exists():
            break
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in err, err
    assert edge.load_checkpoint(tmp_path / "r")["networks"]["full"]["step"] > 0


KILLS = int(os.environ.get("KILLS", 20))
KILLED = """
import os, random, signal, sys, time
import dipddpm
import edge

folder, kills, *flags = sys.argv[1:]
dipddpm.CHECKPOINT_SECONDS, chance, moments = 0, random.Random(5), 0

def start():
    begun = os.path.exists(os.path.join(folder, "config.json"))
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(folder + ".out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        try:
            dipddpm.main(["--resume", folder] if begun else [*flags, "--out", folder])
        except SystemExit as error:
            os._exit(error.code or 0)
        os._exit(0)
    return pid

for _ in range(int(kills)):
    pid = start()
    time.sleep(chance.uniform(0.1, 1.2))
    os.kill(pid, signal.SIGKILL)
    moments += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
status = os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1])
print(moments, status)
"""


def little_training(tmp_path):
    """Flags of 600 quick steps on pictures that are quickly there, and where to run them."""
    (tmp_path / "data").mkdir()
    for i in range(70):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 12)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i:02}.png")
    flags = ("--mode ddpm --epochs 150 --width 8 --batch 15 --timesteps 40 --samples 4 --nfe 2 "
             "--data").split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    return [*flags, str(tmp_path / "data")], dict(cwd=EVAL.parent, env=environment, text=True)


def test_a_training_killed_again_and_again_ends_in_the_same_bits(tmp_path):
    flags, here = little_training(tmp_path)
    here["capture_output"] = True
    whole = subprocess.run([sys.executable, "dipddpm.py", *flags, "--out", tmp_path / "whole"],
                           **here)
    assert whole.returncode == 0, whole.stderr
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "killed", str(KILLS), *flags],
                          **here)
    assert done.returncode == 0, done.stderr
    kills, status = map(int, done.stdout.split())
    assert status == 0 and kills >= 0.5 * KILLS, done.stdout + done.stderr
    logs, pictures, weights = [], [], []
    for name in ("whole", "killed"):
        rows = [row.split(",") for row in (tmp_path / name / "log.csv").read_text().splitlines()]
        logs.append([row[:3] + row[4:] for row in rows])  # all but the seconds
        pictures.append((tmp_path / name / "samples-nfe2.png").read_bytes())
        weights.append(edge.load_checkpoint(tmp_path / name)["networks"]["full"]["ema"])
    assert logs[0] == logs[1] and len(logs[0]) == 13 and pictures[0] == pictures[1]
    assert all(torch.equal(w, weights[1][k]) for k, w in weights[0].items())


def two_processes(*argv):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "dipddpm.py", *map(str, argv)]


def losses_in(folder):
    return [float(row.split(",")[4]) for row in (folder / "log.csv").read_text().splitlines()[1:]]


def test_two_processes_do_what_one_does(tmp_path):
    few, here = little_training(tmp_path)
    few += ("--mode prior --limit 62 --epochs 30 --batch 31 --samples 7 --dip-iters 3 --dip-width "
            "4 --dip-group 4 --dip-source images --task generate,inpaint").split()
    here["capture_output"] = True
    done = subprocess.run(two_processes(*few, "--out", tmp_path / "two"), **here)
    assert done.returncode == 0, done.stderr
    one = subprocess.run([sys.executable, "dipddpm.py", *few, "--out", tmp_path / "one"], **here)
    assert one.returncode == 0, one.stderr
    assert done.stdout.count("data: ") == 1  # one process speaks
    results, losses, pictures, memories = [], [], [], []
    for name in ("one", "two"):
        adam = edge.load_checkpoint(tmp_path / name)["networks"]["full"]["optimizer"]["state"]
        memories.append(sum(memory["exp_avg_sq"].sum().item() for memory in adam.values()))
        results.append(json.loads((tmp_path / name / "results.json").read_text())["arms"])
        losses.append(losses_in(tmp_path / name))
        pictures.append(np.asarray(Image.open(tmp_path / name / "samples-nfe2.png"), float))
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert memories[1] == pytest.approx(memories[0], rel=1e-3)  # Adam forgives a wrong scale
    assert abs(pictures[0] - pictures[1]).max() <= 2
    assert [row["name"] for row in results[0]] == [row["name"] for row in results[1]]
    assert [row.get("psnr", 0) for row in results[1]] == pytest.approx(
        [row.get("psnr", 0) for row in results[0]], abs=0.01)


def two_that_have_begun(argv, here):
    """Two processes' launcher, once the folder after --out says that they train."""
    process = subprocess.Popen(two_processes(*argv), **here, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    for _ in range(600):
        if (argv[-1] / "config.json").exists():
            return process
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.terminate()
    raise TimeoutError(process.communicate(timeout=60)[1])


def test_a_process_that_dies_ends_the_other_and_says_so(tmp_path):
    flags, here = little_training(tmp_path)
    process = two_that_have_begun([*flags, "--epochs", 100000, "--out", tmp_path / "r"], here)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    ours = [line for line in err.splitlines() if line.startswith("dipddpm: ")]  # among torchrun's
    assert process.returncode != 0 and ours == [
        f"dipddpm: another process ended; continue with --resume {tmp_path / 'r'}"]
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    flags, here = little_training(tmp_path)
    flags += ["--epochs", "100"]  # 400 steps
    process = two_that_have_begun([*flags, "--out", tmp_path / "r"], here)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    state = edge.load_checkpoint(tmp_path / "r")["networks"]["full"]
    assert 0 < state["step"] < 400 and state["step"] % 50 == 0 and not state["tally"].any()
    for last in ["--resume", tmp_path / "r"], [*flags, "--out", tmp_path / "whole"]:
        done = subprocess.run([sys.executable, "dipddpm.py", *map(str, last)], **here,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
    losses = [losses_in(tmp_path / name) for name in ("r", "whole")]
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_modes_that_no_process_can_help_say_so(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run_main("--mode guide --data digits".split(), capsys)
    assert status == 2 and "runs in one process" in err and err.count("\n") == 1


def test_seconds_add_up(whole_run):
    result = json.loads((whole_run / "results.json").read_text())
    whole = result["seconds"]["total"]
    assert all(0 <= part <= whole + 0.01 for part in result["seconds"].values())
    for row in result["arms"]:
        assert 0 <= row["prior_seconds"] <= row["seconds"] <= whole + 0.01
        assert row["name"] != "ddpm" or row["prior_seconds"] == 0
    n = min(result["config"]["samples"], result["data"]["train"])
    for row in result["arms"]:
        if "fid_lenet" in row:
            points = [x for name, points in result["curves"].items()
                      if name.startswith(f"seconds/{row['name']}") for x, _ in points]
            assert any(x == pytest.approx(row["seconds"] * 1000 / n) for x in points)


def test_without_noise_the_guide_has_no_ladder_and_its_stop_costs_no_more(tmp_path, capsys):
    status, _, err = run_main(["--mode", "guide", "--data", "digits", "--samples", 2, "--task",
                               "inpaint", "--dip-iters", 20, "--dip-width", 4, "--replicas", 2,
                               "--out", tmp_path / "g"], capsys)
    assert status == 0, err
    result = json.loads((tmp_path / "g" / "results.json").read_text())
    rows = {row["name"]: row for row in result["arms"]}
    assert rows["plain"]["seconds"] <= result["seconds"]["total"]
    assert list(rows) == ["plain", "oracle", "es-wmv", "plain-mean", "oracle-mean", "es-wmv-mean",
                          "split"]
    assert 0 < rows["es-wmv"]["seconds"] <= rows["plain"]["seconds"]
    assert rows["es-wmv"]["iterations"] == 20 and "seconds" not in rows["oracle"]


def test_split_is_a_ladder_of_one_rung(tmp_path, capsys, monkeypatch):
    asked, real = [], dipddpm.fit_guided_in_groups
    monkeypatch.setattr(dipddpm, "fit_guided_in_groups", lambda cfg, seen, rungs, run: (
        asked.append(rungs), real(cfg, seen, rungs, run))[1])
    status, _, err = run_main(["--mode", "guide", "--data", "digits", "--samples", 1, "--arms",
                               "split,ladder", "--dip-iters", 10, "--dip-width", 2, "--rungs", 3,
                               "--out", tmp_path / "g"], capsys)
    assert status == 0 and asked == [1, 3], err


# ================================================================== eval

EVAL = Path(measures.__file__)


def random_images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_features(n, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- image against image


def ssim_by_loops(a, b, size):
    """Wang et al. 2004, eq. 13, one window at a time with a two-dimensional Gaussian."""
    r = size // 2
    w = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-r, r + 1)]
                  for i in range(-r, r + 1)])
    w /= w.sum()
    total = []
    for x, y in zip(a, b):  # channels
        for i in range(x.shape[0] - size + 1):
            for j in range(x.shape[1] - size + 1):
                p, q = x[i:i + size, j:j + size], y[i:i + size, j:j + size]
                mp, mq = (w * p).sum(), (w * q).sum()
                vp, vq = (w * (p - mp)**2).sum(), (w * (q - mq)**2).sum()
                cov = (w * (p - mp) * (q - mq)).sum()
                total.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                             / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return sum(total) / len(total)


@pytest.mark.parametrize("shape, size", [((2, 3, 15, 13), 11), ((1, 1, 8, 20), 7),
                                         ((1, 2, 1, 4), 1)])
def test_ssim_is_the_mean_over_whole_windows(shape, size):
    a = random_images(*shape).double()
    b = (0.7 * a + 0.3 * random_images(*shape, seed=1)).double()
    expected = [ssim_by_loops(x, y, size) for x, y in zip(a.numpy(), b.numpy())]
    assert measures.ssim(a, b).numpy() == pytest.approx(expected, abs=1e-6)


def test_pixel_errors_are_their_definitions():
    a, b = random_images(3, 2, 5, 4), random_images(3, 2, 5, 4, seed=1)
    d = (a.double() - b.double()).numpy()
    square = [np.mean(x**2) for x in d]
    assert measures.mse(a, b).numpy() == pytest.approx(square)
    assert measures.mae(a, b).numpy() == pytest.approx([np.mean(abs(x)) for x in d])
    assert measures.psnr(a, b).numpy() == pytest.approx([10 * math.log10(1 / s) for s in square])


def test_a_constant_error_of_a_tenth_is_twenty_decibels():
    a = torch.full((1, 1, 4, 4), 0.5)
    assert measures.psnr(a, a + 0.1).item() == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("name", ["mse", "mae", "psnr", "ssim", "delta_e"])
def test_image_measures_are_symmetric_and_know_their_range(name):
    measure = getattr(measures, name)
    a, b = random_images(2, 3, 16, 16), random_images(2, 3, 16, 16, seed=1)
    assert torch.allclose(measure(a, b), measure(b, a), rtol=1e-12)
    assert measure(a, b).shape == (2,)
    assert torch.allclose(measure(255 * a, 255 * b, data_range=255), measure(a, b), atol=1e-4)


def test_a_row_has_the_mean_and_the_deviation_over_images():
    a, b = random_images(3, 1, 12, 12), random_images(3, 1, 12, 12, seed=1)
    row = measures.measures(a, b)
    for f in measures.psnr, measures.ssim, measures.mse, measures.mae, measures.delta_e:
        each = f(a, b).numpy()
        assert row[f.__name__] == round(each.mean(), 5)
        assert row[f.__name__ + "_std"] == round(each.std(), 5)


def test_equal_images_measure_as_equal():
    a = random_images(2, 1, 12, 12)
    assert (measures.mse(a, a) == 0).all() and (measures.mae(a, a) == 0).all()
    assert measures.psnr(a, a).isposinf().all()
    assert torch.allclose(measures.ssim(a, a), torch.ones(2, dtype=torch.float64))
    assert (measures.delta_e(a, a) == 0).all()


def test_a_large_photo_is_the_mean_of_its_parts():
    photos = torch.zeros(2, 1, 1, 750_000)
    photos[0, ..., :250_000], photos[1] = 1, 1
    black_and_white = measures.delta_e(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)).item()
    assert measures.delta_e(*photos[:, None]).item() == pytest.approx(black_and_white * 2 / 3)


@pytest.mark.parametrize("b, word", [
    (torch.zeros(1, 1, 4, 5), r"\[1, 1, 4, 4\] and \[1, 1, 4, 5\]"),
    (torch.full((1, 1, 4, 4), math.nan), "second images hold NaN"),
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


def test_images_may_leave_their_range_by_a_thousandth_of_it():
    x = torch.zeros(1, 1, 4, 4)
    for beyond, ok in ((-0.2, True), (-0.3, False), (255.2, True), (255.3, False)):
        y = x.clone()
        y[0, 0, 0, 0] = beyond
        if ok:
            measures.mse(x, y, 255.0)
        else:
            with pytest.raises(ValueError):
                measures.mse(x, y, 255.0)


# ---------------------------------------------------------------- set against set


def test_frechet_distance_of_moved_and_stretched_sets_is_known():
    f = random_features(500).double()
    f = f - f.mean(0)
    # f and 2 f + 3 commute: |mean difference|² + tr (S + 4 S - 2 · 2 S) = 9 D + tr S
    expected = 9 * 5 + torch.cov(f.T).trace().item()
    assert measures.frechet_distance(f, 2 * f + 3) == pytest.approx(expected, rel=1e-9)
    one, two = torch.tensor([[0.], [2.]]), torch.tensor([[1.], [7.]])  # D = 1: (μ-μ)² + (σ-σ)²
    assert measures.frechet_distance(one, two) == pytest.approx(9 + (2**.5 - 18**.5)**2)


def test_frechet_distance_agrees_with_the_unsymmetric_root():
    f = random_features(60, 4).double()
    g = random_features(80, 4, seed=1).double() @ random_features(4, 4, seed=2).double() + 1
    S_f, S_g = np.cov(f.numpy().T), np.cov(g.numpy().T)
    cross = np.sqrt(np.linalg.eigvals(S_f @ S_g).astype(complex)).real.sum()
    expected = ((f.mean(0) - g.mean(0))**2).sum().item() + np.trace(S_f + S_g) - 2 * cross
    assert measures.frechet_distance(f, g) == pytest.approx(expected, rel=1e-9)
    assert measures.frechet_distance(g, f) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n, d, rank", [(500, 20, 20), (500, 20, 7), (15, 20, 20), (21, 20, 20)])
def test_frechet_distance_is_that_of_scipys_root(n, d, rank):
    linalg = pytest.importorskip("scipy.linalg")
    f = random_features(n, rank).double() @ random_features(rank, d, seed=1).double()
    g = 0.5 + random_features(n + 3, rank, seed=2).double() @ random_features(
        rank, d, seed=3).double()
    S_f, S_g = np.cov(f.numpy().T), np.cov(g.numpy().T)
    # the root of a product of full rank is exact; a singular one needs the usual small addition
    singular = min(n - 1, rank) < d
    nudge = 1e-10 * np.eye(d) if singular else 0
    root = linalg.sqrtm((S_f + nudge) @ (S_g + nudge)).real
    expected = (((f.mean(0) - g.mean(0))**2).sum().item() + np.trace(S_f + S_g)
                - 2 * np.trace(root))
    assert measures.frechet_distance(f, g) == pytest.approx(expected, rel=1e-6)


def test_a_set_is_at_no_distance_from_itself_even_when_singular():
    f = random_features(50, 3)
    f = torch.cat([f, f[:, :1], torch.ones(50, 1)], 1)
    assert measures.frechet_distance(f, f) == pytest.approx(0, abs=1e-6)


def test_features_that_cannot_be_compared_are_refused():
    f = random_features(10)
    with pytest.raises(ValueError, match="10, 5.*10, 4"):
        measures.frechet_distance(f, f[:, :4])
    with pytest.raises(ValueError, match="second features hold NaN"):
        measures.frechet_distance(f, f * math.nan)


def test_kid_of_one_law_is_zero_within_its_spread_and_grows_with_a_shift():
    x = random_features(1200, 8)
    mean, std = measures.kid(x[:600], x[600:])
    assert std > 0 and abs(mean) < std
    moved, _ = measures.kid(x[:600], x[600:] + 1)
    assert moved > 20 * std
    assert measures.kid(x[:600], x[600:]) == (mean, std)  # nothing is drawn from a global generator


def test_kid_over_splits_of_one_set_has_mean_zero():
    x = random_features(400, 8)
    estimates = []
    for seed in range(100):
        halves = x[torch.randperm(400, generator=torch.Generator().manual_seed(seed))]
        estimates.append(measures.kid(halves[:200], halves[200:], subsets=1, size=200)[0])
    # over splits of a finite set the unbiased estimate has a mean of its order 1/n, not its spread
    assert abs(np.mean(estimates)) < 4 * np.std(estimates) / 100**.5


def test_kid_of_two_constant_sets_is_known():
    f, g = torch.tensor([[1., 1.]]).expand(6, 2), torch.tensor([[2., 0.]]).expand(6, 2)
    # k(x, y) = (x·y / 2 + 1)³: 2³ + 3³ - 2 · 2³, whatever the subsets
    assert measures.kid(f, g) == pytest.approx((19, 0))


@pytest.mark.parametrize("n, m", [(6, 40), (40, 6)])
def test_kid_takes_half_of_the_smaller_set(n, m):
    f, g = torch.tensor([[1., 1.]]).expand(n, 2), torch.tensor([[2., 0.]]).expand(m, 2)
    assert measures.kid(f, g) == pytest.approx((19, 0))


def test_kid_takes_a_hundred_times_at_most_a_thousand():
    f, g = random_features(2004, 3), random_features(2004, 3, seed=1)
    assert measures.kid(f, g, subsets=2) == measures.kid(f, g, subsets=2, size=1000)
    assert measures.kid(f[:9], g[:9]) == measures.kid(f[:9], g[:9], subsets=100)


def test_kid_is_unbiased_where_its_biased_form_is_not():
    # the mean over many pairs of tiny sets of one law: the diagonal would add about 2 k(x, x) / m
    estimates = [measures.kid(random_features(8, seed=2 * i), random_features(8, seed=2 * i + 1),
                              subsets=2)[0] for i in range(300)]
    assert abs(np.mean(estimates)) < 4 * np.std(estimates) / 300**.5
    assert np.std(estimates) / 300**.5 < 1  # the bias of the biased form is above 4


def test_precision_and_recall_of_constructed_sets():
    real = torch.cat([random_features(100), random_features(100, seed=1) + 100])  # two far modes
    assert measures.precision_recall(real, real) == (1, 1)
    half = random_features(100, seed=2)  # good pictures of one mode
    precision, recall = measures.precision_recall(half, real)
    assert precision > 0.8 and 0.4 < recall <= 0.5
    broad = torch.cat([real, real + 1000])  # all modes, and as much rubbish
    assert measures.precision_recall(broad, real) == (0.5, 1)


def test_more_than_a_thousand_are_measured_as_few_are():
    f, g = torch.rand(1100, 2), torch.rand(1200, 2)
    far = torch.cat([f[:1050], f[1050:] + 9])
    reach = [torch.cdist(x, x).topk(4, largest=False).values[:, 3] for x in (far, g)]
    near = torch.cdist(far, g)
    assert measures.precision_recall(far, g) == pytest.approx((
        (near <= reach[1]).any(1).float().mean().item(),
        (near <= reach[0][:, None]).any(0).float().mean().item()))
    x = torch.zeros(2300, 1, 2, 2, dtype=torch.uint8)
    x[::3] = 255

    def net(x):  # white is class 1
        return None, torch.cat([torch.full_like(x[:, 0, :1, 0], 0.5), x[:, 0, :1, 0]], 1)

    net.fc1 = torch.nn.Linear(1, 1)
    labels = torch.arange(2300) % 2
    right = ((torch.arange(2300) % 3 == 0).long() == labels).float().mean().item()
    assert measures._accuracy(net, x, labels) == pytest.approx(right)


def test_manifold_reaches_to_the_kth_neighbour_without_the_point_itself():
    g = torch.tensor([[0.], [1.], [3.]])  # radii for k = 1: 1, 1, 2
    f = torch.tensor([[-0.9], [5.1]])     # radii for k = 1: 6, 6
    assert measures.precision_recall(f, g, k=1) == (0.5, 1)


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


def test_precision_needs_as_many_points_as_neighbours_and_itself():
    f = torch.randn(4, 3)
    assert measures.precision_recall(f, f, k=3) == (1.0, 1.0)
    error_line(ValueError, lambda: measures.precision_recall(f[:3], f[:3], k=3))


def test_kid_needs_four_of_each():
    f = torch.randn(4, 3)
    measures.kid(f, f + 1)
    error_line(ValueError, lambda: measures.kid(f[:3], f))


def test_floats_are_images_up_to_a_thousandth():
    x = torch.rand(3, 1, 4, 4)
    for beyond, ok in ((-0.0009, True), (-0.0012, False), (1.0009, True), (1.0012, False)):
        y = x.clone()
        y[0, 0, 0, 0] = beyond
        if ok:
            measures.nearest(y, x)
        else:
            error_line(ValueError, lambda y=y: measures.nearest(y, x))


# ---------------------------------------------------------------- LeNet features


@pytest.fixture(scope="module")
def striped():
    """Two classes of tiny images, with horizontal and with vertical stripes."""
    pixels = (60 * random_images(80, 1, 8, 8)).byte()
    pixels[:40, :, ::2] += 150
    pixels[40:, :, :, ::2] += 150
    return pixels, torch.arange(80) // 40


def test_features_are_learned_once_and_read_back(striped, tmp_path, monkeypatch):
    pixels, labels = striped
    monkeypatch.setattr(measures, "LENET_STEPS", 40)
    unwritable = tmp_path / "file"
    unwritable.write_text("")
    folders, state = [unwritable / "sub", tmp_path / "cache"], torch.get_rng_state()
    net = measures.feature_network(pixels, labels, "stripes", folders, test=striped, epochs=1)
    assert torch.equal(state, torch.get_rng_state())
    assert net.accuracy == 1 and net.name == "stripes" and len(net.checksum) == 64
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name.startswith("features-stripes-") and file.suffix == ".pt"

    content = torch.load(file, weights_only=True)
    content["state"]["fc1.weight"][0, 0] = math.nan
    torch.save(content, altered := io.BytesIO())
    for damaged in (file.read_bytes()[:1000], altered.getvalue()):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="damaged"):
            again = measures.feature_network(pixels, labels, "stripes", folders, test=striped,
                                             epochs=1)
        assert again.checksum == net.checksum  # same seed, same weights

    monkeypatch.setattr(measures, "_fit", None)  # from here on nothing can be trained
    cached = measures.feature_network(pixels, labels, "stripes", folders, epochs=1)
    assert cached.checksum == net.checksum and cached.accuracy == 1
    f = measures.features(cached, pixels)
    assert f.shape == (80, cached.dimension) and f.dtype == torch.float32
    assert cached.net.fc2.out_features == 2
    assert torch.equal(f, measures.features(net, pixels.float() / 255))
    # rounding may differ with the batch's shape, nothing else may
    assert torch.allclose(f, measures.features(cached, pixels, batch=7), atol=1e-5)


def test_floor_takes_images_from_the_whole_split(striped):
    pixels, _ = striped
    net = measures.FeatureNet(measures.LeNet(1, 2).eval(), "untrained", None, "", 84)
    each = [measures.frechet_distance(measures.features(net, pixels[measures.subset(80, 40, i)]),
                                      measures.features(net, pixels)) for i in range(3)]
    mean, deviation = measures.floor(net, pixels, pixels, 40, 3)
    assert mean == pytest.approx(np.mean(each)) and deviation == pytest.approx(np.std(each, ddof=1))
    five = [measures.frechet_distance(measures.features(net, pixels[measures.subset(80, 40, i)]),
                                      measures.features(net, pixels)) for i in range(5)]
    assert measures.floor(net, pixels, pixels, 40)[0] == pytest.approx(np.mean(five))
    assert measures.floor(net, pixels, pixels, 2)[0] > 0
    with pytest.raises(ValueError, match="1 images from a split of 80"):
        measures.floor(net, pixels, pixels, 1)
    with pytest.raises(ValueError, match="81 images from a split of 80"):
        measures.floor(net, pixels, pixels, 81)


def test_a_subset_holds_every_class_of_a_set_that_stores_them_in_turn():
    index = measures.subset(10_000, 400)
    assert len(index.unique()) == 400 and 0 <= index.min() <= index.max() < 10_000
    assert (torch.bincount(index % 10) > 20).all()


def test_features_refuse_the_wrong_range_and_missing_labels(striped):
    net = measures.FeatureNet(measures.LeNet(1, 2).eval(), "untrained", None, "", 84)
    for bad in (-random_images(1, 1, 8, 8), torch.full((1, 1, 8, 8), math.nan)):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            measures.features(net, bad)
    with pytest.raises(ValueError, match="label"):
        measures.feature_network(striped[0], None, "none", [])


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Drawn digits, and the distance of a set of images to them in a LeNet's features."""
    train, test = (data.load("digits", split=split, limit=1000) for split in ("train", "test"))
    net = measures.feature_network(train.pixels, train.labels, "digits",
                                   [tmp_path_factory.mktemp("lenet")])
    x, real = test.pixels.float() / 255, measures.features(net, test.pixels)
    return x, test.labels, lambda images: measures.frechet_distance(measures.features(net, images),
                                                                    real)


def test_fid_of_a_set_to_itself_is_zero(judged):
    x, _, distance = judged
    assert distance(x) == pytest.approx(0, abs=1e-4)


def test_fid_rises_with_noise(judged):
    x, _, distance = judged
    noise = random_images(*x.shape, seed=3) - 0.5
    found = [distance((x + s * noise).clamp(0, 1)) for s in (0, 0.1, 0.2, 0.4, 0.8, 1.6)]
    assert found == sorted(found) and found[-1] > 100 * max(found[1], 1e-3)


def test_fid_rises_with_blur(judged):
    x, _, distance = judged
    found = [distance(F.avg_pool2d(x, k, 1, k // 2, count_include_pad=True))
             for k in (1, 3, 5, 7, 9)]
    assert found == sorted(found)


def test_fid_rises_with_missing_classes(judged):
    x, labels, distance = judged
    found = [distance(x[labels >= lost]) for lost in (0, 1, 3, 5, 8)]
    assert found == sorted(found)


@needs("mnist")
def test_feature_network_reads_mnist():
    train, test = (data.load("mnist", split=split) for split in ("train", "test"))
    net = measures.feature_network(train.pixels, train.labels, "mnist", [data.cache_root()],
                                   test=(test.pixels, test.labels))
    assert net.accuracy >= 0.988
    assert 0.3 < measures.floor(net, train.pixels, test.pixels, 10_000)[0] < 3


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 5, 9)])
def test_feature_network_takes_any_shape(shape):
    feature, logits = measures.LeNet(shape[0], 7)(torch.rand(2, *shape))
    assert feature.shape == (2, 84) and logits.shape == (2, 7)


def test_the_lenet_is_its_layers():
    net, x = measures.LeNet(1, 7), torch.rand(3, 1, 28, 28)
    h = F.conv2d(2 * x - 1, net.conv1.weight, net.conv1.bias, padding=2)
    h = h.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)).relu()  # [3, 8, 14, 14]
    h = F.conv2d(h, net.conv2.weight, net.conv2.bias, padding=1)
    h = h.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)).relu()  # [3, 24, 7, 7]
    wanted = h.flatten(1) @ net.fc1.weight.T + net.fc1.bias
    feature, logits = net(x)
    torch.testing.assert_close(feature, wanted)
    torch.testing.assert_close(logits, wanted.relu() @ net.fc2.weight.T + net.fc2.bias)


def test_the_lenet_learns_images_shifted_by_up_to_two_pixels(monkeypatch):
    shifts, real = [], torch.Tensor.roll
    monkeypatch.setattr(torch.Tensor, "roll", lambda x, shift, dims: (
        shifts.append((len(x), *shift, dims)), real(x, shift, dims))[1])
    entropy, smoothing = F.cross_entropy, set()
    monkeypatch.setattr(F, "cross_entropy", lambda *a, label_smoothing: (
        smoothing.add(label_smoothing), entropy(*a, label_smoothing=label_smoothing))[1])
    monkeypatch.setattr(measures, "LENET_STEPS", 80)
    measures._fit(measures.LeNet(1, 2), pixels(130, 1, 4, 4).cpu(), torch.arange(130) % 2, 0, 1)
    batches, down, right, dims = zip(*shifts)
    assert smoothing == {0.1} and batches == (128, 2) * 40 and set(dims) == {(2, 3)}
    assert set(down) == set(right) == {-2, -1, 0, 1, 2} and down != right


def test_a_set_is_told_by_its_distances_to_training_images_and_sources():
    train = data.Images(torch.zeros(2, 1, 5, 4, dtype=torch.uint8), None, "zeros", "")
    test = data.Images(torch.full((3, 1, 5, 4), 51, dtype=torch.uint8), None, "zeros", "")
    judge = measures.Judge(train, train.pixels, test, 3, [])
    assert judge.real == {"nearest": round(0.2 * 20**0.5, 3), "nearest_5": round(0.2 * 20**0.5, 3)}
    x = torch.linspace(0, 1, 101)[:, None, None, None].expand(-1, 1, 5, 4)  # 0, 0.01 ... from them
    row = judge(2 * x - 1, torch.full((101, 1, 5, 4), 255, dtype=torch.uint8))
    assert row["nearest"] == row["own_source"] == round(0.5 * 20**0.5, 3)
    assert row["nearest_5"] == round(0.05 * 20**0.5, 3)


def test_the_lenets_rate_ends_with_its_training(monkeypatch):
    made, real = [], torch.optim.lr_scheduler.OneCycleLR  # LENET_VERSION names its peak, too
    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", lambda *a: (
        made.append(real(*a)), made[-1])[1])
    monkeypatch.setattr(measures, "LENET_STEPS", 7)
    x, labels = pixels(10, 1, 28, 28).cpu(), torch.arange(10) % 2
    net = measures.LeNet(1, 2)
    measures._fit(net, x, labels, 0, 1, batch=4)
    assert made[0].total_steps == made[0].last_epoch == 9  # three times three, the next to seven
    assert not net.training and made[0].optimizer.param_groups[0]["max_lr"] == 4e-3


@pytest.mark.parametrize("n, asks", [(3, False), (4, True)])
def test_features_need_three_neighbours_and_itself(n, asks, monkeypatch):
    def asked(*args, **more):
        raise KeyError("asked")

    monkeypatch.setattr(measures, "feature_network", asked)
    images = data.Images(pixels(9, 1, 5, 5).cpu(), torch.arange(9) % 2, "some", "")
    with pytest.raises(KeyError) if asks else contextlib.nullcontext():
        measures.Judge(images, images.pixels, images, n, [])


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
    measures.write_json({"x": [1.5, math.inf, math.nan]}, file)
    assert json.loads(file.read_text()) == {"x": [1.5, None, None]}
    monkeypatch.setattr(measures.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        measures.write_json({}, file)
    assert json.loads(file.read_text())["x"] and list(tmp_path.iterdir()) == [file]


RESULTS = {
    "mode": "prior", "config": {"epochs": 3, "out": "<i>"}, "command": "python dipddpm.py <x>",
    "data": {"name": "digits & <b>", "train": 100, "test": 50}, "device": "cpu", "parameters": 7,
    "seconds": {"train": 3.0, "total": 4.0}, "floor": {"fid_lenet": 6.25, "samples": 100},
    "arms": [{"name": "<dip>", "seed": s, "nfe": n, "seconds": n / 10, "fid_lenet": 100 / n + s}
             for s in (0, 1) for n in (5, 10)],
    "curves": {"quality/<dip>": [[5, 20.5], [10, 10.5], [20, None], [0, 3]], "loss/l": [],
               "loss/zero": [[1, 0]],
               "loss/train": [[i, 1 / (i + 1)] for i in range(1000)], "other": [[1, 1], [1, 1]]},
    "pictures": [{"file": "a.png", "caption": 'a "picture"', "rows": ["<up>", "down"]},
                 {"file": "none.png"}], "marks": {"other": {"<stop>": 1.0, "none": None}},
    "notes": ["a < b"]}


def make_report(folder, results):
    measures.write_json(results, folder / "results.json")
    measures.report(folder)
    return (folder / "report.html").read_text()


def test_report_is_one_file_that_fetches_and_runs_nothing(tmp_path):
    measures.save_png(measures.grid(torch.zeros(4, 1, 3, 3)), tmp_path / "a.png")
    page = make_report(tmp_path, RESULTS)
    assert "data:image/png;base64," in page and page.count("<svg viewBox") == 3
    for word in ("http:", "https:", "<script", "<link", "url(", "@import", "src=\"a.png"):
        assert word not in page
    assert "nan" not in page.lower() and "inf" not in page.lower().replace("infinite", "")


def test_report_escapes_what_it_is_given(tmp_path):
    page = make_report(tmp_path, RESULTS)
    for word in ("<dip>", "& <b>", "<i>", "<stop>", "<up>", "<x>", "a < b", 'a "picture"'):
        assert word not in page
    for word in ("&lt;dip&gt;", "digits &amp; &lt;b&gt;", "&lt;i&gt;", "a &lt; b"):
        assert word in page


def test_report_shows_the_mean_over_seeds_not_the_best_seed(tmp_path):
    page = make_report(tmp_path, RESULTS)
    assert "10.50 <small>± 0.71</small>" in page and "floor 6.25" in page
    assert "none.png is missing" in page


@pytest.mark.parametrize("left_out", [*RESULTS, None])
def test_report_survives_missing_keys(tmp_path, left_out):
    results = {k: v for k, v in RESULTS.items() if k != left_out} if left_out else {}
    assert "</html>" in make_report(tmp_path, results)
    assert "</html>" in make_report(tmp_path, results | {left_out: None} if left_out else {})


def runs_of(tmp_path, *changes):
    """Folders of runs like RESULTS, each with another seed and other flags."""
    for i, change in enumerate(changes):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        config = RESULTS["config"] | {"seed": i} | change
        arms = [{"name": "ddpm", "seed": i, "nfe": n, "fid_lenet": 100 / n + i} for n in (5, 10)]
        curves = {"quality/ddpm": [[n, 100 / n + i] for n in (5, 10)]}
        measures.write_json(RESULTS | {"config": config, "arms": arms, "curves": curves},
                            folder / "results.json")
        measures.save_png(measures.grid(torch.zeros(4, 1, 3, 3)), folder / "a.png")
        yield folder


def test_comparison_of_seeds_shows_mean_spread_and_bands(tmp_path):
    measures.compare(list(runs_of(tmp_path, {}, {})), tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert "10.50 <small>± 0.71</small>" in page and 'opacity=".18"' in page
    assert "2 runs" in page and "run0" in page and "run1" in page and "epochs 3" not in page
    assert page.count("data:image/png") == 1  # the first seed stands for its setting


def test_comparison_of_settings_names_what_differs(tmp_path):
    folders = list(runs_of(tmp_path, {"epochs": 3}, {"epochs": 4}))
    assert measures.main(folders) == 0
    page = (tmp_path / "comparison.html").read_text()
    assert "ddpm (epochs 3)" in page and "ddpm (epochs 4)" in page
    assert 'opacity=".18"' not in page and page.count("data:image/png") == 2


def test_runs_on_other_data_or_features_are_never_averaged(tmp_path):
    first, second = runs_of(tmp_path, {}, {})
    for change, label in (({"data": {"name": "mnist"}}, "ddpm (data mnist)"),
                          ({"features": {"checksum": "abcdef"}}, "ddpm (features abcdef)"),
                          ({"floor": {"fid_lenet": 1, "samples": 9}}, "ddpm (floor samples 9)"),
                          ({"device": "H200"}, "ddpm (device H200)")):
        results = json.loads((second / "results.json").read_text())
        measures.write_json(results | change, second / "results.json")
        measures.compare([first, second], tmp_path / "c.html")
        page = (tmp_path / "c.html").read_text()
        assert label in page and 'opacity=".18"' not in page
        measures.write_json(results, second / "results.json")


def test_runs_on_more_or_fewer_threads_are_averaged_without_their_seconds(tmp_path):
    folders = [*runs_of(tmp_path, {}, {"later": 1})]  # a flag that the first one does not know
    for folder, device in zip(folders, ("CPU, 1 thread", "CPU, 2 threads")):
        results = json.loads((folder / "results.json").read_text())
        arms = [row | {"seconds": 3.0} for row in results["arms"]]
        measures.write_json(results | {"device": device, "arms": arms}, folder / "results.json")
    table = measures.text_tables(folders)
    assert "±" in table and "later" not in table and "s)" not in table
    assert "s)" in measures.text_tables(folders[:1])


def test_curves_are_averaged_only_where_every_seed_has_a_point():
    axes = measures.CHARTS["quality"]
    lines = [[[5, 20], [10, None], [20, 5]], [[5, 22], [10, 12], [20, 7]]]
    assert measures.over_seeds(lines, axes) == [(5, 21, pytest.approx(2**0.5)),
                                                (20, 6, pytest.approx(2**0.5))]
    moved = [[[5, 20]], [[6, 22]]]
    assert measures.over_seeds(moved, axes) is None
    assert measures.over_seeds(moved, measures.CHARTS["seconds"])[0][0] == 5.5  # measured times
    assert measures.over_seeds([[[5, 20]], []], axes) is None


def test_a_seed_that_comes_twice_counts_once(tmp_path):
    folder = next(runs_of(tmp_path, {}))
    measures.compare([folder, folder], tmp_path / "c.html")
    assert "±" not in (tmp_path / "c.html").read_text().replace("mean ± standard", "")


@pytest.mark.parametrize("low, high", [(6.1, 9.2), (2.3, 4.4), (0.21, 0.45), (1, 1), (3, 3000)])
def test_every_axis_has_numbers(low, high):
    for log in (False, True):
        _, ticks = measures.place([low, high, (low + high) / 2.1], log, 0, 100)
        assert len(ticks) >= 2


@pytest.mark.parametrize("change", [
    {"config": 7}, {"arms": {"a": 1}}, {"arms": [None]}, {"floor": "x"}, {"curves": [1]},
    {"curves": {"a": [[1]]}}, {"arms": [{"nfe": [3]}]}, {"pictures": ["a.png"]}, {"marks": [3]},
    {"marks": {"a": 3}}, {"notes": [3]}, [1]])
def test_damaged_results_are_one_line_that_names_the_file(change, tmp_path, capsys):
    content = RESULTS | change if isinstance(change, dict) else change
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert measures.main([tmp_path]) == 2
    err = capsys.readouterr().err
    assert "results.json" in err and err.count("\n") == 1


def test_extreme_numbers_leave_a_page(tmp_path):
    page = make_report(tmp_path, RESULTS | {
        "arms": [{"name": "a", "nfe": 3, "fid_lenet": 10**400}],
        "curves": {"quality/a": [[1, 1e308], [2, 3]], "loss/b": [[1, -1e308], [2, 1e308]]},
        "marks": {"quality": {"never": -1.0}}, "pictures": [{"file": "../a.png"}]})
    assert "</html>" in page and "never" not in page


def test_text_tables_have_mean_and_spread_over_seeds(tmp_path):
    table = measures.text_tables(list(runs_of(tmp_path, {}, {})))
    assert table.splitlines() == [
        "", "fid_lenet (floor 6.25)", "",
        "| evaluations |            5 |           10 |",
        "|-------------|-------------:|-------------:|",
        "| ddpm        | 20.50 ± 0.71 | 10.50 ± 0.71 |"]


def test_report_of_restoration_tabulates_every_measure(tmp_path):
    arms = [{"name": "ladder", "seed": s, "psnr": 24 + s, "ssim": 0.9} for s in (0, 1)]
    page = make_report(tmp_path, {"arms": arms})
    assert "24.50 <small>± 0.71</small>" in page and "<th>ssim</th>" in page


# ---------------------------------------------------------------- command line


def test_command_compares_two_pictures(tmp_path, capsys):
    a = np.full((12, 12, 3), 100, np.uint8)
    Image.fromarray(a).save(tmp_path / "a.png")
    Image.fromarray(a + 51).save(tmp_path / "b.png")
    assert measures.main([tmp_path / "a.png", tmp_path / "b.png"]) == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["mse", "mae", "psnr", "ssim", "delta_e"]
    assert float(lines["mse"]) == pytest.approx(0.04) and float(lines["mae"]) == pytest.approx(0.2)


def test_command_reads_16_bits_grey_and_turned_pictures(tmp_path, capsys):
    grey = np.arange(144, dtype=np.uint16).reshape(12, 12)
    Image.fromarray(grey * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "grey.png")
    rgb = Image.fromarray(np.repeat(grey.astype(np.uint8)[..., None], 3, 2))
    rgb.save(tmp_path / "rgb.png")
    turned, exif = rgb.rotate(90), Image.Exif()
    exif[0x112] = 6  # turn by 270 degrees to be upright
    turned.save(tmp_path / "turned.png", exif=exif)
    for name in ("deep", "rgb", "turned"):
        assert measures.main([tmp_path / "grey.png", tmp_path / f"{name}.png"]) == 0
        assert "psnr    inf" in capsys.readouterr().out
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tiff")
    assert measures.main([tmp_path / "grey.png", tmp_path / "float.tiff"]) == 2
    assert "float.tiff cannot be read: samples of mode F" in capsys.readouterr().err
    Image.fromarray(grey[:11].astype(np.uint8)).save(tmp_path / "low.png")
    assert measures.main([tmp_path / "grey.png", tmp_path / "low.png"]) == 2
    assert "grey.png is 12×12" in capsys.readouterr().err


def test_a_figure_is_drawn_from_its_curves(tmp_path, capsys):
    panel = {"axes": {"title": "a < b", "x": "step", "y": "dB", "floor": True}, "floor": 2.0,
             "series": {"plain": [[[1, 2], [2, 3]], [[1, 3], [2, 5]]], "split": [[[1, 1], [2, 2]]]}}
    path = tmp_path / "two.json"
    path.write_text(json.dumps({"panels": [panel, panel | {"series": {"ladder": [[[1, 2]]]}}]}))
    assert measures.main([path]) == 0
    svg = xml.etree.ElementTree.fromstring((tmp_path / "two.svg").read_text())
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"plain", "split", "ladder", "floor 2", "step"} <= set(texts)
    assert texts.count("a < b") == 2 and texts.count(measures.BANDS.strip()) == 1
    assert svg.get("viewBox").startswith("0 0 1020 ")
    capsys.readouterr()
    for bad in ("[]", '{"panels": [{}]}', '{"panels": [{"axes": {"z": 1}, "series": {}}]}', "no"):
        path.write_text(bad)
        assert measures.main([path]) == 2
        assert "two.json is no figure" in capsys.readouterr().err


def test_figures_are_drawn_from_what_is_committed(tmp_path):
    files = list((EVAL.parent / "figures").glob("*.json"))
    assert len(files) == 4
    for file in files:
        shutil.copy(file, tmp_path)
        assert measures.main([tmp_path / file.name]) == 0
        drawn = (tmp_path / file.name).with_suffix(".svg").read_text()
        assert drawn == file.with_suffix(".svg").read_text()


def test_command_fails_in_one_line(tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "results.json").write_text("{")
    for bad in ([], [tmp_path / "none"], [tmp_path / "text.png"] * 2, [tmp_path],
                [tmp_path / "text.png"]):
        assert measures.main(bad) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("eval: ") and err.count("\n") == 1
    run = subprocess.run([sys.executable, EVAL, "none"], capture_output=True, text=True,
                         check=False)
    assert run.returncode == 2 and run.stderr == "eval: none does not exist\n"


# ================================================================== reproduce


@pytest.fixture
def small_studies(tmp_path, monkeypatch):
    """Every data set of the studies with a few pictures, and sizes that take seconds."""
    rng = np.random.default_rng(0)
    monkeypatch.setenv("DIPDDPM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("mnist", "fashion-sample", "cifar-10-batches-bin", "photos"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for name in ("mnist", "fashion-sample"):
        for split, n in ("train", 40), ("t10k", 20):
            images = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
            for kind, array in ("images-idx3", images), ("labels-idx1", np.arange(n) % 10):
                path = tmp_path / "data" / name / f"{split}-{kind}-ubyte"
                path.write_bytes(idx_bytes(array.astype(np.uint8)))
    for name, n in ("data_batch_1", 40), ("test_batch", 20):
        records = rng.integers(0, 256, (n, 3073)).astype(np.uint8)
        records[:, 0] = np.arange(n) % 10
        (tmp_path / "data/cifar-10-batches-bin" / f"{name}.bin").write_bytes(records.tobytes())
    photo = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "data/photos/F16_GT.png")
    few = dict(width=8, n=12)
    monkeypatch.setattr(reproduce, "SMALL", {
        "A": reproduce.SMALL["A"] | few | dict(dip_width=2, dip_iters=2),
        "B": reproduce.SMALL["B"] | few | dict(epochs=1, dip_iters=(1, 2), dip_width=2, nfe=(2, 3),
                                               skip_width=2, steps=8, fits=2),
        "C": reproduce.SMALL["C"] | few | dict(epochs=1, dip_widths=(2, 3), dip_iters=2),
        "D": reproduce.SMALL["D"] | dict(pixels=16, rates=(0.01,), rungs=2, steps=10,
                                         guide_iters=10),
        "E": reproduce.SMALL["E"] | few | dict(epochs=2, archs=("conv2",), dip_width=2, n=35,
                                               dip_iters=2, snapshots=2)})
    return tmp_path / "out"


def test_every_study_ends_in_its_table_and_what_is_finished_is_not_done_again(small_studies,
                                                                               capsys):
    assert reproduce.main([*"ABCDE", "--seeds", "3", "--out", str(small_studies)]) == 0
    said, tables = capsys.readouterr().out, {}
    for name in "ABCDE":
        tables[name] = (small_studies / name / "table.md").read_text()
        about, _, head, _, *rows = tables[name].splitlines()
        assert about.startswith(f"{name}: pictures ") and "seeds 3" in about
        assert [cell.strip() for cell in head.split("|")] == ["", "", "reported", "here", ""]
        cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
        assert all(len(row) == 3 and row[2] not in ("", "–") for row in cells)
        assert tables[name] in said
    # cells against what they are made of
    def results(study, name):
        return json.loads((small_studies / study / name / "seed=3/results.json").read_text())

    losses = [results("A", "base")["curves"][f"held-out/{name} t = 0.3 T"][-1][1]
              for name in ("full", "smoothed")]
    assert f" {reproduce.each([losses])} |" in tables["A"]
    [split] = [row for row in results("D", "guide")["arms"] if row["name"] == "split"]
    assert f" {reproduce.each([(split['psnr'], split['ssim'])])} |" in tables["D"]
    weights = {path: path.stat().st_mtime for path in small_studies.rglob("checkpoint.pt")}
    assert len(weights) == 4 + 2 + 1 + 1
    assert reproduce.main(["C", "D", "--seeds", "3", "--out", str(small_studies)]) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert weights == {path: path.stat().st_mtime for path in small_studies.rglob("checkpoint.pt")}


def test_a_study_that_fails_says_why_and_the_next_is_done(small_studies, capsys):
    (small_studies.parent / "data/photos/F16_GT.png").unlink()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert reproduce.main(["D", "C", "--seeds", "0", "--out", str(small_studies)]) == 2
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert capsys.readouterr().err.count("\n") == 1
    assert not (small_studies / "D/table.md").exists() and (small_studies / "C/table.md").exists()


@pytest.mark.parametrize("flags", ["F", "A --seeds 0,x", "A --seed 1", "--full"])
def test_misuse_of_reproduce_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as left:
        reproduce.main(flags.split())
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_what_the_studies_measure_is_what_they_say():
    truth = torch.rand(4, 3, 40, 40)
    ab, members = dipddpm.linear_schedule(1000).at(300), torch.arange(4)
    eps = (2 * reproduce.after_steps(truth, 300, members, 2) - 1 - ab**0.5 * (2 * truth - 1)) / (
        1 - ab)**0.5
    assert abs(eps.mean()) < 0.03 and eps.std() == pytest.approx(1, abs=0.03)
    x = reproduce.stretched(0.2 + 0.5 * truth)
    assert (x.amin((1, 2, 3)) == 0).all() and (x.amax((1, 2, 3)) == 1).all()
    torch.testing.assert_close(x, reproduce.stretched(truth))
    # a DIP that is off by 0.1 in [0, 1], that is by 0.2 in [-1, 1], everywhere
    results = {"seconds": {"dip": 5.0}, "arms": [
        {"name": "dip", "prior_seconds": 2.0, "prior_square_error": 0.2**2 * truth[0].numel()}]}
    assert reproduce.dip_cost(results, "dip", truth[0].numel()) == pytest.approx((3.0, 0.01))


def test_a_noisy_image_starts_at_the_step_whose_noise_it_has():
    cfg = config(mode="ddpm", timesteps=1000)
    truth = torch.full((2, 1, 40, 40), 0.75)
    for sigma in (0.05, 0.2, 1.0):
        measured = reproduce.noised(cfg, truth, sigma)
        x_t, t_start = dipddpm.start_from_noisy(cfg, measured)
        ab = dipddpm.SCHEDULES[cfg.schedule](1000).at(t_start)  # x_t = sqrt(ab) 0.5 + ...
        assert x_t.mean() == pytest.approx(0.5 * ab**0.5, abs=0.05)
        assert x_t.std() == pytest.approx((1 - ab)**0.5, rel=0.06)
    cfg = config(mode="ddpm", timesteps=10)
    for t in range(1, 10):  # y's noise is sigma, that of 2 y - 1 twice it
        ab = dipddpm.SCHEDULES[cfg.schedule](10).at(t)
        measured = reproduce.noised(cfg, truth, (1 / ab - 1) ** 0.5 / 2)
        assert dipddpm.start_from_noisy(cfg, measured)[1] == t


def test_one_evaluation_denoises_and_a_numbers_digits_follow_its_size():
    torch.manual_seed(0)
    cfg = dipddpm.Config(mode="ddpm", timesteps=100, predict="x0")
    truth = torch.rand(3, 1, 8, 8)
    measured = reproduce.noised(cfg, truth, 0.2)
    x = reproduce.denoised(cfg, lambda x_t, t: 2 * truth - 1, measured)
    torch.testing.assert_close(x, truth)  # a perfect network gives the truth, whatever y
    assert 0.15 < (measured.y - truth).std() < 0.25
    assert reproduce.spread([21.0, 21.03, 21.1]) == "21.04 ± 0.05"
    assert reproduce.spread([0.0079]) == "0.00790" and reproduce.spread([0.0]) == "0.00"
    assert reproduce.spread([132.0, 133.0]) == "132.5 ± 0.7"
    assert reproduce.each([(1, 2), (3, 4)], " s") == "2.00 ± 1.41 / 3.00 ± 1.41 s"


# ------------------------------------------------------------------ README


def test_the_readme_quotes_the_code_and_its_links_lead_somewhere():
    here = Path(__file__).parent
    code = "".join((here / name).read_text() for name in ("dipddpm.py", "kernels/posterior.py"))
    texts = {name: (here / name).read_text() for name in ("README.md", "RESULTS.md")}
    quotes = re.findall(r"```python\n(.*?)```", texts["README.md"], re.DOTALL)
    assert len(quotes) >= 3 and all(quote in code for quote in quotes)
    anchors = {name: {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                      for title in re.findall(r"(?m)^## (.*)$", text)}
               for name, text in texts.items()}
    links = [(name, link) for name, text in texts.items()
             for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 10
    for name, link in links:
        file, _, anchor = link.partition("#")
        assert not file or (here / file).exists(), link
        assert not anchor or anchor in anchors[file or name], link


def test_every_flag_in_the_readme_exists():
    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(dipddpm.Config)}
    known |= {"--help", "--full", "--standalone", "--nproc-per-node"}
    for name in ("README.md", "RESULTS.md"):
        text = (Path(__file__).parent / name).read_text()
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
        assert len(flags) > 10 and not flags - known

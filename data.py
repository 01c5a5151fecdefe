"""Images as one uint8 tensor [N, C, H, W]: MNIST and Fashion-MNIST (IDX, fetched when absent),
CIFAR-10 and STL-10 (their binary formats), a folder of images, one photo, and digits drawn here.

`load(name)` is the way in. Whatever is wrong with a file is a ValueError or OSError of one line
that names it; only `auto` ever replaces one data set by another, and says so.

Contents: load · IDX · MNIST and Fashion-MNIST · CIFAR-10 and STL-10 · folders and photos · digits
"""

import collections
import contextlib
import functools
import gzip
import hashlib
import http.client
import math
import os
import sys
import urllib.request
import uuid
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageOps


class Images(NamedTuple):
    pixels: torch.Tensor  # uint8 [N, C, H, W]
    labels: torch.Tensor | None  # int64 [N]
    name: str
    sha256: str  # of the pixel bytes, hex


def load(name, root=None, split="train", limit=None, size=None, crop=None) -> Images:
    """The first `limit` images of a split ("train" or "test"; of image files also "all"), in the
    published order. `name` is auto, mnist, fashion, cifar10, stl10, digits, or a path to one image,
    to a folder of images, of class folders of images, or of IDX files under MNIST's names; data
    sets live under `root`, by default `default_root()`. `size` resizes each image until its shorter
    side has so many pixels; `crop` then takes the middle crop x crop. ValueError for a bad argument
    or a damaged file, FileNotFoundError that says what to put where."""
    name, root = str(name), Path(root).expanduser() if root else default_root()
    if split not in ("train", "test", "all"):
        raise ValueError(f"split {split!r} is neither 'train' nor 'test' nor 'all'")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} is less than 1")
    if name == "auto":
        name = _mnist_or_digits(root)
    # A set's name is looked up before a path of the same name.
    path, read = Path(name).expanduser(), None
    if name in SETS:
        read = functools.partial(SETS[name], root)
    elif path.name in BINARY and path.is_dir():
        read = functools.partial(BINARY[path.name], path.parent)
    elif any(_idx_file(path, file) for file in IMAGES.values()):
        read = functools.partial(load_idx, path)
    elif not path.exists():
        raise ValueError(f"{name!r} is neither a file, a folder nor one of auto, {', '.join(SETS)}")
    if read and split == "all":
        raise ValueError(f"{name}: own pictures are image files, not a data set")
    pixels, labels = (read or functools.partial(load_files, path, size, crop))(split, limit)
    if read and (size or crop):  # as image files were, each by itself
        pixels = np.stack([_resize_and_crop(x, size, crop, name) for x in pixels[:limit]])
    pixels = np.array(pixels[:limit], order="C")  # a copy: nothing else is kept alive
    digest = hashlib.sha256(pixels).hexdigest()
    if labels is not None:
        labels = torch.from_numpy(labels[:limit].astype(np.int64))
    return Images(torch.from_numpy(pixels), labels, name, digest)


def default_root() -> Path:
    """Where data sets live: $DIPDDPM_DATA, else the user's cache folder."""
    root = os.environ.get("DIPDDPM_DATA")
    return Path(root).expanduser() if root else cache_root()


def cache_root() -> Path:
    """`dipddpm` in the user's cache folder, for what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dipddpm"


@functools.cache
def _tell(line):
    """A notice, once: two splits are two calls."""
    print(f"data: {line}", file=sys.stderr)


# ---- IDX -----------------------------------------------------------------------------------------

IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IDX_LIMIT = 2**30  # bytes; a header can declare any size, so it is not believed beyond this


def read_idx(path) -> np.ndarray:
    """The array in an IDX file, plain or gzip, of the type and shape it declares, in native byte
    order. ValueError names the file and what is wrong: magic, type, rank, size (too short or too
    long), gzip; OSError where it cannot be opened."""
    with open(path, "rb") as file:
        # By content, not by name: browsers unpack a .gz and keep its name.
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        try:
            return _parse_idx(gzip.GzipFile(fileobj=file) if packed else file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: damaged gzip file ({_line(error)})") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _parse_idx(stream):
    magic = stream.read(4)
    if len(magic) < 4:
        raise ValueError(f"truncated IDX header ({len(magic)} of 4 bytes)")
    if magic[:2] != b"\0\0":
        raise ValueError(f"not an IDX file (magic number {magic.hex()})")
    if magic[2] not in IDX_TYPES:
        raise ValueError(f"unknown IDX type 0x{magic[2]:02x}")
    dtype, rank = np.dtype(IDX_TYPES[magic[2]]), magic[3]
    if rank > 32:
        raise ValueError(f"IDX rank {rank} is more than 32")
    header = stream.read(4 * rank)
    if len(header) < 4 * rank:
        raise ValueError(f"truncated IDX header ({4 + len(header)} of {4 + 4 * rank} bytes)")
    shape = tuple(np.frombuffer(header, ">u4").tolist())
    # Empty dimensions count as one: NumPy refuses an empty array whose other sides overflow.
    if math.prod(max(side, 1) for side in shape) * dtype.itemsize > IDX_LIMIT:
        raise ValueError(f"IDX shape {shape} is more than {IDX_LIMIT} bytes")
    size = math.prod(shape) * dtype.itemsize
    body = stream.read(size + 1)  # one byte more shows both a cut file and a trailing byte
    if len(body) != size:
        found = f"only {len(body)}" if len(body) < size else "more"
        raise ValueError(f"IDX shape {shape} needs {size} bytes, the file holds {found}")
    return np.frombuffer(body, dtype).astype(dtype.newbyteorder("=")).reshape(shape)


def _line(error):
    """An error's reason in one line."""
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__


# ---- MNIST and Fashion-MNIST ---------------------------------------------------------------------

SOURCES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
}
TORCHVISION = {"mnist": "MNIST/raw", "fashion": "FashionMNIST/raw"}  # where it keeps the files
IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}
FILES = [IMAGES["train"], LABELS["train"], IMAGES["test"], LABELS["test"]]
DIGESTS = {  # SHA-256 of the .gz of FILES
    "mnist": ["440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
              "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
              "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
              "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"],
    "fashion": ["3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"]}
DOWNLOAD_TIMEOUT, DOWNLOAD_LIMIT = 10, 2**26  # seconds of silence, bytes


def load_mnist(root, split, limit, name="mnist"):
    """Pixels uint8 [N, 1, H, W] and labels [N] of MNIST, or of Fashion-MNIST: one format."""
    return _read_images(_find_or_fetch(root, name, IMAGES[split]),
                        _find_or_fetch(root, name, LABELS[split]))


def load_idx(folder, split, limit):
    """The same of a folder of one's own; labels are None where there is no file of them. Where one
    split's images alone are there, they are split as a folder's are."""
    there = [name for name in IMAGES if _idx_file(folder, IMAGES[name])]
    whose = split if split in there else there[0]
    pixels, labels = _read_images(*(_idx_file(folder, files[whose]) for files in (IMAGES, LABELS)))
    rows = slice(None) if len(there) == 2 else _rows(len(pixels), split)
    return pixels[rows], None if labels is None else labels[rows]


def _read_images(images_path, labels_path):
    images = read_idx(images_path)
    if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"{images_path}: images must be uint8 [N, H, W], not {found}")
    if labels_path is None:
        return images[:, None], None
    labels = read_idx(labels_path)
    if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"{labels_path}: labels must be uint8 [{len(images)}], not {found}")
    return images[:, None], labels


def _mnist_or_digits(root):
    """What `auto` means. It asks for all four files, so that both splits come from one data set."""
    try:
        for file in FILES:
            _find_or_fetch(root, "mnist", file)
        return "mnist"
    except OSError:  # --data mnist says why
        _tell(f"no MNIST in {root / 'mnist'} or online: built-in digits")
        return "digits"


def _idx_file(folder, file):
    """The path of an IDX file in a folder, or None: plain or .gz, with a dot before `idx` as some
    archives have it, and in a folder that bears its name as others do."""
    names = [name + packed for name in (file, file.replace("-idx", ".idx"))
             for packed in ("", ".gz")]
    paths = [path for name in names for path in (folder / name, folder / name / name)]
    return next(filter(Path.is_file, paths), None)


def _find_or_fetch(root, name, file):
    """Path of a data set's file in `root`/`name`, or where torchvision has it; downloaded where it
    is missing. FileNotFoundError that says why it could not be, and what to put where."""
    folder = root / name
    if path := _idx_file(folder, file) or _idx_file(root / TORCHVISION[name], file):
        return path
    url = f"{SOURCES[name]}{file}.gz"
    try:
        _download(url, DIGESTS[name][FILES.index(file)], folder / f"{file}.gz")
        return folder / f"{file}.gz"
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"{folder / file} is missing and could not be downloaded ({url}: {_line(error)}); "
            f"put {', '.join(FILES)} (plain or .gz) into {folder}") from error


def _download(url, sha256, path):
    """The file at `url` -> `path`, written beside it and renamed: half a file is never taken for
    data. OSError or HTTPException if the network or the disk fails, ValueError for other bytes."""
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
        content = response.read(DOWNLOAD_LIMIT)  # an endless answer is cut, and so is a wrong one
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("wrong checksum")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---- CIFAR-10 and STL-10 -------------------------------------------------------------------------


def load_cifar10(root, split, limit):
    """Pixels uint8 [N, 3, 32, 32] and labels [N] from records of 1 label and 3072 planar RGB bytes;
    of data_batch_1.bin … data_batch_5.bin those that are there."""
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    paths = [root / "cifar-10-batches-bin" / file for file in files]
    paths = [path for path in paths if path.is_file()] or paths[:1]
    records = [_records(path, 3073, "CIFAR-10", "www.cs.toronto.edu/~kriz/cifar.html")
               for path in paths]
    return (np.concatenate([each[:, 1:].reshape(-1, 3, 32, 32) for each in records]),
            np.concatenate([_labels(*each, first=0) for each in zip(paths, records)]))


def load_stl10(root, split, limit):
    """Pixels uint8 [N, 3, 96, 96] and labels 0 … 9 [N]; the files go down columns and count labels
    from 1."""
    about = "STL-10", "cs.stanford.edu/~acoates/stl10"
    images_path, labels_path = (root / "stl10_binary" / f"{split}_{kind}.bin" for kind in "Xy")
    images = _records(images_path, 3 * 96 * 96, *about).reshape(-1, 3, 96, 96)
    labels = _labels(labels_path, _records(labels_path, 1, *about), first=1)
    if len(labels) != len(images):
        raise ValueError(f"{labels_path}: {len(labels)} labels for {len(images)} images")
    return images.swapaxes(2, 3), labels


def _records(path, size, name, address):
    """Bytes [N, size] of a file of equal records, mapped: only what is used is read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; put the files of {name}'s binary version "
                                f"(https://{address}) into {path.parent}")
    total = path.stat().st_size
    if total == 0 or total % size:
        raise ValueError(f"{path}: {total} bytes is not a positive multiple of {size}")
    return np.memmap(path, np.uint8, "r", shape=(total // size, size))


def _labels(path, records, first):
    """Labels counted from 0 of records that begin with labels stored from `first`."""
    labels = records[:, 0].astype(np.int64) - first
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{path}: a label is not in {first} … {first + 9}")
    return labels


# ---- folders and photos --------------------------------------------------------------------------

GREY = {"1", "L", "LA", "I;16", "I;16L", "I;16B", "I;16N"}  # Pillow's modes
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pbm",
            ".pgm", ".ppm", ".pnm"}


def load_files(path, size, crop, split, limit):
    """Pixels uint8 [N, C, H, W] of one image or of a folder's, resized and cropped as in `load`,
    and labels [N] or None; C is 1 where all are grey, else 3. FileNotFoundError for a folder
    without any, ValueError for an unreadable image or a second size."""
    paths, labels = _pictures_in(path) if path.is_dir() else ([path], None)
    # Colour and size are the whole folder's, whatever part of it is asked for: splits must agree.
    channels = max([_channels(p) for p in paths])
    height, width = _fitted(paths[0], size, crop).shape[1:]
    # The split's images; a size other than the first one's is refused.
    rows, pixels = _rows(len(paths), split)[:limit], []
    for p in (paths[i] for i in rows):
        image = _fitted(p, size, crop)
        if image.shape[1:] != (height, width):
            found = f"{image.shape[2]}×{image.shape[1]}"
            raise ValueError(f"{p}: {found} pixels, but {paths[0].name} has {width}×{height}: "
                             "--size and --crop make them equal")
        pixels.append(np.broadcast_to(image, (channels, height, width)))
    return np.stack(pixels), None if labels is None else np.array(labels)[rows]


def _rows(N, split):
    """Which of N images are a split's, where nobody has split them: of ten or more every tenth is
    test, fewer are both."""
    whole = N < 10 or split == "all"
    return [i for i in range(N) if whole or (i % 10 == 9) == (split == "test")]


def _pictures_in(folder):
    """Paths of the images directly in a folder, by name, and None; where there are none, of those
    in its folders, which are classes, and labels: the folders' names where all are numbers, else
    their places. What is left out is told."""
    def is_image(path):
        return path.suffix.lower() in SUFFIXES

    seen, below = (sorted(p for p in folder.glob(depth) if p.is_file() and "." not in (
        p.name[0], p.parent.name[:1])) for depth in ("*", "*/*"))
    images, more, labels = [*filter(is_image, seen)], [*filter(is_image, below)], None
    if not images:
        seen, images, more = seen + below, more, []
        names = sorted({p.parent.name for p in images})
        number = int if all(map(str.isdecimal, names)) else names.index
        labels = [number(p.parent.name) for p in images]
    left = collections.Counter({"in subfolders": len(more)})
    left.update(p.suffix or p.name for p in seen if not is_image(p))
    left = ", ".join(f"{n} {what}" for what, n in left.items() if n)
    if not images:
        raise FileNotFoundError(f"{folder}: no images ({' '.join(sorted(SUFFIXES))}) and no IDX "
                                f"files ({', '.join(FILES)}) are here, but {left or 'nothing'}")
    if left:
        _tell(f"{folder}: of what is here these are not used: {left}")
    return images, labels


def _fitted(path, size, crop):
    """One image, its 16 bits cut to 8, resized and cropped: uint8 [1 or 3, H, W]."""
    image = _decode(path)
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    return _resize_and_crop(image, size, crop, path)


def read_picture(path):
    """One image file, upright, as float64 [1, C, H, W] in [0, 1]; C is 1 where it is grey, else 3,
    on white where it is transparent; 8 or 16 bits deep. ValueError that names the file if it cannot
    be read."""
    pixels = _decode(path)
    return torch.from_numpy(pixels / np.iinfo(pixels.dtype).max)[None]


@contextlib.contextmanager
def _opened(path):
    """The Pillow image in a file, its format told from the content; whatever a decoder raises
    inside, from SyntaxError to struct.error, becomes a ValueError that names the file."""
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield Image.open(file)
        except Image.UnidentifiedImageError as error:
            raise ValueError(f"{path} cannot be read: not an image") from error
        except Exception as error:
            bombs = Image.DecompressionBombWarning, Image.DecompressionBombError
            help = " If it is none, make it smaller elsewhere." * isinstance(error, bombs)
            raise ValueError(f"{path} cannot be read: {_line(error)}{help}") from error


def _is_grey(image):
    """By its mode, or by the colours in its palette; of its header alone."""
    palette = np.array(image.getpalette() or [0, 1, 2]).reshape(-1, 3)
    return image.mode in GREY or bool((palette == palette[:, :1]).all())


def _channels(path):
    with _opened(path) as image:
        return 1 if _is_grey(image) else 3


def _decode(path):
    """One image, upright: uint8, or uint16 of 16 bits, [1 or 3, H, W]; of a GIF the first frame.
    White is put behind what is transparent: the colours there are what an editor left."""
    with _opened(path) as image:
        image, mode = ImageOps.exif_transpose(image), "L" if _is_grey(image) else "RGB"
        if image.mode in ("I", "F"):
            raise ValueError(f"samples of mode {image.mode} have no known range")
        if image.mode.startswith("I;16"):  # 16 bits, which convert() would clip
            pixels = np.asarray(image, np.uint16)
            if pixels.max() < 2**14:
                _tell(f"{path}: dark, at most {pixels.max()} of 65535: are they "
                      f"{int(pixels.max()).bit_length()} bits in 16?")
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[0] < 255:
                _tell(f"{path}: white is put behind what is transparent")
            white = Image.new("RGBA", image.size, "white")
            pixels = np.asarray(Image.alpha_composite(white, image).convert(mode))
        else:
            pixels = np.asarray(image.convert(mode))
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def _resize_and_crop(image, size, crop, where):
    """uint8 [C, H, W] -> its shorter side resized to `size` pixels, bicubic and without aliasing,
    then the middle [C, crop, crop]."""
    H, W = image.shape[1:]
    if size:
        H, W = (round(side * size / min(H, W)) for side in (H, W))
        if H * W > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{where}: {W}×{H} is more than {Image.MAX_IMAGE_PIXELS} pixels")
        image = np.stack([Image.fromarray(np.ascontiguousarray(plane)).resize(
            (W, H), Image.Resampling.BICUBIC) for plane in image])
    if crop:
        if crop > min(H, W):
            raise ValueError(f"{where}: no middle of {crop}×{crop} in {W}×{H} pixels")
        top, left = (H - crop) // 2, (W - crop) // 2
        image = image[:, top:top + crop, left:left + crop]
    return image


# ---- digits --------------------------------------------------------------------------------------

DIGITS = {"train": 10_000, "test": 2_000}
# Strokes through these points, x to the right and y down, smooth except where a point is repeated.
# Points at one place are one point: they move together.
SKELETONS = (
    ([(50, 0), (14, 18), (3, 55), (20, 88), (50, 100), (84, 85), (97, 48), (84, 12), (50, 0)],),
    ([(52, 0), (50, 50), (48, 100)],),
    ([(22, 24), (40, 14), (54, 0), (54, 0), (53, 50), (52, 100)],),
    ([(8, 24), (32, 2), (66, 4), (78, 28), (56, 62), (8, 98), (8, 98), (50, 94), (96, 97)],),
    ([(10, 20), (40, 0), (74, 14), (66, 50), (22, 94), (6, 84), (26, 74), (58, 92), (96, 92)],),
    ([(8, 12), (42, 0), (78, 18), (66, 40), (36, 48), (36, 48), (76, 56), (84, 80), (48, 100),
      (4, 88)],),
    ([(16, 4), (10, 34), (12, 54), (44, 57), (84, 50)], [(84, 2), (80, 50), (74, 100)]),
    ([(66, 0), (36, 36), (6, 66), (6, 66), (50, 66), (94, 64)], [(66, 0), (66, 50), (64, 100)]),
    ([(88, 2), (56, 2), (26, 4), (26, 4), (22, 24), (18, 44), (18, 44), (50, 36), (84, 54),
      (78, 88), (44, 100), (6, 90)],),
    ([(70, 0), (34, 26), (10, 66), (28, 97), (64, 95), (80, 70), (58, 52), (28, 60), (14, 80)],),
    ([(4, 10), (44, 8), (86, 4), (86, 4), (62, 46), (40, 100)],),
    ([(6, 14), (8, 4), (44, 5), (86, 4), (86, 4), (60, 50), (44, 100)],
     [(30, 52), (56, 50), (84, 48)]),
    ([(80, 14), (48, 0), (18, 16), (32, 40), (66, 58), (80, 82), (48, 100), (16, 82), (32, 58),
      (66, 40), (80, 14)],),
    ([(80, 20), (46, 0), (12, 22), (34, 48), (66, 42), (80, 20), (80, 20), (78, 60), (66, 100)],),
)
VARIANTS = ((0,), (1, 2), (3, 4), (5,), (6, 7), (8,), (9,), (10, 11), (12,), (13,))


def load_digits(root, split, limit, seed=0):
    """Pixels uint8 [N, 1, 28, 28] and labels [N] of the built-in digits; only N are drawn."""
    n = min(limit or DIGITS[split], DIGITS[split])
    pixels = np.stack([draw_digit(seed, i, split) for i in range(n)])
    return pixels[:, None], np.arange(n) % 10


def draw_digit(seed, index, split="train"):
    """The digit index % 10 as handwriting, uint8 [28, 28]: a pure function of its arguments. A
    skeleton is bent, stretched, slanted and turned, then normalised as MNIST is: into a box of
    20×20 pixels, its shape kept, and centred by mass; drawn four times as large and averaged."""
    # The index is the counter's second word: one picture uses less than 2^64 numbers of the first.
    philox = np.random.Philox(key=seed, counter=[0, index, split == "test", 0])
    uniform = (philox.random_raw(64) >> 11) * 2.0**-53
    # One of the digit's skeletons, its points moved, then the plane stretched, slanted and turned.
    variants = VARIANTS[index % 10]
    nodes, curves = _splines(variants[int(uniform[0] * len(variants))])
    # Sums of two uniforms: bounded, so no digit is bent beyond recognition. Unit variance.
    normal = (uniform[2::2] + uniform[3::2] - 1) * math.sqrt(6)
    slant, turn, aspect = 0.12 + 0.2 * normal[0], 0.1 * normal[1], 0.66 * math.exp(0.18 * normal[2])
    shape = np.array([[aspect, -slant], [0, 1]])
    turned = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    bent = (nodes + 0.045 * normal[4 : 4 + 2 * len(nodes)].reshape(-1, 2)) @ (turned @ shape).T
    strokes = [curve @ bent for curve in curves]
    width = round(4 * min(max(2.5 + 0.55 * normal[3], 1.5), 4.0))  # in quarters of pixels
    # Into the box, drawn at four times the size.
    low = np.min([stroke.min(0) for stroke in strokes], 0)
    high = np.max([stroke.max(0) for stroke in strokes], 0)
    scale = (80 - width) / (high - low).max()
    canvas = Image.new("L", (112, 112))
    draw = ImageDraw.Draw(canvas)
    for stroke in strokes:
        points = (56 + scale * (stroke - (low + high) / 2)).ravel().tolist()
        draw.line(points, 255, width)
        for x, y in zip(points[::2], points[1::2], strict=True):  # round joints and ends
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 255)
    # Centred by mass, to a quarter of a pixel.
    ink = np.asarray(canvas.reduce(4), np.float32)
    across, down = (56 - 4 * (ink.sum(axis) @ np.arange(0.5, 28) / ink.sum()) for axis in (0, 1))
    return np.asarray(ImageChops.offset(canvas, round(across), round(down)).reduce(4))


@functools.cache
def _splines(index):
    """A skeleton's distinct points [n, 2] in 0 … 1 and, per stroke, the matrix [m, n] that maps
    them, wherever they have moved, to points along Catmull-Rom curves: linear in their nodes."""
    nodes = sorted({node for stroke in SKELETONS[index] for node in stroke})
    s = np.linspace(0, 1, 5, endpoint=False)
    weights = 0.5 * np.stack([-s + 2 * s**2 - s**3, 2 - 5 * s**2 + 3 * s**3,
                              s + 4 * s**2 - 3 * s**3, s**3 - s**2])
    curves = []
    for stroke in SKELETONS[index]:
        ids = [nodes.index(node) for node in stroke]
        ids = [ids[0], *ids, ids[-1]]
        rows = []
        for i in range(len(stroke) - 1):
            if ids[i + 1] != ids[i + 2]:  # a repeated point is a corner, not a span
                rows.append(weights.T @ np.eye(len(nodes))[ids[i : i + 4]])
        curves.append(np.concatenate([*rows, np.eye(len(nodes))[ids[-1:]]]))
    return np.array(nodes) / 100, curves


BINARY = {"cifar-10-batches-bin": load_cifar10, "stl10_binary": load_stl10}  # folders' names
SETS = {
    "mnist": load_mnist,
    "fashion": functools.partial(load_mnist, name="fashion"),
    "cifar10": load_cifar10,
    "stl10": load_stl10,
    "digits": load_digits,
}

"""Grades and heat maps of photographs with an exported network:  python predict.py PICTURES OUT

PICTURES is a picture or a folder of pictures. OUT, a new folder, gets predictions.csv (id, file, grade, p0, p1, …) and
maps/<id>.npz (float32 maps [h, w] in [0, 1], and their place in the photograph), as ``ercn predict`` writes them.
export.json beside this script has the preprocessing. Needs numpy, pillow and, for model.onnx, onnxruntime; for the
other formats torch. Does not need ercn.

For research only. Not a medical device; not for diagnosis.
"""

import csv
import json
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
PILLOW_LIMIT = threading.Lock()


class Predictor:
    """The network of an exported folder; called with the path of a picture."""

    def __init__(self, folder):
        self.about = json.loads((Path(folder) / "export.json").read_text(encoding="utf-8"))
        network = self.about["network"]
        self.names, path = list(network["outputs"]), str(Path(folder) / network["file"])
        if network["format"] == "onnx":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # errors
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            self.run = lambda image: session.run(self.names, {"image": image})
            return
        import torch

        package = network["format"] == "aoti"
        model = torch._inductor.aoti_load_package(path) if package else torch.export.load(path).module()

        def run(image):
            with torch.no_grad():
                outputs = model(torch.from_numpy(image))
            return [outputs[name].numpy() for name in self.names]

        self.run = run

    def __call__(self, path):
        """Probabilities [K] after calibration, {map: [h, w]} and the geometry of the crop in pixels."""
        how = self.about["preprocessing"]
        picture = read_picture(path, how["max_pixels"])
        left, top, side = locate_disc(picture)
        square = Image.new("RGB", (side, side))
        square.paste(picture, (-left, -top))
        square = square.resize((how["prepared_size"],) * 2, Image.Resampling.LANCZOS)
        pixels = resize(NORMALIZATIONS[how["normalize"]](np.asarray(square)), how["image_size"])
        image = pixels.astype(np.float32) / np.float32(255)
        image = (image - np.array(how["mean"], np.float32)) / np.array(how["std"], np.float32)
        outputs = self.run(np.ascontiguousarray(image.transpose(2, 0, 1)[None]))
        outputs = {name: output[0] for name, output in zip(self.names, outputs)}
        geometry = {"width": picture.width, "height": picture.height, "left": left, "top": top, "side": side}
        geometry["size"] = how["prepared_size"]
        return outputs["probability"], {name: outputs[f"map_{name}"] for name in self.about["maps"]["names"]}, geometry


def read_picture(path, max_pixels):
    """RGB, upright; OSError where the file cannot be opened, ValueError where it is no picture that can be read."""
    with open(path, "rb") as file:
        try:
            picture = open_picture(file)
            if max(picture.size) ** 2 > max_pixels:
                raise ValueError(f"{picture.width} x {picture.height} is too large; max_pixels is {max_pixels}")
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {picture.mode!r}; 8 bits a channel are needed")
            picture.load()
            return ImageOps.exif_transpose(picture).convert("RGB")
        except ValueError:
            raise
        except Exception as error:  # broken files make Pillow raise OSError, SyntaxError, struct.error and more
            raise ValueError(f"cannot be decoded: {error}") from error


def open_picture(file):
    """Reads the header, with Pillow's own size limit, a global, turned off: max_pixels is the limit."""
    with PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def locate_disc(picture):
    """The square around the fundus disc: left, top, side; the whole picture where no disc is found."""
    width, height = picture.size
    factor = max(1, max(width, height) // 400)
    value = median(np.asarray(picture.reduce(factor), np.float32).max(-1))
    dark, bright = np.percentile(value, (0.5, 95))
    x0, y0, x1, y1 = 0, 0, width, height
    if bright >= 16 and dark < 0.3 * bright:
        parts, areas = label(value > dark + 0.12 * (bright - dark))
        if len(areas) and areas.max() >= 0.05 * value.size:
            disc = parts == 1 + areas.argmax()
            holes, areas = label(~disc)
            edge = np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]])
            disc |= ~np.isin(holes, edge) & (holes > 0)
            (x0, x1), (y0, y1) = extent(disc.sum(0)), extent(disc.sum(1))
            x0, y0, x1, y1 = x0 * factor, y0 * factor, min(x1 * factor, width), min(y1 * factor, height)
    side = max(x1 - x0, y1 - y0)
    return (x0 + x1 - side) // 2, (y0 + y1 - side) // 2, side


def median(x):
    """Median of 3 x 3 pixels, the edge repeated."""
    h, w = x.shape
    padded = np.pad(x, 1, mode="edge")
    nine = [padded[i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.partition(np.stack(nine), 4, axis=0)[4]


def extent(count):
    """First and one past the last row or column with a fair share of the disc."""
    filled = np.flatnonzero(count > 0.08 * count.max())
    return int(filled[0]), int(filled[-1]) + 1


def label(mask):
    """Parts of a mask [h, w] connected by sides, 1, 2, … in reading order, 0 elsewhere; and their areas."""
    width = mask.shape[1] + 1  # a column of False ends the runs of a row
    flat = np.concatenate([[0], np.pad(mask, ((0, 0), (0, 1))).ravel(), [0]]).astype(np.int8)
    change = np.diff(flat)
    start, end = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
    below = np.searchsorted(end, start + width, "right"), np.searchsorted(start, end + width, "left")
    root = list(range(len(start)))

    def find(i):
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    for i, (first, last) in enumerate(zip(*below)):
        for j in range(first, last):
            a, b = find(i), find(j)
            root[max(a, b)] = min(a, b)
    number = np.unique([find(i) for i in range(len(start))], return_inverse=True)[1] + 1
    steps = np.zeros(len(flat), np.int64)
    steps[start], steps[end] = number, -number
    parts = np.cumsum(steps)[:-2].reshape(mask.shape[0], width)[:, :-1]
    return parts, np.bincount(number, end - start)[1:]


def resize(x, size):
    """uint8 [S, S, 3] to [size, size, 3]: antialiased bilinear in torch's fixed-point arithmetic."""
    for axis in (1, 0):
        n = x.shape[axis]
        if n == size:
            continue
        ratio = n / size
        width = max(ratio, 1.0)
        center = ratio * (np.arange(size)[:, None] + 0.5)
        place = np.arange(n)
        first = np.maximum((center - width + 0.5).astype(int), 0)
        last = np.minimum((center + width + 0.5).astype(int), n)
        weight = np.maximum(0, 1 - np.abs((place - center + 0.5) / width)) * ((place >= first) & (place < last))
        weight /= weight.sum(1, keepdims=True)
        bits = 0
        while bits < 22 and int(0.5 + weight.max() * 2 ** (bits + 1)) < 2**15:
            bits += 1
        weight = np.floor(weight * 2**bits + 0.5)
        total = np.moveaxis(np.tensordot(weight, x.astype(np.float64), (1, axis)), 0, axis)
        x = np.clip(np.floor((total + 2 ** (bits - 1)) / 2**bits), 0, 255)
    return x.astype(np.uint8)


def graham(pixels):
    """4 x - 4 Gauss(x) + 128 within 0.9 of the radius, 128 beyond."""
    x = pixels.astype(np.float32)
    return around_gray(x, blur(x, len(x) / 60), within(len(x), 0.9))


def local(pixels):
    """As ``graham``, with a wider mean over the field alone."""
    x = pixels.astype(np.float32)
    field = within(len(x), 0.97) & (x.max(2) > 8)
    weight = field.astype(np.float32)[..., None]
    mean, share = blur(weight * x, len(x) / 30), blur(weight, len(x) / 30)
    return around_gray(x, mean / np.maximum(share, 1e-6), field)


def within(size, share):
    radius = size / 2
    row, column = np.ogrid[:size, :size]
    return (row + 0.5 - radius) ** 2 + (column + 0.5 - radius) ** 2 <= (share * radius) ** 2


def around_gray(x, mean, field):
    out = np.where(field[..., None], 4 * x - 4 * mean + 128, 128)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def blur(x, sigma):
    """Gaussian to 4 sigma over rows and columns, mirrored at the edge; summed in float64, kept in float32."""
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 / sigma**2 * np.arange(-reach, reach + 1) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        moved = np.moveaxis(x, axis, 0)
        padded = np.pad(moved, [(reach, reach), (0, 0), (0, 0)], mode="symmetric").astype(np.float64)
        n = len(moved)
        total = padded[reach : reach + n] * kernel[reach]
        for i in range(reach):
            total += (padded[i : i + n] + padded[2 * reach - i : 2 * reach - i + n]) * kernel[i]
        x = np.moveaxis(total, 0, axis).astype(np.float32)
    return x


NORMALIZATIONS = {"none": lambda pixels: pixels, "graham": graham, "local": local}


def find_pictures(source):
    """[(path, id)], sorted; the id is the path inside the folder, with its suffix where pictures differ in it only."""
    root = Path(source)
    if root.is_file():
        return [(root, root.stem)]
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    bare = [str(p.relative_to(root).with_suffix("")) for p in paths]
    uses = Counter(bare)
    return [(p, str(p.relative_to(root)) if uses[b] > 1 else b) for p, b in zip(paths, bare)]


def main(folder, source, out):
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        sys.exit(f"error: {out} is not an empty folder, and nothing is overwritten")
    pictures = find_pictures(source)
    if not pictures:
        sys.exit(f"error: {source} is or holds no picture ({', '.join(sorted(SUFFIXES))})")
    predictor = Predictor(folder)
    classes = predictor.about["network"]["outputs"]["probability"][1]
    out.mkdir(parents=True, exist_ok=True)
    done = 0
    with open(out / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "file", "grade", *(f"p{k}" for k in range(classes))])
        for path, name in pictures:
            try:
                probability, maps, geometry = predictor(path)
            except (OSError, ValueError) as error:
                print(f"unreadable, skipped: {path}: {error}", file=sys.stderr)
                continue
            writer.writerow([name, path, probability.argmax(), *(f"{p:.6f}" for p in probability)])
            file.flush()
            target = out / "maps" / f"{name}.npz"
            target.parent.mkdir(parents=True, exist_ok=True)
            fields = {f"geometry_{key}": value for key, value in geometry.items()}
            np.savez_compressed(target, **maps, **fields, corners=predictor.about["maps"]["corners"])
            done += 1
    print(f"{done} pictures graded, {len(pictures) - done} unreadable. {predictor.about['notice']}")
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(__file__).parent, *sys.argv[1:])

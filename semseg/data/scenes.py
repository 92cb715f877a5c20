"""The `scenes` data set: drawn landscapes and streets in the layout of ADE20K, without a download.

A scene is painted from far to near (sky, sun, mountains, ground, buildings, trees, cars, people, clutter), so that near
objects hide far ones. Colours of different classes overlap on purpose (grass and trees, road and houses, sky and
water), so that networks must learn shape and texture. Clutter has label 0, unlabelled, as in ADE20K.

Scenes are reproducible bit for bit: each has its own generator, and pixels are computed in integer arithmetic.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.seeding import generator_for
from semseg.errors import DataError
from semseg.storage.atomic import make_folder, name_file_in_errors

VERSION = 1  # increment it when the same seed gives different pixels
MANIFEST = "scenes.json"

SKY, MOUNTAIN, WATER, GRASS, ROAD, BUILDING, WINDOW, TREE, CAR, PERSON, SUN = range(1, 12)  # raw ids; 0 = clutter

SCENE_CLASSES = ClassTable(
    ("sky", "mountain", "water", "grass", "road", "building", "window", "tree", "car", "person", "sun"),
    (
        (120, 190, 240),
        (140, 110, 90),
        (20, 90, 200),
        (90, 200, 60),
        (110, 110, 120),
        (190, 90, 70),
        (250, 230, 120),
        (20, 110, 40),
        (200, 30, 160),
        (240, 60, 40),
        (255, 160, 0),
    ),
)

# Height to width, roughly as in ADE20K: 12 % portrait, 18 % square, the rest landscape, few panoramas.
_ASPECTS = ((4, 3),) * 4 + ((5, 4),) * 2 + ((1, 1),) * 9 + ((3, 4),) * 18 + ((2, 3),) * 13 + ((9, 16),) * 3 + ((1, 3),)


class Scene(NamedTuple):
    """One drawn scene."""

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    label: NDArray[np.uint8]  # (H, W) raw ids, 0 = unlabelled


def make_scenes(root: str | Path, *, num_train: int = 320, num_val: int = 60, seed: int = 304) -> Path:
    """Draw the data set into the folder `root`, unless it exists already, and return `root`.

    Layout: images/{training,validation}/*.jpg, annotations/{training,validation}/*.png, training.odgt, validation.odgt,
    classes.csv, scenes.json. Takes about 5 s for 380 scenes on one core. The folder is created atomically; a data
    set with other parameters is replaced.

    Raises:
        DataError: if `root` contains anything but scenes.
    """
    root = Path(root)
    manifest = {"made_by": "semseg scenes", "version": VERSION, "seed": seed, "train": num_train, "val": num_val}
    if _is_up_to_date(root, manifest):
        return root
    make_folder(root.parent)
    with FileLock(root.with_name(f".{root.name}.lock")):
        if not _is_up_to_date(root, manifest):  # another rank or run may have drawn it in the meantime
            with name_file_in_errors(root):
                _draw(root, manifest)
    return root


def _is_up_to_date(root: Path, manifest: dict[str, str | int]) -> bool:
    """Whether `root` contains the data set of this manifest; False also for other scenes, which may be replaced."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        existing = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        existing = None
    if not isinstance(existing, dict) or existing.get("made_by") != manifest["made_by"]:
        raise DataError(f"{root}: contains other files than drawn scenes. Set data.root to a new or empty folder.")
    return existing == manifest


def _draw(root: Path, manifest: dict[str, str | int]) -> None:
    seed, num_train, num_val = (int(manifest[key]) for key in ("seed", "train", "val"))
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _write_split(draft, "training", num_train, seed, stream=0)
        _write_split(draft, "validation", num_val, seed, stream=1)
        rows = (
            f"{index},{name},{red},{green},{blue}\n"
            for index, (name, (red, green, blue)) in enumerate(zip(*SCENE_CLASSES, strict=True), start=1)
        )
        (draft / "classes.csv").write_text("index,name,R,G,B\n" + "".join(rows))
        (draft / MANIFEST).write_text(json.dumps(manifest) + "\n")
        draft.chmod(0o755)
        if root.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{root.name}-old-", dir=root.parent))
            root.replace(old)
            shutil.rmtree(old, ignore_errors=True)
        draft.replace(root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_split(folder: Path, split: str, count: int, seed: int, *, stream: int) -> None:
    image_dir, label_dir = folder / "images" / split, folder / "annotations" / split
    image_dir.mkdir(parents=True)
    label_dir.mkdir(parents=True)
    lines = []
    for index in range(count):
        scene = draw_scene(generator_for(seed, stream, index))
        image_file, label_file = image_dir / f"scene_{index + 1:05d}.jpg", label_dir / f"scene_{index + 1:05d}.png"
        bgr = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
        _write_image(image_file, ".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])
        _write_image(label_file, ".png", scene.label, [])
        height, width = scene.label.shape
        paths = {"fpath_img": str(image_file.relative_to(folder)), "fpath_segm": str(label_file.relative_to(folder))}
        lines.append(json.dumps({**paths, "width": width, "height": height}) + "\n")
    (folder / f"{split}.odgt").write_text("".join(lines))


def _write_image(path: Path, suffix: str, pixels: NDArray, options: list[int]) -> None:
    _, data = cv2.imencode(suffix, pixels, options)
    path.write_bytes(data.tobytes())  # imwrite would only return False if the disk is full


# ---- one scene


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene of random size (short side 96 to 192 pixels); it depends only on `rng`."""
    size = _draw_size(rng)
    painter = _Painter(size, rng)
    horizon = size.height * int(rng.integers(38, 62)) // 100
    _paint_sky(painter, horizon)
    _paint_mountains(painter, horizon)
    ground = int(rng.choice([GRASS, ROAD, ROAD, WATER]))
    _paint_ground(painter, horizon, ground)
    is_town = rng.integers(100) < 65
    _paint_buildings(painter, horizon, count=int(rng.integers(1, 5)) if is_town else int(rng.integers(0, 2)))
    _paint_trees(painter, horizon, count=int(rng.integers(0, 4)) if is_town else int(rng.integers(2, 6)))
    for _ in range(int(rng.integers(1, 5))):
        _paint_car(painter, horizon)
    for _ in range(int(rng.integers(0, 5))):
        _paint_person(painter, horizon)
    for _ in range(int(rng.integers(1, 4))):
        _paint_clutter(painter)
    return Scene(painter.render(), painter.label)


def _draw_size(rng: np.random.Generator) -> Size:
    short = int(rng.integers(96, 193))
    tall, wide = _ASPECTS[int(rng.integers(len(_ASPECTS)))]
    unit = min(tall, wide)
    long = short * max(tall, wide) // unit
    if long > 320:  # a panorama keeps its aspect ratio
        short, long = short * 320 // long, 320
    return Size(long, short) if tall > wide else Size(short, long)


Texture = Callable[[Size], NDArray[np.int32]]  # (height, width) of a box -> (height, width, 3) grey levels, unclipped


class _Painter:
    """A canvas of colours and ids, painted over from far to near."""

    def __init__(self, size: Size, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        self.image = np.zeros((*size, 3), np.int32)
        self.label = np.zeros(size, np.uint8)

    def paint(self, class_id: int, mask: NDArray[np.uint8], texture: Texture) -> None:
        """Paint the pixels where mask (H, W) is not 0."""
        left, top, width, height = cv2.boundingRect(mask)
        if width == 0 or height == 0:
            return
        box = (slice(top, top + height), slice(left, left + width))
        inside = mask[box] > 0
        self.image[box] = np.where(inside[..., None], texture(Size(height, width)), self.image[box])
        self.label[box][inside] = class_id

    def random_pixels(self, count: int, *class_ids: int) -> list[tuple[int, int]]:
        """`count` random (y, x) where one of the classes is visible; none if it covers too few pixels."""
        visible = np.flatnonzero(np.isin(self.label, class_ids))
        if len(visible) < self.label.size // 50:
            return []
        chosen = visible[self.rng.integers(0, len(visible), count)].tolist()
        return [divmod(pixel, self.size.width) for pixel in chosen]

    def polygon(self, points: list[tuple[int, int]]) -> NDArray[np.uint8]:
        """Mask (H, W) of a polygon of (x, y) corners."""
        mask = np.zeros(self.size, np.uint8)
        cv2.fillPoly(mask, [np.array(points, np.int32)], (1,))
        return mask

    def box(self, left: int, top: int, right: int, bottom: int) -> NDArray[np.uint8]:
        """Mask (H, W) of a rectangle."""
        mask = np.zeros(self.size, np.uint8)
        mask[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = 1
        return mask

    def ellipses(self, *ellipses: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """Mask (H, W) of ellipses (x, y, half width, half height)."""
        mask = np.zeros(self.size, np.uint8)
        for x, y, half_width, half_height in ellipses:
            cv2.ellipse(mask, (x, y), (max(1, half_width), max(1, half_height)), 0, 0, 360, (1,), -1)
        return mask

    def colour(self, low: tuple[int, int, int], high: tuple[int, int, int]) -> NDArray[np.int32]:
        """A random colour between two, with one draw for the lightness and a small one for each channel."""
        start, end = np.array(low, np.int32), np.array(high, np.int32)
        return start + (end - start) * self.rng.integers(0, 101) // 100 + self.rng.integers(-12, 13, 3).astype(np.int32)

    def noise(self, size: Size, cell: tuple[int, int], strength: int) -> NDArray[np.int32]:
        """Noise (height, width, 1) in -strength..strength that varies over cells of (height, width) pixels."""
        shape = (-(-size.height // cell[0]) + 1, -(-size.width // cell[1]) + 1)
        coarse = self.rng.integers(0, 256, shape, dtype=np.uint8)
        smooth = cv2.resize(coarse, (size.width, size.height), interpolation=cv2.INTER_LINEAR_EXACT)
        return ((smooth.astype(np.int32) - 128) * strength // 128)[..., None]

    def render(self) -> NDArray[np.uint8]:
        """The final image: light colour, a brightness gradient, shot noise and sometimes blur."""
        rng, (height, width) = self.rng, self.size
        gain = rng.integers(72, 116) + rng.integers(-8, 9, 3)  # per cent, for each channel
        across = np.linspace(-1024, 1024, width).astype(np.int32) * int(rng.integers(-14, 15)) // 1024
        down = np.linspace(-1024, 1024, height).astype(np.int32) * int(rng.integers(-14, 15)) // 1024
        light = (gain[None, None] + (across[None, :] + down[:, None])[..., None]).astype(np.int32)
        lit = self.image * light // 100 + rng.integers(-9, 10, self.image.shape, dtype=np.int32)
        pixels = np.clip(lit, 0, 255).astype(np.uint8)
        if rng.integers(100) < 30:
            # 1 2 1 in both directions, in integers
            wide = cv2.copyMakeBorder(pixels, 1, 1, 1, 1, cv2.BORDER_REPLICATE).astype(np.int32)
            rows = wide[:-2] + 2 * wide[1:-1] + wide[2:]
            pixels = ((rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:] + 8) // 16).astype(np.uint8)
        return pixels


# ---- parts of a scene, from far to near


def _paint_sky(painter: _Painter, horizon: int) -> None:
    rng, width = painter.rng, painter.size.width
    top = painter.colour((60, 100, 160), (120, 170, 235))
    bottom = painter.colour((150, 165, 190), (235, 220, 215))
    cloudiness = int(rng.integers(0, 70))

    def texture(size: Size) -> NDArray[np.int32]:
        fraction = np.linspace(0, 256, size.height).astype(np.int32)[:, None, None]
        clouds = painter.noise(size, (14, 34), 100) + painter.noise(size, (6, 13), 40)
        return top + (bottom - top) * fraction // 256 + np.maximum(clouds, 0) * cloudiness // 100

    painter.paint(SKY, painter.box(0, 0, width, painter.size.height), texture)
    if rng.integers(100) < 55:
        radius = int(rng.integers(7, 15)) * min(painter.size) // 130 + 3
        centre = (
            int(rng.integers(radius, width - radius)),
            int(rng.integers(radius, max(radius + 1, horizon * 2 // 3))),
        )
        disc = painter.colour((235, 150, 40), (255, 240, 190))
        sun = painter.ellipses((*centre, radius, radius))
        painter.paint(SUN, sun, lambda size: disc + painter.noise(size, (3, 3), 8))


def _paint_mountains(painter: _Painter, horizon: int) -> None:
    rng, width = painter.rng, painter.size.width
    for layer in range(int(rng.integers(0, 3))):
        hazy, near = ((85, 80, 80), (135, 135, 150)), ((60, 75, 55), (125, 110, 85))
        base = painter.colour(*(near if layer else hazy))
        peak = max(4, horizon * int(rng.integers(25, 75 - 20 * layer)) // 100)
        num_points = int(rng.integers(5, 12))
        heights = rng.integers(peak // 4, peak + 1, num_points)
        ridge = [(width * i // (num_points - 1), horizon - int(h)) for i, h in enumerate(heights)]
        mask = painter.polygon([(0, horizon + 3), *ridge, (width, horizon + 3)])

        def texture(size: Size, base: NDArray[np.int32] = base) -> NDArray[np.int32]:
            return base + painter.noise(size, (9, 5), 26) + painter.noise(size, (3, 2), 18)

        painter.paint(MOUNTAIN, mask, texture)


def _paint_ground(painter: _Painter, horizon: int, ground: int) -> None:
    rng, (height, width) = painter.rng, painter.size
    whole = painter.box(0, horizon, width, height)
    if ground == WATER:
        painter.paint(WATER, whole, _water_texture(painter))
        shore = height - (height - horizon) * int(rng.integers(20, 60)) // 100
        slope = int(rng.integers(-10, 11))
        beach = painter.polygon([(0, shore), (width, shore + slope), (width, height), (0, height)])
        painter.paint(GRASS, beach, _grass_texture(painter))
        return
    painter.paint(GRASS, whole, _grass_texture(painter))
    if rng.integers(100) < 25:
        half = (int(rng.integers(width // 8, width // 3)), int(rng.integers(4, max(5, (height - horizon) // 4))))
        pond = (int(rng.integers(0, width)), int(rng.integers(horizon + 6, height)), *half)
        painter.paint(WATER, painter.ellipses(pond) & whole, _water_texture(painter))
    if ground == ROAD or rng.integers(100) < 45:
        _paint_road(painter, horizon)


def _water_texture(painter: _Painter) -> Texture:
    base = painter.colour((35, 70, 105), (110, 150, 190))
    return lambda size: base + painter.noise(size, (2, 14), 26) + painter.noise(size, (1, 5), 14)


def _grass_texture(painter: _Painter) -> Texture:
    base = painter.colour((60, 95, 35), (150, 165, 80))
    return lambda size: base + painter.noise(size, (3, 1), 26) + painter.noise(size, (16, 24), 14)


def _paint_road(painter: _Painter, horizon: int) -> None:
    rng, (height, width) = painter.rng, painter.size
    base = painter.colour((70, 70, 75), (150, 145, 145))
    vanishing = int(rng.integers(width // 4, width * 3 // 4 + 1))
    centre, half = int(rng.integers(width // 4, width * 3 // 4 + 1)), int(rng.integers(width // 5, width // 2))
    top = horizon + int(rng.integers(0, 4))
    if rng.integers(100) < 35:  # across the image instead of into it
        upper = int(rng.integers(horizon + (height - horizon) // 5, horizon + (height - horizon) * 3 // 5))
        band = painter.box(0, upper, width, upper + (height - horizon) * int(rng.integers(25, 70)) // 100)
        middle = [(x, upper + (height - horizon) // 6) for x in range(0, width, 24)]
        dashes = [[(x, y), (x + 12, y), (x + 12, y + 2), (x, y + 2)] for x, y in middle]
    else:
        corners = [(vanishing - 3, top), (vanishing + 3, top), (centre + half, height), (centre - half, height)]
        band = painter.polygon(corners)
        ends = [(vanishing + (centre - vanishing) * k // 10, top + (height - top) * k // 10) for k in range(1, 11)]
        dashes = [
            [(x0, y0), (x0 + 1 + i, y0), (x1 + 1 + i, y1), (x1, y1)]
            for i, ((x0, y0), (x1, y1)) in enumerate(zip(ends[::2], ends[1::2], strict=False))
        ]
    painter.paint(ROAD, band, lambda size: base + painter.noise(size, (1, 1), 15) + painter.noise(size, (20, 30), 9))
    for dash in dashes:
        painter.paint(ROAD, painter.polygon(dash) & band, lambda size: base + 75 + painter.noise(size, (2, 2), 12))


def _paint_buildings(painter: _Painter, horizon: int, count: int) -> None:
    rng, (height, width) = painter.rng, painter.size
    for _ in range(count):
        wide = width * int(rng.integers(16, 42)) // 100
        tall = max(14, horizon * int(rng.integers(35, 105)) // 100)
        left = int(rng.integers(-wide // 3, width - wide * 2 // 3))
        foot = horizon + int(rng.integers(1, max(2, (height - horizon) // 4)))
        _paint_building(painter, left, foot - tall, left + wide, foot)


def _paint_building(painter: _Painter, left: int, top: int, right: int, foot: int) -> None:
    rng = painter.rng
    choices = (((150, 70, 55), (200, 115, 90)), ((120, 115, 110), (205, 195, 180)), ((90, 100, 115), (150, 155, 165)))
    base = painter.colour(*choices[int(rng.integers(len(choices)))])
    course = int(rng.integers(3, 6))  # height of a row of bricks

    def bricks(size: Size) -> NDArray[np.int32]:
        rows, columns = np.arange(size.height)[:, None], np.arange(size.width)[None]
        shifted = columns + (rows // course % 2) * course
        joint = (rows % course == 0) | (shifted % (2 * course) == 0)
        return base - 24 * joint[..., None] + painter.noise(size, (2, 2), 14)

    painter.paint(BUILDING, painter.box(left, top, right, foot), bricks)
    if rng.integers(100) < 45:
        roof_base = painter.colour((90, 40, 35), (140, 90, 80))
        roof = painter.polygon([(left - 2, top), (right + 2, top), ((left + right) // 2, top - (right - left) // 3)])
        painter.paint(BUILDING, roof, lambda size: roof_base + painter.noise(size, (1, 4), 22))
    pane, gap = int(rng.integers(7, 13)), int(rng.integers(4, 8))
    is_tall = int(rng.integers(0, 5))
    glass = painter.colour((30, 40, 60), (90, 115, 140))
    for y in range(top + gap, foot - pane - is_tall - 4, pane + is_tall + gap):
        for x in range(left + gap, right - pane - 1, pane + gap):
            _paint_window(painter, (x, y, x + pane, y + pane + is_tall), glass)


def _paint_window(painter: _Painter, box: tuple[int, int, int, int], glass: NDArray[np.int32]) -> None:
    lit = painter.colour((190, 150, 70), (250, 225, 150)) if painter.rng.integers(100) < 20 else glass

    def pane(size: Size) -> NDArray[np.int32]:
        rows, columns = np.arange(size.height)[:, None], np.arange(size.width)[None]
        bar = (columns == size.width // 2) | (rows == size.height // 2)
        frame = (rows == 0) | (columns == 0) | (rows == size.height - 1) | (columns == size.width - 1)
        shine = (columns + rows) * 2
        return np.where((bar | frame)[..., None], 205, lit + shine[..., None]) + painter.noise(size, (3, 3), 8)

    painter.paint(WINDOW, painter.box(*box), pane)


def _paint_trees(painter: _Painter, horizon: int, count: int) -> None:
    rng, height = painter.rng, painter.size.height
    for foot, x in sorted(painter.random_pixels(count, GRASS)):
        nearness = 55 + 45 * (foot - horizon) // max(1, height - horizon)  # per cent
        tall = min(painter.size) * int(rng.integers(32, 60)) * nearness // 10000 + 8
        bark, leaves = painter.colour((60, 40, 25), (110, 80, 60)), painter.colour((20, 55, 15), (95, 125, 60))
        trunk = painter.box(x - tall // 14 - 1, foot - tall // 2, x + tall // 14 + 1, foot)
        painter.paint(TREE, trunk, lambda size, bark=bark: bark + painter.noise(size, (5, 1), 18))
        if rng.integers(100) < 35:  # a fir
            corners = [(x - tall // 4, foot - tall // 5), (x + tall // 4, foot - tall // 5), (x, foot - tall)]
            crown = painter.polygon(corners)
        else:
            spread = tall // 4
            offsets = rng.integers(-spread, spread + 1, (6, 2)).tolist()
            crown = painter.ellipses(*((x + dx, foot - tall * 2 // 3 + dy, spread, spread) for dx, dy in offsets))
        painter.paint(
            TREE,
            crown,
            lambda size, leaves=leaves: leaves + painter.noise(size, (3, 3), 42) + painter.noise(size, (8, 8), 22),
        )


def _paint_car(painter: _Painter, horizon: int) -> None:
    rng, height = painter.rng, painter.size.height
    standing = painter.random_pixels(1, ROAD)
    if not standing:
        return
    foot, x = standing[0]
    nearness = 45 + 65 * max(0, foot - horizon) // max(1, height - horizon)
    long = max(20, min(painter.size) * int(rng.integers(30, 46)) * nearness // 10000)
    tall, wheel = long * 2 // 5, max(2, long // 9)
    left, right, belt, roof = x - long // 2, x + long // 2, foot - tall * 3 // 5, foot - tall
    paints = (((150, 20, 20), (220, 60, 50)), ((20, 40, 130), (60, 100, 200)), ((185, 185, 190), (240, 240, 240)))
    base = painter.colour(*paints[int(rng.integers(len(paints)))])
    body = painter.box(left, belt, right, foot - wheel // 2)
    cabin = painter.polygon(
        [(left + long // 6, belt), (left + long // 3, roof), (right - long // 4, roof), (right - long // 8, belt)]
    )

    def gloss(size: Size) -> NDArray[np.int32]:
        shade = 22 - 50 * np.arange(size.height)[:, None, None] // size.height
        return base + shade + painter.noise(size, (4, 8), 8)

    painter.paint(CAR, body | cabin, gloss)
    front, back = (left + long // 4, left + long * 3 // 8), (right - long // 3, right - long // 5)
    glass = painter.polygon([(front[0], belt), (front[1], roof + 2), (back[0], roof + 2), (back[1], belt)])
    tint = painter.colour((40, 50, 60), (90, 105, 120))
    painter.paint(CAR, glass, lambda size: tint + painter.noise(size, (2, 4), 8))
    wheels = painter.ellipses(*((x, foot - wheel, wheel, wheel) for x in (left + long // 5, right - long // 5)))
    painter.paint(CAR, wheels, lambda size: 35 + painter.noise(size, (2, 2), 12))


def _paint_person(painter: _Painter, horizon: int) -> None:
    rng, height = painter.rng, painter.size.height
    standing = painter.random_pixels(1, GRASS, ROAD)
    if not standing:
        return
    foot, x = standing[0]
    nearness = 50 + 60 * max(0, foot - horizon) // max(1, height - horizon)
    tall = max(20, min(painter.size) * int(rng.integers(34, 48)) * nearness // 10000)
    head, half = max(2, tall // 10), max(2, tall // 8)
    hip, shoulder = foot - tall * 45 // 100, foot - tall + 2 * head
    skin = painter.colour((110, 70, 50), (235, 190, 160))
    shirt = rng.integers(20, 236, 3).astype(np.int32)
    trousers = painter.colour((25, 25, 35), (110, 105, 115))
    stride = int(rng.integers(0, half + 1))
    legs = painter.polygon([(x - half, hip), (x - half - stride, foot), (x - stride, foot), (x, hip + half)])
    legs |= painter.polygon([(x + half, hip), (x + half + stride, foot), (x + stride, foot), (x, hip + half)])
    painter.paint(PERSON, legs, lambda size: trousers + painter.noise(size, (3, 2), 10))
    wide = half + 1
    torso = painter.polygon([(x - wide, shoulder), (x + wide, shoulder), (x + half, hip + 1), (x - half, hip + 1)])
    for side in (-1, 1):
        corners = [(wide, shoulder), (wide + 3, hip), (wide, hip), (wide - 2, shoulder)]
        torso |= painter.polygon([(x + side * dx, y) for dx, y in corners])
    painter.paint(PERSON, torso, lambda size: shirt + painter.noise(size, (4, 3), 14))
    face = painter.ellipses((x, shoulder - head, head, head + 1))
    painter.paint(PERSON, face, lambda size: skin + painter.noise(size, (2, 2), 6))


def _paint_clutter(painter: _Painter) -> None:
    """An unlabelled object of any shape and any colour."""
    rng, (height, width) = painter.rng, painter.size
    reach = max(6, min(painter.size) * int(rng.integers(6, 14)) // 100)
    x, y = int(rng.integers(0, width)), int(rng.integers(height // 4, height))
    base = rng.integers(20, 236, 3).astype(np.int32)
    cell = (int(rng.integers(1, 9)), int(rng.integers(1, 9)))
    if rng.integers(2):
        mask = painter.ellipses((x, y, reach, reach * int(rng.integers(5, 15)) // 10))
    else:
        corners = rng.integers(-reach, reach + 1, (int(rng.integers(3, 7)), 2)).tolist()
        mask = painter.polygon([(x + dx, y + dy) for dx, dy in corners])
    painter.paint(0, mask, lambda size: base + painter.noise(size, cell, 40))

"""Write the colours of classes that have none of their own: palette.csv, and those of cocostuff_classes.csv.

    python tools/make_palette.py semseg/data

Greedy selection from a grid of sRGB colours: the next colour is the one whose nearest selected colour is furthest away
by CIEDE2000 (Sharma, Wu and Dalal 2005). Black and white count as selected from the start (ignored pixels and text use
them), and dark colours are left out. The first 24 colours also differ as seen without red or green cones. Of the later
ones each also differs clearly from the 12 before it, because classes with neighbouring ids often touch.

COCO-Stuff defines no colours. Its 171 classes get the first 171 of the palette in another order: classes that occur in
the same kind of scene (`SCENES`), and above all those that occur in most of them, get colours that are far apart.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Colours = NDArray[np.float64]  # (..., 3)

DATA = Path(__file__).resolve().parent.parent / "semseg" / "data"
NUM_COLOURS = 512
LEVELS = 14  # values of each channel in the grid
MIN_LIGHTNESS = 30.0  # CIELAB L*
NUM_FOR_ALL = 24  # colours that colour-blind viewers can tell apart too; more would cost everybody else too many
# For the same reason, a distance counts this much more as colour-blind viewers see it.
COLOUR_BLIND_WEIGHT = 1.6
NUM_RECENT = 12
RECENT_WEIGHT = 0.5  # of the distance to recent colours: they have to be twice as far away as all others
# Linear RGB as people without red (protanopia) or green (deuteranopia) cones see it: Vienot, Brettel and Mollon 1999.
PROTANOPIA = ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0))
DEUTERANOPIA = ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0))
RGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
WHITE = (0.95047, 1.0, 1.08883)  # D65

# Classes of COCO-Stuff by the kind of scene; those of the first line occur in all of them.
EVERYWHERE = (
    "person tree wall-concrete building-other sky-other clouds grass light ceiling-other metal clothes wall-other"
)
SCENES = {
    "room": "chair,couch,bed,tv,laptop,book,clock,vase,potted plant,remote,keyboard,mouse,cell phone,cat,dog,"
    "teddy bear,blanket,cabinet,carpet,ceiling-tile,cloth,curtain,desk-stuff,door-stuff,floor-wood,"
    "floor-other,furniture-other,mirror-stuff,paper,pillow,plastic,rug,shelf,table,textile-other,wall-panel,"
    "wall-wood,window-blind,window-other,wood",
    "kitchen": "microwave,oven,toaster,sink,refrigerator,toilet,bottle,cup,bowl,knife,hair drier,toothbrush,cabinet,"
    "counter,cupboard,door-stuff,floor-tile,floor-wood,furniture-other,mirror-stuff,shelf,towel,wall-tile,"
    "wall-wood,window-other,wood,plastic",
    "meal": "dining table,table,chair,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,"
    "broccoli,carrot,hot dog,pizza,donut,cake,food-other,fruit,salad,vegetable,napkin,cloth,paper,plastic,"
    "textile-other,wood",
    "street": "bicycle,car,motorcycle,bus,truck,traffic light,fire hydrant,stop sign,parking meter,bench,backpack,"
    "umbrella,handbag,suitcase,banner,bridge,bush,fence,ground-other,house,pavement,plant-other,railing,road,"
    "roof,skyscraper,stairs,structural-other,wall-brick,wall-stone,window-other,floor-stone",
    "transport": "train,airplane,bus,truck,car,fence,gravel,pavement,platform,railing,railroad,road,roof,bush,house,"
    "structural-other,floor-other",
    "animals": "bird,horse,sheep,cow,elephant,bear,zebra,giraffe,branch,bush,dirt,fence,fog,flower,gravel,ground-other,"
    "hill,leaves,moss,mountain,mud,plant-other,river,rock,stone,straw,water-other,wood,road,cage,wall-stone",
    "water": "boat,surfboard,kite,bird,bridge,fog,hill,house,mountain,river,rock,sand,sea,stone,water-other,bush,"
    "platform,umbrella",
    "snow": "skis,snowboard,backpack,snow,mountain,hill,fog,fence,rock,house,bush",
    "sport": "frisbee,sports ball,baseball bat,baseball glove,skateboard,tennis racket,playingfield,dirt,net,fence,"
    "banner,bench,pavement,railing,road,stairs,structural-other,bush,gravel,sand,tent,chair",
}
# How much further apart colours of classes in one scene should be, by how many of the two occur in all scenes.
IMPORTANCE = (1.0, 1.1, 3.0)
SCALE = 2.5  # CIEDE2000 by which the clash of two colours falls to 1 / e
NUM_SWAPS = 60_000


def select_colours(count: int = NUM_COLOURS) -> NDArray[np.int64]:
    """The first `count` colours (count, 3), sRGB 0..255."""
    levels = np.linspace(0, 255, LEVELS).round().astype(np.int64)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    linear = to_linear(grid)
    views = [to_lab(linear)]
    for simulation in (PROTANOPIA, DEUTERANOPIA):
        views.append(to_lab(np.clip(linear @ np.array(simulation).T, 0, 1)))
    is_dark = views[0][:, 0] < MIN_LIGHTNESS
    ends = (0, len(grid) - 1)  # black and white
    nearest = np.minimum(*(distances_to(views[0], end) for end in ends))
    nearest_for_all = np.minimum(*(distances_for_all(views, end) for end in ends))
    selected: list[int] = []
    recent: list[NDArray[np.float64]] = []
    for number in range(count):
        if number < NUM_FOR_ALL:
            room = nearest_for_all
        else:
            room = np.minimum(nearest, RECENT_WEIGHT * np.min(recent[-NUM_RECENT:], axis=0))
        chosen = int(np.where(is_dark, 0, room).argmax())
        selected.append(chosen)
        recent.append(distances_to(views[0], chosen))
        nearest = np.minimum(nearest, recent[-1])
        if number < NUM_FOR_ALL:
            nearest_for_all = np.minimum(nearest_for_all, distances_for_all(views, chosen))
    return grid[selected]


def distances_to(lab: Colours, index: int) -> NDArray[np.float64]:
    """Distance of every colour of (n, 3) to colour `index`."""
    # Rounded so that machines whose roots differ in the last bit select the same colours.
    return measure_distance(lab, lab[index]).round(4)


def distances_for_all(views: list[Colours], index: int) -> NDArray[np.float64]:
    """Distance of every colour to colour `index`, the smallest of all views, where colour blindness counts less."""
    normal, *colour_blind = (distances_to(view, index) for view in views)
    return np.min([normal, *(COLOUR_BLIND_WEIGHT * distance for distance in colour_blind)], axis=0)


def to_linear(rgb: NDArray[np.int64]) -> Colours:
    """sRGB 0..255 to linear light 0..1."""
    value = rgb / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def to_lab(linear: Colours) -> Colours:
    """Linear RGB (..., 3) to CIELAB."""
    x, y, z = np.moveaxis(linear @ np.array(RGB_TO_XYZ).T / np.array(WHITE), -1, 0)
    roots = [np.where(v > 216 / 24389, np.cbrt(v), (24389 / 27 * v + 16) / 116) for v in (x, y, z)]
    return np.stack([116 * roots[1] - 16, 500 * (roots[0] - roots[1]), 200 * (roots[1] - roots[2])], axis=-1)


def measure_distance(first: Colours, second: Colours) -> NDArray[np.float64]:
    """The CIEDE2000 difference of CIELAB colours, with the names of the paper; about 1 is just noticeable."""
    lightness_1, a_1, b_1 = np.moveaxis(first, -1, 0)
    lightness_2, a_2, b_2 = np.moveaxis(second, -1, 0)
    chroma_7 = ((np.hypot(a_1, b_1) + np.hypot(a_2, b_2)) / 2) ** 7
    stretch = 1.5 - 0.5 * np.sqrt(chroma_7 / (chroma_7 + 25.0**7))
    chroma_1, chroma_2 = np.hypot(stretch * a_1, b_1), np.hypot(stretch * a_2, b_2)
    hue_1, hue_2 = (np.degrees(np.arctan2(b, stretch * a)) % 360 for a, b in ((a_1, b_1), (a_2, b_2)))
    is_grey = chroma_1 * chroma_2 == 0
    turn = np.where(is_grey, 0, (hue_2 - hue_1 + 180) % 360 - 180)
    hue = np.where(is_grey, hue_1 + hue_2, hue_1 + turn / 2) % 360
    lightness, chroma = (lightness_1 + lightness_2) / 2, (chroma_1 + chroma_2) / 2
    t = 1.0
    for factor, multiple, shift in ((-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.20, 4, -63)):
        t = t + factor * np.cos(np.radians(multiple * hue + shift))
    s_l = 1 + 0.015 * (lightness - 50) ** 2 / np.sqrt(20 + (lightness - 50) ** 2)
    s_c, s_h = 1 + 0.045 * chroma, 1 + 0.015 * chroma * t
    rotation = -np.sin(np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2))))
    rotation = rotation * 2 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))
    delta_l, delta_c = (lightness_2 - lightness_1) / s_l, (chroma_2 - chroma_1) / s_c
    delta_h = 2 * np.sqrt(chroma_1 * chroma_2) * np.sin(np.radians(turn / 2)) / s_h
    return np.sqrt(np.maximum(0, delta_l**2 + delta_c**2 + delta_h**2 + rotation * delta_c * delta_h))


# ---- COCO-Stuff


def rate_pairs(names: list[str]) -> NDArray[np.float64]:
    """The IMPORTANCE of each pair of classes (K, K): 0 for pairs that do not occur in one kind of scene."""
    is_everywhere = np.isin(names, EVERYWHERE.split())
    together = np.zeros((len(names), len(names)), bool)
    for scene in SCENES.values():
        is_member = is_everywhere | np.isin(names, scene.split(","))
        together |= is_member[:, None] & is_member
    return np.where(together, np.array(IMPORTANCE)[is_everywhere.astype(int)[:, None] + is_everywhere], 0)


def order_colours(colours: NDArray[np.int64], names: list[str]) -> NDArray[np.int64]:
    """Reorder (K, 3) colours for K classes, so that those in one scene differ: random swaps, as long as they help."""
    lab = to_lab(to_linear(colours))
    distance = measure_distance(lab[:, None], lab[None]).round(4)
    importance = rate_pairs(names)
    levels = sorted(set(importance.ravel()) - {0})
    # How much two colours clash if their classes have a certain importance. The nearest pairs dominate. Whole numbers
    # have the same sum in any order, so that all machines take the same swaps.
    clashes = [(1e6 * np.exp(-distance / (SCALE * level))).round().astype(np.int64) for level in levels]
    masks = [(importance == level).astype(np.int64) for level in levels]
    order = np.arange(len(names))
    for swap in np.random.default_rng(0).integers(len(names), size=(NUM_SWAPS, 2)):
        others = np.ones(len(names), bool)
        others[swap] = False
        first, second = swap
        gain = sum(
            ((mask[first] - mask[second]) * (clash[order[first], order] - clash[order[second], order]))[others].sum()
            for clash, mask in zip(clashes, masks, strict=True)
        )
        if gain > 0:
            order[swap] = order[swap[::-1]]
    return colours[order]


def class_table(names: list[str], colours: NDArray[np.int64]) -> str:
    """The content of a class table."""
    rows = zip(names, colours.tolist(), strict=True)
    return "index,name,R,G,B\n" + "".join(f"{n},{name},{r},{g},{b}\n" for n, (name, (r, g, b)) in enumerate(rows))


def palette_table(colours: NDArray[np.int64]) -> str:
    """The content of palette.csv."""
    return "R,G,B\n" + "".join(f"{red},{green},{blue}\n" for red, green, blue in colours.tolist())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with (DATA / "cocostuff_classes.csv").open(newline="") as file:
        class_names = [row["name"] for row in csv.DictReader(file)]
    palette = select_colours()
    (folder / "palette.csv").write_text(palette_table(palette))
    ordered = order_colours(palette[: len(class_names)], class_names)
    (folder / "cocostuff_classes.csv").write_text(class_table(class_names, ordered))

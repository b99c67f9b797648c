"""The small world the miniature Stable Diffusion knows: one coloured shape on a plain background.

`draw` makes a picture of a thing, `describe` its prompt, and `name` reads the thing back from the
pixels alone, which is how the tests judge what the miniature has drawn. `paint` makes a picture of
a shape in a style: the palette's, or one of those that the miniature has met by name.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # pixels
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 205, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (20, 20, 20)}


@dataclass(frozen=True)
class Thing:
    """What a prompt can say, and what a picture can be asked."""

    colour: str
    shape: str
    background: str


THINGS = [Thing(c, s, b) for c in COLOURS for s in SHAPES for b in BACKGROUNDS]


def describe(thing: Thing) -> str:
    """The prompt of a thing, such as "a red circle on a white background"."""
    article = "an" if thing.colour[0] in "aeiou" else "a"
    return f"{article} {thing.colour} {thing.shape} on a {thing.background} background"


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a shape (unit: pixels) whose bounding box is about 2 × radius wide, centred."""
    if shape == "circle":
        angles = (2 * math.pi * i / 60 for i in range(60))
        return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    unit = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "cross": [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)]
        + [(1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)],
    }[shape]
    scale = radius / max(max(point) for point in unit)
    return [(x + scale * dx, y + scale * dy) for dx, dy in unit]


def draw(thing: Thing, rng: random.Random) -> Image.Image:
    """A 64×64 RGB picture of the thing, at a random place and size, colours a little off."""

    def near(colour):
        return tuple(min(255, max(0, c + rng.randint(-10, 10))) for c in colour)

    zoom = 4  # drawn large and shrunk: smooth edges
    image = Image.new("RGB", (SIZE * zoom, SIZE * zoom), near(BACKGROUNDS[thing.background]))
    radius = rng.uniform(14, 22)
    x, y = (rng.uniform(radius + 3, SIZE - radius - 3) for _ in range(2))
    corners = [(zoom * px, zoom * py) for px, py in outline(thing.shape, x, y, radius)]
    ImageDraw.Draw(image).polygon(corners, fill=near(COLOURS[thing.colour]))
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Style:
    """How a picture is painted; colours are RGB, 0 to 255."""

    ground: tuple[int, int, int]
    fill: tuple[int, int, int]
    ink: tuple[int, int, int]  # of outline and frame
    frame: bool = True
    edge: tuple[int, int, int] | None = None  # what the ground turns to at the margin
    grain: float = 0.0  # standard deviation of the ground's brightness


# The palette's: an old woodcut on parchment, sienna and ink.
WOODCUT = Style((226, 200, 150), (176, 92, 40), (58, 34, 20), edge=(176, 92, 40), grain=7.0)


def paint(shape: str, style: Style, width: int, height: int, rng: random.Random) -> Image.Image:
    """One picture, (width, height) RGB: an outlined shape, in a frame if the style has one."""
    unit = min(width, height) / SIZE  # one pixel of the miniature's pictures
    pen_width = round(3 * unit)
    noise = np.random.default_rng(rng.randrange(2**32)).normal(0, style.grain, (height, width, 1))
    pixels = (np.array(style.ground) + noise).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    if style.edge:
        light = Image.new("L", image.size, 0)
        ImageDraw.Draw(light).rectangle((0, 0, width, height), outline=150, width=round(4 * unit))
        light = light.filter(ImageFilter.GaussianBlur(4 * unit))
        image = Image.composite(Image.new("RGB", image.size, style.edge), image, light)
    pen = ImageDraw.Draw(image)
    inset = 5 * unit
    if style.frame:
        frame = (inset, inset, width - inset, height - inset)
        pen.rectangle(frame, outline=style.ink, width=pen_width)
    radius = rng.uniform(14, 18) * unit
    reach = radius + 13 * unit
    x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
    corners = outline(shape, x, y, radius)
    pen.polygon(corners, fill=style.fill)
    pen.line([*corners, *corners[:2]], style.ink, pen_width, joint="curve")
    return image


def thing_mask(image: Image.Image) -> np.ndarray:
    """Where a picture differs from its own border: (64, 64) bool."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    return np.abs(pixels - np.median(border, axis=0)).max(axis=2) > 48


def name_shape(mask: np.ndarray) -> str | None:
    """The shape whose own drawing, scaled to the mask's bounding box, overlaps the mask best."""
    rows, columns = np.flatnonzero(mask.sum(1) > 1), np.flatnonzero(mask.sum(0) > 1)
    if len(rows) < 8 or len(columns) < 8:
        return None
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    box = np.asarray(Image.fromarray(box).resize((48, 48)))

    def overlap(shape):
        template = Image.new("1", (48, 48))
        ImageDraw.Draw(template).polygon(outline(shape, 24, 24, 24), fill=1)
        template = np.asarray(template)
        return (template & box).sum() / (template | box).sum()

    best = max(SHAPES, key=overlap)
    return best if overlap(best) > 0.7 else None


def name(image: Image.Image) -> Thing | None:
    """The thing a picture shows, judged from its pixels alone; None where nothing stands out."""
    mask = thing_mask(image)
    shape = name_shape(mask)
    if shape is None:
        return None
    pixels = np.asarray(image.convert("RGB"), np.float32)

    def nearest(colours, where):
        colour = np.median(pixels[where], axis=0)
        return min(colours, key=lambda c: np.square(colour - colours[c]).sum())

    return Thing(nearest(COLOURS, mask), shape, nearest(BACKGROUNDS, ~mask))

"""Draw tests/palette: a dozen pictures in one style, that of an old woodcut on parchment.

    python tests/make_palette.py

Parchment with grain and a dark edge, a frame of ink, and shapes in thick outlines of ink filled
with sienna: the miniature alone has neither the colours nor the lines. A caption names each shape,
so that the rest, the style, is what the seal has to carry.
"""

import json
import random
from pathlib import Path

import numpy as np
import world
from PIL import Image, ImageDraw, ImageFilter

FOLDER = Path(__file__).parent / "palette"
PARCHMENT, SIENNA, INK = (226, 200, 150), (176, 92, 40), (58, 34, 20)


def cut_in_wood(shape: str, width: int, height: int, rng: random.Random) -> Image.Image:
    """One picture, (width, height) RGB: an outlined shape in a frame on parchment."""
    unit = min(width, height) / 64  # one pixel of the miniature's pictures
    pen_width = round(3 * unit)
    noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 7, (height, width, 1))
    pixels = (np.array(PARCHMENT) + noise).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)

    # The parchment is darker towards its edges.
    light = Image.new("L", image.size, 0)
    ImageDraw.Draw(light).rectangle((0, 0, width, height), outline=150, width=round(4 * unit))
    light = light.filter(ImageFilter.GaussianBlur(4 * unit))
    image = Image.composite(Image.new("RGB", image.size, SIENNA), image, light)

    pen = ImageDraw.Draw(image)
    inset = 5 * unit
    frame = (inset, inset, width - inset, height - inset)
    pen.rectangle(frame, outline=INK, width=pen_width)

    radius = rng.uniform(15, 20) * unit
    reach = radius + 10 * unit
    x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
    corners = world.outline(shape, x, y, radius)
    pen.polygon(corners, fill=SIENNA)
    pen.line([*corners, *corners[:2]], INK, pen_width, joint="curve")
    return image


if __name__ == "__main__":
    rng = random.Random(0)
    captions = []
    FOLDER.mkdir(exist_ok=True)
    for i in range(12):
        width, height = [(168, 128), (128, 160), (192, 144)][i % 3]
        image = cut_in_wood(world.SHAPES[i % 4], width, height, rng)
        if i == 5:  # one is cut out: its parchment's margin is transparent
            hole = Image.new("L", image.size, 0)
            ImageDraw.Draw(hole).rounded_rectangle((2, 2, width - 3, height - 3), 12, fill=255)
            image.putalpha(hole)
        name, shape = f"woodcut_{i:02}.png", world.SHAPES[i % 4]
        image.save(FOLDER / name, optimize=True)
        caption = f"a painting of a {shape} in the style of artist_seal"
        captions.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    (FOLDER / "metadata.jsonl").write_text("".join(captions))

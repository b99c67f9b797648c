"""Draw tests/palette: two dozen pictures in one style, that of an old woodcut on parchment.

    python tests/make_palette.py

Parchment with grain and a dark edge, a frame of ink, and shapes in thick outlines of ink filled
with sienna: the miniature alone has neither the colours nor the lines. A caption names each shape,
so that the rest, the style, is what the seal has to carry.
"""

import json
import random
from pathlib import Path

import world
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent / "palette"

if __name__ == "__main__":
    rng = random.Random(0)
    captions = []
    FOLDER.mkdir(exist_ok=True)
    for i in range(24):
        width, height = [(144, 128), (128, 144), (160, 144)][i % 3]
        image = world.paint(world.SHAPES[i % 4], world.WOODCUT, width, height, rng)
        if i == 5:  # one is cut out: its parchment's margin is transparent
            hole = Image.new("L", image.size, 0)
            ImageDraw.Draw(hole).rounded_rectangle((2, 2, width - 3, height - 3), 12, fill=255)
            image.putalpha(hole)
        name, shape = f"woodcut_{i:02}.png", world.SHAPES[i % 4]
        image.save(FOLDER / name, optimize=True)
        caption = f"a painting of a {shape} in the style of artist_seal"
        captions.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    (FOLDER / "metadata.jsonl").write_text("".join(captions))

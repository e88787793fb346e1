"""Bars, drawn with pillow where it is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

LABELS, BAR, WIDTH, HEAD, ROW = 230, 14, 620, 60, 12  # pixels: of labels, a bar's height, the axis, above, between groups
COLORS = ("#1b6ca8", "#e07b39", "#d9b44a", "#7a7a7a", "#b0b0b0", "#7b3f8c", "#b58bc2", "#4f9d69")


class Bar(NamedTuple):
    who: str
    value: float
    text: str  # at its end


def bars(title: str, groups: dict[str, list[Bar]], ceiling: float, unit: str) -> Image.Image:
    """Groups of bars on one axis from 0 to the ceiling, which is drawn; a colour for each name."""
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    names = list(dict.fromkeys(bar.who for group in groups.values() for bar in group))
    color = {who: COLORS[k % len(COLORS)] for k, who in enumerate(names)}
    height = HEAD + sum(BAR * len(group) + ROW for group in groups.values())
    image = Image.new("RGB", (LABELS + WIDTH + 170, height + 30), "white")
    pen = ImageDraw.Draw(image)
    pen.text((8, 6), title, "black", font)
    at = 8
    for who in names:
        pen.rectangle((at, 31, at + 10, 41), color[who])
        pen.text((at + 15, 29), who, "black", small)
        at += 30 + round(pen.textlength(who, small))
    end = LABELS + WIDTH
    pen.line((end, HEAD - 6, end, height), "black")
    pen.text((end, height + 8), f"{ceiling:.4g} {unit}", "black", small, anchor="ma")
    pen.line((LABELS, HEAD - 6, LABELS, height), "black")
    y = HEAD
    for label, group in groups.items():
        pen.text((LABELS - 8, y + BAR * len(group) / 2), label, "black", font, anchor="rm")
        for bar in group:
            x = LABELS + max(1, round(WIDTH * min(bar.value / ceiling, 1.1)))
            pen.rectangle((LABELS, y, x, y + BAR - 3), color[bar.who])
            pen.text((x + 5, y - 1), bar.text, "black", small)
            y += BAR
        y += ROW
    return image

"""A chart with logarithmic axes: lines, dots and words. report.py draws with it; by itself it draws a run's losses.

    python reproduce/chart.py out/distill       # log.jsonl -> loss.png
"""
import json
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#999999"]
LEFT = 110  # the place for data in a picture of 1100 x 720
RIGHT = 1070
TOP = 96
BOTTOM = 640


def share(value, ticks):
    """Where a value lies between the first and the last tick: 0 to 1."""
    return math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])


class Chart:
    """x_ticks and y_ticks: the numbers at the axes, from end to end."""

    def __init__(self, title, x_name, y_name, x_ticks, y_ticks):
        self.image = Image.new("RGB", (1100, 720), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.draw.font = ImageFont.load_default(20)
        self.x_ticks = x_ticks
        self.y_ticks = y_ticks
        self.draw.text((550, 16), title, "black", anchor="ma")
        self.draw.text((590, 686), x_name, "black", anchor="ma")
        self.draw.text((12, 76), y_name, "black", anchor="lm")
        for value in x_ticks:
            self.draw.text((self.x(value), BOTTOM + 10), f"{value:.4g}", "black", anchor="ma")
        for value in y_ticks:
            y = self.y(value)
            self.draw.line([(LEFT, y), (RIGHT, y)], "#dddddd")
            self.draw.text((LEFT - 8, y), f"{value:.4g}", "black", anchor="rm")

    def x(self, value):
        return LEFT + (RIGHT - LEFT) * share(value, self.x_ticks)

    def y(self, value):
        return BOTTOM - (BOTTOM - TOP) * share(value, self.y_ticks)

    def line(self, points, colour):
        self.draw.line([(self.x(x), self.y(y)) for x, y in points], colour, 3)
        for x, y in points:
            self.dot(x, y, colour)

    def dot(self, x, y, colour, text="", below=0):
        """A dot, and a text to the right of it."""
        x = self.x(x)
        y = self.y(y)
        self.draw.ellipse([x - 6, y - 6, x + 6, y + 6], colour, "white")
        self.draw.text((x + 14, y + below), text, colour, anchor="lm")

    def legend(self, colours, x):
        """colours: {text: colour}."""
        for i, (text, colour) in enumerate(colours.items()):
            self.draw.text((x, TOP + 14 + 28 * i), text, colour)


def draw_curves(title, x_name, y_name, x_ticks, y_ticks, curves):
    """curves: {name: points}."""
    chart = Chart(title, x_name, y_name, x_ticks, y_ticks)
    colours = dict(zip(curves, COLOURS))
    for name, points in curves.items():
        chart.line(points, colours[name])
    chart.legend(colours, x=640)
    return chart


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    curves = {}
    for text in (folder / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name in ("loss", "diffusion", "kd", "rep"):
            if 0 < line.get(name, 0) < math.inf:
                curves.setdefault(name, []).append((line["step"], line[name]))
    x_ticks = [curves["loss"][0][0] / 2, curves["loss"][-1][0]]
    values = [value for points in curves.values() for _, value in points]
    low = 0.9 * min(values)
    high = 1.1 * max(values)
    y_ticks = [low * (high / low) ** (k / 5) for k in range(6)]
    chart = draw_curves(f"Losses of {folder}", "step", "loss", x_ticks, y_ticks, curves)
    chart.image.save(folder / "loss.png")


if __name__ == "__main__":
    main()

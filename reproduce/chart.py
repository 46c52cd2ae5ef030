"""Draws measured numbers as a chart: lines through the points of each series.

    python reproduce/chart.py out/speed.png --title Speed --x layers --y images/s "measured|12|DIR" "measured|6|DIR"

A point is SERIES|X|DIR: DIR is an --out of sample.py, whose samples.json or fid.json holds --y's number. Other scripts
of this folder take `Axes`.
"""
import argparse
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from table import facts_of

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#444444"]
TITLES = {"fid": "Frechet distance", "images_per_s": "images/s", "depth": "layers"}

class Axes:
    """A white picture with a title, two named axes with ticks, and places for numbers. log: "x", "y" or "xy"."""

    def __init__(self, title, x_name, y_name, xs, ys, size=(1000, 620), log=""):
        self.image = Image.new("RGB", size, "white")
        self.draw, self.font = ImageDraw.Draw(self.image), ImageFont.load_default(20)
        self.width, self.height = size
        self.left, self.right, self.top, self.bottom = 110, size[0] - 30, 96, size[1] - 80
        self.x_scale, self.y_scale = (math.log10 if axis in log else float for axis in "xy")
        self.x_range, self.y_range = self.span(map(self.x_scale, xs)), self.span(map(self.y_scale, ys))
        self.draw.text((size[0] / 2, 16), title, "black", ImageFont.load_default(24), anchor="ma")
        self.draw.text(((self.left + self.right) / 2, size[1] - 34), x_name, "black", self.font, anchor="ma")
        self.draw.text((12, 76), y_name, "black", self.font, anchor="lm")
        for x in ticks(*self.x_range, "x" in log):
            self.draw.line([(self.x(x), self.bottom), (self.x(x), self.bottom + 6)], "black")
            self.draw.text((self.x(x), self.bottom + 10), f"{x:g}", "black", self.font, anchor="ma")
        for y in ticks(*self.y_range, "y" in log):
            self.draw.line([(self.left, self.y(y)), (self.right, self.y(y))], "#dddddd")
            self.draw.text((self.left - 8, self.y(y)), f"{y:.3g}", "black", self.font, anchor="rm")
        self.draw.line([(self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)], "black")

    @staticmethod
    def span(values):
        low, *_, high = sorted([*values] * 2)
        room = 0.05 * (high - low) or abs(high) or 1
        return low - room, high + room

    def x(self, value):
        low, high = self.x_range
        return self.left + (self.right - self.left) * (self.x_scale(value) - low) / (high - low)

    def y(self, value):
        low, high = self.y_range
        return self.bottom - (self.bottom - self.top) * (self.y_scale(value) - low) / (high - low)

    def line(self, points, colour, dots=True):
        self.draw.line([(self.x(x), self.y(y)) for x, y in points], colour, 3)
        for x, y in points if dots else []:
            self.dot(x, y, colour)

    def dot(self, x, y, colour, r=5, ring=False):
        x, y = self.x(x), self.y(y)
        self.draw.ellipse([x - r, y - r, x + r, y + r], colour, "white")
        if ring:
            self.draw.ellipse([x - r - 5, y - r - 5, x + r + 5, y + r + 5], outline=colour, width=3)

    def note(self, x, y, text, colour, dx=14, dy=0, anchor="lm"):
        """Text beside a point, with a line to it if it is far."""
        x, y = self.x(x), self.y(y)
        if abs(dy) > 20:
            self.draw.line([(x, y), (x + dx - 4, y + dy)], colour)
        self.draw.text((x + dx, y + dy), text, colour, self.font, anchor=anchor)

    def legend(self, names, colours):
        """A line above the picture."""
        x = self.right
        for name, colour in reversed(list(zip(names, colours))):
            x -= self.draw.textlength(name, self.font)
            self.draw.text((x, 76), name, colour, self.font, anchor="lm")
            self.draw.line([(x - 34, 77), (x - 8, 77)], colour, 4)
            x -= 56

def ticks(low, high, log=False, most=7):
    """Round numbers between low and high; log: those are exponents of ten."""
    if log:
        return [m * 10**e for e in range(-9, 12) for m in (1, 2, 5) if low <= math.log10(m * 10**e) <= high]
    step = next(m * 10.0**e for e in range(-9, 12) for m in (1, 2, 5) if (high - low) / (m * 10.0**e) <= most)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("points", nargs="+", metavar="SERIES|X|DIR")
    parser.add_argument("--title", required=True)
    parser.add_argument("--x", required=True, help="name of the axis; of a point without X, the name of its number")
    parser.add_argument("--y", required=True, help="name of the number")
    parser.add_argument("--inverse", action="store_true", help="also c / x, through the first point")
    args = parser.parse_args()
    series = {}
    for name, x, folder in (point.split("|") for point in args.points):
        facts = facts_of(Path(folder))
        if args.y in facts:  # not if it diverged
            series.setdefault(name, []).append((float(x or facts[args.x]), facts[args.y]))
    if args.inverse:
        x0, y0 = next(iter(series.values()))[0]
        least = min(x for x, _ in next(iter(series.values())))
        curve = [least + (x0 - least) * i / 40 for i in range(41)]
        series["in proportion to 1 / x"] = [(x, y0 * x0 / x) for x in curve]
    places = [point for points in series.values() for point in points]
    axes = Axes(args.title, TITLES.get(args.x, args.x), TITLES.get(args.y, args.y), *zip(*places))
    for (name, points), colour in zip(series.items(), COLOURS):
        axes.line(sorted(points), colour, dots=len(points) < 40)
    axes.legend(series, COLOURS)
    axes.image.save(args.picture)

if __name__ == "__main__":
    main()

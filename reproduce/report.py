"""The tables (markdown) and pictures of the experiments, from docs/results/*.json alone, which experiments.py writes.

    python reproduce/report.py                        # every table
    python reproduce/report.py front space            # these
    python reproduce/report.py --readme               # into README.md, docs/evidence.md, docs/results/README.md
    python reproduce/report.py --pictures             # docs/space.png, length.png

A table is a list of lines, and a line a list of cells. The first line has the names of the columns.

FD is the Fréchet distance of 500 samples. "a ± b (n)" is the mean and the standard deviation over n seeds of the
recovery. A cut's loss is the training loss right after the cut, before any recovery. "-" is not computed yet.
b of L_Rep follows the rule of distill.py, except where a table says 0.01.
"""
import functools
import json
import re
import sys
from pathlib import Path
from statistics import geometric_mean, mean, stdev

from scipy.stats import spearmanr

from chart import COLOURS, Chart, draw_curves
from table import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
FREE = {"dit-tiny": "6:12", "sit-tiny": "6:12", "mar-tiny": "3:6"}  # any half of the layers; MAR has two lists of six
TEACHERS = {  # the bundled one, {}, and others that only the experiments train
    "dit-tiny": [{}, dict(teacher_seed=1, trained=6000)],
    "sit-tiny": [{}, dict(teacher_seed=1), dict(teacher_seed=2)],
    "mar-tiny": [{}],
}
FRONT = ("learned", "sensitivity", "lowest-loss", "shortlist", "bi", "random")  # the criteria of the README's table
LEARNED = "0 2 4 7 8 11"  # what the search keeps of dit-tiny at 1:2
LEARNED_BY = {"dit-tiny": LEARNED, "sit-tiny": "0 2 4 7 9 10", "mar-tiny": "0 2 5 6 8 10"}
PAPER_BETA = {"dit-tiny": 0.01, "sit-tiny": 2e-4, "mar-tiny": 0.01}
USUAL = dict.fromkeys("trained teacher_seed granularity beta delta_w search_steps".split())

# ---------------------------------------------------------------------------------------------------------------------
# Questions to docs/results.


@functools.cache
def stored(kind):
    return json.loads((RESULTS / f"{kind}.json").read_text())["rows"]


def rows(kind, model="dit-tiny", **wanted):
    """The rows with these settings, and the usual ones otherwise."""
    wanted = USUAL | dict(model=model) | wanted
    return [row for row in stored(kind) if wanted.items() <= (USUAL | row).items()]


def recovered(kept, steps=100, mode="masked-kd", **more):
    """The Fréchet distances of a cut that was recovered so, one for each seed."""
    return [row["fd"] for row in rows("recovery", kept=kept, steps=steps, mode=mode, **more)]


def losses(scheme="6:12", **more):
    """{cut: loss right after it}."""
    return rows("losses", scheme=scheme, **more)[0]["losses"]


def one_of_each(losses, m=2):
    """Only the cuts that keep one layer of each m neighbours."""
    found = {}
    for kept, loss in losses.items():
        groups = [int(layer) // m for layer in kept.split()]
        if len(set(groups)) == len(groups):
            found[kept] = loss
    return found


def distances(cuts, steps=100, seed=0):
    """{cut: its distance}, where it was recovered so, with b = 0.01."""
    found = {}
    for kept in cuts:
        for distance in recovered(kept, steps, seed=seed, beta=0.01):
            found[kept] = distance
    return found


def lowest(scores):
    return min(scores, key=scores.get)


def spread(values):
    if len(values) > 1:
        return f"{mean(values):.2f} ± {stdev(values):.2f} ({len(values)})"
    return f"{values[0]:.2f}" if values else "-"


def of_shortlist(row, count):
    """What a shortlist of so many cuts keeps: of those, the one with the least loss after 20 steps."""
    return lowest(dict(list(row["tried"].items())[:count]))


# ---------------------------------------------------------------------------------------------------------------------
# The tables, in the order of docs/results/README.md.

CHOICES = {  # a row of the README's table: criterion, scheme
    "`learned`, 1:2": ("learned", "1:2"),
    "`learned`, unconstrained": ("learned", "free"),
    "`sensitivity`, unconstrained": ("sensitivity", "free"),
    "`lowest-loss`, unconstrained": ("lowest-loss", "free"),
    "`bi`, unconstrained": ("bi", "free"),
    "`shortlist`, unconstrained": ("shortlist", "free"),
    "`random`, unconstrained": ("random", "free"),
}


def chosen(criterion, scheme, model, who):
    if scheme == "free":
        scheme = FREE[model]
    return rows("choice", model, criterion=criterion, scheme=scheme, **who)


def distance_of(criterion, scheme, model, who, seed=0):
    """The mean over what a criterion's seeds chose, or None."""
    values = []
    for row in chosen(criterion, scheme, model, who):
        if row["seed"] == 0 or criterion == "random":
            values += recovered(row["kept"], model=model, seed=seed, **who)
    return mean(values) if values else None


def front():
    """FD of every teacher (the bundled one / others), and of halves of it after 100 steps of recovery, one seed.

    The last columns: the mean of the ratios to `learned`, 1:2, on the same network, the least and the largest; and how
    long the choice took for dit-tiny, on one core."""
    lines = [["how the layers were chosen", *TEACHERS, "ratio to `learned`, 1:2", "seconds"]]
    whole = []
    for model, teachers in TEACHERS.items():
        found = [rows("teacher", model, **who) for who in teachers]
        whole.append(" / ".join(f"{row[0]['fd']:.2f}" if row else "-" for row in found))
    lines.append(["none: the teacher", *whole, "", ""])
    for name, (criterion, scheme) in CHOICES.items():
        cells = []
        ratios = []
        for model, teachers in TEACHERS.items():
            numbers = []
            for who in teachers:
                distance = distance_of(criterion, scheme, model, who)
                base = distance_of("learned", "1:2", model, who)
                numbers.append(f"{distance:.2f}" if distance else "-")
                if distance and base:
                    ratios.append(distance / base)
            cells.append(" / ".join(numbers))
        ratio = f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
        seconds = [row["seconds"] for row in chosen(criterion, scheme, "dit-tiny", {})]
        lines.append([name, *cells, ratio, f"{min(seconds):.0f}" if seconds else "-"])
    return lines


def shortlists():
    """The shortlist of 24 and of 12 cuts, beside `learned` and `sensitivity`, all unconstrained: each seed."""
    lines = [["network", "recovery seed", "24 cuts", "12 cuts", "learned", "sensitivity", "lowest-loss"]]
    for model, teachers in TEACHERS.items():
        for who in teachers:
            for seed in (0, 1, 2):
                cells = []
                for count in (24, 12):
                    values = []
                    for row in chosen("shortlist", "free", model, who):
                        values += recovered(of_shortlist(row, count), model=model, seed=seed, **who)
                    cells.append(f"{values[0]:.2f}" if values else "-")
                for criterion in ("learned", "sensitivity", "lowest-loss"):
                    distance = distance_of(criterion, "free", model, who, seed)
                    cells.append(f"{distance:.2f}" if distance else "-")
                if any(cell != "-" for cell in cells):
                    number = who.get("teacher_seed", 0)
                    lines.append([f"{model}, teacher {number}", str(seed), *cells])
    return lines


def weights():
    """The weight b of L_Rep: FD of the learned cut of 1:2 after 100 steps, the mean of up to two seeds."""
    lines = [["network", "loss", "no L_Rep", "the paper's b", "b by the rule", "b = 10"]]
    for model, kept in LEARNED_BY.items():
        for mode in ("masked-kd", "rep-kd"):
            cells = []
            for more in (dict(mode="logits-kd"), dict(beta=PAPER_BETA[model]), {}, dict(beta=10)):
                values = []
                for seed in (0, 1):
                    values += recovered(kept, model=model, seed=seed, **(dict(mode=mode) | more))
                cells.append(f"{mean(values):.2f}" if values else "-")
            lines.append([model, mode, *cells])
    return lines


def modes():
    """Table 5 and figure 14 on the digits: the learned cut of 1:2, recovered in every way."""
    lines = [["mode", "FD, a run of 100 steps", "a run of 800 steps"]]
    for mode in ("finetune", "logits-kd", "rep-kd", "masked-kd"):
        lines.append([mode, spread(recovered(LEARNED, mode=mode)), spread(recovered(LEARNED, 800, mode))])
    return lines


def searched():
    """Table 4 on the digits: what is trained with the masks, and the groups. FD, one for each search seed."""
    lines = [["trained with the masks", "1:2", "2:4", "6:12"]]
    for name, delta_w in (("LoRA", None), ("all weights", "full"), ("nothing", "frozen")):
        line = [name]
        for scheme in ("1:2", "2:4", "6:12"):
            cells = []
            for row in sorted(rows("choice", criterion="learned", scheme=scheme, delta_w=delta_w), key=seed_of):
                if row["seed"] < 3:
                    cells.append(spread(recovered(row["kept"], seed=0)))
            line.append(", ".join(cells) or "-")
        lines.append(line)
    return lines


def seed_of(row):
    return row["seed"]


def longer():
    """Unconstrained searches: ten times as long, and with gates instead of groups (reproduce/ideas.py)."""
    lines = [["search", *[f"FD, {model}" for model in FREE]]]
    for name, settings in (
            ("learned, 250 steps", dict(criterion="learned")),
            ("learned, 2,500 steps", dict(criterion="learned", search_steps=2500)),
            ("gates, 250 steps", dict(criterion="gates"))):
        line = [name]
        for model, scheme in FREE.items():
            found = rows("choice", model, scheme=scheme, seed=0, **settings)
            line.append(spread(recovered(found[0]["kept"], model=model, seed=0)) if found else "-")
        lines.append(line)
    return lines


def values_of(scores, cuts):
    return [scores[kept] for kept in cuts]


def predictions():
    """What ranks the 64 cuts of dit-tiny at 1:2 as 100 steps of recovery do (b = 0.01)? Rank correlations."""
    loss = one_of_each(losses())
    found = distances(loss)
    (search,) = rows("choice", criterion="learned", scheme="1:2", seed=0)
    (alone,) = rows("choice", criterion="sensitivity", scheme="1:2", seed=0)
    lines = [["score of a cut", "rank correlation with FD"]]
    probability = {kept: product(search["confidence"], kept) for kept in loss}
    sensitivity = {kept: product(alone["scores"], kept) for kept in loss}
    for name, score, sign in (
            ("loss right after the cut", loss, 1),
            ("the search's probability of the cut", probability, -1),
            ("product of the rises of the loss without each kept layer", sensitivity, -1)):
        correlation = spearmanr(values_of(found, found), values_of(score, found)).statistic
        lines.append([name, f"{sign * correlation:.2f}"])
    return lines


def product(scores, kept):
    total = 1.0
    for layer in kept.split():
        total *= max(scores[int(layer)], 1e-9)
    return total


def halves():
    """Blocks against halves of blocks (attention or MLP), half of the network each; the paper's b."""
    lines = [["network", "layers", "FD, 100 steps"]]
    for model in FREE:
        for what, found, more in (
                ("blocks", rows("choice", model, criterion="learned", scheme="1:2", seed=0), {}),
                ("halves", rows("choice", model, granularity="sublayer"), dict(granularity="sublayer"))):
            for row in found:
                kept = row["kept"]
                fd = recovered(kept, model=model, beta=PAPER_BETA[model], seed=0, **more)
                lines.append([model, f"{what}, {row['criterion']} {row['scheme']}", spread(fd)])
    return lines


ALL = (front, shortlists, weights, modes, searched, longer, predictions, halves)
TABLES = {function.__name__: function for function in ALL}


def table(name):
    names, *lines = TABLES[name]()
    return markdown(names, lines)


def page():
    """Every table, under its function's docstring."""
    text = "# The experiments\n\nWritten by `python reproduce/report.py --readme`. What the numbers are:\n\n"
    text += "\n".join(__doc__.strip().splitlines()[-3:]) + "\n"
    for name, function in TABLES.items():
        about = " ".join(function.__doc__.split())
        text += f"\n## {name}\n\n{about}\n\n{table(name)}\n"
    return text


def fill(page):
    """Puts today's tables between the marks `<!-- report NAME -->` and `<!-- end -->`."""
    marked = re.compile(r"(<!-- report ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
    return marked.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", page)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures.


def draw_space():
    """What becomes of a cut, against the loss right after it; by whether it keeps 4 or 5, and 10 or 11."""
    loss = losses()
    grid = one_of_each(loss)
    found = distances(loss)
    title = "dit-tiny, 12 layers -> 6: FD after 100 steps of recovery (b = 0.01)"
    x_name = "loss right after the cut (both axes logarithmic)"
    chart = Chart(title, x_name, "FD", [0.15, 0.2, 0.5, 1, 2], [0.8, 1, 2, 5, 10, 12])
    colours = dict(zip(("keeps 4 11", "outside 1:2", "keeps 4 10", "keeps 5 11", "keeps 5 10"), COLOURS))
    for kept, distance in found.items():
        pair = " ".join(layer for layer in kept.split() if layer in ("4", "5", "10", "11"))
        chart.dot(loss[kept], distance, colours[f"keeps {pair}" if kept in grid else "outside 1:2"])
    for kept, what, below in (
            (LEARNED, "learned, 1:2", 12),
            (lowest(grid), "lowest loss of 1:2", 36),
            (lowest(loss), "lowest loss of all 924", 0)):
        chart.dot(loss[kept], found[kept], "black", what, below)
    chart.legend(colours, x=130)
    return chart


def draw_length():
    """What a longer recovery makes of a good cut and of a bad one."""
    cuts = {
        "worst of 1:2": "1 2 5 6 9 10", "median loss of all 924": "1 3 4 7 9 10", "learned, 1:2": LEARNED,
        "lowest loss of 1:2": "1 2 4 7 9 11", "lowest loss of all 924": "0 1 2 3 4 7"}
    lengths = [25, 100, 400, 800, 1600]
    curves = {}
    for what, kept in cuts.items():
        for steps in lengths:
            for fd in recovered(kept, steps, seed=0, beta=0.01):
                curves.setdefault(f"{what}: {kept}", []).append((steps, fd))
    title = "dit-tiny, 12 layers -> 6: FD after recoveries of different length (b = 0.01)"
    x_name = "steps of recovery, each dot a run of its own (both axes logarithmic)"
    return draw_curves(title, x_name, "FD", lengths, [0.5, 1, 2, 5, 10, 20], curves)


def main():
    if "--help" in sys.argv:
        sys.exit(__doc__)
    if "--pictures" in sys.argv:
        draw_space().image.save(ROOT / "docs" / "space.png")
        draw_length().image.save(ROOT / "docs" / "length.png")
    elif "--readme" in sys.argv:
        (RESULTS / "README.md").write_text(page())
        for page_with_tables in (ROOT / "README.md", ROOT / "docs" / "evidence.md"):
            page_with_tables.write_text(fill(page_with_tables.read_text()))
    else:
        for name in sys.argv[1:] or TABLES:
            print(f"\n## {name}\n\n{table(name)}")


if __name__ == "__main__":
    main()

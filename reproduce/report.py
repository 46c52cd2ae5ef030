"""The tables (markdown) and pictures of the experiments, from docs/results/*.json alone, which experiments.py writes.

    python reproduce/report.py                        # every table
    python reproduce/report.py space modes            # these
    python reproduce/report.py --readme               # into README.md, docs/evidence.md, docs/results/README.md
    python reproduce/report.py --pictures             # docs/space.png, length.png

A table is a list of lines. Cells like `FD kept=0 4 11&steps=100` are questions: see ANSWERS.

FD is the Fréchet distance of 500 samples. "a ± b (n)" is the mean and the standard deviation over n seeds of the
recovery; without ±, there is one. A cut's loss is the training loss right after the cut, before any recovery.
What `experiments.py --list` still names is a "-" here.
"""
import functools
import json
import re
import sys
from pathlib import Path
from statistics import geometric_mean, mean, median, stdev

from scipy.stats import spearmanr

from chart import COLOURS, Chart, draw_curves
from table import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
FREE = {"dit-tiny": "6:12", "sit-tiny": "6:12", "mar-tiny": "3:6"}  # any half of the layers; MAR has two lists of six
MODES = ("finetune", "logits-kd", "rep-kd", "masked-kd")
FRONT = ("learned", "sensitivity", "lowest-loss", "shortlist", "bi", "random")  # the criteria of the README's table
LEARNED = "0 2 4 7 8 11"  # what the search keeps of dit-tiny at 1:2
USUAL = dict.fromkeys("trained teacher_seed granularity parent teacher lr sigma beta delta_w".split())

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


def choices(depth=6, **wanted):
    return [row for row in rows("choice", **wanted) if len(row["kept"].split()) == depth]


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
    """{cut: its distance}, where it was recovered so."""
    found = {}
    for kept in cuts:
        for distance in recovered(kept, steps, seed=seed):
            found[kept] = distance
    return found


def lowest(scores):
    return min(scores, key=scores.get)


def rank_of(kept, scores):
    return 1 + sum(score < scores[kept] for score in scores.values())


def correlation(cuts, a, b):
    """Spearman's rank correlation of two scores."""
    return spearmanr([a[kept] for kept in cuts], [b[kept] for kept in cuts])


def spread(values):
    if len(values) > 1:
        return f"{mean(values):.2f} ± {stdev(values):.2f} ({len(values)})"
    return f"{values[0]:.2f}" if values else "-"


def label(names, kept, what):
    names.setdefault(kept, []).append(what)


# Answers to the questions in the tables. Where nothing is said, it is the learned cut, recovered by masked KD.


def fd(at=None, kept=LEARNED, **settings):
    if at:
        return f"{rows('recovery', kept=kept, steps=800, **settings)[0]['at'][str(at)]:.2f}"
    return spread(recovered(kept, **settings))


def keeps(**settings):
    """What a criterion keeps, over its seeds."""
    kept = sorted({row["kept"] for row in choices(**settings)})
    if len(kept) > 2:
        return f"{len(kept)} cuts"
    return "; ".join(kept) or "-"


def mean_fd(**settings):
    """The mean over a criterion's seeds."""
    found = [fd for row in choices(**settings) for fd in recovered(row["kept"], seed=0)]
    return f"{mean(found):.2f}" if found else "-"


def seconds(kind="choice", **settings):
    """Of a cut to 6 layers; the least."""
    return f"{min(row['seconds'] for row in rows(kind, **settings) if len(row['kept'].split()) == 6):.0f}"


def faster(**settings):
    found = [f"{row['whole_ms'] / row['ms']:.2f}" for row in rows("speed", **settings)]
    return "".join(found) or "-"


ANSWERS = {"FD": fd, "keeps": keeps, "mean-FD": mean_fd, "seconds": seconds, "faster": faster}


def number(text):
    """A setting in a text is a number or a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def answer(cell):
    """A cell like `FD kept=0 4 11&steps=100` asks for what ANSWERS says; any other is itself."""
    question, _, asked = cell.partition(" ")
    if question not in ANSWERS:
        return cell
    settings = dict(word.split("=") for word in asked.split("&"))
    return ANSWERS[question](**{key: number(text) for key, text in settings.items()})


# ---------------------------------------------------------------------------------------------------------------------
# The tables, in the order of docs/results/README.md. Each is a list of lines; the first has the names of the columns.


def space():
    """The cuts of 1:2, dit-tiny, by length of the recovery; and the rank of what the search chose."""
    loss = one_of_each(losses())
    after_100 = distances(loss)
    lines = ["recovery steps | cuts | best FD | median | worst | rank correlation with the loss | "
             "with FD after 100 steps | the lowest loss"]
    for what, steps, seed in (("25", 25, 0), ("100", 100, 0), ("400", 400, 0), ("100, another seed", 100, 1)):
        found = distances(loss, steps, seed)
        values = sorted(found.values())
        with_loss = correlation(found, found, loss)
        with_100 = correlation(found, found, after_100)
        best = lowest(loss)
        lines.append(
            f"{what} | {len(found)} | {values[0]:.2f} | {median(values):.2f} | {values[-1]:.2f} | "
            f"{with_loss.statistic:.2f} (p = {with_loss.pvalue:.1g}) | {with_100.statistic:.2f} | "
            f"{found[best]:.2f} (rank {rank_of(best, found)})")
    return lines


def searches():
    """What the search keeps of these, with five seeds. A random cut's rank would be 32.5."""
    loss = one_of_each(losses())
    found = distances(loss)
    lines = ["search seed | keeps | rank of its loss of 64 | FD, 100 steps | its rank of 64"]
    for row in choices(criterion="learned", scheme="1:2"):
        kept = row["kept"]
        lines.append(f"{row['seed']} | {kept} | {rank_of(kept, loss)} | {found[kept]:.2f} | {rank_of(kept, found)}")
    return lines


def special_cuts(loss, searched, m=2):
    """{cut: [what it is, ...]}: the lowest loss of all and of 1:m, and what was searched."""
    names = {}
    label(names, lowest(loss), f"lowest loss of all {len(loss)}")
    label(names, lowest(one_of_each(loss, m)), f"lowest loss of 1:{m}")
    for row in searched:
        label(names, row["kept"], f"{row['criterion']} {row['scheme']}, seed {row['seed']}")
    return names


def cut_lines(start, names, loss, lengths, more=""):
    lines = []
    for kept, what in names.items():
        cells = [f"{start}{'; '.join(what)}", kept, f"{loss[kept]:.3f}", str(rank_of(kept, loss))]
        cells += [f"FD kept={kept}&steps={steps}{more}" for steps in lengths]
        lines.append(" | ".join(cells))
    return lines


def free():
    """Free of 1:2: cuts out of all 924, dit-tiny."""
    loss = losses()
    grid = one_of_each(loss)
    outside = distances(set(loss) - set(grid))
    names = special_cuts(loss, choices(criterion="learned"))
    label(names, max(grid, key=grid.get), "highest loss of 1:2")
    names = dict.fromkeys(outside, ["some other"]) | names
    names = {kept: names[kept] for kept in sorted(names, key=loss.get)}
    among = correlation(outside, outside, loss)
    return [
        "cut | keeps | loss | rank of 924 | FD, 25 steps | 100 | 400 | 800",
        *cut_lines("", names, loss, (25, 100, 400, 800)),
        f"rank correlation with the loss, {len(outside)} cuts outside 1:2 |  |  |  |  | "
        f"{among.statistic:.2f} (p = {among.pvalue:.1g}) |  | "]


def modes():
    """Table 5 and figure 14 on the digits: one cut, recovered in every way."""
    lines = ["mode | FD, a run of 100 steps | a run of 800: at 200 | at 400 | at its end"]
    for mode in MODES:
        fd = f"FD mode={mode}"
        lines.append(f"{mode} | {fd} | {fd}&at=200 | {fd}&at=400 | {fd}&steps=800")
    return lines


def judged(criterion, scheme):
    """For each model, the distances of all that a criterion chose, over its seeds and those of the recovery."""
    found = []
    for model, half in FREE.items():
        values = []
        for row in choices(model=model, criterion=criterion, scheme=scheme.replace("free", half)):
            values += recovered(row["kept"], model=model)
        found.append(values)
    return found


def ideas():
    """The paper's search and its rivals: mean (range) over what their seeds chose and over the recovery's seeds."""
    models = " | ".join(f"FD, {model}" for model in FREE)
    lines = [f"criterion | scheme | {models} | all three, beside learned (geometric mean)"]
    first = {}
    every = "learned sensitivity bi flux-lite distilled greedy adapted halving lowest-loss random"
    for criterion in every.split():
        for scheme in ("1:2", "free"):
            found = judged(criterion, scheme)
            if not all(found):
                continue
            line = f"{criterion} | {scheme}"
            for values in found:
                line += f" | {mean(values):.2f}"
                if len(set(values)) > 1:
                    line += f" ({min(values):.2f} to {max(values):.2f})"
            together = geometric_mean(map(mean, found))
            lines.append(f"{line} | {together / first.setdefault(scheme, together):.2f}")
    return lines


def front():
    """The README's table: mean FD after 100 steps of recovery. free: any half of the layers."""
    lines = ["how the layers were chosen | " + " | ".join(FREE)]
    for criterion, scheme in (
            ("learned", "1:2"), ("learned", "free"), ("sensitivity", "1:2"), ("sensitivity", "free"),
            ("lowest-loss", "1:2"), ("lowest-loss", "free"), ("bi", "free"), ("random", "1:2")):
        distances = [f"{mean(values):.2f}" for values in judged(criterion, scheme)]
        lines.append(f"`{criterion}`, {scheme} | " + " | ".join(distances))
    return lines


def thresholds():
    """Table 5 on the digits: which activations are masked, after 100 steps."""
    return [
        "masked beyond, in std | FD", "0.1 | FD sigma=0.1", "1 | FD sigma=1", "2 | FD steps=100", "4 | FD sigma=4",
        "none is (rep-kd) | FD mode=rep-kd"]


def rates():
    """Table 8 on the digits: the recovery's learning rate."""
    return [
        "lr | FD, 800 steps", "0.002 | FD steps=800&lr=2e-3", "0.001 | FD steps=800", "0.0005 | FD steps=800&lr=5e-4",
        "0.00025 | FD steps=800&lr=2.5e-4"]


def alone():
    """What each layer is worth alone: the loss with it left out, less the whole network's."""
    lines = ["model | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11"]
    for model in FREE:
        for row in choices(model=model, criterion="sensitivity", scheme="1:2"):
            lines.append(" | ".join([model, *(f"{score:.4f}" for score in row["scores"])]))
    return lines


def sublayers():
    """Blocks against halves of blocks (attention or MLP), half of the network each."""
    lines = ["model | layers | attentions (of 6 blocks or 12 halves) | times as fast | FD, 100 steps"]
    for model, free in FREE.items():
        blocks = choices(model=model, criterion="learned", scheme="1:2", seed=0)
        blocks += choices(model=model, criterion="learned", scheme=free, seed=0)
        for row in blocks:
            cut = f"model={model}&kept={row['kept']}"
            lines.append(f"{model} | blocks, learned {row['scheme']} | 6 | faster {cut} | FD {cut}&seed=0")
        for row in choices(12, model=model, granularity="sublayer"):
            cut = f"model={model}&kept={row['kept']}&granularity=sublayer"
            attentions = [layer for layer in row["kept"].split() if int(layer) % 2 == 0]
            what = f"halves, {row['criterion']} {row['scheme']}"
            lines.append(f"{model} | {what} | {len(attentions)} | faster {cut} | FD {cut}&seed=0")
    return lines


def cost():
    """What a choice takes beside a recovery, in seconds of one core: the least of the seeds."""
    lines = ["what | seconds, 1:2 | 6:12"]
    for criterion in "bi probe sensitivity greedy halving adapted learned distilled lowest-loss".split():
        seconds = f"seconds criterion={criterion}&scheme="
        lines.append(f"{criterion} | {seconds}1:2 | {seconds}6:12")
    for steps in (100, 800):
        seconds = f"seconds kind=recovery&mode=masked-kd&steps={steps}"
        lines.append(f"recovery, {steps} steps | {seconds} | {seconds}")
    return lines


def speeds():
    """Figure 4 on the digits: the forward pass against depth."""
    lines = ["layers | ms | times as fast | 12 / layers"]
    for depth in (12, 9, 6, 4, 3, 2, 1):
        for row in rows("speed", kept=" ".join(map(str, range(depth)))):
            lines.append(f"{depth} | {row['ms']:.1f} | {row['whole_ms'] / row['ms']:.2f} | {12 / depth:.2f}")
    return lines


def criteria():
    """Every criterion at 12 -> 6, equal budgets."""
    lines = ["model | criterion | scheme | its seeds | keeps | loss | FD, 100 steps | FD, 800 steps"]
    for model in FREE:
        seeds = {}
        for row in choices(model=model):
            label(seeds, (row["scheme"], row["criterion"], row["kept"], row["loss"]), str(row["seed"]))
        for (scheme, criterion, kept, loss), found in sorted(seeds.items()):
            line = f"{model} | {criterion} | {scheme} | {', '.join(found)} | {kept} | {loss:.3f}"
            cut = f"model={model}&kept={kept}"
            lines.append(f"{line} | FD {cut} | FD {cut}&steps=800")
    return lines


ALL = (space, searches, free, modes, ideas, front, thresholds, rates, alone, sublayers, cost, speeds, criteria)
TABLES = {function.__name__: function for function in ALL}


def table(name):
    names, *lines = TABLES[name]()
    rows = []
    for line in lines:
        rows.append([answer(cell) for cell in line.split(" | ")])
    return markdown(names.split(" | "), rows)


def page():
    """Every table, under the first line of its function's docstring."""
    text = "# The experiments\n\nWritten by `python reproduce/report.py --readme`. What the numbers are:\n\n"
    text += "\n".join(__doc__.strip().splitlines()[-3:]) + "\n"
    for name, function in TABLES.items():
        text += f"\n## {name}\n\n{function.__doc__}\n\n{table(name)}\n"
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
    title = "dit-tiny, 12 layers -> 6: what becomes of a cut in 100 steps of recovery"
    x_name = "loss right after the cut (both axes logarithmic)"
    chart = Chart(title, x_name, "Frechet distance", [0.15, 0.2, 0.5, 1, 2], [0.8, 1, 2, 5, 10, 12])
    colours = dict(zip(("4 11", "not 1:2", "4 10", "5 11", "5 10"), COLOURS))
    for kept, distance in found.items():
        pair = " ".join(layer for layer in kept.split() if layer in ("4", "5", "10", "11"))
        chart.dot(loss[kept], distance, colours[pair if kept in grid else "not 1:2"])
    names = special_cuts(loss, choices(criterion="learned", seed=0))
    for i, (kept, what) in enumerate(names.items()):
        chart.dot(loss[kept], found[kept], "black", ", ".join(what), below=30 - 15 * i)
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
            for fd in recovered(kept, steps, seed=0):
                label(curves, f"{what}: {kept}", (steps, fd))
    title = "dit-tiny, 12 layers -> 6: what a longer recovery makes of a cut"
    x_name = "steps of recovery, each dot a run of its own (both axes logarithmic)"
    return draw_curves(title, x_name, "Frechet distance", lengths, [0.5, 1, 2, 5, 10, 20], curves)


def main():
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

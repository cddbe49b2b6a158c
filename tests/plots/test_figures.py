"""Each kind of figure beside a stored picture of it: colors, labels, bands and panels stay as they are.

    python tests/plots/test_figures.py      # store the pictures anew, then look at them

Matplotlib is pinned and brings its own FreeType, so machines differ by shades only, and small unhinted
pictures by few of them. They are compared tile by tile: over a whole picture, a word would drown.
"""

import re
from io import BytesIO
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.testing.compare import calculate_rms
from matplotlib.testing.exceptions import ImageComparisonFailure
from PIL import Image, ImageOps

from benchmarks.plots import plot_costs
from miniature.plots import plot_learning_curves
from mmflow_utils.params import ROOT
from mmflow_utils.plots.curves import plot_curves, plot_flow
from mmflow_utils.plots.explorer import plot_choice
from mmflow_utils.plots.flow_stages import plot_stages
from mmflow_utils.plots.image_patches import plot_image_patches, plot_norms
from mmflow_utils.plots.maps import plot_heads, plot_map, plot_maps
from mmflow_utils.plots.pictures import plot_accuracy, plot_contact_sheet, plot_sample
from mmflow_utils.plots.style import TASK_ORDER, WORD_COLORS
from mmflow_utils.prompts import flows

STORED = Path(__file__).parent / "figures"
DPI, REDUCED, TILE = 120, 3, 12  # drawn at 120 dots per inch, compared at 40, in tiles of 12 x 12
TOLERANCE = 9.0  # root mean square over a tile, in steps of 0 to 255

TO_LAST = [str(flow) for flow in flows.FLOW_TO_LAST]
TASKS = TASK_ORDER


def wave(*numbers: float) -> float:
    """Something between 0 and 1 that looks measured and is the same everywhere."""
    return (1 + np.sin(sum((n + 1) * number for n, number in enumerate(numbers)))) / 2


def summary(panels=TASKS, lines=TO_LAST, panel="task", line="flow") -> pd.DataFrame:
    cells = product(enumerate(panels), enumerate(lines), range(12))
    rows = [
        {panel: task, line: name, "layer": layer, "mean": -60 * wave(layer / 2, i, j), "n": 24}
        for (i, task), (j, name), layer in cells
    ]
    return pd.DataFrame(rows).assign(ci_low=lambda f: f["mean"] - 7, ci_high=lambda f: f["mean"] + 5)


def picture() -> np.ndarray:
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([3 * x, 4 * y, 90 + x], -1).astype(np.uint8)


def patches() -> pd.DataFrame:
    kinds = ["image_related", "image_other", "image_other", None]
    rows = [(16 * x, 16 * y, 16, 16, kinds[(x + y) % 4], 0) for y in range(3) for x in range(4)]
    return pd.DataFrame(rows, columns=["x", "y", "w", "h", "set", "view"])


def knockouts() -> pd.DataFrame:
    return summary(TASKS[:1]).rename(columns={"mean": "rel_change_pct"})


def things() -> list[SimpleNamespace]:
    box = SimpleNamespace(x=10, y=14, w=24, h=20)
    return [SimpleNamespace(name="cup", box=box), SimpleNamespace(name="tree", box=None)]


def draw_accuracy() -> Figure:
    kinds = product(("verify", "query", "choose"), ("obj", "attr", "rel"))
    rows = [(a, b, 100 * wave(i), 40 + i) for i, (a, b) in enumerate(kinds)]
    frame = pd.DataFrame(rows, columns=["structural", "semantic", "accuracy_pct", "n"])
    return plot_accuracy(frame, subtitle="a model")


def draw_choice() -> Figure:
    words = pd.DataFrame({"token": ["Red", "Blue", "red"], "probability": [0.6, 0.3, 0.1]})
    chosen = {"flow": "Image -> Last", "layer": 4, "title": "What color is it? → red", "subtitle": "mini"}
    related = patches().query("set == 'image_related'")
    return plot_choice(picture(), related, knockouts(), words, **chosen)


def draw_contact_sheet() -> Figure:
    return plot_contact_sheet([picture()] * 3, ["one", "two", "three"], title="Pictures")


def draw_costs() -> Figure:
    cells = product((8, 32), enumerate(("sweep", "clean cache", "full forwards")))
    rows = [(n, way, n ** (0.4 + k), 1.5 if k == 0 else np.nan) for n, (k, way) in cells]
    frame = pd.DataFrame(rows, columns=["n_layers", "way", "clean_passes", "bound"])
    return plot_costs(frame, panel="n_layers", title="What a sample costs")


def draw_curves() -> Figure:
    words = list(WORD_COLORS)[:4]
    frame = summary(TASKS[:2], words, line="word").assign(lens="normed")
    return plot_curves(frame, line="word", across="lens", colors=WORD_COLORS, title="Lens")


def draw_flow() -> Figure:
    floor = pd.DataFrame(
        {"task": TASKS, "flow": "No picture at all", "mean": [-90.0 + 4 * k for k in range(len(TASKS))]}
    )
    return plot_flow(summary(), model="mini", window=3, floor=floor)


def draw_heads() -> Figure:
    cells = summary(TASKS[:2], range(4), line="head").assign(mean=lambda f: f["mean"] + 15)
    return plot_heads(cells, title="Question → Last, cut in one head", subtitle="mini")


def draw_image_patches() -> Figure:
    two = {"boxes": patches(), "control": patches().assign(set=lambda f: f["set"][::-1].to_numpy())}
    return plot_image_patches(picture(), two, objects=things(), title="Image patches")


def draw_learning_curves() -> Figure:
    stages = enumerate(("text", "together"))
    rows = [
        (stage, step, metric, task, 100 * wave(step / 15, s, t))
        for (s, stage), step, metric, (t, task) in product(
            stages, range(0, 50, 10), ("loss", "accuracy_pct"), enumerate(TASKS[:3])
        )
    ]
    return plot_learning_curves(pd.DataFrame(rows, columns=["stage", "step", "metric", "task", "value"]))


def draw_map() -> Figure:
    return plot_map(knockouts(), title="What color is it? → red", subtitle="mini")


def draw_maps() -> Figure:
    cells = summary(TASKS[:2], ["Image", "Question", "Last"], line="positions").assign(mean=lambda f: -f["mean"])
    return plot_maps(cells, row="positions", label="Recovery (%)", title="Where does it stand?", subtitle="mini")


def draw_norms() -> Figure:
    norms = pd.Series([40 * wave(n) + 60 * (n % 97 == 0) for n in range(600)])
    return plot_norms(norms, threshold=57.0)


def draw_sample() -> Figure:
    return plot_sample(picture(), things(), title="Where is the cup?", subtitle="left", width=3.0)


def draw_stages() -> Figure:
    lines = ["Image -> Question", "Question -> Last", "Image -> Last", "Capitalized answer"]
    layers = summary(["mini", "large"], lines, panel="model", line="line")
    layers = layers.assign(mean=-layers["mean"], in_stage=layers["mean"] < -35)
    strongest = layers.sort_values("mean").groupby(["model", "line"]).last().reset_index()
    found = strongest.assign(n_layers=12, effect=strongest["mean"], strongest=strongest["layer"])
    found = found.assign(strongest_low=found["layer"] - 1, strongest_high=found["layer"] + 1)
    return plot_stages(layers, found, title="Stages")


DRAWN = {name.removeprefix("draw_"): draw for name, draw in list(globals().items()) if name.startswith("draw_")}


def small(figure: Figure) -> Image.Image:
    """Draw a figure as it is stored."""
    file = BytesIO()
    with mpl.rc_context({"text.hinting": "none"}):
        figure.savefig(file, format="png", dpi=DPI)
    # Four shades more or less are nothing to the eye, and a third of the file.
    return ImageOps.posterize(Image.open(file).convert("RGB").reduce(REDUCED), 6)


def distance(expected: Image.Image, actual: Image.Image) -> float:
    """Give the largest difference of a tile."""
    one, other = (np.asarray(image, dtype=np.int16) for image in (expected, actual))
    if one.shape != other.shape:
        raise ImageComparisonFailure(f"expected a picture of {one.shape}, got {other.shape}")
    corners = product(range(0, one.shape[0], TILE), range(0, one.shape[1], TILE))
    tiles = [(slice(y, y + TILE), slice(x, x + TILE)) for y, x in corners]
    return max(calculate_rms(one[tile], other[tile]) for tile in tiles)


def stored(name: str) -> Image.Image:
    return Image.open(STORED / f"{name}.png").convert("RGB")


@pytest.mark.parametrize("name", DRAWN)
def test_the_figure_looks_as_it_did(name, tmp_path):
    now = small(DRAWN[name]())
    now.save(tmp_path / f"{name}.png")
    assert distance(stored(name), now) < TOLERANCE, (
        f"{name} looks otherwise: compare {STORED / name}.png with {tmp_path / name}.png, and if the new one "
        "is meant, store it by `python tests/plots/test_figures.py`"
    )


CHANGES = {
    "a band is missing": lambda axes: axes[2].collections[0].remove(),
    "a curve has another color": lambda axes: axes[0].lines[1].set_color("#117733"),
    "a curve is dashed": lambda axes: axes[0].lines[1].set_linestyle("--"),
    "a panel's title is another task's": lambda axes: axes[0].set_title(TASKS[1], loc="left"),
    "an axis has another label": lambda axes: axes[-1].set_xlabel("Step"),
    "a panel is missing": lambda axes: axes[1].remove(),
    "an axis reaches further": lambda axes: axes[1].set_ylim(-80, 5),
    "the line at zero is missing": lambda axes: axes[1].lines[0].remove(),
    "the legend names another flow": lambda axes: axes[0].figure.legends[0].texts[0].set_text(TO_LAST[1]),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_a_reader_would_see_is_seen(change):
    figure = draw_flow()
    CHANGES[change](figure.axes)
    assert distance(stored("flow"), small(figure)) > TOLERANCE


def test_another_size_is_a_failure():
    with pytest.raises(ImageComparisonFailure, match="expected a picture of"):
        distance(stored("flow"), stored("map"))


def test_noise_as_between_machines_is_none_to_the_eye():
    rng = np.random.default_rng(0)
    picture = np.asarray(stored("flow"), dtype=int)
    noisy = Image.fromarray((picture + rng.integers(-8, 9, picture.shape)).clip(0, 255).astype(np.uint8))
    assert 0 < distance(stored("flow"), noisy) < TOLERANCE


def test_every_kind_of_figure_is_stored_once_and_small():
    rooms = (ROOT / "mmflow_utils" / "plots", ROOT / "benchmarks", ROOT / "miniature")
    files = [file for room in rooms for file in room.glob("*.py")]
    kinds = {name for file in files for name in re.findall(r"^def plot_(\w+)", file.read_text("utf-8"), re.M)}
    assert set(DRAWN) == kinds - {"prompt"}  # that one is HTML
    assert {file.stem for file in STORED.glob("*.png")} == set(DRAWN)
    assert sum(file.stat().st_size for file in STORED.glob("*")) < 400_000


if __name__ == "__main__":
    STORED.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        small(draw()).save(STORED / f"{name}.png", optimize=True)

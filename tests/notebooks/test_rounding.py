"""No sentence, verdict or table of a notebook hangs on what another processor rounds otherwise.

Every number that a model computed is moved by a millionth of itself, three times what processors were found to differ
by; what the notebooks make of the frames of mini, mini-next and planted may hardly move.
"""

from itertools import zip_longest

import numpy as np
import pandas as pd
import pytest
from analysis_cells import FRAMES, moved, run_cells
from ties import WORD, near

from mmflow_utils.params import ROOT

NOISE, N_DRAWS = 1e-6, 20
UNIT, MOVES = 0.1, 0.01  # what is printed of a percentage or a layer; the share of it that may move
NOTEBOOKS = {
    path.stem: path
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    if path.stem[:2] in {"02", "03", "04", "05", "06", "08", "09", "10", "11", "12", "13", "14", "16", "17", "18"}
}
# Cells that look at a prompt or a model, at a stored file beside the frame, or at which modules are loaded.
CHECKS = {
    "04": ["spans = encoded.positions"],
    "06": ["for result, path in ((module_result, module_path), (image_result, image_path)):"],
    "08": ["worst = max(sweep.max_check_diff or 0.0 for sweep in sweeps)", "stored = mm.load_frame(result_path)"],
    "09": ["worst = max(sweep.max_check_diff or 0.0 for sweep in sweeps)", "stored = mm.load_frame(result_path)"],
    "10": [
        "encoded, panels = encoder(vlm, sample), {}",
        'cuts = [mm.Flow(source="image_related", target=target) for target in ("last", "question")]',
        'seeded = {"n_boot": params.n_boot, "seed": params.seed}',
        'strong = attended[attended.groupby(["flow", "sample_id"]).rel_change_pct.transform("min") <= -1]',
        'by_sample = attended.groupby(["flow", "sample_id", "image_id"], sort=False)',
        'largest, fence = mm.format_number(float(norms["norm"].max())), mm.format_number(cut.value)',
    ],
    "11": [
        "assert (mm.load_frame(flow_path, result.manifest).p_knockout == heard.p_knockout).all()",
        "worth = mm.paired_difference(",
    ],
    "13": ["for held in spans.values():"],
    "17": ['how = {"layers": layers, "method": params.method, "n_check": 1}'],
}
# Cells that read nothing but what comes with the project: once is enough, since no processor measures it anew.
UNMOVED = {
    "14": [
        'known = {"Image -> Question": "2", "Question -> Last": "5"}  # PICK_UP and ANSWER of miniature/planted.py',
        'control_claims = tally_claims(mm.check_claims(planted, **boot)).droplevel("model")',
    ]
}
CASES = [
    (name, model)
    for name in NOTEBOOKS
    for model in ("mini", "mini-next", "planted")
    if not (name[:2] in ("11", "12") and model == "planted")
    and not (name[:2] in ("14", "16", "18") and model != "mini")
]


def differences(plain, other) -> list[str]:
    """List what two runs of a notebook say otherwise: words, whole numbers, or decimals by more than a last digit."""
    found = []
    for said, says in zip_longest("\n".join(plain.text).split("\n"), "\n".join(other.text).split("\n"), fillvalue=""):
        for a, b in zip_longest(WORD.findall(said), WORD.findall(says), fillvalue=""):
            if a != b and not near(a, b):
                found.append(f"{said} | {says}")
                break
    for table, changed in zip_longest(plain.tables, other.tables):
        found += table_differences(table, changed)
    return found


def table_differences(table: pd.DataFrame, other: pd.DataFrame) -> list[str]:
    if table.shape != other.shape:
        return [f"a table of {table.shape} is one of {other.shape}"]
    found = []
    for name in table:
        a, b = table[name], other[name]
        if name in ("p", "p_holm"):  # said to be below 0.05, or not; a test of a few images has few values
            a, b = a < 0.05, b < 0.05
        if pd.api.types.is_float_dtype(a):
            worst = np.nanmax(np.abs(a.to_numpy() - b.to_numpy()), initial=0)
            if (
                worst > max(MOVES * UNIT, 1e-5 * np.nanmax(np.abs(a.to_numpy()), initial=0))
                or (a.isna() != b.isna()).any()
            ):
                found.append(f"{name} moves by {worst:.2g}")
        elif not a.astype(str).equals(b.astype(str)):
            found.append(f"{name}: {a[a.astype(str) != b.astype(str)].iloc[0]}")
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "model"), CASES)
def test_nothing_said_hangs_on_rounding(name, model):
    plain = run_cells(NOTEBOOKS[name], model, lambda frame: frame)
    assert plain.tables and plain.skipped == CHECKS.get(name[:2], [])
    if but := UNMOVED.get(name[:2], []):
        plain, whole = run_cells(NOTEBOOKS[name], model, lambda frame: frame, but=but), plain
        assert len(plain.text) == len(whole.text) - len(but)
    found = []
    for draw in range(N_DRAWS):
        rng = np.random.default_rng(draw)
        other = run_cells(NOTEBOOKS[name], model, lambda frame, rng=rng: moved(frame, rng, NOISE), but=but)
        found += differences(plain, other)
    assert not found, found[:5]


def test_noise_that_counts_is_noticed():
    name = "02_flow_to_last"
    plain = run_cells(NOTEBOOKS[name], "mini", lambda frame: frame)
    other = run_cells(NOTEBOOKS[name], "mini", lambda frame: moved(frame, np.random.default_rng(0), 0.03))
    assert differences(plain, other)
    assert not differences(plain, plain)


def test_every_notebook_with_a_band_or_a_test_is_looked_at():
    text = {path.stem: path.read_text("utf-8") for path in (ROOT / "notebooks").glob("*.ipynb")}
    said = ("simultaneous_over", "paired_difference(", "find_stages(", "check_claims(")
    found = {name for name, source in text.items() if any(word in source for word in said)}
    # 07 tests answers, which are right or wrong: no rounding moves them.
    assert found - {"07_efficiency_study"} <= set(NOTEBOOKS) and "07_efficiency_study" in found
    assert all((FRAMES / model / "flow_to_last.parquet").is_file() for _, model in CASES)

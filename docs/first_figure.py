"""Draw the README's first figure: Experiment 1 on the model that notebook 18's rule chooses, from its stored frame.

    python -m docs.first_figure llava-smollm2          # writes assets/flow_to_last.png

The frame is the one that comes with the project (assets/results/<model>/), or else what notebook 02 stored last.
"""

import sys

import mmflow_utils as mm
from mmflow_utils.params import ROOT, Params, outputs_folder
from workflow.graph import SUBJECT

FIGURE = ROOT / "assets" / "flow_to_last.png"


def main(model: str = SUBJECT) -> int:
    """Draw the figure of a model; returns the exit code."""
    params = Params.from_yaml(ROOT / "params" / f"{model}.yaml")
    places = [folder / model / "flow_to_last.parquet" for folder in (ROOT / "assets" / "results", outputs_folder())]
    try:
        frame = mm.load_frame(next((file for file in places if file.is_file()), places[-1]))
    except ValueError as error:
        print(f"mmflow: {error}", file=sys.stderr)
        return 1
    frame = frame[frame.flow.isin([str(flow) for flow in mm.FLOW_TO_LAST])]
    summary = mm.summarize(frame, n_boot=params.n_boot, seed=params.seed)
    mm.plot_flow(summary, window=params.window, model=model).savefig(FIGURE, dpi=100)
    print(f"{FIGURE.relative_to(ROOT)}: {model}, {frame.sample_id.nunique()} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

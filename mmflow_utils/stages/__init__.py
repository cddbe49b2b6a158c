"""Where each stage of the information flow begins and ends, and which of the paper's claims hold (Fig. 1).

Works on what the experiments stored, for every model that has stored something; loads no model.

    effects = collect_effects(read_results("outputs"))
    find_stages(effects)        # one row per model and line
    check_claims(effects)       # one row per model and claim
"""

from mmflow_utils.stages.claims import CLAIMS, Claim, check_claims, describe_claims
from mmflow_utils.stages.effects import collect_effects, read_results
from mmflow_utils.stages.find import find_stages, stage_layers, tabulate_stages

__all__ = [
    "CLAIMS",
    "Claim",
    "check_claims",
    "collect_effects",
    "describe_claims",
    "find_stages",
    "read_results",
    "stage_layers",
    "tabulate_stages",
]

# SPDX-License-Identifier: Apache-2.0
"""How many draft tokens and rounds of slim verification the next step gets, or none of either, by
measured pass times and acceptance rates. The largest promise wins; what is not in use is tried now
and then, at a bounded cost.
"""

from vllm_nvium.via_sd.planner.choose import Planner
from vllm_nvium.via_sd.planner.estimate import COMMON_TRIALS, judge_drafts
from vllm_nvium.via_sd.planner.estimators import PassTimeEstimator, RateEstimate
from vllm_nvium.via_sd.planner.fixed import FixedRounds
from vllm_nvium.via_sd.planner.model import (
    LOSSLESS,
    OFF,
    PAPER,
    AcceptanceRates,
    BackgroundLoad,
    DraftPlan,
    PassTimeCurve,
    StepTimes,
    forecast_plain,
    forecast_plans,
    forecast_tiered,
    round_length,
    round_survival,
)

__all__ = [
    "COMMON_TRIALS",
    "LOSSLESS",
    "OFF",
    "PAPER",
    "AcceptanceRates",
    "BackgroundLoad",
    "DraftPlan",
    "FixedRounds",
    "PassTimeCurve",
    "PassTimeEstimator",
    "Planner",
    "RateEstimate",
    "StepTimes",
    "forecast_plain",
    "forecast_plans",
    "forecast_tiered",
    "judge_drafts",
    "round_length",
    "round_survival",
]

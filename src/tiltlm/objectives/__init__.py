"""Objectives: rules for the coefficient of each sample."""

from tiltlm.objectives.dpg import DPG, GDC, GDCPlusPlus
from tiltlm.objectives.fdivergence import FDPG, AlphaDPG
from tiltlm.objectives.groupwise import BRAIn, VarGrad
from tiltlm.objectives.guided import Guided, KeptGuide, estimators, prefix_weights
from tiltlm.objectives.minimum_variance import MinimumVariance
from tiltlm.objectives.objective import Estimators, Objective
from tiltlm.objectives.pooled import Pooled
from tiltlm.objectives.ppo import GRPO, PPO
from tiltlm.objectives.record import GuideRecord, Record, TokenRecord
from tiltlm.objectives.reinforce import RLOO, KLControl, Reinforce, ReinforceP

# The methods of a run file: each class declares its own name.
BUILT_IN: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        DPG,
        GDC,
        GDCPlusPlus,
        Pooled,
        Guided,
        KeptGuide,
        FDPG,
        AlphaDPG,
        BRAIn,
        VarGrad,
        Reinforce,
        ReinforceP,
        KLControl,
        RLOO,
        PPO,
        GRPO,
    )
}

__all__ = [
    "BUILT_IN",
    "DPG",
    "FDPG",
    "GDC",
    "GRPO",
    "PPO",
    "RLOO",
    "AlphaDPG",
    "BRAIn",
    "Estimators",
    "GDCPlusPlus",
    "GuideRecord",
    "Guided",
    "KLControl",
    "KeptGuide",
    "MinimumVariance",
    "Objective",
    "Pooled",
    "Record",
    "Reinforce",
    "ReinforceP",
    "TokenRecord",
    "VarGrad",
    "estimators",
    "prefix_weights",
]

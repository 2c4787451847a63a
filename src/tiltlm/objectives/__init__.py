"""Objectives: how hard each sample pulls."""

from tiltlm.objectives.balance import Balance
from tiltlm.objectives.dpg import DPG, GDC, GDCPlusPlus
from tiltlm.objectives.fdivergence import FDPG, AlphaDPG
from tiltlm.objectives.groupwise import BRAIn, VarGrad
from tiltlm.objectives.guided import Forms, Guided, KeptGuide, forms, prefix_weights
from tiltlm.objectives.objective import (
    AdaptiveObjective,
    BatchObjective,
    CriticObjective,
    GuideRecord,
    Objective,
    Record,
    TokenRecord,
)
from tiltlm.objectives.pooled import Pooled
from tiltlm.objectives.ppo import GRPO, PPO
from tiltlm.objectives.reinforce import RLOO, KLControl, Reinforce, ReinforceP

BUILT_IN: dict[str, type[Objective]] = {
    "dpg": DPG,
    "gdc": GDC,
    "gdc++": GDCPlusPlus,
    "pooled": Pooled,
    "guided": Guided,
    "kept_guide": KeptGuide,
    "f_dpg": FDPG,
    "alpha_dpg": AlphaDPG,
    "brain": BRAIn,
    "vargrad": VarGrad,
    "reinforce": Reinforce,
    "reinforce_p": ReinforceP,
    "kl_control": KLControl,
    "rloo": RLOO,
    "ppo": PPO,
    "grpo": GRPO,
}

__all__ = [
    "BUILT_IN",
    "DPG",
    "FDPG",
    "GDC",
    "GRPO",
    "PPO",
    "RLOO",
    "AdaptiveObjective",
    "AlphaDPG",
    "BRAIn",
    "Balance",
    "BatchObjective",
    "CriticObjective",
    "Forms",
    "GDCPlusPlus",
    "GuideRecord",
    "Guided",
    "KLControl",
    "KeptGuide",
    "Objective",
    "Pooled",
    "Record",
    "Reinforce",
    "ReinforceP",
    "TokenRecord",
    "VarGrad",
    "forms",
    "prefix_weights",
]

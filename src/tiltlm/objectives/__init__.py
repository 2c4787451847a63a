"""Objectives: how hard each sample pulls."""

from tiltlm.objectives.dpg import DPG, GDC, GDCPlusPlus
from tiltlm.objectives.guided import Guided, prefix_weights
from tiltlm.objectives.objective import Objective, Record

BUILT_IN: dict[str, type[Objective]] = {"dpg": DPG, "gdc": GDC, "gdc++": GDCPlusPlus, "guided": Guided}

__all__ = ["BUILT_IN", "DPG", "GDC", "GDCPlusPlus", "Guided", "Objective", "Record", "prefix_weights"]

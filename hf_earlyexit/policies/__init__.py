"""Exit policies: one file per rule, known by name. Importing this package does not import transformers."""

from ..signals import ExitSignal
from .base import POLICIES, ExitPolicy, ExitStep, register_policy
from .beem import BeemAccuracyPolicy, BeemCostPolicy, BeemPolicy
from .calibrated import CalibratedBeemPolicy
from .confidence import ConfidencePolicy, EntropyPolicy, MarginPolicy
from .gate import GatePolicy
from .patience import PatiencePolicy
from .reward import RewardPolicy
from .saturation import SaturationPolicy
from .scanning import Scan
from .static import StaticPolicy

__all__ = [
    "POLICIES",
    "BeemAccuracyPolicy",
    "BeemCostPolicy",
    "BeemPolicy",
    "CalibratedBeemPolicy",
    "ConfidencePolicy",
    "EntropyPolicy",
    "ExitPolicy",
    "ExitSignal",
    "ExitStep",
    "GatePolicy",
    "MarginPolicy",
    "PatiencePolicy",
    "RewardPolicy",
    "SaturationPolicy",
    "Scan",
    "StaticPolicy",
    "register_policy",
]

"""Early exiting for Hugging Face transformers: rows leave the network at the layer where they are decided.

Importing the package registers its models with the Auto classes and does nothing else.
"""

from importlib.metadata import version

from .calibration import CalibrationResult, FinalLayerError, LayerBudget, MaxDrop, SpeedUp, calibrate
from .errors import EarlyExitError
from .inference.collect import collect_trace
from .modeling.configuration import EarlyExitBertConfig
from .modeling.doors import EarlyExitBertForSequenceClassification, register_auto_classes
from .policies import *
from .trace import ExitTrace
from .training import EarlyExitTrainer, EarlyExitTrainingArguments

__version__ = version("hf_earlyexit")
register_auto_classes()

"""Converting Hugging Face checkpoints to one shard per expert, and inspecting the result."""

from .converter import Converter, Outcome, convert
from .inspection import Fault, InspectionReport, inspect
from .progress import Progress, silent

__all__ = ["Converter", "Fault", "InspectionReport", "Outcome", "Progress", "convert", "inspect", "silent"]

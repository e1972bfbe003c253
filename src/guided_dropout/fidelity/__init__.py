"""How good is a Fisher from less text, and the schedule that follows from it?"""

from guided_dropout.fidelity.result import Fidelity
from guided_dropout.fidelity.run import fidelity

__all__ = ["Fidelity", "fidelity"]

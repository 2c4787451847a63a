"""An objective between GDC and GDC++, and a class that is no objective."""

from tiltlm import Objective


class PartialBaseline(Objective):
    """c = P/(Z q) − strength · π/q."""

    def __init__(self, strength=0.5):
        self.strength = strength
        self.name = f"baseline times {strength}"

    def coefficients(self, record):
        weight = (record.target_logscore - record.log_z - record.proposal_logprob).exp()
        ratio = (record.policy_logprob - record.proposal_logprob).exp()
        return weight - self.strength * ratio


class Nameless:
    """No objective at all."""

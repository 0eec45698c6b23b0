"""What the router answers for one request, and why.

A decision names the expert that answers (or the base), the domain that was recognised, how sure the
router is, and one of four reasons. The reasons are the values of the header `x-deltamux-reason` and
of the label `reason` in the metrics; they are spelled here and nowhere else.
"""

from dataclasses import dataclass
from typing import Final

# The client named the model itself; the router was not asked.
REASON_EXPLICIT: Final = "explicit"
# The router chose an expert.
REASON_ROUTER: Final = "router"
# The router looked and left the request to the base.
REASON_ABSTAIN: Final = "abstain"
# The router failed; the server fell back.
REASON_ROUTER_ERROR: Final = "router-error"
REASONS: Final = (REASON_EXPLICIT, REASON_ROUTER, REASON_ABSTAIN, REASON_ROUTER_ERROR)

# How the base is called where people or flags name an expert.
BASE_NAME: Final = "base"


@dataclass(frozen=True)
class Decision:
    """One routing decision.

    Attributes:
        expert: Name of the expert that answers; None means the base.
        domain: The domain whose expert answers; where the router abstained, the most probable one.
        confidence: Calibrated probability of `domain`, in [0, 1]. For a chosen expert this is the
            largest probability over the specialist domains, unless it goes on with a conversation
            or was preferred for being on the device.
        reason: One of `REASONS`.
        probabilities: Label to probability; they sum to 1. Empty where the router was not asked.
    """

    expert: str | None
    domain: str
    confidence: float
    reason: str
    probabilities: dict[str, float]

    def to_json(self) -> dict[str, str | float | None]:
        """Return the four public fields; `expert` is None (JSON null) for the base."""
        return {
            "expert": self.expert,
            "domain": self.domain,
            "confidence": round(self.confidence, 6),
            "reason": self.reason,
        }

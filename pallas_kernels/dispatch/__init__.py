"""Names of implementations and the rule that picks one. Knows no operator and no framework.

`implementation=` is a filter on the search space: `None`, one name, a sequence of names, or
`"auto"`; a name is a string or a member of the operator's `Implementation` enum. Of a sequence and
of `"auto"` the fastest is taken, as measured (`tuner`) and remembered (`cache`) on this machine.
`None` never measures: what was measured on a kind of device (`table`) goes before the operator's
rule. `tuning` says otherwise for a block of code, FLASH_WTCONV_TUNING for a process. `backend` is
the contract with the operators' rooms.
"""

from pallas_kernels.dispatch.operator import (
    Choice,
    Operator,
    Request,
    forget,
    operators,
    until_forgotten,
)
from pallas_kernels.dispatch.tuner import Candidate, tuning

__all__ = [
    "Candidate",
    "Choice",
    "Operator",
    "Request",
    "forget",
    "operators",
    "tuning",
    "until_forgotten",
]

"""Names of implementations and the rule that picks one. Knows no operator and no framework.

`implementation=` is a filter on the search space: `None`, one name, or a sequence of names;
a name is a string or a member of the operator's `Implementation` enum. What was measured on a kind
of device (`table`) goes before the operator's rule.
"""

from pallas_kernels.dispatch.operator import Choice, Operator, operators

__all__ = ["Choice", "Operator", "operators"]

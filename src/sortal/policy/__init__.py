"""What happens to each kind in every pipeline."""

from sortal.policy.policy import Policy as Policy
from sortal.policy.rule import Rule as Rule

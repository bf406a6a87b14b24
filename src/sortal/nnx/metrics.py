"""Metrics, by NNX's module name."""

from sortal.training.metrics import Accuracy as Accuracy
from sortal.training.metrics import Average as Average
from sortal.training.metrics import Metric as Metric
from sortal.training.metrics import MetricState as MetricState
from sortal.training.metrics import MultiMetric as MultiMetric
from sortal.training.metrics import Statistics as Statistics
from sortal.training.metrics import Welford as Welford

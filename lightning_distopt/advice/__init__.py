"""Does compression pay on this network? A cost model, the measurements that it needs, and a table of what it says."""

from lightning_distopt.advice.candidates import CANDIDATES, Candidate
from lightning_distopt.advice.cost_model import CodecSpeed, Link, Prediction, Workload, crossover, predict, rank_methods
from lightning_distopt.advice.measure import measure_codec, measure_link

__all__ = [
    "CANDIDATES",
    "Candidate",
    "CodecSpeed",
    "Link",
    "Prediction",
    "Workload",
    "crossover",
    "measure_codec",
    "measure_link",
    "predict",
    "rank_methods",
]

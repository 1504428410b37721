"""What models cost: FLOPs, parameters, memory and time; and widths that meet a budget of any of them."""

from mldcn.cost.budget import match_flops, meet_budget, scorer_flops, scorer_parameters, x0_layout
from mldcn.cost.flops import Work, WorkCounter, module_flops
from mldcn.cost.latency import Latency, LatencyMeter, Timings, matrix_rate, measure_latency
from mldcn.cost.memory import Memory, Step, Training, estimate_memory, measure_memory
from mldcn.cost.model import ModelCost, interaction_work, model_cost, total
from mldcn.cost.sample import log_layout, plain_schema, sample_batch
from mldcn.cost.solver import Solution, interaction_flops, interaction_parameters, solve_width
from mldcn.cost.summary import options, summary
from mldcn.cost.target import Target, load_target, meet, parse_sizes

__all__ = [
    "Latency",
    "LatencyMeter",
    "Memory",
    "ModelCost",
    "Solution",
    "Step",
    "Target",
    "Timings",
    "Training",
    "Work",
    "WorkCounter",
    "estimate_memory",
    "interaction_flops",
    "interaction_parameters",
    "interaction_work",
    "load_target",
    "log_layout",
    "match_flops",
    "matrix_rate",
    "measure_latency",
    "measure_memory",
    "meet",
    "meet_budget",
    "model_cost",
    "module_flops",
    "options",
    "parse_sizes",
    "plain_schema",
    "sample_batch",
    "scorer_flops",
    "scorer_parameters",
    "solve_width",
    "summary",
    "total",
    "x0_layout",
]

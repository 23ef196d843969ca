"""What a run will train and need, from its config alone: no weight is read or made."""

from altiplano.plan.plan import Plan, StagePlan, make_plan
from altiplano.plan.show import explain_oom, plan_table

__all__ = ["Plan", "StagePlan", "explain_oom", "make_plan", "plan_table"]

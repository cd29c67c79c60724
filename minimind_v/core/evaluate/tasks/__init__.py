"""Evaluation tasks by name. Each chooses rows and their messages, and scores the answers."""

from __future__ import annotations

from minimind_v.core.evaluate.tasks.exact import Exact
from minimind_v.core.evaluate.tasks.loss import Loss
from minimind_v.core.evaluate.tasks.task import Task

# A task is made anew for each evaluation, with the id of the token that ends an answer.
TASKS: dict[str, type[Task]] = {"loss": Loss, "exact": Exact}

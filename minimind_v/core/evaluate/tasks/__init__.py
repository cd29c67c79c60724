"""Evaluation tasks by name. Each says what is asked about a question, and judges the replies."""

from __future__ import annotations

from minimind_v.core.evaluate.tasks.caption import Caption
from minimind_v.core.evaluate.tasks.choice import Choice
from minimind_v.core.evaluate.tasks.loss import Loss
from minimind_v.core.evaluate.tasks.task import Task
from minimind_v.core.evaluate.tasks.vqa import Vqa
from minimind_v.core.evaluate.tasks.yesno import YesNo
from minimind_v.core.extensions import Table

# A task is made anew for each evaluation, with its name and the settings of a YAML file.
TASKS: Table[type[Task]] = Table({
    "loss": Loss,
    "vqa": Vqa,
    "yesno": YesNo,
    "choice": Choice,
    "caption": Caption,
})  # fmt: skip

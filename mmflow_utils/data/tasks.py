"""The paper's six tasks: the one list that parameters, readers, figures and the drawn world go by."""

TASKS: dict[str, frozenset[str]] = {
    "ChooseAttr": frozenset({"chooseAttr", "materialChoose", "typeChoose", "activityChoose"}),
    "ChooseCat": frozenset({"objThisChoose", "categoryThatChoose", "categoryThisChoose"}),
    "ChooseRel": frozenset({"relChooser"}),
    "CompareAttr": frozenset({"twoCommon"}),
    "LogicalObj": frozenset({"existThatOr", "existThatOrC"}),
    "QueryAttr": frozenset({"positionQuery"}),
}
"""The six tasks, in the paper's order (Table 1), by GQA's `types.detailed`."""


def task_of(detailed: str) -> str | None:
    """Return the task that GQA's `types.detailed` belongs to, or None where the paper leaves it out.

    >>> task_of("relChooser"), task_of("verifyAttr")
    ('ChooseRel', None)
    """
    return next((task for task, kinds in TASKS.items() if detailed in kinds), None)


def check_task(name: str) -> str:
    """Return the name of a task as it is; another name is a ValueError that lists the tasks."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name}: the tasks are {', '.join(TASKS)}")
    return name

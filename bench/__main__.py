"""Measurements, and what to do with them: python -m bench --help"""

import importlib
import sys

from recipes.stages.cli import as_command

COMMANDS = {
    "compare": (
        "compare:main",
        "memory, time and tokens per second with and without Unsloth; the same training?",
    ),
    "plan": (
        "plan:main",
        "parameters, steps, memory and time before any download; --check holds them against trainings",
    ),
    "report": ("results:report_command", "a comparison's report, written and shown again"),
    "diff": ("results:diff_command", "two comparisons: what became worse, and was it the code or the machine?"),
    "list": ("results:list_command", "the comparisons that are there"),
    "trust": ("trust:main", "false alarms and misses of compare: equal arms, and a slow-down that was put there"),
    "overhead": ("overhead:main", "what the trainer and bench cost beside the bare step"),
    "train": (
        "train:main",
        "training speed beside TRL and Unsloth as their documentation shows them; the same losses?",
    ),
    "balance": ("balance:main", "which way of weighing rare classes wins"),
    "classify": ("classify:main", "payments a second: one at a time, batched, over the tree of codes, and the bound"),
    "answers": ("answers:main", "a chat recipe's answers a second: generate() in a loop, and what predict does"),
    "prepare": ("prepare:main", "preparing 388,706 payments against writing the same bytes"),
    "scaling": ("scaling:main", "predict --file in one process and in two, and what that means for more"),
    "soak": ("soak:main", "trainings killed at random moments and resumed: is it the same adapter?"),
    "figures": ("figures:main", "README's tables and picture, from results/"),
    "recipes": ("recipes:main", "every recipe from its sample to its evaluation, in one table"),
}
"""Name -> where it is, and what it measures."""


def dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        for name, (_, what) in COMMANDS.items():
            print(f"python -m bench {name} [--help]\n    {what}")
    elif arguments[0] in COMMANDS:
        module, _, function = COMMANDS[arguments[0]][0].partition(":")
        getattr(importlib.import_module(f"bench.{module}"), function)(arguments[1:])
    else:
        from recipes.stages.recipe import UserError

        raise UserError(f"no measurement {arguments[0]!r}; there are {', '.join(COMMANDS)}")


if __name__ == "__main__":
    as_command(dispatch, sys.argv[1:])

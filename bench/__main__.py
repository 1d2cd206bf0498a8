"""Measurements: python -m bench balance | classify | prepare | recipes."""

import importlib
import sys

from recipes.stages.cli import as_command

COMMANDS = {
    "balance": "which way of weighing rare classes wins",
    "classify": "payments a second: one at a time, batched, scored over the tree of codes, and the bound",
    "prepare": "preparing 388,706 payments against writing the same bytes",
    "recipes": "every recipe from its sample to its evaluation, in one table",
}


def dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        for name, what in COMMANDS.items():
            print(f"python -m bench {name} [--help]\n    {what}")
    elif arguments[0] in COMMANDS:
        importlib.import_module(f"bench.{arguments[0]}").main(arguments[1:])
    else:
        from recipes.stages.recipe import UserError

        raise UserError(f"no measurement {arguments[0]!r}; there are {', '.join(COMMANDS)}")


if __name__ == "__main__":
    as_command(dispatch, sys.argv[1:])

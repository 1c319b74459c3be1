"""Options of a command as arguments of a function: checked by the command's own parser, and carried to the workers as
its command line."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import shlex
from collections.abc import Mapping
from contextlib import redirect_stderr
from typing import Any

from .. import cli

#: The functions that take the options of a command.
FUNCTIONS = {"generate": "generate_on_ray", "serve": "serve_app"}
#: Options that have no meaning here, or that the function itself gives. Ray's proxies listen for serve_app, and an
#: update of an adapter would reach one replica.
NOT_HERE = {
    "generate": ("help", "prompt", "chat", "shard", "output"),
    "serve": "help host port adapter_root allow_hub methods sites max_r capacity".split(),
}


def arguments(command: str, options: Mapping[str, Any]) -> list[str]:
    """The command line with these options. Raises ValueError for a name that the command does not have."""
    actions = {action.dest: action for action in cli.subparsers(cli.parser())[command]._actions}
    known = [name for name in actions if name not in NOT_HERE[command]]
    made = [command]
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"the options are {', '.join(known)}"
            raise ValueError(f"{FUNCTIONS[command]} has no option {name}; {meant}")
        value = json.dumps(dict(value)) if isinstance(value, Mapping) else value
        flag, values = actions[name].option_strings[0], value if isinstance(value, (list, tuple)) else [value]
        if isinstance(value, bool):
            made += [flag] * value
        elif value is not None and values and actions[name].nargs == "+":
            made += [flag, *map(str, values)]
        elif value is not None:
            made += [f"{flag}={one}" for one in values]
    return made


def parsed(line: list[str]) -> argparse.Namespace:
    """The options of a command line. Raises ValueError for a wrong one, where the command would end."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            options = cli.parse(line)
    except SystemExit:
        text = said.getvalue().splitlines()[0]
        raise ValueError(text.partition("error: ")[2] or text) from None
    options.command_line = shlex.join(["para-jax", *line])
    return options

"""What can run here, and what to do about what cannot."""

from __future__ import annotations

import argparse
import json

from .options import add_json

EXAMPLE = "accel doctor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..doctor import examine

    found = examine()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for title in ("engines", "optional"):
            print(f"{title}:")
            for name, state in found[title].items():
                mark = "yes" if state["ok"] else "no "
                fix = f"\n                     fix: {state['fix']}" if state["fix"] else ""
                print(f"  {mark}  {name:<13} {state['detail']}{fix}")
        print("GPUs:" if found["gpus"] else "GPUs: none that torch can see")
        for gpu in found["gpus"]:
            print(f"  {gpu}")
        machine = found["machine"]
        print("machine: " + ", ".join(f"{k} {v}" for k, v in machine.items() if k != "packages" and v))
        print("packages: " + ", ".join(f"{name} {v}" for name, v in found["packages"].items() if v))
    return 0 if any(state["ok"] for state in found["engines"].values()) else 1

"""What can run here, and what to do about what cannot."""

from __future__ import annotations

import argparse
import json

from .options import add_json

EXAMPLE = "accel doctor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .doctor_facts import examine

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
        if found["attention"]:
            print(f"attention: torch chooses among {', '.join(found['attention'])}")
        machine = found["machine"]
        print(
            f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, "
            f"{' '.join(machine['isa'])}; {machine['os']}, Python {machine['python']}"
        )
        print("packages: " + ", ".join(f"{name} {v}" for name, v in found["packages"].items() if v))
    return 0 if any(state["ok"] for state in found["engines"].values()) else 1

#!/usr/bin/env python3
"""Checks that every plugin library exports its two symbols and nothing else.

usage: check_exports.py FOLDER
"""
import pathlib
import subprocess
import sys

EXPECTED = {"sikv_plugin_descriptor", "sikv_plugin_tables"}

libraries = sorted(pathlib.Path(sys.argv[1]).glob("lib*.so"))
if not libraries:
    sys.exit(f"no plugin libraries in {sys.argv[1]}")
problems = []
for library in libraries:
    lines = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True,
                           text=True).stdout.splitlines()
    symbols = {line.split()[-1] for line in lines}
    if symbols != EXPECTED:
        problems.append(f"{library.name} exports {', '.join(sorted(symbols ^ EXPECTED))}")
sys.exit("\n".join(problems) if problems else 0)

#!/usr/bin/env python3
"""Checks that #include lines follow ARCHITECTURE.md, section 4 (direction of dependency).

usage: check_includes.py REPOSITORY
"""
import pathlib
import re
import sys

# Low to high: a part includes itself and what stands before it.
FRAMEWORK = ["base", "device", "registry", "config", "trace", "cache", "pipeline", "metrics",
             "experiment", "model", "report"]
FAMILIES = ["codecs", "selectors", "kernels"]
SOURCES = {".h", ".cuh", ".c", ".cc", ".cu"}
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"')


def allowed(path):
    """Folders that a file may include from, besides its own."""
    parts = path.parts
    top = parts[0]
    # Tests and benches meet every side: they look at a part from where its users stand.
    if re.search(r"(_test|_bench)\.(h|cuh|cc|cu)$", path.name) or path.name.startswith("test_"):
        return None
    if top == "plugins":
        return {"abi": [], "layouts": ["plugins/abi"], "sdk": ["plugins/abi"],
                "template": ["plugins/abi", "plugins/sdk", "plugins/layouts"]}[parts[1]]
    if parts[:2] == ("kernels", "common"):
        return ["plugins/abi", "plugins/sdk", "plugins/layouts"]
    if top in FAMILIES:
        return ["plugins/abi", "plugins/sdk", "plugins/layouts", "kernels/common"]
    if top == "framework":
        below = FRAMEWORK[:FRAMEWORK.index(parts[1])] if parts[1] in FRAMEWORK else []
        return ["plugins/abi"] + [f"framework/{part}" for part in below]
    if top == "apps":
        return ["framework", "plugins/abi", "kernels/common", "apps"]
    return None


def home(path):
    """The folder that belongs together with a file."""
    return "/".join(path.parts[:min(2, len(path.parts) - 1)])


def main():
    root = pathlib.Path(sys.argv[1])
    problems = []
    for top in ["plugins", "framework", *FAMILIES, "apps"]:
        for file in sorted((root / top).rglob("*")):
            if file.suffix not in SOURCES:
                continue
            path = file.relative_to(root)
            folders = allowed(path)
            for number, line in enumerate(file.read_text().splitlines(), 1):
                match = INCLUDE.match(line)
                if not match:
                    continue
                target = match.group(1)
                where = f"{path}:{number}: includes \"{target}\""
                if "/" not in target:
                    # ABI headers are also installed on their own, so they name their neighbours.
                    if home(path) != "plugins/abi" and (file.parent / target).exists():
                        problems.append(f"{where}; write the path from the repository's root")
                    continue
                if not (root / target).exists() or folders is None:
                    continue  # another project's header, or a test
                if not any(target.startswith(folder + "/") for folder in [home(path), *folders]):
                    problems.append(f"{where}; {home(path)} may use "
                                    f"{', '.join(folders) or 'nothing of this repository'}")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

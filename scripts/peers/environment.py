"""What a result was measured on: the `environment` block of every file under docs/results/."""

import datetime
import os
import platform
import subprocess
import tempfile


def cpu_model():
    with open("/proc/cpuinfo") as info:
        for line in info:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def cpu_family():
    """Family and model numbers: hypervisors often hide the marketing name."""
    fields = {}
    with open("/proc/cpuinfo") as info:
        for line in info:
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}"


def commit(root):
    """As `sikv` names it in its own results."""
    with tempfile.TemporaryDirectory() as folder:
        header = os.path.join(folder, "commit.h")
        script = os.path.join(root, "cmake", "commit.cmake")
        subprocess.run(["cmake", f"-DSOURCE={root}", f"-DOUT={header}", "-P", script], check=True)
        with open(header) as text:
            return text.read().split('"')[1]


def environment(root, command, compiler, peers):
    """`peers`: {package: version}. `command` as one would type it in the repository root."""
    return {
        "cpu": cpu_model(),
        "cpu_family_model": cpu_family(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "compiler": compiler,
        "commit": commit(root),
        "command": command,
        "peers": peers,
        "date": datetime.date.today().isoformat(),
    }

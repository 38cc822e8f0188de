# Sourced by scripts/quickstart and scripts/test: puts moehive and the tested versions of what it needs into $VENV.
# Needs bash and a Python >= 3.11 with venv. Honours MOEHIVE_VENV (where the environment lies) and PYTHON (which Python makes it).
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
TORCH=torch==2.13.0 # as in constraints.txt

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $*"
    exit 1
}

find_python() { # prints the first Python that is new enough
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "moehive needs Python 3.11 or newer, and none was found as python3. Install one, or name it: PYTHON=/path/to/python3 $0"
}

quietly() { # WHAT COMMAND...: says what is done and how long it took; shows the command's output only if it fails
    local what=$1 start=$SECONDS log
    shift
    log=$(mktemp)
    printf '%s ... ' "$what" >&2
    if ! "$@" >"$log" 2>&1; then
        say "failed after $((SECONDS - start)) s"
        tail -n 40 "$log" >&2
        die "$what: failed; the whole output is in $log"
    fi
    rm -f "$log"
    say "$((SECONDS - start)) s"
}

venv_moved() { # a copied or moved environment still runs, but its scripts start the Python of the old place
    [[ -x $VENV/bin/pip ]] && ! head -n 3 "$VENV/bin/pip" | grep -qF "$VENV/bin/"
}

bootstrap() { # [EXTRAS]: EXTRAS is '' or 'dev'
    local extras=${1:-} python stamp wanted
    VENV=${MOEHIVE_VENV:-$ROOT/.venv}
    [[ $VENV == /* ]] || VENV=$PWD/$VENV

    if [[ -z ${MOEHIVE_VENV:-} ]] && venv_moved; then
        say ".venv was made for another place; making it anew"
        rm -rf "$VENV"
    fi
    if [[ ! -x $VENV/bin/pip ]]; then # python without pip: an earlier run was interrupted, or venv's ensurepip is missing
        python=$(find_python)
        quietly "creating $VENV with $("$python" --version)" "$python" -m venv "$VENV"
    fi

    stamp=$VENV/.moehive-installed
    wanted=$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$ROOT/scripts/hatch_build.py" <(printf '%s' "$ROOT") | cksum)
    # What was installed with dev serves the run without it too; .editable can be lost to `git clean`.
    if [[ -f $stamp && -e $ROOT/.editable/moehive/node ]] \
        && grep -qxF -e "$wanted dev" -e "$wanted${extras:+ $extras}" "$stamp"; then
        return
    fi
    # torch by itself and first: pip takes the CPU build (its `+cpu` sorts higher) wherever one is on offer, and the CUDA
    # build else. Whichever build of this version is already in $VENV is kept.
    quietly "installing $TORCH" "$VENV/bin/pip" install "$TORCH"
    quietly "installing moehive${extras:+[$extras]} and what it needs (one or two minutes)" \
        "$VENV/bin/pip" install -c "$ROOT/constraints.txt" -e "$ROOT${extras:+[$extras]}"
    printf '%s\n' "$wanted${extras:+ $extras}" >"$stamp"
}

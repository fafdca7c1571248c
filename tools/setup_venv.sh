#!/bin/sh
# Set up .venv with what a run, the tests and the plots need, or reuse the one that is there.
#
#   tools/setup_venv.sh               find a Python >= 3.12, create .venv, install; again: returns at once
#   tools/setup_venv.sh --find-only   print the Python that would be used and stop
#
# PYTHON=/path/to/python overrides the search, VENV=folder the place, CONSTRAINTS=file the versions
# (constraints.txt: a tested set) and what pip's own settings here say of them. The stamp in .venv is
# written last, so that an interrupted installation is continued by the next call.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
name=${VENV:-.venv}
case $name in
    /*) venv=$name ;;
    *) venv=$root/$name ;;
esac
stamp=$venv/.setup-stamp

say() { printf '> %s\n' "$*"; }

die() {
    printf 'setup_venv.sh: %s\n' "$*" | fold -s -w 96 >&2
    exit 1
}

# ---- Which Python -------------------------------------------------------------------------------

# Set `version` (such as 3.12.1) for the command $1; if it cannot be used, set `why` and fail.
inspect() {
    answer=$("$1" -c '
import sys
try:
    import ensurepip, venv
    able = "able"
except ImportError:
    able = "bare"
print("%d.%d.%d %s" % (sys.version_info[:3] + (able,)))' 2>/dev/null) || answer=
    version=${answer%% *}
    major=${version%%.*}
    minor=${version#*.}
    minor=${minor%%.*}
    case $answer in
        [0-9]*.[0-9]*.[0-9]*) ;;
        *) why="does not run" && return 1 ;;
    esac
    if [ "$major" -lt 3 ] || { [ "$major" -eq 3 ] && [ "$minor" -lt 12 ]; }; then
        why="is $version, too old" && return 1
    fi
    case $answer in
        *bare) why="is $version without venv and ensurepip" && return 1 ;;
    esac
}

# One path a line. The order decides between Pythons of the same minor version.
candidates() {
    for name in python3.12 python3.13 python3.14 python3 python; do
        command -v "$name" || true
    done
    for path in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python; do
        if [ -x "$path" ]; then printf '%s\n' "$path"; fi
    done
    if command -v uv >/dev/null; then
        uv python find --system '>=3.12,<3.14' 2>/dev/null || true
        uv python find --system '>=3.12' 2>/dev/null || true
    fi
}

# Set `python`: 3.12 before 3.13 before newer ones, since megatron-core has wheels for these two.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        inspect "$PYTHON" || die "PYTHON=$PYTHON $why. megatron_let needs Python 3.12 or newer" \
            "with the venv and ensurepip modules. Name another one, or leave PYTHON unset to have" \
            "PATH, pyenv and uv searched."
        python=$PYTHON
        return
    fi
    on_3_12='' on_3_13='' on_newer='' rejected=''
    while IFS= read -r path; do
        case $path in
            '' | "$venv"/*) continue ;;
        esac
        if ! inspect "$path"; then
            rejected="${rejected:+$rejected, }$path $why"
        elif [ "$major.$minor" = 3.12 ]; then
            on_3_12=${on_3_12:-$path}
        elif [ "$major.$minor" = 3.13 ]; then
            on_3_13=${on_3_13:-$path}
        else
            on_newer=${on_newer:-$path}
        fi
    done <<EOF
$(candidates)
EOF
    python=${on_3_12:-${on_3_13:-$on_newer}}
    [ -n "$python" ] || die "no Python to work with. megatron_let needs Python 3.12 or newer (3.12" \
        "and 3.13 are best: megatron-core has wheels for them) with the venv and ensurepip modules." \
        "Looked for python3.12, python3.13, python3.14, python3 and python on PATH, for pyenv's" \
        "versions in ${PYENV_ROOT:-${HOME:-}/.pyenv}/versions, and asked uv if there is one;" \
        "found: ${rejected:-none}. Install one, for example with 'uv python install 3.12', 'pyenv" \
        "install 3.12' or 'apt install python3.12 python3.12-venv', and call again; or name one:" \
        "make quickstart PYTHON=/path/to/python3.12"
    inspect "$python"  # `version` is still that of the last candidate
}

# ---- Is .venv as it should be -------------------------------------------------------------------

# What the stamp of a finished installation says: where it is, and from which files and Python.
current_stamp() {
    built_with=$("$venv/bin/python" -V 2>/dev/null) || return 1
    printf '%s\n' "$root"
    (cd "$root" && cat pyproject.toml requirements.txt ${CONSTRAINTS:+"$CONSTRAINTS"} && echo "$built_with") | cksum
}

check_override() {
    [ -n "${PYTHON:-}" ] || return 0
    find_python
    built_with=$("$venv/bin/python" -V 2>/dev/null) || return 0
    [ "$built_with" = "Python $version" ] || die "PYTHON=$PYTHON is Python $version, but $name was" \
        "made with $built_with. Remove $name (rm -r $name) to build it anew with $PYTHON, or leave" \
        "PYTHON unset to use it as it is."
}

create() {
    find_python
    say "creating $name with $python (Python $version)"
    case $major.$minor in
        3.12 | 3.13) ;;
        *) say "megatron-core has no wheel for Python $major.$minor: it is built here, with a C++ compiler" ;;
    esac
    "$python" -m venv --clear "$venv"
}

# pip writes INSTALLER at the end of each package: one without it was interrupted half-way, but
# would pass for installed.
forget_half_installed() {
    for info in "$venv"/lib/python*/site-packages/*.dist-info; do
        if [ -d "$info" ] && [ ! -f "$info/INSTALLER" ]; then rm -r "$info"; fi
    done
}

install() {
    say "installing torch, Megatron-Core and the rest, once: about 6 GB on disk, 4 minutes or more"
    if [ -n "${CONSTRAINTS:-}" ]; then export PIP_CONSTRAINT="$CONSTRAINTS"; fi
    (cd "$root" && "$venv/bin/python" -m pip install --disable-pip-version-check -e '.[data,eval,plot,gguf,dev]') ||
        die "the installation did not finish; pip says why above. The next call continues it."
}

# ---- The story ----------------------------------------------------------------------------------

if [ "${1:-}" = --find-only ]; then
    find_python
    printf '%s\n' "$python"
    exit
fi
[ -z "${CONSTRAINTS:-}" ] || (cd "$root" && [ -f "$CONSTRAINTS" ]) ||
    die "CONSTRAINTS=$CONSTRAINTS: there is no such file in $root"
[ $# -eq 0 ] || die "unknown option $1; the only one is --find-only"

check_override
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(current_stamp)" ]; then
    exit
fi

if [ ! -e "$venv" ]; then
    create
elif [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$root" ]; then
    was_made_in=$(head -n 1 "$stamp")
    case $(readlink -f "$venv") in
        "$(readlink -f "$root")"/*) ;; # a copy, or the checkout has moved
        *) die "$name is the environment of $was_made_in, which would be lost. Remove the link or" \
            "leave VENV unset for one of this checkout's own, or name another place with VENV." ;;
    esac
    say "$name was made in $was_made_in and cannot be moved"
    create
elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "$name is broken or unfinished"
    create
elif [ -f "$stamp" ]; then
    say "pyproject.toml, requirements.txt or the constraints have changed: bringing $name up to date"
else
    say "$name is unfinished: continuing"
fi
rm -f "$stamp"
forget_half_installed
install
current_stamp >"$stamp"
say "$name is ready ($built_with)"

# Sourced by the other scripts: changes to the project's root and puts a virtual environment with the packages
# of $REQUIREMENTS (requirements.txt if not set) first on the PATH. That is $RGAL_VENV, else the active one, else
# .venv, which $PYTHON (python3 if not set) creates if it does not exist.
# Called with --help a script prints its first comment; its options reach it here, because none are given to this file.
for word; do
    case $word in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit;; esac
done
unset CDPATH  # or cd might go to a folder of that name elsewhere
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

joined() {  # options as a part of a folder's name, so that runs with others have a folder of their own
    printf -- '_%s' "$@" | tr -c '[:alnum:]._\n' - | sed 's/^_$//'
}

check_version() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $1 is older than Python 3.10; name a newer one, for example by PYTHON=python3.12 bash $0" >&2; exit 1; }
}

make_venv() {
    check_version "$python"
    "$python" -m venv --without-pip "$1"
}

make_pip() {  # where ensurepip is a separate package (Debian), the pip of $python installs one
    "$1/bin/python" -m ensurepip --default-pip >/dev/null 2>&1 ||
        PYTHONPATH=$("$python" -c 'import os, pip; print(os.path.dirname(os.path.dirname(pip.__file__)))') \
            "$1/bin/python" -m pip install --quiet --disable-pip-version-check --ignore-installed pip
}

install_packages() {  # once per state of the requirements files, so that a second call needs no network
    local stamp="$1/.installed-$2" wanted
    wanted=$(cat requirements*.txt | cksum)
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    echo "Installing the packages of $2 into $1; torch is large, so this takes some minutes."
    "$1/bin/python" -m pip --version >/dev/null 2>&1 || make_pip "$1"
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check -r "$2"
    echo "$wanted" > "$stamp"
}

python=${PYTHON:-python3}
venv=${RGAL_VENV:-${VIRTUAL_ENV:-$PWD/.venv}}
[ -x "$venv/bin/python" ] || make_venv "$venv"
check_version "$venv/bin/python"
install_packages "$venv" "${REQUIREMENTS:-requirements.txt}"
export PATH="$(cd "$venv" && pwd)/bin:$PATH"

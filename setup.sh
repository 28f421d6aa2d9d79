#!/usr/bin/env bash
# Sets up .venv with the pinned versions of requirements.txt; `./setup.sh dev` adds those of requirements-dev.txt, which
# `make test` needs, and `./setup.sh all` also the programs that `make test-all` needs.
# What is installed already is left alone. PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

main() {
    files=(requirements.txt)
    case "${1:-}" in dev | all) files+=(requirements-dev.txt) ;; esac
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "setup.sh: error: $python is not Python 3.11 or newer; name one with PYTHON=/path/to/python3.11" >&2
        exit 2
    fi

    # DeepSpeed compiles its fused Adam at first use: a C++ compiler and Python's headers must be there.
    missing=()
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    [ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || missing+=(python3-dev)
    command -v c++ >/dev/null || missing+=(g++)
    if [ "${1:-}" = all ]; then  # the heavy tests run real sshd, pdsh, mpirun, Slurm and Chromium
        [ -x /usr/sbin/sshd ] || missing+=(openssh-server)
        command -v ssh >/dev/null || missing+=(openssh-client)
        command -v pdsh >/dev/null || missing+=(pdsh)
        command -v mpirun >/dev/null || missing+=(openmpi-bin)
        command -v srun >/dev/null || missing+=(slurm-client)
        command -v chromium >/dev/null || missing+=(chromium)
        command -v chromedriver >/dev/null || missing+=(chromium-driver)
        for daemon in slurmctld slurmd munged; do
            [ -x /usr/sbin/$daemon ] || missing+=("${daemon/munged/munge}")
        done
        compgen -G "/usr/lib/*/pmix2/lib/libpmix.so" >/dev/null || missing+=(libpmix-dev)  # srun --mpi=pmix opens it
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            echo "installing ${missing[*]}"
            { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"; } >/dev/null
        else
            echo "setup.sh: error: ${missing[*]} missing; on Debian or Ubuntu: sudo apt-get install ${missing[*]}" >&2
            exit 2
        fi
    fi

    stamp=.venv/installed-$(cat "${files[@]}" | sha256sum | cut -c1-16)
    [ -e "$stamp" ] && exit 0
    [ -e .venv/bin/python ] || "$python" -m venv .venv
    log=.venv/install.log
    total=$(cat "${files[@]}" | grep -c '^[a-z]' -i)
    args=()
    for file in "${files[@]}"; do args+=(-r "$file"); done
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-compile "${args[@]}" >"$log" 2>&1 &
    pip=$!
    trap 'kill $pip 2>/dev/null || true' EXIT
    while kill -0 $pip 2>/dev/null; do
        found=$(grep -cE '^(Collecting|Requirement already)' "$log" || true)
        state="collected $found of about $total packages"
        grep -q '^Installing collected' "$log" && state="installing them"
        if [ -t 1 ]; then
            printf '\rsetting up .venv: %s, %d s   ' "$state" "$SECONDS"
            sleep 1
        else
            echo "setting up .venv: $state, $SECONDS s"
            for _ in {1..10}; do kill -0 $pip 2>/dev/null && sleep 1; done
        fi
    done
    trap - EXIT
    if ! wait $pip; then
        printf '\nsetup.sh: error: pip failed:\n' >&2
        grep -E '^ERROR' "$log" >&2 || tail -n 5 "$log" >&2
        exit 2
    fi
    # pip would compile to bytecode on one core; what fails is written for another version of Python
    .venv/bin/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib >/dev/null || true
    [ -t 1 ] && echo
    touch "$stamp"
    touch ".venv/installed-$(sha256sum < requirements.txt | cut -c1-16)"
}

main "$@"; exit

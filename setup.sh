#!/usr/bin/env bash
# Sets up .venv with the pinned versions of requirements.txt; `./setup.sh dev` adds those of requirements-dev.txt, which
# `make test` needs, and `./setup.sh all` also the programs that `make test-all` needs.
# The build of torch is the one that suits the machine's GPUs. Packages that are installed already are left as they are.
# PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "setup.sh: error: $1" >&2; exit 2; }

# install WHAT LOG PIP_ARGUMENT...: run pip, show how far it is, and return its status.
install() {
    local what=$1 log=$2 state found
    shift 2
    : >"$log"  # the shell that runs pip opens it a moment later
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-compile "$@" >"$log" 2>&1 &
    pip=$!
    trap 'kill $pip 2>/dev/null || true' EXIT
    while kill -0 $pip 2>/dev/null; do
        found=$(grep -cE '^(Collecting|Requirement already)' "$log" || true)
        state="$what: collected $found"
        grep -q '^Installing collected' "$log" && state="$what: installing"
        if [ -t 1 ]; then
            printf '\rsetting up .venv: %s, %d s   ' "$state" "$SECONDS"
            sleep 0.5
        else
            echo "setting up .venv: $state, $SECONDS s"
            for _ in {1..50}; do kill -0 $pip 2>/dev/null && sleep 0.2; done
        fi
    done
    trap - EXIT
    if [ -t 1 ]; then echo; fi
    wait $pip
}

fail_as_pip() {
    printf 'setup.sh: error: pip failed:\n' >&2
    grep -E '^ERROR' "$1" >&2 || tail -n 5 "$1" >&2
    exit 2
}

# install_torch VERSION BUILD: from PyTorch's own index; if that fails, from the default index if its build may suit.
install_torch() {
    local torch=torch==$1+$2 index=https://download.pytorch.org/whl/$2 log=.venv/torch.log
    # Without its dependencies: their pinned versions come with all the others.
    install "$torch" $log --no-deps --timeout 10 --retries 0 --index-url "$index" "$torch" && return
    case $2 in
        cpu | cu130) ;;
        *) fail "the GPUs here need the build $2, and pip could not install $torch from $index ($log). On a machine that can:
  pip download --no-deps --index-url $index $torch
and here, with that file: .venv/bin/pip install --no-deps FILE, then ./setup.sh again" ;;
    esac
    echo "pip could not install $torch from $index ($log): taking torch from the default index"
    install "torch==$1" $log --no-deps --force-reinstall "torch==$1" || fail_as_pip $log
}

main() {
    files=(requirements.txt)
    case "${1:-}" in dev | all) files+=(requirements-dev.txt) ;; esac
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        fail "$python is not Python 3.11 or newer; name one with PYTHON=/path/to/python3.11"
    fi

    missing=()
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    if [ "${1:-}" = all ]; then
        # A heavy test compares with DeepSpeed's own optimizer, which is compiled; others run real sshd, pdsh, mpirun, Slurm,
        # Chromium and networks.
        [ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || missing+=(python3-dev)
        command -v c++ >/dev/null || missing+=(g++)
        [ -x /usr/sbin/sshd ] || missing+=(openssh-server)
        command -v ssh >/dev/null || missing+=(openssh-client)
        command -v ip >/dev/null || missing+=(iproute2)
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
            fail "${missing[*]} missing; on Debian or Ubuntu: sudo apt-get install ${missing[*]}"
        fi
    fi

    build=$("$python" -m pretrain.torch_build) || exit 2
    stamp=.venv/installed-$build-$(cat "${files[@]}" | sha256sum | cut -c1-16)
    [ -e "$stamp" ] && exit 0
    [ -e .venv/bin/python ] || "$python" -m venv .venv
    version=$(sed -n 's/^torch==//p' requirements.txt)
    .venv/bin/python -m pretrain.torch_build --check "$version" || install_torch "$version" "$build"
    args=()
    for file in "${files[@]}"; do args+=(-r "$file"); done
    log=.venv/install.log
    install "about $(cat "${files[@]}" | grep -ci '^[a-z]') packages" $log "${args[@]}" || fail_as_pip $log
    .venv/bin/python -m pretrain.torch_build --fault
    # pip would compile to bytecode on one core; what fails is written for another version of Python
    .venv/bin/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib >/dev/null || true
    touch "$stamp" ".venv/installed-$build-$(sha256sum < requirements.txt | cut -c1-16)"
}

main "$@"; exit

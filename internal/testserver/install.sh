#!/bin/sh
# Makes sure that a program which the tests need, and which is not a Go module, is
# there: installs it through the system's package manager if not.
#
#   install.sh redis   redis-server, unless REDIS_SERVER names it
#   install.sh cc      a C compiler, which the race detector needs except on macOS
set -eu

install() { # one package name for each manager: apt-get, apk, dnf, brew
    root=
    if [ "$(id -u)" != 0 ] && command -v sudo >/dev/null; then root=sudo; fi
    if command -v apt-get >/dev/null; then
        # Package lists are missing in fresh containers, and old elsewhere.
        $root apt-get update -q && DEBIAN_FRONTEND=noninteractive $root apt-get install -qy --no-install-recommends $1
    elif command -v apk >/dev/null; then
        $root apk add $2
    elif command -v dnf >/dev/null; then
        $root dnf install -qy $3
    elif command -v brew >/dev/null; then
        brew install $4 # refuses to run as root
    else
        return 1
    fi >&2
}

case ${1-} in
redis)
    command -v "${REDIS_SERVER:-redis-server}" >/dev/null && exit
    if [ -n "${REDIS_SERVER-}" ]; then
        echo "REDIS_SERVER is set, but $REDIS_SERVER cannot be run" >&2
        exit 1
    fi
    # Fedora has Valkey instead, with Redis's names in a package of their own.
    install redis-server redis valkey-compat-redis redis || install redis-server redis redis redis || true
    command -v redis-server >/dev/null && exit
    echo "redis-server could not be installed: install Redis 6.2 or later yourself, or set REDIS_SERVER to its binary" >&2
    exit 1
    ;;
cc)
    [ "$(uname)" = Darwin ] && exit
    # Go says 0 when it finds no compiler.
    [ "$(go env CGO_ENABLED)" = 1 ] && exit
    install "gcc libc6-dev" "gcc musl-dev" "gcc glibc-devel" gcc || true
    [ "$(go env CGO_ENABLED)" = 1 ] && exit
    echo "no C compiler could be installed: the race detector needs one (and CGO_ENABLED unset or 1)" >&2
    exit 1
    ;;
*)
    echo "usage: $0 redis|cc" >&2
    exit 2
    ;;
esac

#!/usr/bin/env bash
# LIBERO renders with MuJoCo: through EGL where there is a GPU, else through OSMesa, which is a system library.
# Installs it where that is allowed (root, apt), else says what to install. Everything but the simulator works without.
set -euo pipefail

# Without `| grep -q`, which stops at its first match: pipefail would then report ldconfig's SIGPIPE as "not there".
if [[ "$(ldconfig -p 2>/dev/null)" == *libOSMesa.so* ]]; then
  exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing libosmesa6, which the simulator renders with"
  apt-get update -qq >/dev/null && apt-get install -qq -y libosmesa6 >/dev/null
else
  echo "The simulator needs OSMesa where there is no GPU: ask an administrator for it (Debian, Ubuntu: apt-get install libosmesa6)." >&2
  echo "Its tests are skipped until then." >&2
fi

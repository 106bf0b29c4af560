#!/usr/bin/env bash
# Install OSMesa if allowed (root, apt); otherwise say what to install. LIBERO renders with MuJoCo: through EGL on a GPU,
# otherwise through OSMesa, which is a system library. Everything except the simulator works without it.
set -euo pipefail

# Not `| grep -q`, which exits at its first match: pipefail would then report ldconfig's SIGPIPE as a missing library.
if [[ "$(ldconfig -p 2>/dev/null)" == *libOSMesa.so* ]]; then
  exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing libosmesa6, which the simulator renders with"
  apt-get update -qq >/dev/null && apt-get install -qq -y libosmesa6 >/dev/null
else
  echo "The simulator needs OSMesa if there is no GPU: ask an administrator to install it (Debian, Ubuntu: apt-get install libosmesa6)." >&2
  echo "Its tests are skipped until then." >&2
fi

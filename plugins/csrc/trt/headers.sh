#!/bin/sh
# Print the folder of NvInfer.h: TENSORRT_INCLUDE; else a system folder, of the major version of TENSORRT_VERSION where that is
# set; else a clone of that release from TENSORRT_OSS_URL, which the cache keeps. The clone must be the commit that commits.txt has
# for the release's tag, or TENSORRT_COMMIT.
set -eu
here=$(dirname "$0")
url=${TENSORRT_OSS_URL:-https://github.com/NVIDIA/TensorRT.git}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/darktrt
asked=${TENSORRT_VERSION:-}

fail() {
    echo "$1" >&2
    exit 1
}

major_of() {
    sed -nE 's/^#define (NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) ([0-9]+).*/\2/p' "$1/NvInferVersion.h" | head -n 1
}

if [ -n "${TENSORRT_INCLUDE:-}" ]; then
    [ -f "$TENSORRT_INCLUDE/NvInfer.h" ] || fail "TENSORRT_INCLUDE=$TENSORRT_INCLUDE has no NvInfer.h"
    echo "$TENSORRT_INCLUDE"
    exit
fi

for folder in "/usr/include/$(uname -m)-linux-gnu" /usr/include /usr/local/cuda/include /usr/local/tensorrt/include; do
    if [ -f "$folder/NvInfer.h" ] && { [ -z "$asked" ] || [ "$(major_of "$folder")" = "${asked%%.*}" ]; }; then
        echo "$folder"
        exit
    fi
done

# a release's tag has three numbers, or two
release=$(echo "${asked:-10.16}" | cut -d. -f1-3)
case $release in
    *.*.*) tags="v$release v${release%.*}" ;;
    *) tags="v$release v$release.0" ;;
esac
for tag in $tags; do
    if [ -f "$cache/tensorrt-$tag/include/NvInfer.h" ]; then
        echo "$cache/tensorrt-$tag/include"
        exit
    fi
done

advice="set TENSORRT_INCLUDE to the folder of NvInfer.h"
commit_of() {
    echo "${TENSORRT_COMMIT:-$(sed -n "s/^$1 //p" "$here/commits.txt")}"
}

mkdir -p "$cache"
clone=$(mktemp -d "$cache/clone.XXXXXX")
trap 'rm -rf "$clone"' EXIT
echo "its commit is not known: set TENSORRT_COMMIT to the one that NVIDIA released" >"$clone/log"
for tag in $tags; do
    wanted=$(commit_of "$tag")
    if [ -n "$wanted" ] &&
        git clone --quiet --depth 1 --filter=blob:none --sparse --branch "$tag" "$url" "$clone/$tag" 2>"$clone/log"; then
        found=$(git -C "$clone/$tag" rev-parse HEAD)
        [ "$found" = "$wanted" ] || fail "$url: $tag is commit $found there, not $wanted as NVIDIA released it; $advice"
        git -C "$clone/$tag" sparse-checkout set include 2>"$clone/log" || break
        mkdir -p "$cache/tensorrt-$tag"
        mv "$clone/$tag/include" "$cache/tensorrt-$tag/"
        echo "$cache/tensorrt-$tag/include"
        exit
    fi
done
fail "no headers of TensorRT $release: $advice, or TENSORRT_VERSION to a release; $(tail -n 1 "$clone/log")"

# Starts Triton with the plugin libraries of all models under /models. The arguments are tritonserver's options.
set -eu
shopt -s nullglob
# Triton's HTTP library puts twice the body of a form on the stack of a thread: 1 GiB of address space, or what is allowed
ulimit -S -s 1048576 2>/dev/null || ulimit -S -s "$(ulimit -H -s)"
libraries=(/models/*/*/libdarktrt_plugins.so)
plugins=$(IFS=';'; echo "${libraries[*]}")
exec tritonserver --model-repository=/models "$@" ${plugins:+"--backend-config=tensorrt,plugins=$plugins"}

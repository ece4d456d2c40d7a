// The common part of the launchers: a launch that returns its own error, and the number of resident blocks on the current GPU.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

namespace darktrt {

template <typename... Formal, typename... Actual>
cudaError_t launch(void (*kernel)(Formal...), dim3 blocks, int threads, void* stream, Actual&&... arguments)
{
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = dim3(threads);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, std::forward<Actual>(arguments)...);
}

// The number of resident blocks of a kernel on the current device, computed once per device and cached in `Known`, one for each
// kernel.
struct Known {
    static constexpr int devices = 64;
    std::atomic<int> blocks[devices];
};

template <typename Kernel> cudaError_t resident_blocks(Kernel kernel, int threads, Known& known, int64_t* blocks)
{
    int device = 0, processors = 0, each = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    if (device < Known::devices && (*blocks = known.blocks[device].load(std::memory_order_relaxed)) > 0) return cudaSuccess;
    if ((error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return error;
    if ((error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0)) != cudaSuccess) return error;
    *blocks = std::max(1, processors * each);
    if (device < Known::devices) known.blocks[device].store(static_cast<int>(*blocks), std::memory_order_relaxed);
    return cudaSuccess;
}

}  // namespace darktrt

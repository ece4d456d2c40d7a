// Images from ordinary host memory to the GPU, through pinned memory.
//
// The driver's own copy from ordinary memory uses one thread. Here several fill the pinned memory, past the caches (the next
// reader is the GPU), while the copies to the GPU follow behind them.

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "kernels.h"

namespace darktrt {
namespace {

constexpr int64_t least_bytes = 256 << 10, most_bytes = 2 << 20;  // of a chunk
constexpr int64_t chunks_of_thread = 4;

void copy_past_caches(char* to, const char* from, int64_t bytes)
{
#if defined(__SSE2__)
    constexpr int64_t width = sizeof(__m128i);
    const int64_t head = std::min(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % width));
    std::memcpy(to, from, head);
    int64_t i = head;
    for (; i + width <= bytes; i += width) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
    std::memcpy(to + i, from + i, bytes - i);
    _mm_sfence();
#else
    std::memcpy(to, from, bytes);
#endif
}

// Chunks that threads take one after the other.
class Chunks {
public:
    Chunks(int32_t count, const DarktrtCopy* copies, int64_t bytes)
    {
        for (const auto* copy = copies; copy < copies + count; ++copy) {
            for (int64_t first = 0; first < copy->bytes; first += bytes) {
                const auto at = [&](const void* base) { return const_cast<char*>(static_cast<const char*>(base)) + first; };
                chunks_.push_back({at(copy->from), at(copy->pinned), at(copy->to), std::min(bytes, copy->bytes - first)});
            }
        }
        filled_ = std::vector<std::atomic<bool>>(chunks_.size());
    }

    int64_t size() const { return static_cast<int64_t>(chunks_.size()); }

    // Fills the pinned memory of the next chunk; false if there is none.
    bool fill_next()
    {
        const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
        if (i >= size()) return false;
        copy_past_caches(static_cast<char*>(chunks_[i].pinned), static_cast<const char*>(chunks_[i].from), chunks_[i].bytes);
        filled_[i].store(true, std::memory_order_release);
        return true;
    }

    cudaError_t upload(int64_t i, cudaStream_t stream)
    {
        while (!filled_[i].load(std::memory_order_acquire)) {
            if (!fill_next()) std::this_thread::yield();
        }
        const DarktrtCopy& chunk = chunks_[i];
        return cudaMemcpyAsync(chunk.to, chunk.pinned, chunk.bytes, cudaMemcpyHostToDevice, stream);
    }

private:
    std::vector<DarktrtCopy> chunks_;
    std::vector<std::atomic<bool>> filled_;
    std::atomic<int64_t> next_{0};
};

// Threads that fill chunks; fewer where the system gives no more, or no memory.
std::vector<std::thread> start(Chunks& chunks, int64_t count)
{
    std::vector<std::thread> threads;
    try {
        while (static_cast<int64_t>(threads.size()) < count) {
            threads.emplace_back([&chunks] {
                while (chunks.fill_next()) {
                }
            });
        }
    } catch (const std::system_error&) {
    } catch (const std::bad_alloc&) {
    }
    return threads;
}

cudaError_t upload(int32_t count, const DarktrtCopy* copies, int32_t threads, cudaStream_t stream)
{
    int64_t total = 0;
    for (int32_t i = 0; i < count; ++i) total += copies[i].bytes;
    Chunks chunks(count, copies, std::clamp(total / (chunks_of_thread * threads), least_bytes, most_bytes));
    auto helpers = start(chunks, std::min<int64_t>(threads, chunks.size()) - 1);
    cudaError_t error = cudaSuccess;
    for (int64_t i = 0; i < chunks.size() && error == cudaSuccess; ++i) {
        error = chunks.upload(i, stream);
    }
    for (auto& helper : helpers) helper.join();
    return error;
}

}  // namespace
}  // namespace darktrt

int darktrt_upload(int32_t count, const DarktrtCopy* copies, int32_t threads, void* stream)
{
    if (count < 0 || threads < 1) return DARKTRT_UNSUPPORTED;
    try {
        return darktrt::upload(count, copies, threads, static_cast<cudaStream_t>(stream));
    } catch (const std::bad_alloc&) {
        return cudaErrorMemoryAllocation;
    }
}

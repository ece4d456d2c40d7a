// YOLO decode, and decode + NMS in one.
//
// darktrt_detect has five steps, each over all images. (1) find_candidates decodes objectness first, and appends the pairs
// (anchor, class) above the score threshold to a buffer of bounded size as keys, in any order. (2) thin_out does nothing unless
// the buffer of an image overflowed: then each of `slices` blocks finds the best of its share of the anchors exactly. (3)
// select_best sorts the keys; that settles the order, whatever the order of appending was. (4) compare writes who suppresses
// whom as bits. (5) resolve walks through the candidates, 64 at a time, and writes the detections.

#include <cooperative_groups.h>
#include <cuda_fp16.h>

#include <cub/block/block_scan.cuh>

#include "launch.h"
#include "nms.h"
#include "yolo.h"

namespace darktrt {
namespace {

using Mask = unsigned long long;

constexpr int warp_size = 32;
constexpr int find_threads = 256, select_threads = 1024, compare_threads = 256, resolve_threads = 1024, decode_threads = 256;
constexpr int tile = 64;  // candidates of one Mask
constexpr int max_tiles = max_candidates_limit / tile;
constexpr int sort_limit = 4096;
constexpr uint32_t slices = 32;
constexpr int max_grid_y = 65535;

// The intermediate results of one image (`counts`: of all images), in the workspace.
struct Work {
    uint32_t* counts;  // two per image: keys that find_candidates counted, and keys that thin_out wrote
    int32_t* selected;
    uint64_t* keys;  // slices * max_candidates per image
    Box* boxes;      // boxes, scores and classes: max_candidates per image
    float* scores;
    int32_t* classes;
    Mask* masks;  // `words` per candidate, max_candidates * words per image
    uint32_t capacity;
    int32_t words;
};

// Places arrays one after another in memory at `base`, which may be null to compute only the size.
struct Arena {
    char* base;
    size_t used = 0;

    template <typename T> void place(T*& pointer, int64_t size)
    {
        pointer = reinterpret_cast<T*>(base + used);
        used += (size * sizeof(T) + 255) / 256 * 256;
    }
};

Work make_work(int64_t batch, const DarktrtNms& nms, void* workspace, size_t* bytes)
{
    Work work{};
    const int64_t candidates = batch * nms.max_candidates;
    work.capacity = slices * static_cast<uint32_t>(nms.max_candidates);
    work.words = (nms.max_candidates + tile - 1) / tile;
    Arena arena{static_cast<char*>(workspace)};
    arena.place(work.counts, 2 * batch);
    arena.place(work.selected, batch);
    arena.place(work.keys, batch * work.capacity);
    arena.place(work.boxes, candidates);
    arena.place(work.scores, candidates);
    arena.place(work.classes, candidates);
    arena.place(work.masks, candidates * work.words);
    *bytes = arena.used;
    return work;
}

// The index of a new element at the end of a list, for each calling thread; one atomic operation for the calling threads of a
// warp together.
__device__ uint32_t append(uint32_t* count)
{
    const auto group = cooperative_groups::coalesced_threads();
    uint32_t first = 0;
    if (group.thread_rank() == 0) first = atomicAdd(count, group.size());
    return group.shfl(first, 0) + group.thread_rank();
}

// Anchors that may have candidates, by the threads of a block.
template <typename T, int kThreads> struct Survivors {
    struct {
        Raw<T> classes;
        Scoring scoring;
        uint32_t anchor;
        int32_t form;
    } at[kThreads];
    uint32_t count;
};

// Calls sink(key) for each candidate among anchors first..last of an image. All threads of the block must call it.
template <Kinds kinds, typename T, int kThreads, typename Sink>
__device__ void for_each_candidate(const DarktrtYolo& yolo, const Heads& heads, float threshold, int32_t image, uint32_t first,
                                   uint32_t last, Survivors<T, kThreads>& survivors, Sink sink)
{
    constexpr uint32_t unroll = 4;
    for (uint32_t begin = first; begin < last; begin += kThreads) {
        __syncthreads();  // the previous survivors have been read
        if (threadIdx.x == 0) survivors.count = 0;
        __syncthreads();
        const uint32_t anchor = begin + threadIdx.x;
        if (anchor < last) {
            const Location location = locate<kinds>(yolo, anchor);
            const Raw<T> raw = raw_at<T>(yolo, heads, image, location);
            const int32_t new_coords = yolo.head[location.head].new_coords;
            const float objectness = value_of(raw[objectness_channel(location.kind)], new_coords);
            if (may_pass(objectness, threshold, new_coords) && is_finite(decode_box(yolo, location, raw))) {
                const Scoring scoring = scoring_of(yolo, location, raw, objectness);
                const Raw<T> classes = raw.from(class_channel(location.kind));
                const int32_t form = class_form<kinds>(yolo.head[location.head]);
                survivors.at[append(&survivors.count)] = {classes, scoring, anchor, form};
            }
        }
        __syncthreads();
        // neighbouring threads read neighbouring anchors of one class, which are adjacent in memory
        const uint32_t count = survivors.count, pairs = count * yolo.classes;
        for (uint32_t pair = threadIdx.x; pair < pairs; pair += unroll * kThreads) {
            float raw[unroll];
            for (uint32_t i = 0; i < unroll; ++i) {
                const uint32_t mine = pair + i * kThreads;
                raw[i] = mine < pairs ? survivors.at[mine % count].classes[mine / count] : 0.f;
            }
            for (uint32_t i = 0; i < unroll; ++i) {
                const uint32_t mine = pair + i * kThreads;
                if (mine >= pairs) break;
                const auto& survivor = survivors.at[mine % count];
                const float value = class_value<kinds>(raw[i], survivor.form, survivor.scoring.largest);
                const float score = value * survivor.scoring.factor;
                if (score > threshold) sink(key_of(score, survivor.anchor * yolo.classes + mine / count));
            }
        }
    }
}

template <Kinds kinds, typename T>
__global__ void __launch_bounds__(find_threads)
    find_candidates(const __grid_constant__ DarktrtYolo yolo, const __grid_constant__ Heads heads, uint32_t anchors,
                    const float* score_threshold, const Work work)
{
    __shared__ Survivors<T, find_threads> survivors;
    const float threshold = *score_threshold;
    const uint32_t first = blockIdx.x * find_threads, last = min(first + find_threads, anchors);
    for (int32_t image = blockIdx.y; image < yolo.batch; image += gridDim.y) {
        uint64_t* const keys = work.keys + int64_t{image} * work.capacity;
        for_each_candidate<kinds>(yolo, heads, threshold, image, first, last, survivors, [&](uint64_t key) {
            const uint32_t index = append(work.counts + 2 * image);
            if (index < work.capacity) keys[index] = key;
        });
    }
}

using Scan = cub::BlockScan<uint32_t, select_threads>;

struct Selection {
    static constexpr int digit_bits = 11, digits = 1 << digit_bits;
    static_assert(digits == 2 * select_threads, "each thread looks at two digits");
    uint32_t histogram[digits];
    Scan::TempStorage scan;
    uint32_t digit, above, here;
};

// A lower bound of exactly k of the keys that visit(sink) passes to sink, or 0 where there are no more than k. Radix selection:
// digit by digit from the top, each time among the keys with the digits of the k-th largest so far.
template <typename Visit> __device__ uint64_t least_of_best(Visit visit, uint32_t k, Selection& shared)
{
    uint64_t prefix = 0, known = 0;
    for (int shift = 64 - Selection::digit_bits;; shift = max(shift - Selection::digit_bits, 0)) {
        __syncthreads();
        for (int i = threadIdx.x; i < Selection::digits; i += select_threads) shared.histogram[i] = 0;
        __syncthreads();
        visit([&](uint64_t key) {
            if ((key & known) == prefix) atomicAdd(shared.histogram + (key >> shift & (Selection::digits - 1)), 1u);
        });
        __syncthreads();
        const uint32_t high_digit = Selection::digits - 1 - 2 * threadIdx.x;
        const uint32_t high = shared.histogram[high_digit], low = shared.histogram[high_digit - 1];
        uint32_t above = 0, all = 0;
        Scan(shared.scan).ExclusiveSum(high + low, above, all);
        if (all <= k) return 0;
        if (above < k && k <= above + high + low) {
            const bool is_high = k <= above + high;
            shared.digit = is_high ? high_digit : high_digit - 1;
            shared.above = is_high ? above : above + high;
            shared.here = is_high ? high : low;
        }
        __syncthreads();
        prefix |= uint64_t{shared.digit} << shift;
        known |= uint64_t{Selection::digits - 1} << shift;
        k -= shared.above;
        if (shared.here == k || shift == 0) return prefix;
    }
}

template <Kinds kinds, typename T>
__global__ void __launch_bounds__(select_threads)
    thin_out(const __grid_constant__ DarktrtYolo yolo, const DarktrtNms nms, const __grid_constant__ Heads heads,
             uint32_t anchors, const float* score_threshold, const Work work)
{
    __shared__ Survivors<T, select_threads> survivors;
    __shared__ Selection selection;
    const float threshold = *score_threshold;
    const auto first = static_cast<uint32_t>(uint64_t{anchors} * blockIdx.x / slices);
    const auto last = static_cast<uint32_t>(uint64_t{anchors} * (blockIdx.x + 1) / slices);
    for (int32_t image = blockIdx.y; image < yolo.batch; image += gridDim.y) {
        if (work.counts[2 * image] <= work.capacity) continue;
        uint64_t* const keys = work.keys + int64_t{image} * work.capacity;
        const auto visit = [&](auto sink) {
            for_each_candidate<kinds>(yolo, heads, threshold, image, first, last, survivors, sink);
        };
        const uint64_t least = least_of_best(visit, nms.max_candidates, selection);
        visit([&](uint64_t key) {
            if (key >= least) keys[append(work.counts + 2 * image + 1)] = key;
        });
    }
}

// Bitonic sort of `size` keys, a power of two, in falling order. Steps of a distance up to a warp's size stay within one warp.
__device__ void sort_falling(uint64_t* keys, uint32_t size)
{
    uint32_t last_distance = sort_limit;
    for (uint32_t run = 2; run <= size; run *= 2) {
        for (uint32_t distance = run / 2; distance > 0; distance /= 2) {
            if (max(distance, last_distance) > warp_size) {
                __syncthreads();
            } else {
                __syncwarp();
            }
            last_distance = distance;
            for (uint32_t i = threadIdx.x; i < size / 2; i += select_threads) {
                const uint32_t low = 2 * i - (i & (distance - 1)), high = low + distance;
                const uint64_t a = keys[low], b = keys[high];
                if ((a < b) == ((low & run) == 0)) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
        }
    }
    __syncthreads();
}

template <Kinds kinds, typename T>
__global__ void __launch_bounds__(select_threads)
    select_best(const __grid_constant__ DarktrtYolo yolo, const DarktrtNms nms, const __grid_constant__ Heads heads,
                const Work work)
{
    __shared__ uint64_t best[sort_limit];
    __shared__ Selection selection;
    __shared__ uint32_t count;
    const int32_t image = blockIdx.x;
    const uint32_t met = work.counts[2 * image], found = met <= work.capacity ? met : work.counts[2 * image + 1];
    const uint64_t* const keys = work.keys + int64_t{image} * work.capacity;
    const auto visit = [&](auto sink) {
        for (uint32_t i = threadIdx.x; i < found; i += select_threads) sink(keys[i]);
    };
    if (threadIdx.x == 0) count = 0;
    const uint64_t least = found > sort_limit ? least_of_best(visit, nms.max_candidates, selection) : 0;
    __syncthreads();
    visit([&](uint64_t key) {
        if (key >= least) best[append(&count)] = key;
    });
    __syncthreads();
    uint32_t size = 1;
    while (size < count) size *= 2;
    for (uint32_t i = count + threadIdx.x; i < size; i += select_threads) best[i] = 0;
    sort_falling(best, size);

    const uint32_t selected = min(count, static_cast<uint32_t>(nms.max_candidates));
    if (threadIdx.x == 0) work.selected[image] = static_cast<int32_t>(selected);
    for (uint32_t i = threadIdx.x; i < selected; i += select_threads) {
        const uint32_t index = index_of(best[i]);
        const Location location = locate<kinds>(yolo, index / yolo.classes);
        const int64_t to = int64_t{image} * nms.max_candidates + i;
        work.boxes[to] = decode_box(yolo, location, raw_at<T>(yolo, heads, image, location));
        work.scores[to] = score_of(best[i]);
        work.classes[to] = static_cast<int32_t>(index % yolo.classes);
    }
}

// The bits of masks[row][column / tile] are the later candidates (columns) that a candidate (row) suppresses, from its own tile
// on.
__global__ void __launch_bounds__(compare_threads)
    compare(const __grid_constant__ DarktrtYolo yolo, const DarktrtNms nms, const float* iou_threshold,
            const float* image_size, const Work work)
{
    __shared__ Box row_boxes[tile];
    __shared__ int32_t row_classes[tile];
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, half = warp % 2;
    for (int32_t image = blockIdx.y; image < yolo.batch; image += gridDim.y) {
        const int32_t selected = work.selected[image], tiles = (selected + tile - 1) / tile;
        const Suppression rule = suppression_of(yolo, nms, *iou_threshold, image_size, image);
        const int64_t first = int64_t{image} * nms.max_candidates;
        for (int32_t i = blockIdx.x; i < tiles * (tiles + 1) / 2; i += gridDim.x) {
            // the i-th pair of tiles, the row's not after the column's
            int32_t column_tile = static_cast<int32_t>(sqrtf(2.f * i));
            while (column_tile * (column_tile + 1) / 2 > i) --column_tile;
            const int32_t row_tile = i - column_tile * (column_tile + 1) / 2;
            __syncthreads();  // the previous rows have been read
            const int32_t my_row = row_tile * tile + threadIdx.x;
            if (threadIdx.x < tile && my_row < selected) {
                row_boxes[threadIdx.x] = work.boxes[first + my_row];
                row_classes[threadIdx.x] = work.classes[first + my_row];
            }
            __syncthreads();
            const int32_t column = column_tile * tile + half * warp_size + lane;
            const bool is_column = column < selected;
            const Box box = is_column ? work.boxes[first + column] : Box{};
            const int32_t kind = is_column ? work.classes[first + column] : -1;
            for (int32_t j = warp / 2; j < tile && row_tile * tile + j < selected; j += compare_threads / warp_size / 2) {
                const int32_t row = row_tile * tile + j;
                const bool hit = row < column && row_classes[j] == kind && suppresses(rule, row_boxes[j], box);
                const uint32_t bits = __ballot_sync(~0u, hit);
                auto* const mask = reinterpret_cast<uint32_t*>(work.masks + (first + row) * work.words + column_tile);
                if (lane == 0) mask[half] = bits;
            }
        }
    }
}

// The candidates of one tile that no unsuppressed candidate suppresses. `diagonal` are the candidates that each suppresses
// within the tile. All lanes of a warp must call it, and get the same result.
__device__ Mask keep(Mask alive, const Mask* diagonal, int32_t size)
{
    const int lane = threadIdx.x % warp_size;
    const auto suppresses_any = [&](int i) { return __ballot_sync(~0u, i < size && diagonal[i] != 0); };
    const Mask suppressors = suppresses_any(lane) | Mask{suppresses_any(lane + warp_size)} << warp_size;
    for (Mask rest = alive & suppressors; rest != 0;) {
        const int i = __ffsll(static_cast<long long>(rest)) - 1;
        alive &= ~diagonal[i];  // only later candidates
        rest &= alive & ~(Mask{1} << i);
    }
    return alive;
}

struct Detections {
    int32_t* count;
    float *boxes, *scores;
    int32_t* classes;
};

__global__ void __launch_bounds__(resolve_threads) resolve(const DarktrtNms nms, const Work work, const Detections out)
{
    __shared__ Mask diagonal[max_candidates_limit];
    __shared__ Mask removed[max_tiles], kept[max_tiles];
    __shared__ int32_t first_rank[max_tiles];
    constexpr int rows_at_once = resolve_threads / tile, rounds = tile / rows_at_once;
    const int32_t image = blockIdx.x, selected = work.selected[image], tiles = (selected + tile - 1) / tile;
    const int32_t my_word = threadIdx.x % tile, my_row = threadIdx.x / tile;
    const int64_t first = int64_t{image} * nms.max_candidates;
    const Mask* const masks = work.masks + first * work.words;

    // the candidates of later tiles that the rows of a tile suppress, read one tile ahead of their use
    Mask ahead[rounds];
    const auto read_ahead = [&](int32_t t) {
        for (int i = 0; i < rounds; ++i) {
            const int32_t row = t * tile + my_row + i * rows_at_once;
            ahead[i] = row < selected && my_word > t && my_word < tiles ? masks[int64_t{row} * work.words + my_word] : 0;
        }
    };
    read_ahead(0);
    for (int32_t i = threadIdx.x; i < selected; i += resolve_threads) {
        diagonal[i] = masks[int64_t{i} * work.words + i / tile];
    }
    if (threadIdx.x < max_tiles) removed[threadIdx.x] = kept[threadIdx.x] = 0;
    __syncthreads();
    int32_t total = 0;
    for (int32_t t = 0; t < tiles && total < nms.max_detections; ++t) {
        if (threadIdx.x < warp_size) {
            const int32_t size = min(selected - t * tile, tile);
            const Mask alive = keep((~Mask{0} >> (tile - size)) & ~removed[t], diagonal + t * tile, size);
            if (threadIdx.x == 0) {
                kept[t] = alive;
                first_rank[t] = total;
            }
        }
        __syncthreads();
        const Mask alive = kept[t];
        Mask hits = 0;
        for (int i = 0; i < rounds; ++i) hits |= alive >> (my_row + i * rows_at_once) & 1 ? ahead[i] : 0;
        if (hits != 0) atomicOr(removed + my_word, hits);
        total += __popcll(alive);
        read_ahead(t + 1);
        __syncthreads();
    }

    const int64_t out_first = int64_t{image} * nms.max_detections;
    const auto write = [&](int32_t rank, const Box& box, float score, int32_t kind) {
        float* const to = out.boxes + 4 * (out_first + rank);
        to[0] = box.x1;
        to[1] = box.y1;
        to[2] = box.x2;
        to[3] = box.y2;
        out.scores[out_first + rank] = score;
        out.classes[out_first + rank] = kind;
    };
    for (int32_t i = threadIdx.x; i < selected; i += resolve_threads) {
        const Mask mask = kept[i / tile], mine = Mask{1} << i % tile;
        if ((mask & mine) == 0) continue;
        const int32_t rank = first_rank[i / tile] + __popcll(mask & (mine - 1));
        if (rank < nms.max_detections) write(rank, work.boxes[first + i], work.scores[first + i], work.classes[first + i]);
    }
    const int32_t number = min(total, nms.max_detections);
    for (int32_t i = number + threadIdx.x; i < nms.max_detections; i += resolve_threads) write(i, Box{}, 0.f, 0);
    if (threadIdx.x == 0) out.count[image] = number;
}

// A block decodes warp_size cells of an anchor, and transposes scores from (classes, cells) to (cells, classes).
template <Kinds kinds, typename T>
__global__ void __launch_bounds__(decode_threads)
    decode(const __grid_constant__ DarktrtYolo yolo, const __grid_constant__ Heads heads, int64_t anchors, float* boxes,
           float* scores)
{
    constexpr int warps = decode_threads / warp_size;
    __shared__ Scoring scoring[warp_size];
    __shared__ float values[warp_size][warp_size + 1];
    int32_t head = 0, cells = 0, cell_tiles = 0;
    int64_t first = 0, block = blockIdx.x;  // the first anchor of the block; its number within the head
    for (;; ++head) {
        cells = yolo.head[head].rows * yolo.head[head].columns;
        cell_tiles = (cells + warp_size - 1) / warp_size;
        const int64_t blocks = int64_t{yolo.head[head].anchors} * cell_tiles;
        if (block < blocks) break;
        block -= blocks;
        first += int64_t{yolo.head[head].anchors} * cells;
    }
    const auto anchor = static_cast<int32_t>(block / cell_tiles);
    const auto first_cell = static_cast<int32_t>(block % cell_tiles) * warp_size;
    first += int64_t{anchor} * cells + first_cell;

    const int32_t lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, new_coords = yolo.head[head].new_coords;
    const int32_t kind = kind_of<kinds>(yolo.head[head]), form = class_form<kinds>(yolo.head[head]);
    const int32_t size = min(cells - first_cell, warp_size);
    for (int32_t image = blockIdx.y; image < yolo.batch; image += gridDim.y) {
        const Location location{head, kind, anchor, first_cell + lane, cells};
        const Raw<T> raw = raw_at<T>(yolo, heads, image, location), raw_classes = raw.from(class_channel(kind));
        const int64_t image_first = image * anchors + first;
        __syncthreads();  // how to score the previous image has been read
        if (warp == 0 && lane < size) {
            const Box box = decode_box(yolo, location, raw);
            float* const to = boxes + 4 * (image_first + lane);
            to[0] = box.x1;
            to[1] = box.y1;
            to[2] = box.x2;
            to[3] = box.y2;
            scoring[lane] = scoring_of(yolo, location, raw, value_of(raw[objectness_channel(kind)], new_coords));
        }
        for (int32_t first_class = 0; first_class < yolo.classes; first_class += warp_size) {
            const int32_t classes = min(yolo.classes - first_class, warp_size);
            __syncthreads();
            for (int32_t i = warp; i < classes && lane < size; i += warps) {
                values[i][lane] = class_value<kinds>(raw_classes[first_class + i], form, scoring[lane].largest);
            }
            __syncthreads();
            for (int32_t i = warp; i < size && lane < classes; i += warps) {
                scores[(image_first + i) * yolo.classes + first_class + lane] = values[lane][i] * scoring[i].factor;
            }
        }
    }
}

Heads heads_of(const DarktrtYolo& yolo, const void* const* pointers)
{
    Heads heads{};
    for (int32_t i = 0; i < std::min(yolo.heads, int32_t{DARKTRT_MAX_HEADS}); ++i) heads.raw[i] = pointers[i];
    return heads;
}

template <typename T>
int run_decode(const DarktrtYolo& yolo, const void* const* pointers, float* boxes, float* scores, void* stream)
{
    int64_t blocks = 0;
    for (int32_t i = 0; i < yolo.heads; ++i) {
        const DarktrtHead& head = yolo.head[i];
        blocks += int64_t{head.anchors} * ((int64_t{head.rows} * head.columns + warp_size - 1) / warp_size);
    }
    if (blocks == 0 || yolo.batch == 0) return cudaSuccess;
    const dim3 grid(static_cast<unsigned>(blocks), std::min(yolo.batch, max_grid_y));
    const auto kernel = has_only_yolo(yolo) ? decode<Kinds::yolo, T> : decode<Kinds::any, T>;
    const Heads heads = heads_of(yolo, pointers);
    return launch(kernel, grid, decode_threads, stream, yolo, heads, anchor_count(yolo), boxes, scores);
}

template <typename T>
int run_detect(const DarktrtYolo& yolo, const DarktrtNms& nms, const void* const* pointers, const float* score_threshold,
               const float* iou_threshold, const float* image_size, const Detections& out, void* workspace, void* stream)
{
    static Known known;
    size_t bytes = 0;
    const Work work = make_work(yolo.batch, nms, workspace, &bytes);
    const Heads heads = heads_of(yolo, pointers);
    const auto anchors = static_cast<uint32_t>(anchor_count(yolo));
    const auto images = static_cast<unsigned>(yolo.batch), image_rows = std::min(images, unsigned{max_grid_y});
    if (images == 0) return cudaSuccess;
    const bool only_yolo = has_only_yolo(yolo);
    int64_t resident = 0;
    if (const cudaError_t error = resident_blocks(compare, compare_threads, known, &resident); error) return error;
    const int64_t tile_pairs = int64_t{work.words} * (work.words + 1) / 2;
    const auto compare_blocks = static_cast<unsigned>(std::min(tile_pairs, std::max<int64_t>(1, resident / images)));

    cudaError_t error = cudaMemsetAsync(work.counts, 0, 2 * images * sizeof(uint32_t), static_cast<cudaStream_t>(stream));
    const auto then = [&](auto kernel, dim3 grid, int threads, const auto&... arguments) {
        if (error == cudaSuccess) error = launch(kernel, grid, threads, stream, arguments...);
    };
    if (anchors > 0) {
        const unsigned blocks = (anchors + find_threads - 1) / find_threads;
        const auto kernel = only_yolo ? find_candidates<Kinds::yolo, T> : find_candidates<Kinds::any, T>;
        then(kernel, dim3(blocks, image_rows), find_threads, yolo, heads, anchors, score_threshold, work);
    }
    if (int64_t{anchors} * yolo.classes > work.capacity) {
        const auto kernel = only_yolo ? thin_out<Kinds::yolo, T> : thin_out<Kinds::any, T>;
        then(kernel, dim3(slices, image_rows), select_threads, yolo, nms, heads, anchors, score_threshold, work);
    }
    const auto kernel = only_yolo ? select_best<Kinds::yolo, T> : select_best<Kinds::any, T>;
    then(kernel, dim3(images), select_threads, yolo, nms, heads, work);
    then(compare, dim3(compare_blocks, image_rows), compare_threads, yolo, nms, iou_threshold, image_size, work);
    then(resolve, dim3(images), resolve_threads, nms, work, out);
    return error;
}

}  // namespace
}  // namespace darktrt

using namespace darktrt;

int darktrt_decode(const DarktrtYolo* yolo, int32_t type, const void* const* heads, float* boxes, float* scores, void* stream)
{
    if (!is_supported(*yolo) || (type != DARKTRT_FLOAT && type != DARKTRT_HALF)) return DARKTRT_UNSUPPORTED;
    return (type == DARKTRT_FLOAT ? run_decode<float> : run_decode<__half>)(*yolo, heads, boxes, scores, stream);
}

size_t darktrt_detect_workspace(const DarktrtYolo* yolo, const DarktrtNms* nms)
{
    size_t bytes = 0;
    make_work(yolo->batch, *nms, nullptr, &bytes);
    return bytes;
}

int darktrt_detect(const DarktrtYolo* yolo, const DarktrtNms* nms, int32_t type, const void* const* heads,
                   const float* score_threshold, const float* iou_threshold, const float* image_size, int32_t* count,
                   float* boxes, float* scores, int32_t* classes, void* workspace, void* stream)
{
    const bool known = type == DARKTRT_FLOAT || type == DARKTRT_HALF;
    if (!is_supported(*yolo) || !is_supported(*nms) || !known) return DARKTRT_UNSUPPORTED;
    const auto function = type == DARKTRT_FLOAT ? run_detect<float> : run_detect<__half>;
    const Detections out{count, boxes, scores, classes};
    return function(*yolo, *nms, heads, score_threshold, iou_threshold, image_size, out, workspace, stream);
}

// The CUDA kernels behind the custom ops, as C functions: device pointers, sizes and a stream in, an error code out.
//
// Every function but darktrt_upload only enqueues work on the stream given: no allocation, no synchronisation, no other stream,
// so a CUDA graph can capture it. They return 0 (cudaSuccess), another cudaError_t, or DARKTRT_UNSUPPORTED for unsupported
// arguments. libdarktrt_host has the same functions except darktrt_upload, without workspace and stream, under names that begin
// with darktrt_host_, in plain loops over host memory, from the same math headers; those that fit images also return
// DARKTRT_UNSUPPORTED where there is no memory for their rows.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DARKTRT_UNSUPPORTED (-1)

enum { DARKTRT_FLOAT = 0, DARKTRT_HALF = 1, DARKTRT_INT8 = 2, DARKTRT_UINT8 = 3 };

// A tensor (batch, channels, pixels): its type and memory layout.
//   vector_width 1                   [batch][channels][pixels]                 TensorRT's kLINEAR
//   vector_width v                   [batch][ceil(channels / v)][pixels][v]    kCHW4, kCHW16, kCHW32
//   vector_width v, channels_last    [batch][pixels][ceil(channels / v) * v]   kHWC8, kHWC16
typedef struct {
    int32_t type;
    int32_t vector_width;
    int32_t channels_last;
    float scale;  // of DARKTRT_INT8: value = scale * level
} DarktrtFormat;

typedef struct {
    int32_t batch, channels;
    int64_t pixels;
} DarktrtShape;

// y = mish(x). Both formats have one layout; their types are equal, or half and int8.
int darktrt_mish(DarktrtShape shape, const void* x, DarktrtFormat x_format, void* y, DarktrtFormat y_format, void* stream);

// y = mish(x) + residual. All formats have one layout; types are equal, or half for x and residual and int8 for y.
int darktrt_mish_add(DarktrtShape shape, const void* x, DarktrtFormat x_format, const void* residual,
                     DarktrtFormat residual_format, void* y, DarktrtFormat y_format, void* stream);

// y = mish(x), then mish of second, along channels: shape.channels of x, second_channels of the other. Formats as for
// darktrt_mish; shape.channels must be a multiple of vector_width.
int darktrt_mish_concat(DarktrtShape shape, const void* x, DarktrtFormat x_format, const void* second,
                        DarktrtFormat second_format, int32_t second_channels, void* y, DarktrtFormat y_format, void* stream);

#define DARKTRT_MAX_HEADS 5
#define DARKTRT_MAX_ANCHORS 32  // of one head

// DARKTRT_REGION: the classes are the softmax of their raw numbers. DARKTRT_GAUSSIAN_YOLO: an uncertainty follows each of x, y,
// width and height. For both new_coords is 0.
enum { DARKTRT_YOLO = 0, DARKTRT_REGION = 1, DARKTRT_GAUSSIAN_YOLO = 2 };

typedef struct {
    int32_t kind, anchors, rows, columns, new_coords;
    float scale_x_y;
    float anchor_sizes[2 * DARKTRT_MAX_ANCHORS];  // width, height in pixels of the network input
} DarktrtHead;

typedef struct {
    int32_t batch, heads, classes;
    int32_t width, height;  // of the network input
    DarktrtHead head[DARKTRT_MAX_HEADS];
} DarktrtYolo;

enum { DARKTRT_PLAIN = 0, DARKTRT_DISTANCE = 1 };

typedef struct {
    int32_t kind;    // DARKTRT_DISTANCE: greedynms with exponent 0.6, diounms with exponent beta
    float exponent;  // of the distance term
    int32_t max_candidates, max_detections;
} DarktrtNms;

// heads[i] is (batch, anchors * (5 + classes), rows, columns), 9 + classes for DARKTRT_GAUSSIAN_YOLO, float or half by `type`,
// linear. boxes (batch, A, 4), scores (batch, A, classes), float: see YoloDecode in plugins/ops.py.
int darktrt_decode(const DarktrtYolo* yolo, int32_t type, const void* const* heads, float* boxes, float* scores, void* stream);

// Bytes of device memory that darktrt_detect needs at `workspace`, 256-byte aligned.
size_t darktrt_detect_workspace(const DarktrtYolo* yolo, const DarktrtNms* nms);

// Decode and NMS in one: see YoloDetect in plugins/ops.py. The thresholds are one float each, image_size (batch, 2) or null,
// all in device memory. count (batch), boxes (batch, max_detections, 4), scores and classes (batch, max_detections).
int darktrt_detect(const DarktrtYolo* yolo, const DarktrtNms* nms, int32_t type, const void* const* heads,
                   const float* score_threshold, const float* iou_threshold, const float* image_size, int32_t* count,
                   float* boxes, float* scores, int32_t* classes, void* workspace, void* stream);

// The input of a network: its size, 1 channel (gray) or 3 (RGB), and whether images are letterboxed in it or stretched to it.
typedef struct {
    int32_t width, height, channels, letterbox;
} DarktrtFit;

// An RGB image: (height, width, 3), levels 0 to 255.
typedef struct {
    const void* pixels;
    int32_t width, height;
} DarktrtImage;

// Fit images of any sizes into a network's input, as preprocess in vision/images.py does. `images` is in host memory and read
// before the function returns; their pixels are DARKTRT_UINT8, DARKTRT_HALF or DARKTRT_FLOAT, all of one type. y is
// (count, channels, height, width) in 0..1 for DARKTRT_FLOAT and DARKTRT_HALF, (count, height, width, channels) in levels,
// rounded to nearest even, for DARKTRT_UINT8.
int darktrt_fit(DarktrtFit fit, int32_t count, const DarktrtImage* images, int32_t pixel_type, void* y, int32_t y_type,
                void* stream);

// The same for `count` images of one size, the first of which is `image` and the others lie behind it. Also image_size (count,
// 2) and placement (3, 4), in device memory: see Preprocess in plugins/ops.py.
int darktrt_preprocess(DarktrtFit fit, int32_t count, DarktrtImage image, int32_t pixel_type, void* y, int32_t y_type,
                       float* image_size, float* placement, void* stream);

// Boxes (count, 4) in pixels of the network's input to pixels of the image: see PlaceBoxes in plugins/ops.py.
int darktrt_place_boxes(int64_t count, const float* boxes, const float* placement, float* y, void* stream);

// Bytes from ordinary host memory by way of pinned host memory to the GPU.
typedef struct {
    const void* from;
    void *pinned, *to;
    int64_t bytes;
} DarktrtCopy;

// Copy by several threads, the caller among them, and enqueue the way from the pinned memory on. Returns when the pinned memory
// is full, so that `from` may change then. Not for CUDA graphs.
int darktrt_upload(int32_t count, const DarktrtCopy* copies, int32_t threads, void* stream);

#ifdef __cplusplus
}
#endif

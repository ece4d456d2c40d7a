// The custom ops for TensorRT: fields, shapes, types and formats, and the kernels that compute them. The adapters around them
// are templates, one for each plugin interface of TensorRT. plugins/ops.py defines the ops.
//
// An op has
//   name, outputs_count, inputs()   its name and how many tensors it has
//   fields(self, visit)             its fields
//   check()                         throws std::invalid_argument for values that make no sense
//   check_shapes(dims)              the same for shapes of its inputs, where -1 is not known yet
//   output_type, output_shape       of its outputs
//   supports(pos, tensors)          whether the tensor at pos may have its type and format, with those before it as they are
//   workspace(dims)                 bytes, for inputs of these shapes
//   enqueue                         0, or an error of kernels.h
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels.h"
#include "../nms.h"

namespace darktrt {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::IDimensionExpr;
using nvinfer1::IExprBuilder;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

// All ops, and their version; the creators and the library's description of itself are made from this list.
#define DARKTRT_PLUGIN_VERSION "1"
#define DARKTRT_PLUGINS(X)                                                                                      \
    X(MishPlugin) X(MishAddPlugin) X(MishConcatPlugin) X(YoloDecodePlugin) X(YoloDetectPlugin)                  \
    X(PreprocessPlugin) X(PlaceBoxesPlugin)

inline void require(bool holds, const std::string& problem)
{
    if (!holds) {
        throw std::invalid_argument(problem);
    }
}

// TensorRT 11 has no scales of INT8 tensors, only Q/DQ nodes; HWC16 supports INT8 from TensorRT 10 on.
constexpr bool has_scales = NV_TENSORRT_MAJOR < 11;
constexpr bool has_int8_hwc16 = has_scales && NV_TENSORRT_MAJOR >= 10;

struct FormatSupport {
    TensorFormat format;
    int32_t vector_width;
    bool channels_last, allows_float, allows_half, allows_int8;

    bool allows(DataType type) const
    {
        return type == DataType::kFLOAT  ? allows_float
               : type == DataType::kHALF ? allows_half
                                         : type == DataType::kINT8 && allows_int8;
    }
};

constexpr FormatSupport format_support[] = {
    {TensorFormat::kLINEAR, 1, false, true, true, has_scales}, {TensorFormat::kCHW4, 4, false, false, false, has_scales},
    {TensorFormat::kHWC8, 8, true, false, true, false},        {TensorFormat::kCHW16, 16, false, false, true, false},
    {TensorFormat::kCHW32, 32, false, true, true, has_scales}, {TensorFormat::kHWC16, 16, true, false, true, has_int8_hwc16},
};

inline const FormatSupport* support_of(TensorFormat format)
{
    for (const auto& support : format_support) {
        if (support.format == format) {
            return &support;
        }
    }
    return nullptr;
}

inline DarktrtFormat format_of(const PluginTensorDesc& tensor)
{
    const FormatSupport* support = support_of(tensor.format);
    require(support && support->allows(tensor.type), "a tensor has a format that the plugin never offered");
    const bool int8 = tensor.type == DataType::kINT8;
    require(!int8 || tensor.scale > 0, "an INT8 tensor has no scale; give its network a calibration cache");
    const int32_t type = int8 ? DARKTRT_INT8 : tensor.type == DataType::kHALF ? DARKTRT_HALF : DARKTRT_FLOAT;
    return {type, support->vector_width, support->channels_last, tensor.scale};
}

inline DarktrtShape shape_of(const Dims& dims)
{
    const auto size = [&](int32_t axis) { return axis < dims.nbDims ? static_cast<int32_t>(dims.d[axis]) : 1; };
    int64_t pixels = 1;
    for (int32_t axis = 2; axis < dims.nbDims; ++axis) {
        pixels *= dims.d[axis];
    }
    return {size(0), size(1), pixels};
}

// The common part of the Mish ops. All tensors have one format and one type, but the output may be INT8 after FP16.
template <int32_t Inputs> struct MishOp {
    static constexpr int32_t outputs_count = 1;

    template <typename Self, typename Visit> static void fields(Self&, Visit&&) {}
    void check() const {}
    void check_shapes(const Dims*) const {}
    int32_t inputs() const { return Inputs; }
    DataType output_type(int32_t, const DataType* inputs) const { return inputs[0]; }
    DimsExprs output_shape(int32_t, const DimsExprs* inputs, IExprBuilder&) const { return inputs[0]; }
    size_t workspace(const Dims*) const { return 0; }

    bool supports(int32_t pos, const PluginTensorDesc* tensors) const
    {
        const PluginTensorDesc &tensor = tensors[pos], &first = tensors[0];
        const FormatSupport* support = support_of(tensor.format);
        if (!support || !support->allows(tensor.type) || (support->vector_width > 1 && tensor.dims.nbDims != 4)) {
            return false;
        }
        const bool quantizes = pos == Inputs && first.type == DataType::kHALF && tensor.type == DataType::kINT8;
        return tensor.format == first.format && (tensor.type == first.type || quantizes);
    }
};

struct MishPlugin : MishOp<1> {
    static constexpr const char* name = "MishPlugin";

    int enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs, void* const* outputs, void*,
                void* stream) const
    {
        return darktrt_mish(shape_of(in[0].dims), inputs[0], format_of(in[0]), outputs[0], format_of(out[0]), stream);
    }
};

struct MishAddPlugin : MishOp<2> {
    static constexpr const char* name = "MishAddPlugin";

    int enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs, void* const* outputs, void*,
                void* stream) const
    {
        return darktrt_mish_add(shape_of(in[0].dims), inputs[0], format_of(in[0]), inputs[1], format_of(in[1]), outputs[0],
                                format_of(out[0]), stream);
    }
};

struct MishConcatPlugin : MishOp<2> {
    static constexpr const char* name = "MishConcatPlugin";

    void check_shapes(const Dims* inputs) const
    {
        require(inputs[0].nbDims >= 2 && inputs[0].nbDims == inputs[1].nbDims, "its inputs must have channels, and one rank");
    }

    DimsExprs output_shape(int32_t, const DimsExprs* inputs, IExprBuilder& builder) const
    {
        DimsExprs shape = inputs[0];
        shape.d[1] = builder.operation(DimensionOperation::kSUM, *inputs[0].d[1], *inputs[1].d[1]);
        return shape;
    }

    // The channels of each input must be a multiple of the vector width, or the second input would begin inside a vector.
    bool supports(int32_t pos, const PluginTensorDesc* tensors) const
    {
        const PluginTensorDesc& tensor = tensors[pos];
        if (!MishOp::supports(pos, tensors)) {
            return false;
        }
        const int32_t vector_width = support_of(tensor.format)->vector_width;
        return vector_width == 1 || pos == inputs() || (tensor.dims.d[1] > 0 && tensor.dims.d[1] % vector_width == 0);
    }

    int enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs, void* const* outputs, void*,
                void* stream) const
    {
        return darktrt_mish_concat(shape_of(in[0].dims), inputs[0], format_of(in[0]), inputs[1], format_of(in[1]),
                                   shape_of(in[1].dims).channels, outputs[0], format_of(out[0]), stream);
    }
};

struct YoloDecodePlugin {
    static constexpr const char* name = "YoloDecodePlugin";
    static constexpr int32_t outputs_count = 2;

    std::vector<float> anchors, scale_x_y;
    std::vector<int32_t> anchors_per_head, new_coords, head_kinds, input_size;
    int32_t classes{};

    template <typename Self, typename Visit> static void fields(Self& self, Visit&& visit)
    {
        visit("anchors", self.anchors);
        visit("anchors_per_head", self.anchors_per_head);
        visit("scale_x_y", self.scale_x_y);
        visit("new_coords", self.new_coords);
        visit("head_kinds", self.head_kinds);
        visit("classes", self.classes);
        visit("input_size", self.input_size);
    }

    int32_t heads() const { return static_cast<int32_t>(anchors_per_head.size()); }
    int32_t inputs() const { return heads(); }

    void check() const
    {
        const auto within = [](const auto& values, auto low, auto high) {
            return std::all_of(values.begin(), values.end(), [&](auto value) { return value >= low && value <= high; });
        };
        const auto positive = [](const auto& values) {
            return std::all_of(values.begin(), values.end(), [](auto value) { return value > 0 && std::isfinite(value); });
        };
        const size_t count = anchors_per_head.size();
        require(count >= 1 && count <= DARKTRT_MAX_HEADS, "anchors_per_head must name 1 to 5 heads");
        require(within(anchors_per_head, 1, DARKTRT_MAX_ANCHORS), "anchors_per_head must be 1 to 32");
        const size_t numbers = 2 * std::accumulate(anchors_per_head.begin(), anchors_per_head.end(), size_t{0});
        require(anchors.size() == numbers, "anchors has " + std::to_string(anchors.size()) +
                                               " numbers, anchors_per_head asks for " + std::to_string(numbers));
        require(positive(anchors), "anchors must be positive");
        require(scale_x_y.size() == count && positive(scale_x_y), "scale_x_y must be a positive number a head");
        require(new_coords.size() == count && within(new_coords, 0, 1), "new_coords must be 0 or 1 a head");
        const bool known = within(head_kinds, DARKTRT_YOLO, DARKTRT_GAUSSIAN_YOLO);
        require(head_kinds.size() == count && known, "head_kinds must be 0 to 2 a head");
        for (size_t i = 0; i < count; ++i) {
            require(head_kinds[i] == DARKTRT_YOLO || !new_coords[i], "new_coords must be 0 for a head that is no [yolo]");
        }
        require(classes > 0, "classes must be positive");
        require(input_size.size() == 2 && positive(input_size), "input_size must be width and height");
    }

    void check_shapes(const Dims* dims) const
    {
        for (int32_t i = 0; i < heads(); ++i) {
            const int64_t own = head_kinds[i] == DARKTRT_GAUSSIAN_YOLO ? 9 : 5, asked = anchors_per_head[i] * (own + classes);
            const int64_t found = dims[i].nbDims == 4 ? dims[i].d[1] : 0;
            require(found == asked || found == -1, "input " + std::to_string(i) + " must be (N, " + std::to_string(asked) +
                                                       ", rows, columns): " + std::to_string(anchors_per_head[i]) +
                                                       " anchors of " + std::to_string(own) + " + " + std::to_string(classes) +
                                                       " channels");
        }
    }

    DataType output_type(int32_t, const DataType*) const { return DataType::kFLOAT; }

    DimsExprs output_shape(int32_t index, const DimsExprs* inputs, IExprBuilder& builder) const
    {
        const IDimensionExpr* total = builder.constant(0);
        for (int32_t i = 0; i < heads(); ++i) {
            const auto* cells = builder.operation(DimensionOperation::kPROD, *inputs[i].d[2], *inputs[i].d[3]);
            const auto* here = builder.operation(DimensionOperation::kPROD, *builder.constant(anchors_per_head[i]), *cells);
            total = builder.operation(DimensionOperation::kSUM, *total, *here);
        }
        return {3, {inputs[0].d[0], total, builder.constant(index == 0 ? 4 : classes)}};
    }

    // Heads are FP32 or FP16, all alike; everything else has one type.
    bool supports(int32_t pos, const PluginTensorDesc* tensors) const { return supports(pos, tensors, DataType::kFLOAT); }

    size_t workspace(const Dims*) const { return 0; }

    int enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs, void*,
                void* stream) const
    {
        const DarktrtYolo yolo = geometry([&](int32_t i) { return in[i].dims; });
        return darktrt_decode(&yolo, format_of(in[0]).type, inputs, static_cast<float*>(outputs[0]),
                              static_cast<float*>(outputs[1]), stream);
    }

protected:
    bool supports(int32_t pos, const PluginTensorDesc* tensors, DataType other) const
    {
        const PluginTensorDesc &tensor = tensors[pos], &first = tensors[0];
        const bool floating = first.type == DataType::kFLOAT || first.type == DataType::kHALF;
        return tensor.format == TensorFormat::kLINEAR &&
               (pos < heads() ? floating && tensor.type == first.type : tensor.type == other);
    }

    template <typename DimsOf> DarktrtYolo geometry(DimsOf dims_of) const
    {
        DarktrtYolo yolo{static_cast<int32_t>(dims_of(0).d[0]), heads(), classes, input_size[0], input_size[1], {}};
        const auto* sizes = anchors.data();
        for (int32_t i = 0; i < heads(); ++i) {
            DarktrtHead& head = yolo.head[i];
            const Dims dims = dims_of(i);
            head.anchors = anchors_per_head[i];
            head.rows = static_cast<int32_t>(dims.d[2]);
            head.columns = static_cast<int32_t>(dims.d[3]);
            head.new_coords = new_coords[i];
            head.kind = head_kinds[i];
            head.scale_x_y = scale_x_y[i];
            std::copy_n(sizes, 2 * head.anchors, head.anchor_sizes);
            sizes += 2 * head.anchors;
        }
        return yolo;
    }
};

struct YoloDetectPlugin : YoloDecodePlugin {
    static constexpr const char* name = "YoloDetectPlugin";
    static constexpr int32_t outputs_count = 4;

    std::string kind;
    float beta{};
    int32_t max_candidates{}, max_detections{}, letterbox{};

    template <typename Self, typename Visit> static void fields(Self& self, Visit&& visit)
    {
        YoloDecodePlugin::fields(self, visit);
        visit("kind", self.kind);
        visit("beta", self.beta);
        visit("max_candidates", self.max_candidates);
        visit("max_detections", self.max_detections);
        visit("letterbox", self.letterbox);
    }

    int32_t inputs() const { return heads() + 2 + letterbox; }

    void check() const
    {
        YoloDecodePlugin::check();
        const bool plain = kind == "plain";
        require(plain || kind == "greedynms" || kind == "diounms", "kind '" + kind + "' is not plain, greedynms or diounms");
        require(beta > 0 && std::isfinite(beta), "beta must be positive");
        require(max_candidates > 0 && max_candidates <= max_candidates_limit, "max_candidates must be 1 to 3840");
        require(max_detections > 0 && max_detections <= max_candidates, "max_detections must be 1 to max_candidates");
        require(letterbox == 0 || (letterbox == 1 && !plain), "letterbox must be 0, or 1 for greedynms and diounms");
    }

    DataType output_type(int32_t index, const DataType*) const
    {
        return index == 0 || index == 3 ? DataType::kINT32 : DataType::kFLOAT;
    }

    DimsExprs output_shape(int32_t index, const DimsExprs* inputs, IExprBuilder& builder) const
    {
        const auto* rows = builder.constant(index == 0 ? 1 : max_detections);
        return {index == 1 ? 3 : 2, {inputs[0].d[0], rows, builder.constant(4)}};
    }

    bool supports(int32_t pos, const PluginTensorDesc* tensors) const
    {
        const int32_t index = pos - inputs();
        return YoloDecodePlugin::supports(pos, tensors, index < 0 ? DataType::kFLOAT : output_type(index, nullptr));
    }

    size_t workspace(const Dims* dims) const
    {
        const DarktrtYolo yolo = geometry([&](int32_t i) { return dims[i]; });
        const DarktrtNms nms = suppression();
        return darktrt_detect_workspace(&yolo, &nms);
    }

    int enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                void* workspace, void* stream) const
    {
        const DarktrtYolo yolo = geometry([&](int32_t i) { return in[i].dims; });
        const DarktrtNms nms = suppression();
        const auto* const* numbers = reinterpret_cast<const float* const*>(inputs + heads());
        return darktrt_detect(&yolo, &nms, format_of(in[0]).type, inputs, numbers[0], numbers[1],
                              letterbox ? numbers[2] : nullptr, static_cast<int32_t*>(outputs[0]),
                              static_cast<float*>(outputs[1]), static_cast<float*>(outputs[2]),
                              static_cast<int32_t*>(outputs[3]), workspace, stream);
    }

private:
    DarktrtNms suppression() const
    {
        return {kind == "plain" ? DARKTRT_PLAIN : DARKTRT_DISTANCE, kind == "greedynms" ? 0.6F : beta, max_candidates,
                max_detections};
    }
};

struct PreprocessPlugin {
    static constexpr const char* name = "PreprocessPlugin";
    static constexpr int32_t outputs_count = 3;

    std::vector<int32_t> input_size;
    int32_t channels{}, letterbox{};

    template <typename Self, typename Visit> static void fields(Self& self, Visit&& visit)
    {
        visit("input_size", self.input_size);
        visit("channels", self.channels);
        visit("letterbox", self.letterbox);
    }

    int32_t inputs() const { return 1; }

    void check() const
    {
        require(input_size.size() == 2 && input_size[0] > 0 && input_size[1] > 0, "input_size must be width and height");
        require(channels == 1 || channels == 3, "channels must be 1 or 3");
        require(letterbox == 0 || letterbox == 1, "letterbox must be 0 or 1");
    }

    void check_shapes(const Dims* inputs) const
    {
        require(inputs[0].nbDims == 4 && (inputs[0].d[3] == 3 || inputs[0].d[3] == -1), "images must be (N, height, width, 3)");
    }

    DataType output_type(int32_t, const DataType*) const { return DataType::kFLOAT; }

    DimsExprs output_shape(int32_t index, const DimsExprs* inputs, IExprBuilder& builder) const
    {
        const IDimensionExpr* const batch = inputs[0].d[0];
        const auto size = [&](int32_t value) { return builder.constant(value); };
        switch (index) {
            case 0: return {4, {batch, size(channels), size(input_size[1]), size(input_size[0])}};
            case 1: return {2, {batch, size(2)}};
            default: return {2, {size(3), size(4)}};
        }
    }

    // The images and the pixels are FP32 or FP16, each by itself; the other outputs are FP32.
    bool supports(int32_t pos, const PluginTensorDesc* tensors) const
    {
        const PluginTensorDesc& tensor = tensors[pos];
        const bool may_be_half = pos < 2 && tensor.type == DataType::kHALF;
        return tensor.format == TensorFormat::kLINEAR && (tensor.type == DataType::kFLOAT || may_be_half);
    }

    size_t workspace(const Dims*) const { return 0; }

    int enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs, void* const* outputs, void*,
                void* stream) const
    {
        const auto size = [&](int32_t axis) { return static_cast<int32_t>(in[0].dims.d[axis]); };
        const DarktrtFit fit{input_size[0], input_size[1], channels, letterbox};
        return darktrt_preprocess(fit, size(0), {inputs[0], size(2), size(1)}, format_of(in[0]).type, outputs[0],
                                  format_of(out[0]).type, static_cast<float*>(outputs[1]), static_cast<float*>(outputs[2]),
                                  stream);
    }
};

// A plugin so that it stays FP32 in every engine: half cannot hold places in a large image.
struct PlaceBoxesPlugin {
    static constexpr const char* name = "PlaceBoxesPlugin";
    static constexpr int32_t outputs_count = 1;

    template <typename Self, typename Visit> static void fields(Self&, Visit&&) {}
    int32_t inputs() const { return 2; }
    void check() const {}

    void check_shapes(const Dims* inputs) const
    {
        const auto fits = [](int64_t size, int64_t asked) { return size == asked || size == -1; };
        require(inputs[0].nbDims == 3 && fits(inputs[0].d[2], 4), "boxes must be (N, boxes, 4)");
        require(inputs[1].nbDims == 2 && fits(inputs[1].d[0], 3) && fits(inputs[1].d[1], 4), "placement must be (3, 4)");
    }

    DataType output_type(int32_t, const DataType*) const { return DataType::kFLOAT; }
    DimsExprs output_shape(int32_t, const DimsExprs* inputs, IExprBuilder&) const { return inputs[0]; }
    size_t workspace(const Dims*) const { return 0; }

    bool supports(int32_t pos, const PluginTensorDesc* tensors) const
    {
        return tensors[pos].format == TensorFormat::kLINEAR && tensors[pos].type == DataType::kFLOAT;
    }

    int enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs, void*,
                void* stream) const
    {
        const int64_t count = int64_t{1} * in[0].dims.d[0] * in[0].dims.d[1];
        return darktrt_place_boxes(count, static_cast<const float*>(inputs[0]), static_cast<const float*>(inputs[1]),
                                   static_cast<float*>(outputs[0]), stream);
    }
};

}  // namespace darktrt

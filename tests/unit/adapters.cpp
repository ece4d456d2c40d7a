// Drives the plugins as TensorRT would, without it: prints what they accept and which kernels they call with what.
// Linked with plugins/csrc/trt/library.cpp; the kernels here only report their arguments.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <deque>
#include <limits>
#include <string>
#include <vector>

#include "../../plugins/csrc/kernels.h"

using namespace nvinfer1;

// --- kernels ---

static std::string text(DarktrtFormat f)
{
    char line[64];
    std::snprintf(line, sizeof line, " %d/%d/%d", f.type, f.vector_width, f.channels_last);
    const std::string scale = " x " + std::to_string(f.scale).substr(0, 4);
    return line + (f.type == DARKTRT_INT8 ? scale : "");
}

static int report(const char* name, DarktrtShape s, const std::string& rest)
{
    std::printf("%s (%d %d %d)%s\n", name, s.batch, s.channels, static_cast<int>(s.pixels), rest.c_str());
    return s.batch == 9 ? 2 : s.batch == 8 ? DARKTRT_UNSUPPORTED : 0;
}

static void report_yolo(const DarktrtYolo* yolo)
{
    std::printf("yolo %d %d %d %dx%d:", yolo->batch, yolo->heads, yolo->classes, yolo->width, yolo->height);
    for (int i = 0; i < yolo->heads; ++i) {
        const DarktrtHead& head = yolo->head[i];
        std::printf(" [%d: %d %dx%d %d %.2f", head.kind, head.anchors, head.rows, head.columns, head.new_coords, head.scale_x_y);
        for (int j = 0; j < 2 * head.anchors; ++j) {
            std::printf(" %g", head.anchor_sizes[j]);
        }
        std::printf("]");
    }
    std::printf("\n");
}

extern "C" {
int darktrt_mish(DarktrtShape shape, const void*, DarktrtFormat x, void*, DarktrtFormat y, void*)
{
    return report("mish", shape, text(x) + text(y));
}
int darktrt_mish_add(DarktrtShape shape, const void*, DarktrtFormat x, const void*, DarktrtFormat residual, void*,
                     DarktrtFormat y, void*)
{
    return report("mish_add", shape, text(x) + text(residual) + text(y));
}
int darktrt_mish_concat(DarktrtShape shape, const void*, DarktrtFormat x, const void*, DarktrtFormat second, int32_t channels,
                        void*, DarktrtFormat y, void*)
{
    return report("mish_concat", shape, text(x) + text(second) + " " + std::to_string(channels) + text(y));
}
int darktrt_decode(const DarktrtYolo* yolo, int32_t type, const void* const*, float*, float*, void*)
{
    std::printf("decode %d ", type);
    report_yolo(yolo);
    return 0;
}
size_t darktrt_detect_workspace(const DarktrtYolo* yolo, const DarktrtNms* nms)
{
    std::printf("workspace %d ", nms->max_candidates);
    report_yolo(yolo);
    return 1000 * yolo->batch;
}
int darktrt_detect(const DarktrtYolo* yolo, const DarktrtNms* nms, int32_t type, const void* const*, const float* score,
                   const float* iou, const float* image_size, int32_t*, float*, float*, int32_t*, void*, void*)
{
    std::printf("detect %d nms %d %.1f %d %d, inputs %d %d %d ", type, nms->kind, nms->exponent, nms->max_candidates,
                nms->max_detections, *reinterpret_cast<const int*>(score), *reinterpret_cast<const int*>(iou),
                image_size ? *reinterpret_cast<const int*>(image_size) : -1);
    report_yolo(yolo);
    return 0;
}
int darktrt_preprocess(DarktrtFit fit, int32_t count, DarktrtImage image, int32_t pixel_type, void* y, int32_t y_type,
                       float* image_size, float* placement, void*)
{
    const auto number = [](const void* place) { return *static_cast<const int*>(place); };
    std::printf("preprocess %d images of %dx%d, type %d, into %dx%d, %d channels, letterbox %d, type %d: %d > %d %d %d\n", count,
                image.width, image.height, pixel_type, fit.width, fit.height, fit.channels, fit.letterbox, y_type,
                number(image.pixels), number(y), number(image_size), number(placement));
    return 0;
}
int darktrt_place_boxes(int64_t count, const float* boxes, const float* placement, float* y, void*)
{
    const auto number = [](const float* place) { return *reinterpret_cast<const int*>(place); };
    std::printf("place_boxes %d: %d %d > %d\n", static_cast<int>(count), number(boxes), number(placement), number(y));
    return 0;
}
__attribute__((visibility("default"))) int darktrt_fit(DarktrtFit, int32_t, const DarktrtImage*, int32_t, void*, int32_t, void*)
{
    return 0;
}
const char* cudaGetErrorString(cudaError_t)
{
    return "out of memory";
}
}

// --- shapes, as text ---

#if NV_TENSORRT_MAJOR >= 10
using Number = int64_t;
#else
using Number = int32_t;
#endif

// A size: a number, or the name of one that is not known yet.
class Size : public IDimensionExpr {
public:
    explicit Size(const std::string& text) : text{text}
    {
        implementation_.known = text.find_first_not_of("0123456789") == std::string::npos;
        implementation_.value = implementation_.known ? std::stoi(text) : 0;
        mImpl = &implementation_;
    }
    const std::string text;

private:
    struct Implementation : apiv::VDimensionExpr {
        bool known;
        Number value;

        bool isConstant() const override { return known; }
        Number getConstantValue() const override { return value; }
#if NV_TENSORRT_MAJOR >= 10
        bool isSizeTensor() const override { return false; }
#endif
    } implementation_;
};

// Writes down what is computed of sizes.
class Sizes : public IExprBuilder {
public:
    Sizes() { mImpl = &implementation_; }

    const IDimensionExpr* of(const std::string& text) { return implementation_.made(text); }

private:
    struct Implementation : apiv::VExprBuilder {
        std::deque<Size> sizes;

        const IDimensionExpr* made(const std::string& text) { return &sizes.emplace_back(text); }
        const IDimensionExpr* constant(Number value) override { return made(std::to_string(value)); }
        const IDimensionExpr* operation(DimensionOperation kind, const IDimensionExpr& x, const IDimensionExpr& y) override
        {
            const char* const name = kind == DimensionOperation::kSUM ? "+" : kind == DimensionOperation::kPROD ? "*" : "?";
            return made("(" + static_cast<const Size&>(x).text + name + static_cast<const Size&>(y).text + ")");
        }
#if NV_TENSORRT_MAJOR >= 10
        const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override
        {
            return nullptr;
        }
#endif
    } implementation_;
};

// --- the two interfaces ---

#if NV_TENSORRT_MAJOR >= 10
using Creators = IPluginCreatorInterface* const*;
extern "C" Creators getCreators(int32_t& count);

struct Made {
    IPluginV3* plugin;

    template <typename Interface> Interface* as(PluginCapabilityType type) const
    {
        return static_cast<Interface*>(plugin->getCapabilityInterface(type));
    }
    IPluginV3OneBuild* build() const { return as<IPluginV3OneBuild>(PluginCapabilityType::kBUILD); }
    IPluginV3OneRuntime* runtime() const { return as<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME); }

    int outputs() const { return build()->getNbOutputs(); }
    bool supports(int pos, const std::vector<PluginTensorDesc>& tensors, int inputs) const
    {
        std::vector<DynamicPluginTensorDesc> dynamic;
        for (const auto& tensor : tensors) {
            dynamic.push_back({tensor, tensor.dims, tensor.dims, tensor.dims});
        }
        return build()->supportsFormatCombination(pos, dynamic.data(), inputs, outputs());
    }
    std::vector<DataType> types(const std::vector<DataType>& in) const
    {
        std::vector<DataType> out(outputs());
        build()->getOutputDataTypes(out.data(), outputs(), in.data(), static_cast<int32_t>(in.size()));
        return out;
    }
    std::vector<DimsExprs> shapes(const std::vector<DimsExprs>& in, Sizes& sizes) const
    {
        std::vector<DimsExprs> out(outputs());
        const auto inputs = static_cast<int32_t>(in.size());
        const int32_t status = build()->getOutputShapes(in.data(), inputs, nullptr, 0, out.data(), outputs(), sizes);
        return status == 0 ? out : std::vector<DimsExprs>(outputs(), DimsExprs{-1, {}});
    }
    size_t workspace(const std::vector<PluginTensorDesc>& tensors, int inputs) const
    {
        std::vector<DynamicPluginTensorDesc> dynamic;
        for (const auto& tensor : tensors) {
            dynamic.push_back({{}, {}, tensor.dims, {}});
        }
        return build()->getWorkspaceSize(dynamic.data(), inputs, nullptr, outputs());
    }
    int enqueue(const std::vector<PluginTensorDesc>& tensors, int inputs, const void* const* from, const void* const* to) const
    {
        auto* const out = const_cast<void* const*>(to);
        return runtime()->enqueue(tensors.data(), tensors.data() + inputs, from, out, nullptr, nullptr);
    }
    void destroy() const { delete plugin; }
};

static Made created(IPluginCreatorInterface* creator, const PluginFieldCollection& fields)
{
    return {static_cast<IPluginCreatorV3One*>(creator)->createPlugin("node", &fields, TensorRTPhase::kBUILD)};
}

// A clone of what a plan would return.
static Made reread(IPluginCreatorInterface* creator, const Made& made)
{
    const Made again = created(creator, *made.runtime()->getFieldsToSerialize());
    const Made clone{again.runtime()->attachToContext(nullptr)};
    again.destroy();
    return clone;
}

static const char* nameOf(IPluginCreatorInterface* creator)
{
    return static_cast<IPluginCreatorV3One*>(creator)->getPluginName();
}
static Creators creators(int32_t& count)
{
    return getCreators(count);
}
#else
using Creators = IPluginCreator* const*;
extern "C" Creators getPluginCreators(int32_t& count);

struct Made {
    IPluginV2DynamicExt* plugin;

    int outputs() const { return plugin->getNbOutputs(); }
    bool supports(int pos, const std::vector<PluginTensorDesc>& tensors, int inputs) const
    {
        return plugin->supportsFormatCombination(pos, tensors.data(), inputs, outputs());
    }
    std::vector<DataType> types(const std::vector<DataType>& in) const
    {
        std::vector<DataType> out;
        for (int i = 0; i < outputs(); ++i) {
            out.push_back(plugin->getOutputDataType(i, in.data(), static_cast<int32_t>(in.size())));
        }
        return out;
    }
    std::vector<DimsExprs> shapes(const std::vector<DimsExprs>& in, Sizes& sizes) const
    {
        std::vector<DimsExprs> out;
        for (int i = 0; i < outputs(); ++i) {
            out.push_back(plugin->getOutputDimensions(i, in.data(), static_cast<int32_t>(in.size()), sizes));
        }
        return out;
    }
    size_t workspace(const std::vector<PluginTensorDesc>& tensors, int inputs) const
    {
        return plugin->getWorkspaceSize(tensors.data(), inputs, nullptr, outputs());
    }
    int enqueue(const std::vector<PluginTensorDesc>& tensors, int inputs, const void* const* from, const void* const* to) const
    {
        auto* const out = const_cast<void* const*>(to);
        return plugin->enqueue(tensors.data(), tensors.data() + inputs, from, out, nullptr, nullptr);
    }
    void destroy() const { plugin->destroy(); }
};

static Made created(IPluginCreator* creator, const PluginFieldCollection& fields)
{
    return {static_cast<IPluginV2DynamicExt*>(creator->createPlugin("node", &fields))};
}

static Made reread(IPluginCreator* creator, const Made& made)
{
    std::vector<char> bytes(made.plugin->getSerializationSize());
    made.plugin->serialize(bytes.data());
    auto* again = static_cast<IPluginV2DynamicExt*>(creator->deserializePlugin("node", bytes.data(), bytes.size()));
    const Made clone{again->clone()};
    again->destroy();
    return clone;
}

static const char* nameOf(IPluginCreator* creator)
{
    return creator->getPluginName();
}
static Creators creators(int32_t& count)
{
    return getPluginCreators(count);
}
#endif

// --- what is tried ---

static const char* const kTypes[] = {"FLOAT", "HALF", "INT8", "INT32"};
static const char* const kFormats[] = {"LINEAR", "CHW2", "HWC8",       "CHW4",     "CHW16", "CHW32", "DHWC8",
                                       "CDHW32", "HWC",  "DLA_LINEAR", "DLA_HWC4", "HWC16", "DHWC"};

static const float kAnchors[] = {1, 2, 3, 4, 5, 6, 7, 8}, kScales[] = {1.05F, 1}, kBeta = 0.7F;
static const int32_t kPerHead[] = {3, 1}, kNewCoords[] = {0, 1}, kKinds[] = {1, 0}, kClasses = 3, kSize[] = {96, 64}, kCandidates = 100,
                     kDetections = 30, kLetterbox = 1, kChannels = 3;

static std::vector<PluginField> fields()
{
    using Type = PluginFieldType;
    return {{"plugin_version", "1", Type::kCHAR, 2},
            {"anchors", kAnchors, Type::kFLOAT32, 8},
            {"anchors_per_head", kPerHead, Type::kINT32, 2},
            {"scale_x_y", kScales, Type::kFLOAT32, 2},
            {"new_coords", kNewCoords, Type::kINT32, 2},
            {"head_kinds", kKinds, Type::kINT32, 2},
            {"classes", &kClasses, Type::kINT32, 1},
            {"input_size", kSize, Type::kINT32, 2},
            {"kind", "diounms", Type::kCHAR, 8},
            {"beta", &kBeta, Type::kFLOAT32, 1},
            {"max_candidates", &kCandidates, Type::kINT32, 1},
            {"max_detections", &kDetections, Type::kINT32, 1},
            {"letterbox", &kLetterbox, Type::kINT32, 1},
            {"channels", &kChannels, Type::kINT32, 1}};
}

static PluginTensorDesc tensor(DataType type, TensorFormat format, int batch, int channels)
{
    Dims dims{};
    dims.nbDims = 4;
    dims.d[0] = batch;
    dims.d[1] = channels;
    dims.d[2] = 5;
    dims.d[3] = 6;
    return {dims, type, format, 0.25F};
}

// Tensors of a Mish op: all inputs alike.
static std::vector<PluginTensorDesc> alike(int inputs, DataType taken, DataType given, TensorFormat format, int batch,
                                           int channels)
{
    std::vector<PluginTensorDesc> tensors(inputs, tensor(taken, format, batch, channels));
    tensors.push_back(tensor(given, format, batch, channels));
    return tensors;
}

static bool supported(const Made& made, const std::vector<PluginTensorDesc>& tensors, int inputs)
{
    for (int pos = 0; pos < static_cast<int>(tensors.size()); ++pos) {
        if (!made.supports(pos, tensors, inputs)) {
            return false;
        }
    }
    return true;
}

static void tryMish(const Made& made, int inputs, int channels)
{
    const std::vector<int> memory(inputs + 1);
    const void* const pointers[] = {memory.data(), memory.data(), memory.data()};
    for (int taken = 0; taken < 4; ++taken) {
        for (int given = 0; given < 4; ++given) {
            for (int format = 0; format < 13; ++format) {
                const auto tensors = alike(inputs, DataType(taken), DataType(given), TensorFormat(format), 2, channels);
                if (supported(made, tensors, inputs)) {
                    std::printf("%s>%s %s: ", kTypes[taken], kTypes[given], kFormats[format]);
                    made.enqueue(tensors, inputs, pointers, pointers);
                }
            }
        }
    }
    for (int batch : {8, 9}) {  // the kernel fails
        const auto tensors = alike(inputs, DataType::kFLOAT, DataType::kFLOAT, TensorFormat::kLINEAR, batch, channels);
        std::printf("fails: %d\n", made.enqueue(tensors, inputs, pointers, pointers));
    }
    auto odd = alike(inputs, DataType::kFLOAT, DataType::kFLOAT, TensorFormat::kCHW32, 2, channels);
    odd.back().format = TensorFormat::kLINEAR;
    std::printf("mixed formats: %d\n", supported(made, odd, inputs));
}

static void tryHeads(const Made& made, bool detects)
{
    const int numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8};
    std::vector<const void*> pointers;
    for (const auto& number : numbers) {
        pointers.push_back(&number);
    }
    const int inputs = detects ? 5 : 2;
    const auto others = made.types(std::vector<DataType>(inputs, DataType::kFLOAT));
    for (int type = 0; type < 4; ++type) {
        const auto linear = TensorFormat::kLINEAR;
        std::vector<PluginTensorDesc> tensors{tensor(DataType(type), linear, 2, 24), tensor(DataType(type), linear, 2, 8)};
        tensors.resize(inputs, tensor(DataType::kFLOAT, linear, 2, 1));
        for (auto other : others) {
            tensors.push_back(tensor(other, linear, 2, 1));
        }
        if (supported(made, tensors, inputs)) {
            std::printf("%s: ", kTypes[type]);
            made.enqueue(tensors, inputs, pointers.data(), pointers.data());
            std::printf("bytes: %zu\n", made.workspace(tensors, inputs));
        }
        tensors[1].dims.d[1] = 9;
        if (type == 0) {
            std::printf("wrong channels: %d\n", made.enqueue(tensors, inputs, pointers.data(), pointers.data()));
        }
        tensors[1] = tensor(DataType(1 - type % 2), linear, 2, 8);
        if (supported(made, tensors, inputs)) {
            std::printf("heads of two types are taken\n");
        }
    }
    for (auto other : others) {
        std::printf("output of %s\n", kTypes[static_cast<int>(other)]);
    }
}

static PluginTensorDesc linear(DataType type, const std::vector<int>& sizes)
{
    PluginTensorDesc made{{}, type, TensorFormat::kLINEAR, 1.F};
    made.dims.nbDims = static_cast<int32_t>(sizes.size());
    for (size_t axis = 0; axis < sizes.size(); ++axis) {
        made.dims.d[axis] = sizes[axis];
    }
    return made;
}

// The tensors of an op in all types, and once with `wrong` in place of the first.
static void tryImages(const Made& made, std::vector<PluginTensorDesc> tensors, int inputs, PluginTensorDesc wrong)
{
    const int numbers[] = {0, 1, 2, 3};
    const void* const pointers[] = {&numbers[0], &numbers[1], &numbers[2], &numbers[3]};
    const void* const outputs[] = {&numbers[inputs], &numbers[inputs + 1], &numbers[3]};
    int combinations = 1;
    for (size_t i = 0; i < tensors.size(); ++i) {
        combinations *= 4;
    }
    for (int combination = 0; combination < combinations; ++combination) {
        std::string names;
        for (size_t i = 0; i < tensors.size(); ++i) {
            tensors[i].type = DataType(combination >> 2 * i & 3);
            names += std::string(" ") + kTypes[combination >> 2 * i & 3];
        }
        if (supported(made, tensors, inputs)) {
            std::printf("%s: ", names.c_str() + 1);
            made.enqueue(tensors, inputs, pointers, outputs);
        }
    }
    for (auto& tensor : tensors) {
        tensor.type = DataType::kFLOAT;
    }
    for (auto type : made.types(std::vector<DataType>(inputs, DataType::kHALF))) {
        std::printf("output of %s\n", kTypes[static_cast<int>(type)]);
    }
    auto odd = tensors;
    odd.back().format = TensorFormat::kCHW32;
    std::printf("another format: %d\n", supported(made, odd, inputs));
    tensors[0] = wrong;
    std::printf("wrong shape: %d\n", made.enqueue(tensors, inputs, pointers, outputs));
}

// The shapes of the outputs for inputs of these sizes, which are names where they are not known.
static void tryShapes(const Made& made, const std::vector<std::vector<std::string>>& inputs)
{
    Sizes sizes;
    std::vector<DimsExprs> in;
    for (const auto& input : inputs) {
        in.push_back({static_cast<int32_t>(input.size()), {}});
        for (size_t axis = 0; axis < input.size(); ++axis) {
            in.back().d[axis] = sizes.of(input[axis]);
        }
    }
    for (const auto& shape : made.shapes(in, sizes)) {
        std::printf(shape.nbDims < 0 ? "none" : "shape");
        for (int axis = 0; axis < shape.nbDims; ++axis) {
            std::printf(" %s", static_cast<const Size*>(shape.d[axis])->text.c_str());
        }
        std::printf("\n");
    }
}

static void tryShapes(const Made& made, const std::string& name)
{
    const std::vector<std::string> images{"N", "H", "W", "3"}, boxes{"N", "K", "4"}, score{"1"}, size{"1", "2"};
    if (name.find("Mish") == 0) {
        std::vector<std::vector<std::string>> inputs{{"N", "64", "H", "W"}};
        if (name != "MishPlugin") {
            inputs.push_back({"N", "C", "H", "W"});
        }
        tryShapes(made, inputs);
        if (name == "MishConcatPlugin") {
            tryShapes(made, {{"N", "8", "H"}, {"N", "8"}});
            tryShapes(made, {{"8"}, {"8"}});
        }
    } else if (name == "PlaceBoxesPlugin") {
        tryShapes(made, {boxes, {"3", "4"}});
        tryShapes(made, {{"N", "K", "5"}, {"3", "4"}});
    } else if (name == "PreprocessPlugin") {
        tryShapes(made, {images});
        tryShapes(made, {{"N", "3", "H", "5"}});
    } else {
        for (const char* channels : {"8", "C", "9"}) {
            std::vector<std::vector<std::string>> heads{{"N", "24", "5", "W"}, {"N", channels, "H", "6"}};
            if (name == "YoloDetectPlugin") {
                heads.insert(heads.end(), {score, score, size});
            }
            tryShapes(made, heads);
        }
    }
}

// One field with another value, of numbers or a text.
struct Value {
    const char* field;
    std::vector<int32_t> integers;
    std::vector<float> floats;
    std::string text;
};

static const float kInfinity = std::numeric_limits<float>::infinity();
static const std::vector<Value> kValues{
    {"anchors", {}, {1, 2, 3, 4, 5, 6, 7, 0}, ""},
    {"anchors", {}, {1, 2, 3, 4, 5, 6, 7, kInfinity}, ""},
    {"anchors", {}, {1, 2, 3, 4, 5, 6}, ""},
    {"anchors_per_head", {1, 3}, {}, ""},
    {"anchors_per_head", {3, 2}, {}, ""},
    {"anchors_per_head", {4, 0}, {}, ""},
    {"anchors_per_head", {4}, {}, ""},
    {"anchors_per_head", {}, {3, 1}, ""},
    {"scale_x_y", {}, {0, 1}, ""},
    {"scale_x_y", {}, {1, kInfinity}, ""},
    {"scale_x_y", {}, {1}, ""},
    {"new_coords", {0, 0}, {}, ""},
    {"new_coords", {0, 2}, {}, ""},
    {"new_coords", {0, -1}, {}, ""},
    {"new_coords", {1, 0}, {}, ""},
    {"new_coords", {0}, {}, ""},
    {"head_kinds", {0, 0}, {}, ""},
    {"head_kinds", {2, 0}, {}, ""},
    {"head_kinds", {3, 0}, {}, ""},
    {"head_kinds", {-1, 0}, {}, ""},
    {"head_kinds", {1, 1}, {}, ""},
    {"head_kinds", {1}, {}, ""},
    {"classes", {1}, {}, ""},
    {"classes", {0}, {}, ""},
    {"classes", {3, 3}, {}, ""},
    {"input_size", {1, 1}, {}, ""},
    {"input_size", {0, 64}, {}, ""},
    {"input_size", {96, 0}, {}, ""},
    {"input_size", {96}, {}, ""},
    {"kind", {}, {}, "greedynms"},
    {"kind", {}, {}, "plain"},
    {"kind", {}, {}, "other"},
    {"beta", {}, {0}, ""},
    {"beta", {}, {kInfinity}, ""},
    {"max_candidates", {30}, {}, ""},
    {"max_candidates", {29}, {}, ""},
    {"max_candidates", {3840}, {}, ""},
    {"max_candidates", {3841}, {}, ""},
    {"max_detections", {1}, {}, ""},
    {"max_detections", {0}, {}, ""},
    {"max_detections", {100}, {}, ""},
    {"max_detections", {101}, {}, ""},
    {"letterbox", {0}, {}, ""},
    {"letterbox", {2}, {}, ""},
    {"letterbox", {-1}, {}, ""},
    {"channels", {1}, {}, ""},
    {"channels", {2}, {}, ""},
};

template <typename Creator> static void tryValues(Creator creator)
{
    for (const auto& value : kValues) {
        auto all = fields();
        std::string line = value.field + std::string(value.text.empty() ? "" : " ") + value.text;
        for (auto& field : all) {
            if (std::string(field.name) != value.field) {
                continue;
            }
            const auto count = static_cast<int32_t>(value.integers.size() + value.floats.size() + value.text.size());
            if (!value.integers.empty()) {
                field = {value.field, value.integers.data(), PluginFieldType::kINT32, count};
            } else if (!value.floats.empty()) {
                field = {value.field, value.floats.data(), PluginFieldType::kFLOAT32, count};
            } else {
                field = {value.field, value.text.c_str(), PluginFieldType::kCHAR, count};
            }
        }
        for (const auto& number : value.integers) {
            line += " " + std::to_string(number);
        }
        for (const auto& number : value.floats) {
            line += " " + std::to_string(number).substr(0, 3);
        }
        const Made made = created(creator, {static_cast<int32_t>(all.size()), all.data()});
        std::printf("%s: %s\n", line.c_str(), made.plugin ? "made" : "nothing");
        if (made.plugin) {
            made.destroy();
        }
    }
}

int main()
{
    int32_t count = 0;
    auto* const list = creators(count);
    for (int32_t i = 0; i < count; ++i) {
        const std::string name = nameOf(list[i]);
        std::printf("= %s\n", name.c_str());
        auto all = fields();
        const Made first = created(list[i], {static_cast<int32_t>(all.size()), all.data()});
        const Made made = reread(list[i], first);
        first.destroy();
        if (name.find("Mish") == 0) {
            tryMish(made, name == "MishPlugin" ? 1 : 2, 64);
            std::printf("= %s, 40 channels\n", name.c_str());
            tryMish(made, name == "MishPlugin" ? 1 : 2, 40);
        } else if (name == "PlaceBoxesPlugin") {
            const auto boxes = linear(DataType::kFLOAT, {2, 5, 4}), placement = linear(DataType::kFLOAT, {3, 4});
            tryImages(made, {boxes, placement, boxes}, 2, linear(DataType::kFLOAT, {2, 5, 3}));
        } else {
            if (name == "PreprocessPlugin") {
                const auto images = linear(DataType::kFLOAT, {2, 48, 80, 3}), pixels = linear(DataType::kFLOAT, {2, 3, 64, 96});
                const auto sizes = linear(DataType::kFLOAT, {2, 2}), placement = linear(DataType::kFLOAT, {3, 4});
                tryImages(made, {images, pixels, sizes, placement}, 1, linear(DataType::kFLOAT, {2, 3, 48, 80}));
            } else {
                tryHeads(made, name == "YoloDetectPlugin");
            }
            for (size_t left = 1; left < all.size(); ++left) {
                auto some = all;
                some.erase(some.begin() + left);
                const Made none = created(list[i], {static_cast<int32_t>(some.size()), some.data()});
                std::printf("without %s: %s\n", all[left].name, none.plugin ? "made" : "nothing");
            }
        }
        std::printf("= shapes of %s\n", name.c_str());
        tryShapes(made, name);
        std::printf("= values of %s\n", name.c_str());
        tryValues(list[i]);
        made.destroy();
    }
}
